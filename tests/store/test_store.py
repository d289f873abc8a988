"""The store of training gradients answers as `influence` does, whatever happened to it before."""

import dataclasses
import shutil
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import DrawDesign, Store, Task, build_index, open_index
from jaxinf.attribution.kernels import DrawGroups
from jaxinf.compression.projection import Truncation
from jaxinf.core.random import fold_in_each, stream
from jaxinf.core.types import Eigenbasis
from jaxinf.curvature.eigenbasis import to_eigenbasis
from jaxinf.curvature.ggn import GGN
from jaxinf.diffusion.measurements import LOSS, Measurement
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.progress import Progress
from jaxinf.engine.worklist import Rows
from jaxinf.layers.coverage import Selection
from jaxinf.layers.per_example import group_keys
from jaxinf.store import rows as rows_module
from jaxinf.store import search
from jaxinf.store import store as store_module
from jaxinf.store.rows import RowStore
from tests import nets, test_hosts

influence_module = sys.modules["jaxinf.attribution.influence"]  # not the function

NUM_TRAIN, NUM_QUERIES, DRAWS, GROUPS = 11, 3, 4, 2
DAMPINGS = [1e-8, 1e-3, 1e-1]
LABELS = np.arange(NUM_TRAIN) % 3
QUERY_LABELS = np.array([2, 0, 1])
# Pairs at a time: two rows of two draws, an example.
MADE = dict(draws=DRAWS, seed=5, replicates=GROUPS, batch_size=4, reserve_bytes=0)
ASKED = dict(draws=DRAWS, seed=5, query_replicates=2, batch_size=4)
# Of the largest score. Gradients turn into the eigenbasis and back in float32.
ROUNDING = 2e-6


class Problem(NamedTuple):
  task: Task
  curvature: jaxinf.Curvature
  queries: np.ndarray
  train: np.ndarray
  of_queries: dict  # conditioning of query and influence
  of_train: dict  # and of build_index


def grouped_net(params, x_t, t):
  """A convolution of 2 groups between position-wise layers."""
  h = jnp.tanh(
    nets.dense(params["in"], x_t) + nets.dense(params["time"], nets.time_features(t))[:, None, None]
  )
  h = jax.lax.conv_general_dilated(
    h, params["grouped"]["kernel"], (1, 1), "SAME", feature_group_count=2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  ) + params["grouped"]["bias"]  # fmt: skip
  return nets.dense(params["out"], jnp.tanh(h))


GROUPED_SHAPES = {
  "in": {"kernel": (1, 4), "bias": (4,)},
  "time": {"kernel": (2, 4), "bias": (4,)},
  "grouped": {"kernel": (3, 3, 2, 6), "bias": (6,)},
  "out": {"kernel": (6, 1), "bias": (1,)},
}


def problem_of(name: str) -> Problem:
  train, queries = nets.random_images(NUM_TRAIN), nets.random_images(NUM_QUERIES, seed=1)
  fit = dict(draws=10, seed=0)
  if name == "kfac, conditional":
    task = nets.conditional_task()
    curvature = jaxinf.fit_curvature(task, train, method="kfac", conditioning=LABELS, **fit)
    asked, made = {"query_conditioning": QUERY_LABELS}, {"train_conditioning": LABELS}
    return Problem(task, curvature, queries, train, asked, made)
  task = nets.conv_task()
  if name == "ekfac, grouped":
    task = Task(grouped_net, nets.random_params(GROUPED_SHAPES), nets.SCHEDULE)
  curvature = jaxinf.fit_curvature(task, train, method="ekfac", **fit)
  return Problem(task, curvature, queries, train, {}, {})


def once(function):
  """The function, which gives the same object for the same arguments."""
  memo = {}

  def remembered(*args, **kwargs):
    kinds = jax.tree.map(lambda x: (np.shape(x), getattr(x, "dtype", x)), kwargs)
    by_value = (str, tuple, Selection, DrawGroups, Measurement)
    key = (*(repr(x) if isinstance(x, by_value) else id(x) for x in args), repr(kinds))
    if key not in memo:
      memo[key] = (function(*args, **kwargs), args)  # whose ids are then no others'
    return memo[key][0]

  return remembered


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Gradients of one model and design compile once, for all stores and for `influence`."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("registered", "gradient_kernel"):
      shared = once(getattr(store_module, name))
      for module in (store_module, influence_module):
        patch.setattr(module, name, shared)
    yield


@pytest.fixture(scope="module")
def problem():
  return problem_of("ekfac")


def build(problem: Problem, folder, **changes) -> Store:
  settings = {**MADE, "compression": None, **problem.of_train, **changes}
  return build_index(folder, problem.task, problem.curvature, problem.train, **settings)


def scores_of(problem: Problem, **changes):
  """What `influence` says, for all DAMPINGS unless told otherwise."""
  made = {name: value for name, value in MADE.items() if name != "reserve_bytes"}
  settings = made | dict(damping=DAMPINGS, query_replicates=2, compression=None)
  given = problem.of_queries | problem.of_train
  task, curvature, queries, train = problem[:4]
  return jaxinf.influence(task, curvature, queries, train, **settings | given | changes)


@pytest.fixture(scope="module")
def expected(problem):
  return scores_of(problem)


@pytest.fixture(scope="module")
def built(problem, tmp_path_factory):
  """A store in chunks of two examples: six, the last not full."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rows_module, "_CHUNK_EXAMPLES", 2)
    return build(problem, tmp_path_factory.mktemp("store") / "whole")


@pytest.fixture
def copy(built, problem, tmp_path):
  """The same store, to be changed."""
  shutil.copytree(built.rows.folder, tmp_path / "copy")
  return dataclasses.replace(built, rows=RowStore.open(tmp_path / "copy"))


def assert_scores(found, expected, tolerance=ROUNDING):
  assert list(found.query_ids) == list(expected.query_ids)
  assert list(found.train_ids) == list(expected.train_ids)
  atol = tolerance * np.abs(expected.values).max()
  for field in ("values", "group_values", "query_group_values", "std_errors"):
    actual, wanted = getattr(found, field), getattr(expected, field)
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol, err_msg=field)


def rows_of(store: Store) -> list[np.ndarray]:
  """All rows in memory that are kept, as on disk."""
  ledger = store.rows.ledger
  kept = np.repeat(ledger.kept, ledger.groups)
  return [array[kept] for array in store.rows.read(0, len(kept))]


def assert_same_rows(ours: Store, theirs: Store) -> None:
  for actual, wanted in zip(rows_of(ours), rows_of(theirs), strict=True):
    np.testing.assert_array_equal(actual, wanted)


# --- a query says what influence says ---


@pytest.mark.parametrize("name", ["ekfac", "diagonal", "kfac, conditional", "ekfac, grouped"])
def test_queries_equal_influence_at_every_damping(problem, expected, built, tmp_path, name):
  ours, scores, store = problem, expected, built
  if name == "diagonal":
    bases = {n: Eigenbasis(None, None, b.eigenvalues) for n, b in problem.curvature.bases.items()}
    ours = problem._replace(curvature=dataclasses.replace(problem.curvature, bases=bases))
  elif name != "ekfac":
    ours = problem_of(name)
  if name == "ekfac, grouped":
    assert any(len(layer.matrix_shape) == 3 for layer in ours.curvature.layers)
  if name != "ekfac":
    store, scores = build(ours, tmp_path), scores_of(ours)
  for damping, wanted in zip(DAMPINGS, scores, strict=True):
    found = store.query(ours.queries, damping=damping, **ASKED, **ours.of_queries)
    assert_scores(found, wanted)
    assert found.settings["damping"] == damping


def test_they_do_so_for_independent_draws_and_other_ids_and_draws_of_queries(problem, tmp_path):
  design = DrawDesign("uniform", antithetic=False, shared=False)
  ids = np.array(["a", "b", "c"])  # which the keys of independent draws follow
  store = build(problem, tmp_path, design=design)
  found = store.query(problem.queries, damping=1e-3, query_ids=ids, **ASKED | {"draws": 6})
  wanted = scores_of(problem, damping=1e-3, query_ids=ids, query_draws=6, design=design)
  assert_scores(found, wanted)


def test_without_groups_there_are_no_standard_errors(problem, tmp_path):
  store = build(problem, tmp_path, replicates=1)
  found = store.query(problem.queries, damping=1e-3, **ASKED | {"query_replicates": 1})
  wanted = scores_of(problem, damping=1e-3, replicates=1, query_replicates=1)
  assert found.query_group_values is None and np.isnan(found.std_errors).all()
  atol = ROUNDING * np.abs(wanted.values).max()
  np.testing.assert_allclose(found.group_values, wanted.group_values, rtol=0, atol=atol)


# Of the largest score. int: numbers are off by half a step, 1/254 of the largest of 64 for int8,
# and errors of a score's terms partly cancel; bfloat16: by 1/512 of themselves.
TOLERANCES = {"int16": 1e-4, "int8": 1e-2, "int4": 0.2, "bfloat16": 3e-3}


@pytest.mark.parametrize("compression", TOLERANCES)
def test_compressed_rows_say_nearly_the_same(problem, expected, tmp_path, compression):
  store = build(problem, tmp_path, compression=compression)
  for damping, wanted in zip(DAMPINGS, expected, strict=True):
    found = store.query(problem.queries, damping=damping, **ASKED)
    assert_scores(found, wanted, TOLERANCES[compression])
    assert not np.array_equal(found.values, wanted.values)


# --- naive twins ---


def twin_terms(problem: Problem, damping: float) -> dict[str, np.ndarray]:
  """Layer → [Q, N, d_out, d_in] float64: the terms of each score, in the eigenbasis.

  Plain gradients of one image at a time, by the draws of each group.
  """
  task, design = problem.task, DrawDesign()
  double = lambda x: jnp.asarray(np.asarray(x), jnp.float64)

  @jax.jit
  @jax.grad
  def gradient(params, x_t, t, noise):
    return jnp.mean(jnp.square(task.apply_fn(params, x_t, t) - noise))

  def of_pair(pair):
    t = jnp.asarray(np.asarray(pair.t), jnp.int32)
    grads = gradient(jax.tree.map(double, task.params), double(pair.x_t), t, double(pair.noise))
    return jax.tree.leaves(jax.tree.map(np.asarray, grads))

  def gradients(images, name):
    found = []  # of each group, of each image
    for group in range(GROUPS):
      keys = fold_in_each(stream(5, name), design.numbers(jnp.arange(len(images))))
      keys = group_keys(keys, jnp.full(len(images), group), DRAWS // GROUPS)
      pairs = [
        LOSS.pairs(task.schedule, images[i][None], keys[i][None], None, design)
        for i in range(len(images))
      ]
      with jax.enable_x64(True):
        found.append([of_pair(pair) for pair in pairs])
    return {
      layer.name: np.mean([[layer.to_matrix(g) for g in of_group] for of_group in found], axis=0)
      for layer in problem.curvature.layers
    }

  of_queries = gradients(problem.queries, "query_gradients")
  of_train = gradients(problem.train, "train_gradients")
  terms = {}
  for name, basis in problem.curvature.bases.items():
    asked, kept = (to_eigenbasis(grads[name], basis) for grads in (of_queries, of_train))
    terms[name] = (asked / (np.asarray(basis.eigenvalues) + damping))[:, None] * kept[None]
  return terms


@pytest.fixture(scope="module")
def terms(problem):
  return twin_terms(problem, 1e-3)


@pytest.mark.parametrize(
  "patterns", [["conv"], ["^conv_in$"], ["mix", "time"], ["conv_in", "out$"]]
)
def test_a_query_of_some_layers_sums_over_those_alone(problem, built, terms, patterns):
  names = search.matching_layers(terms, patterns)
  assert 0 < len(names) < len(terms)
  found = built.query(problem.queries, damping=1e-3, layers=patterns, **ASKED).values
  expected = sum(terms[name].sum((-2, -1)) for name in names)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_single_layers_sum_to_the_whole(problem, built, terms):
  ask = lambda layers: built.query(problem.queries, damping=1e-3, layers=layers, **ASKED)
  whole, parts = ask(None), [ask([f"^{name}$"]) for name in terms]
  for field in ("group_values", "query_group_values"):
    total = sum(getattr(part, field) for part in parts)
    atol = ROUNDING * max(np.abs(getattr(part, field)).max() for part in parts)
    np.testing.assert_allclose(total, getattr(whole, field), rtol=0, atol=atol)


def test_truncated_rows_sum_over_the_coordinates_they_keep(problem, terms, tmp_path):
  """Those of the largest eigenvalues, in each layer."""
  store = build(problem, tmp_path, compression=Truncation(0.3))
  expected = 0
  for name, of_layer in terms.items():
    flat = of_layer.reshape(*of_layer.shape[:2], -1)
    eigenvalues = np.asarray(problem.curvature.bases[name].eigenvalues, np.float32).ravel()
    kept = np.argsort(-eigenvalues, kind="stable")[: int(np.ceil(0.3 * len(eigenvalues)))]
    expected = expected + flat[..., kept].sum(-1)
  found = store.query(problem.queries, damping=1e-3, **ASKED).values
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  reopened = open_index(tmp_path, problem.task, problem.curvature)
  assert reopened.packing.compression == Truncation(0.3)


# --- the best alone ---


@pytest.mark.parametrize("k", [1, 4, NUM_TRAIN])
def test_the_best_are_the_top_of_all_scores(problem, built, k):
  scores = built.query(problem.queries, damping=1e-3, **ASKED)
  found = built.query(problem.queries, damping=1e-3, top_k=k, **ASKED)
  for field, wanted in dataclasses.asdict(scores.top(k)).items():
    # Bit for bit: the same products, of the same blocks, are averaged in the same order.
    np.testing.assert_array_equal(getattr(found, field), wanted, err_msg=field)


def test_deleted_examples_are_in_no_answer(problem, copy, expected):
  best = copy.query(problem.queries, damping=1e-3, top_k=2, **ASKED)
  gone = sorted({*best.ids.ravel().tolist()})[:-1]
  copy.delete(gone)
  kept = np.setdiff1d(np.arange(NUM_TRAIN), gone)
  assert len(copy) == len(kept)
  for store in (copy, open_index(copy.rows.folder, problem.task, problem.curvature)):
    scores = store.query(problem.queries, damping=1e-3, **ASKED)
    np.testing.assert_array_equal(scores.train_ids, kept)
    wanted = expected[1].values[:, kept]
    np.testing.assert_allclose(
      scores.values, wanted, rtol=0, atol=ROUNDING * np.abs(expected[1].values).max()
    )
    found = store.query(problem.queries, damping=1e-3, top_k=len(kept), **ASKED)
    top = scores.top(len(kept))
    np.testing.assert_array_equal(found.ids, top.ids)
    np.testing.assert_array_equal(found.values, top.values)
    np.testing.assert_array_equal(found.std_errors, top.std_errors)
    np.testing.assert_array_equal(found.positions, kept[top.positions])  # rows of the store
  with pytest.raises(ValueError, match=f"top_k must lie in 1…{len(kept)}"):
    copy.query(problem.queries, damping=1e-3, top_k=len(kept) + 1, **ASKED)


def test_ties_go_to_the_first_in_the_store(problem, tmp_path, monkeypatch):
  """The same image under many ids, with shared draws: all scores of a query are equal."""
  monkeypatch.setattr(rows_module, "_CHUNK_EXAMPLES", 2)
  one = problem._replace(train=np.repeat(problem.train[:1], 7, axis=0))
  store = build(one, tmp_path, train_ids=np.array(list("gfedcba")))
  store.delete(["e"])
  found = store.query(problem.queries, damping=1e-3, top_k=4, **ASKED)
  assert (found.values == found.values[:, :1]).all()
  assert found.ids.tolist() == [["g", "f", "d", "c"]] * NUM_QUERIES
  assert found.positions.tolist() == [[0, 1, 3, 4]] * NUM_QUERIES


# --- order, batches, devices, processes ---

processes_in_threads = pytest.fixture(test_hosts.in_processes.__wrapped__)


@pytest.mark.parametrize("compression", [None, "int8"])
def test_rows_depend_on_no_order_batches_or_devices(problem, built, tmp_path, devices, compression):
  """float32 rounding; int8: a number at the border of two steps may be rounded either way."""
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  first, then = np.split(order, [4])
  settings = dict(compression=compression, devices=devices)
  whole = built if compression is None else build(problem, tmp_path / "whole", compression="int8")
  store = build(problem._replace(train=problem.train[first]), tmp_path / "parts",
                train_ids=first, **settings)  # fmt: skip
  store.append(problem.train[then], then, batch_size=12, reserve_bytes=0, devices=devices)
  back = np.argsort(order)
  for actual, wanted in zip(rows_of(store), rows_of(whole), strict=True):
    actual = actual.reshape(NUM_TRAIN, -1)[back].ravel().astype(np.float64)
    wanted = wanted.ravel().astype(np.float64)
    integers = compression == "int8" and wanted.size > NUM_TRAIN * GROUPS * 8
    atol = 1 if integers else 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def test_processes_write_and_ask_together_as_one(
  problem, built, processes_in_threads, tmp_path, monkeypatch
):
  """Three, in threads; the append begins inside a chunk."""
  monkeypatch.setattr(rows_module, "_CHUNK_EXAMPLES", 2)
  written: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
  original = RowStore.write

  def write(self, begin, arrays, reserve_bytes):
    written[jax.process_index()].append((begin, begin + len(arrays[0])))
    original(self, begin, arrays, reserve_bytes)

  monkeypatch.setattr(RowStore, "write", write)

  def process():
    one = jax.local_devices()[:1]
    part = problem._replace(train=problem.train[:3])
    store = build(part, tmp_path / "store", devices=one)
    store.append(problem.train[3:], np.arange(3, NUM_TRAIN), batch_size=4, reserve_bytes=0,
                 devices=one)  # fmt: skip
    ask = dict(damping=1e-3, devices=one, **ASKED)
    store.delete([1])
    return store.query(problem.queries, **ask), store.query(problem.queries, top_k=4, **ask)

  results = processes_in_threads(3, process)
  for result in results:
    assert not isinstance(result, Exception), result
  # 1. Each wrote rows of its own, and no chunk but the first one is shared.
  spans = sorted(span for of_one in written.values() for span in of_one)
  assert [row for span in spans for row in range(*span)] == list(range(GROUPS * NUM_TRAIN))
  assert all(written.values())
  # 2. All know the same, and it is what one process says.
  monkeypatch.undo()
  store = open_index(tmp_path / "store", problem.task, problem.curvature)
  wanted = built.query(problem.queries, damping=1e-3, **ASKED)
  kept = np.delete(np.arange(NUM_TRAIN), 1)
  for scores, best in results:
    np.testing.assert_array_equal(scores.train_ids, kept)
    atol = ROUNDING * np.abs(wanted.values).max()
    np.testing.assert_allclose(scores.values, wanted.values[:, kept], rtol=0, atol=atol)
    top = scores.top(4)
    np.testing.assert_array_equal(best.ids, top.ids)
    np.testing.assert_allclose(best.values, top.values, rtol=0, atol=atol)
    np.testing.assert_array_equal(best.positions, kept[top.positions])
  assert store.verify() == len(store.rows.ledger.ids) * GROUPS * 4 * sum(store.packing.widths)


# --- interruption ---


@pytest.fixture
def computed(monkeypatch):
  """Rows that went through the gradient kernel, pass by pass."""
  passes = []

  class Recorded(Progress):
    def __init__(self, label, *args, **kwargs):
      passes.append(0)
      super().__init__(label, *args, **kwargs)

    def advance(self, amount, note=""):
      passes[-1] += amount
      super().advance(amount, note)

  monkeypatch.setattr("jaxinf.engine.maps.Progress", Recorded)
  return passes


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_an_interrupted_build_goes_on_to_the_same_bits(
  problem, built, tmp_path, computed, monkeypatch, killed_after
):
  """Chunks of two examples and batches of one: what had been written is not computed again."""
  monkeypatch.setattr(rows_module, "_CHUNK_EXAMPLES", 2)
  saved = []
  original = RowStore.save_progress

  def save_then_die(self, worker, row):
    original(self, worker, row)
    saved.append(row)
    if len(saved) == killed_after:
      raise KeyboardInterrupt

  monkeypatch.setattr(RowStore, "save_progress", save_then_die)
  with pytest.raises(KeyboardInterrupt):
    build(problem, tmp_path)
  assert saved[-1] == killed_after * 2 * GROUPS
  unfinished = open_index(tmp_path, problem.task, problem.curvature)
  assert len(unfinished) == 0  # nothing is counted yet
  other = problem._replace(train=problem.train[::-1])
  with pytest.raises(ValueError, match="go on with the same images"):
    build(other, tmp_path)
  monkeypatch.setattr(RowStore, "save_progress", original)
  store = build(problem, tmp_path)
  assert computed[-1] == GROUPS * NUM_TRAIN - saved[-1]
  assert_same_rows(store, built)
  # And a finished one is opened, without computing anything.
  num_passes = len(computed)
  assert_same_rows(build(problem, tmp_path), built)
  assert len(computed) == num_passes


def test_a_full_disk_stops_the_build_and_room_lets_it_go_on(
  problem, built, tmp_path, computed, monkeypatch
):
  monkeypatch.setattr(rows_module, "_CHUNK_EXAMPLES", 2)
  usage = shutil.disk_usage(tmp_path)
  asked = []

  def disk_usage(path):
    asked.append(path)
    return type(usage)(usage.total, 0, 0 if len(asked) > 3 else usage.free)

  monkeypatch.setattr(rows_module.shutil, "disk_usage", disk_usage)
  with pytest.raises(ValueError, match="What is written stays"):
    build(problem, tmp_path)
  monkeypatch.setattr(rows_module.shutil, "disk_usage", lambda path: usage)
  store = build(problem, tmp_path)
  assert computed[-1] == GROUPS * NUM_TRAIN - 2 * 2 * GROUPS  # two chunks had been written
  assert_same_rows(store, built)


def test_a_damaged_chunk_is_named_by_queries_and_healed(problem, copy, expected):
  path = copy.rows.folder / "arrays/leaf_0/c/2/0"
  damaged = bytearray(path.read_bytes())
  damaged[7] ^= 16
  path.write_bytes(damaged)
  for act in (copy.verify, lambda: copy.query(problem.queries, damping=1e-3, top_k=1, **ASKED)):
    with pytest.raises(ValueError, match=f"{path}.*delete the 2 examples 4 … 5"):
      act()
  copy.delete([4, 5])
  copy.append(problem.train[4:6], np.array([4, 5]), batch_size=4, reserve_bytes=0)
  copy.verify()
  found = copy.query(problem.queries, damping=1e-3, **ASKED)
  assert found.train_ids.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 4, 5]
  wanted = expected[1].values[:, found.train_ids]
  np.testing.assert_allclose(found.values, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


# --- what does not belong together ---


def test_a_store_of_something_else_is_refused_with_the_difference(problem, built):
  folder, task = built.rows.folder, problem.task
  before = (folder / "index.json").read_bytes()
  for change, line in (
    ({"seed": 6}, "settings.seed: 5 → 6"),
    ({"draws": 8}, "settings.draws: 4 → 8"),
    ({"replicates": 1}, "settings.replicates: 2 → 1"),
    ({"compression": "int8"}, "settings.compression: .*Uncompressed.* → .*Quantisation.*8"),
    ({"design": DrawDesign(shared=False)}, "settings.design.shared: True → False"),
  ):
    with pytest.raises(StaleArtifact, match=line):
      build(problem, folder, **change)
  other = jax.tree.map(lambda x: 1.5 * x, task.params)
  schedule = jaxinf.Schedule.linear(1000, 1e-4, 0.03)
  bases = {n: dataclasses.replace(b, eigenvalues=2 * b.eigenvalues)
           for n, b in problem.curvature.bases.items()}  # fmt: skip
  for changed, curvature, line in (
    (Task(task.apply_fn, other, task.schedule), problem.curvature, "params: "),
    (Task(task.apply_fn, task.params, schedule), problem.curvature, "schedule: "),
    (task, dataclasses.replace(problem.curvature, bases=bases), "curvature: "),
  ):
    with pytest.raises(StaleArtifact, match=line):
      open_index(folder, changed, curvature)
    with pytest.raises(StaleArtifact, match=line):
      build(problem._replace(task=changed, curvature=curvature), folder)
  assert (folder / "index.json").read_bytes() == before


def test_other_images_under_the_same_ids_are_refused(problem, built):
  images = problem.train.copy()
  images[3, 0, 0] *= 0.5
  with pytest.raises(ValueError, match="other images under 1 of the 11 ids, such as 3"):
    build(problem._replace(train=images), built.rows.folder)


@pytest.mark.parametrize("compression", ["svd", "projection"])
def test_compressions_that_rows_cannot_have_are_refused(problem, tmp_path, compression):
  with pytest.raises(ValueError, match="take int4, int8, int16, bfloat16, truncation or None"):
    build(problem, tmp_path / "store", compression=compression)
  assert not (tmp_path / "store").exists()


def test_exact_curvature_has_no_store(problem, tmp_path):
  rows = Rows(problem.train, np.arange(NUM_TRAIN, dtype=np.uint32), 2)
  ggn = GGN(problem.task, problem.curvature.layers, rows, seed=0, batch_size=4, devices=None,
            solver=jaxinf.Solver())  # fmt: skip
  exact = dataclasses.replace(problem.curvature, exact=ggn)
  with pytest.raises(ValueError, match="fit kfac, ekfac or diagonal"):
    build(problem._replace(curvature=exact), tmp_path)


@pytest.mark.parametrize(
  ("images", "ids", "message"),
  [
    (nets.random_images(2), np.array([10, 11]), "1 of 2 ids are in the store already, such as 10"),
    (nets.random_images(2), np.array(["a", "b"]), "are integers; those of the new images, strings"),
    (nets.random_images(2), np.array([-1, 12]), "Integer ids must lie in"),
    (nets.random_images(2), np.array([12, 12]), "train_ids must be 2 different ids"),
    (nets.random_images(1, (5, 4, 2)), np.array([12]), "The store is of images"),
  ],
)
def test_what_cannot_be_appended_leaves_the_store_as_it_was(copy, problem, images, ids, message):
  before = {p: p.read_bytes() for p in copy.rows.folder.rglob("*") if p.is_file()}
  with pytest.raises(ValueError, match=message):
    copy.append(images, ids, batch_size=4, reserve_bytes=0)
  assert before == {p: p.read_bytes() for p in copy.rows.folder.rglob("*") if p.is_file()}
  copy.append(nets.random_images(1, seed=3), np.array([12]), batch_size=4, reserve_bytes=0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"layers": ["attention"]}, "No layer matches .*conv_in"),
    ({"damping": 0.0}, "damping must be positive"),
    ({"draws": 3}, "3 draws do not split into 2 equal groups"),
    ({"top_k": 0}, "top_k must lie in 1…11"),
    ({"query_conditioning": QUERY_LABELS}, "apply_fn.* fails for"),
  ],
)
def test_impossible_questions_are_refused(problem, built, change, message):
  with pytest.raises(ValueError, match=message):
    built.query(problem.queries, **{"damping": 1e-3, **ASKED, **change})


def test_scores_that_overflow_are_an_error_that_names_the_image(problem, copy):
  """As `influence` has it; when the image is deleted, the others answer."""
  rows = copy.rows.read(6 * GROUPS, 7 * GROUPS)
  copy.rows.write(6 * GROUPS, [np.full_like(array, np.inf) for array in rows], 0)
  copy.rows.reload()
  with pytest.raises(ValueError, match="not finite, first those of the training image 6:"):
    copy.query(problem.queries, damping=1e-3, **ASKED)
  copy.delete([6])
  assert np.isfinite(copy.query(problem.queries, damping=1e-3, **ASKED).values).all()


def test_a_store_says_how_it_was_made(built):
  assert built.settings["compression"] == ["Uncompressed", {}]
  assert {name: built.settings[name] for name in ("draws", "replicates", "seed")} == {
    "draws": DRAWS, "replicates": GROUPS, "seed": 5,
  }  # fmt: skip
  chunks = (built.rows.folder / "arrays").glob("leaf_*/c/*/*")
  assert built.num_bytes == sum(path.stat().st_size for path in chunks)


def test_images_of_another_size_are_refused(tmp_path):
  """A convolutional network would take them."""
  task = nets.conv_task()
  curvature = jaxinf.fit_curvature(task, nets.random_images(4), draws=2, seed=0)
  store = jaxinf.build_index(tmp_path, task, curvature, nets.random_images(4), draws=2, seed=0)
  larger = nets.random_images(2, (8, 8, 1))
  with pytest.raises(ValueError, match=r"The store is of images \(4, 4, 1\); got \(8, 8, 1\)"):
    store.query(larger, damping=1e-3, draws=2, seed=0)
  with pytest.raises(ValueError, match=r"The store is of images \(4, 4, 1\)"):
    store.append(larger, np.array([7, 8]))
  assert len(store) == 4
