"""The store of training gradients answers as `influence` does, whatever happened to it before."""

import dataclasses
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import Compute, DiffusionModel, Draws, Examples, Process, Store, build_store, open_store
from jaxinf.compression.projection import Truncation
from jaxinf.core.random import draw_keys, stream
from jaxinf.core.types import Eigenbasis
from jaxinf.curvature.curvature import ExactCurvature
from jaxinf.curvature.eigenbasis import to_eigenbasis
from jaxinf.diffusion.noise import draw_pairs
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.progress import Progress
from jaxinf.scores.sweep import Sweep
from jaxinf.store import rows as rows_module
from jaxinf.store import search
from jaxinf.store.rows import RowStore
from tests import nets
from tests.compilations import counted_compilations
from tests.processes import PROCESSES
from tests.stored import Stored

pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # parameters are random

NUM_TRAIN, NUM_QUERIES = 11, 3
DAMPINGS = (1e-8, 1e-3, 1e-1)
LABELS = np.arange(NUM_TRAIN) % 3
QUERY_LABELS = np.array([2, 0, 1])
CONDITIONAL = Examples(nets.random_images(NUM_QUERIES), conditioning=QUERY_LABELS)
DRAWS = Draws(4, 2, seed=5, loss_power=1.0)
GROUPS = 2
COMPUTE = Compute(4)  # pairs at a time: two rows of two draws, an example
ASKED = dict(draws=DRAWS, compute=COMPUTE)
# Of the largest score. Gradients turn into the eigenbasis and back in float32.
ROUNDING = 4e-6


class Problem(NamedTuple):
  curvature: jaxinf.Curvature
  queries: Examples
  train: Examples


def grouped_net(params, x_t, t):
  """A convolution of 2 groups between position-wise layers."""
  h = jnp.tanh(
    nets.dense(params["in"], x_t) + nets.dense(params["time"], nets.time_features(t))[:, None, None]
  )
  kernel, bias = params["grouped"]["kernel"], params["grouped"]["bias"]
  numbers = ("NHWC", "HWIO", "NHWC")
  h = jax.lax.conv_general_dilated(
    h, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
  )
  return nets.dense(params["out"], jnp.tanh(h + bias))


GROUPED_SHAPES = {
  "in": {"kernel": (1, 4), "bias": (4,)},
  "time": {"kernel": (2, 4), "bias": (4,)},
  "grouped": {"kernel": (3, 3, 2, 6), "bias": (6,)},
  "out": {"kernel": (6, 1), "bias": (1,)},
}

VECTOR_SHAPES = {
  "in": {"kernel": (5, 4), "bias": (4,)},
  "time": {"kernel": (2, 4)},
  "out": {"kernel": (4, 5), "bias": (5,)},
}


def vector_net(params, x_t, t):
  """Two layers on vectors [5], for times of any size."""
  seconds = jnp.stack([jnp.tanh(t.astype(jnp.float32)), jnp.cos(t)], axis=-1)
  h = jnp.tanh(nets.dense(params["in"], x_t) + seconds @ params["time"]["kernel"])
  return nets.dense(params["out"], h)


def fitted(model: DiffusionModel, train: Examples, kind: jaxinf.KFAC) -> jaxinf.Curvature:
  return jaxinf.fit_curvature(model, train, kind, draws=Draws(10))


def problem_of(name: str) -> Problem:
  """A small model's curvature, its training images and queries."""
  images, asked = nets.random_images(NUM_TRAIN), nets.random_images(NUM_QUERIES, seed=1)
  train, queries, model = Examples(images), Examples(asked), nets.conv_model()
  if name == "kfac, conditional":
    train = Examples(images, conditioning=LABELS)
    queries = Examples(asked, conditioning=QUERY_LABELS)
    return Problem(fitted(nets.conditional_model(), train, jaxinf.KFAC()), queries, train)
  if name == "ekfac, grouped":
    model = DiffusionModel(grouped_net, nets.random_params(GROUPED_SHAPES), nets.PROCESS)
  return Problem(fitted(model, train, jaxinf.EKFAC()), queries, train)


@pytest.fixture(scope="module")
def problem():
  return problem_of("ekfac")


def build(problem: Problem, folder, **changes) -> Store:
  made = dict(train=problem.train, draws=DRAWS, compression=None, compute=COMPUTE, reserve_bytes=0)
  return build_store(folder, problem.curvature, **made | changes)


def append(store: Store, images: np.ndarray, ids, devices=None, batch_size: int = 4) -> None:
  compute = Compute(batch_size, devices)
  store.append(Examples(images, np.asarray(ids)), reserve_bytes=0, compute=compute)


def some(examples: Examples, rows) -> Examples:
  """Some of the examples, under the ids that they have."""
  return examples.take(np.asarray(rows))


def scores_of(problem: Problem, **changes) -> Sweep:
  """What `influence` says."""
  settings = dict(dampings=DAMPINGS, query_draws=DRAWS, compression=None, **ASKED)
  given = dict(queries=problem.queries, train=problem.train)
  return jaxinf.influence_sweep(problem.curvature, **given | settings | changes)


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
  for field in ("values", "replicate_values", "query_replicate_values", "std_errors"):
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
    found = store.query(ours.queries, damping=damping, **ASKED)
    assert_scores(found, wanted)
    assert found.settings["damping"] == damping


def test_queries_equal_influence_at_relative_damping(problem, built):
  damping = jaxinf.RelativeDamping(1e-2)
  found = built.query(problem.queries, damping=damping, **ASKED)
  (wanted,) = scores_of(problem, dampings=[damping])
  assert_scores(found, wanted)
  assert found.settings["damping_kind"] == wanted.settings["damping_kind"] == "relative"


@pytest.mark.parametrize("name", ["v", "sample_table", "flow_logit_normal", "edm"])
def test_they_do_so_for_every_process_and_vectors(tmp_path, name):
  """The loss's weights and the law of its times are in both gradients."""
  model = DiffusionModel(vector_net, nets.random_params(VECTOR_SHAPES), PROCESSES[name])
  train, queries = (Examples(nets.random_images(num, (5,), num)) for num in (6, 2))
  ours = Problem(fitted(model, train, jaxinf.KFAC()), queries, train)
  found = build(ours, tmp_path).query(queries, damping=1e-3, **ASKED)
  assert_scores(found, scores_of(ours, dampings=[1e-3])[0])


def test_they_do_so_for_independent_draws_and_other_ids_and_draws_of_queries(problem, tmp_path):
  independent = dataclasses.replace(DRAWS, timesteps="uniform", antithetic=False, shared=False)
  asked = dataclasses.replace(independent, num=6)
  ids = np.array(["a", "b", "c"])  # which the keys of independent draws follow
  queries = Examples(problem.queries.data, ids)
  store = build(problem, tmp_path, draws=independent)
  found = store.query(queries, damping=1e-3, draws=asked, compute=COMPUTE)
  wanted = scores_of(
    problem, dampings=[1e-3], queries=queries, draws=independent, query_draws=asked
  )
  assert_scores(found, wanted[0])


def test_the_same_draws_split_alike_for_influence_and_for_a_store(problem, tmp_path):
  """Where nobody says how: into 3 replicates for training images and 2 for queries."""
  draws = Draws(6, seed=5)
  found = build(problem, tmp_path, draws=draws).query(problem.queries, damping=1e-3, draws=draws)
  wanted = scores_of(problem, dampings=[1e-3], draws=draws, query_draws=None)
  assert_scores(found, wanted[0], 2 * ROUNDING)  # of centred scores, which are smaller
  assert (len(found.replicate_values), len(found.query_replicate_values)) == (3, 2)
  for name in ("draws", "replicates", "query_draws", "query_replicates", "seed", "design"):
    assert found.settings[name] == wanted[0].settings[name]


def test_without_groups_there_are_no_standard_errors(problem, tmp_path):
  one = dataclasses.replace(DRAWS, replicates=1)
  store = build(problem, tmp_path, draws=one)
  found = store.query(problem.queries, damping=1e-3, draws=one, compute=COMPUTE)
  wanted = scores_of(problem, dampings=[1e-3], draws=one, query_draws=one)[0]
  assert found.query_replicate_values is None and np.isnan(found.std_errors).all()
  atol = ROUNDING * np.abs(wanted.values).max()
  np.testing.assert_allclose(found.replicate_values, wanted.replicate_values, rtol=0, atol=atol)


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

  Plain gradients of one image at a time, by the draws of each replicate.
  """
  model = problem.curvature.model
  double = lambda x: jnp.asarray(np.asarray(x), jnp.float64)

  @jax.jit
  @jax.grad
  def gradient(params, inputs, t, target):
    return jnp.mean(jnp.square(model.apply_fn(params, inputs, t) - target))

  def of_pairs(pairs):
    t = jnp.asarray(np.asarray(pairs.t), jnp.int32)
    arrays = double(pairs.inputs), t, double(pairs.target)
    grads = gradient(jax.tree.map(double, model.params), *arrays)
    return jax.tree.leaves(jax.tree.map(np.asarray, grads))

  def gradients(images, name):
    found = []  # of each replicate, of each image
    for replicate in range(GROUPS):
      keys = draw_keys(jax.random.fold_in(stream(5, name), 0), DRAWS.size, replicate * DRAWS.size)
      pairs = [
        draw_pairs(model.process, jnp.asarray(image)[None], keys[None], DRAWS) for image in images
      ]
      with jax.enable_x64(True):
        found.append([of_pairs(pair) for pair in pairs])
    return {
      layer.name: np.mean([[layer.to_matrix(g) for g in of_group] for of_group in found], axis=0)
      for layer in problem.curvature.layers
    }

  of_queries = gradients(problem.queries.data, "query_gradients")
  of_train = gradients(problem.train.data, "train_gradients")
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
  for field in ("replicate_values", "query_replicate_values"):
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
  reopened = open_store(tmp_path, problem.curvature)
  assert reopened.packing.compression == Truncation(0.3)


# --- the best alone ---


def test_the_best_of_centred_scores_are_the_top_of_all_of_them(problem, tmp_path):
  """Of draws with a loss_power other than 1, also where examples were deleted."""
  store = build(problem, tmp_path, draws=dataclasses.replace(DRAWS, loss_power=0.5))
  store.delete([2, 5])
  scores = store.query(problem.queries, damping=1e-3, **ASKED)
  np.testing.assert_allclose(scores.values.mean(axis=1), 0, atol=1e-6)
  found, wanted = store.top(problem.queries, 4, damping=1e-3, **ASKED), scores.top(4)
  np.testing.assert_array_equal(found.ids, wanted.ids)
  for field in ("values", "std_errors"):
    np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4, NUM_TRAIN])
def test_the_best_are_the_top_of_all_scores(problem, built, k):
  scores = built.query(problem.queries, damping=1e-3, **ASKED)
  found = built.top(problem.queries, k, damping=1e-3, **ASKED)
  for field, wanted in dataclasses.asdict(scores.top(k)).items():
    # Bit for bit: the same products, of the same blocks, are averaged in the same order.
    np.testing.assert_array_equal(getattr(found, field), wanted, err_msg=field)


@pytest.mark.parametrize("compression", [None, "bfloat16", "int16"])
def test_self_influence_is_that_of_a_pass_but_for_compression(problem, tmp_path, compression):
  """Of three replicates, with a deleted example, which is in no answer."""
  draws = Draws(6, 3, seed=5, loss_power=1)
  store = build(problem, tmp_path, draws=draws, compression=compression)
  gone = problem.train.ids[4]
  store.delete([gone])
  kept = np.flatnonzero(problem.train.ids != gone)
  for damping in (1e-8, 1e-1):
    found = store.self_influence(damping, compute=COMPUTE)
    expected = jaxinf.self_influence(
      problem.curvature, train=problem.train, damping=damping, draws=draws, compute=COMPUTE
    )
    np.testing.assert_array_equal(found.ids, problem.train.ids[kept])
    # bfloat16 rounds each number by 2⁻⁹ at most, int16 by 2⁻¹⁶ of the largest of its block.
    atol = {None: ROUNDING, "bfloat16": 1e-2, "int16": 1e-3}[compression]
    for name in ("values", "std_errors"):
      ours, theirs = getattr(found, name), getattr(expected, name)[kept]
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * expected.values.max())
  parts = [store.self_influence(1e-1, layers=(f"^{n}$",)).values for n in store.packing.shapes]
  np.testing.assert_allclose(np.sum(parts, axis=0), found.values, rtol=1e-4)
  assert not found.settings["biased"] and found.settings["damping"] == 1e-1


def test_one_replicate_gives_squares_that_are_too_large_and_says_so(problem, built, tmp_path):
  one = build(problem, tmp_path, draws=Draws(4, 1, seed=5))
  with pytest.warns(UserWarning, match="one replicate of draws.* too large"):
    squares = one.self_influence(1e-3)
  assert squares.settings["biased"] and np.isnan(squares.std_errors).all()
  assert squares.values.mean() > built.self_influence(1e-3).values.mean()


def test_deleted_examples_are_in_no_answer(problem, copy, expected):
  best = copy.top(problem.queries, 2, damping=1e-3, **ASKED)
  gone = sorted({*best.ids.ravel().tolist()})[:-1]
  copy.delete(gone)
  kept = np.setdiff1d(np.arange(NUM_TRAIN), gone)
  assert len(copy) == len(kept)
  for store in (copy, open_store(copy.rows.folder, problem.curvature)):
    scores = store.query(problem.queries, damping=1e-3, **ASKED)
    np.testing.assert_array_equal(scores.train_ids, kept)
    wanted = expected[1].values[:, kept]
    np.testing.assert_allclose(
      scores.values, wanted, rtol=0, atol=ROUNDING * np.abs(expected[1].values).max()
    )
    found = store.top(problem.queries, len(kept), damping=1e-3, **ASKED)
    top = scores.top(len(kept))
    np.testing.assert_array_equal(found.ids, top.ids)
    np.testing.assert_array_equal(found.values, top.values)
    np.testing.assert_array_equal(found.std_errors, top.std_errors)
    np.testing.assert_array_equal(found.positions, kept[top.positions])  # rows of the store
  with pytest.raises(ValueError, match=f"k must lie in 1…{len(kept)}"):
    copy.top(problem.queries, len(kept) + 1, damping=1e-3, **ASKED)


def test_ties_go_to_the_first_in_the_store(problem, tmp_path, monkeypatch):
  """The same image under many ids, with shared draws: all scores of a query are equal."""
  monkeypatch.setattr(rows_module, "_CHUNK_EXAMPLES", 2)
  same = Examples(np.repeat(problem.train.data[:1], 7, axis=0), list("gfedcba"))
  store = build(problem, tmp_path, train=same)
  store.delete(["e"])
  found = store.top(problem.queries, 4, damping=1e-3, **ASKED)
  assert (found.values == found.values[:, :1]).all()
  assert found.ids.tolist() == [["g", "f", "d", "c"]] * NUM_QUERIES
  assert found.positions.tolist() == [[0, 1, 3, 4]] * NUM_QUERIES


# --- order, batches, devices, processes ---


@pytest.mark.parametrize("compression", [None, "int8"])
def test_rows_depend_on_no_order_batches_or_devices(problem, built, tmp_path, devices, compression):
  """float32 rounding; int8: a number at the border of two steps may be rounded either way."""
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  first, then = np.split(order, [4])
  whole = built if compression is None else build(problem, tmp_path / "whole", compression="int8")
  store = build(
    problem,
    tmp_path / "parts",
    train=some(problem.train, first),
    compression=compression,
    compute=Compute(4, devices),
  )
  append(store, problem.train.data[then], then, devices, batch_size=12)
  back = np.argsort(order)
  for actual, wanted in zip(rows_of(store), rows_of(whole), strict=True):
    actual = actual.reshape(NUM_TRAIN, -1)[back].ravel().astype(np.float64)
    wanted = wanted.ravel().astype(np.float64)
    integers = compression == "int8" and wanted.size > NUM_TRAIN * GROUPS * 8
    atol = 1 if integers else 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def test_processes_write_and_ask_together_as_one(
  problem, built, in_processes, tmp_path, monkeypatch
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
    one = Compute(4, jax.local_devices()[:1])
    store = build(problem, tmp_path / "store", train=some(problem.train, range(3)), compute=one)
    append(store, problem.train.data[3:], range(3, NUM_TRAIN), one.devices)
    ask = dict(damping=1e-3, draws=DRAWS, compute=one)
    store.delete([1])
    return store.query(problem.queries, **ask), store.top(problem.queries, 4, **ask)

  results = in_processes(3, process)
  for result in results:
    assert not isinstance(result, Exception), result
  # 1. Each wrote rows of its own, and no chunk but the first one is shared.
  spans = sorted(span for of_one in written.values() for span in of_one)
  assert [row for span in spans for row in range(*span)] == list(range(GROUPS * NUM_TRAIN))
  assert all(written.values())
  # 2. All know the same, and it is what one process says.
  monkeypatch.undo()
  store = open_store(tmp_path / "store", problem.curvature)
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
  unfinished = open_store(tmp_path, problem.curvature)
  assert len(unfinished) == 0  # nothing is counted yet
  with pytest.raises(ValueError, match="go on with the same examples"):
    build(problem, tmp_path, train=Examples(problem.train.data[::-1]))
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
  for act in (copy.verify, lambda: copy.top(problem.queries, 1, damping=1e-3, **ASKED)):
    with pytest.raises(ValueError, match=f"{path}.*delete the 2 examples 4 … 5"):
      act()
  copy.delete([4, 5])
  append(copy, problem.train.data[4:6], [4, 5])
  copy.verify()
  found = copy.query(problem.queries, damping=1e-3, **ASKED)
  assert found.train_ids.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 4, 5]
  wanted = expected[1].values[:, found.train_ids]
  np.testing.assert_allclose(found.values, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


# --- what does not belong together ---


def test_a_store_of_something_else_is_refused_with_the_difference(problem, built):
  folder, model = built.rows.folder, problem.curvature.model
  before = (folder / "index.json").read_bytes()
  drawn = lambda **fields: {"draws": dataclasses.replace(DRAWS, **fields)}
  for change, line in (
    (drawn(seed=6), "settings.seed: 5 → 6"),
    (drawn(num=8), "settings.draws: 4 → 8"),
    (drawn(replicates=1), "settings.replicates: 2 → 1"),
    (drawn(shared=False), "settings.design.shared: True → False"),
    ({"compression": "int8"}, "settings.compression: .*Uncompressed.* → .*Quantisation.*8"),
    ({"train": dataclasses.replace(problem.train, random_flip=True)}, "random_flip: False → True"),
  ):
    with pytest.raises(StaleArtifact, match=line):
      build(problem, folder, **change)
  scaled = jax.tree.map(lambda x: 1.5 * x, model.params)
  noisier = Process.epsilon(jaxinf.Schedule.linear(1000, 1e-4, 0.03))
  weighted = Process.epsilon(nets.SCHEDULE, "min_snr")
  bases = {
    name: dataclasses.replace(basis, eigenvalues=2 * basis.eigenvalues)
    for name, basis in problem.curvature.bases.items()
  }
  for change, line in (
    ({"model": model.with_params(scaled)}, "params: "),
    ({"model": dataclasses.replace(model, process=noisier)}, "process.schedule"),
    ({"model": dataclasses.replace(model, process=weighted)}, "process.weight"),
    ({"bases": bases}, "curvature: "),
  ):
    other = problem._replace(curvature=dataclasses.replace(problem.curvature, **change))
    with pytest.raises(StaleArtifact, match=line):
      open_store(folder, other.curvature)
    with pytest.raises(StaleArtifact, match=line):
      build(other, folder)
  assert (folder / "index.json").read_bytes() == before


def test_other_images_under_the_same_ids_are_refused(problem, built):
  images = problem.train.data.copy()
  images[3, 0, 0] *= 0.5
  with pytest.raises(ValueError, match="other examples under 1 of the 11 ids, such as 3"):
    build(problem, built.rows.folder, train=Examples(images))


@pytest.mark.parametrize("compression", ["svd", "projection"])
def test_compressions_that_rows_cannot_have_are_refused(problem, tmp_path, compression):
  with pytest.raises(ValueError, match="take int4, int8, int16, bfloat16, truncation or None"):
    build(problem, tmp_path / "store", compression=compression)
  assert not (tmp_path / "store").exists()


def test_exact_curvature_has_no_store(problem, tmp_path):
  fields = {
    f.name: getattr(problem.curvature, f.name) for f in dataclasses.fields(problem.curvature)
  }
  exact = ExactCurvature(**fields)
  with pytest.raises(ValueError, match="fit KFAC, EKFAC, Shampoo or Diagonal"):
    build(problem._replace(curvature=exact), tmp_path / "store")
  assert not (tmp_path / "store").exists()


def test_rounds_until_stable_are_no_draws_of_a_store(problem, tmp_path):
  with pytest.raises(ValueError, match=r"keeps a fixed number of draws: Draws\(num\)"):
    build(problem, tmp_path / "store", draws=Draws.until_stable())


@pytest.mark.parametrize(
  ("images", "ids", "message"),
  [
    (nets.random_images(2), np.array([10, 11]), "1 of 2 ids are in the store already, such as 10"),
    (
      nets.random_images(2),
      np.array(["a", "b"]),
      "are integers; those of the new examples, strings",
    ),
    (nets.random_images(2), np.array([-1, 12]), "Integer ids must lie in"),
    (nets.random_images(2), np.array([12, 12]), "ids must be different; got more than once: 12"),
    (nets.random_images(1, (5, 4, 2)), np.array([12]), "The store is of examples"),
  ],
)
def test_what_cannot_be_appended_leaves_the_store_as_it_was(copy, problem, images, ids, message):
  before = {p: p.read_bytes() for p in copy.rows.folder.rglob("*") if p.is_file()}
  with pytest.raises(ValueError, match=message):
    append(copy, images, ids)
  assert before == {p: p.read_bytes() for p in copy.rows.folder.rglob("*") if p.is_file()}
  append(copy, nets.random_images(1, seed=3), [12])


def test_examples_that_training_mirrored_stay_among_themselves(copy):
  mirrored = Examples(nets.random_images(1, seed=3), [12], random_flip=True)
  with pytest.raises(ValueError, match="The store was made with random_flip=False"):
    copy.append(mirrored, reserve_bytes=0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"layers": ["attention"]}, "No layer matches .*conv_in"),
    ({"damping": 0.0}, "damping must be positive"),
    ({"layers": "conv_in"}, r"layers must be a sequence .*; write layers=\('conv_in',\)"),
    ({"measurement": "los"}, "Unknown measurement 'los'; there are: loss"),
    ({"draws": Draws.until_stable()}, "give query_draws a fixed number of draws"),
    ({"k": 0}, "k must be at least 1; got 0"),
    ({"k": NUM_TRAIN + 1}, "k must lie in 1…11"),
    ({"queries": CONDITIONAL}, "fitted with conditioning, or these examples have"),
  ],
)
def test_impossible_questions_are_refused(problem, built, change, message):
  question = {"queries": problem.queries, "damping": 1e-3, **ASKED, **change}
  with pytest.raises(ValueError, match=message):
    built.top(**{"k": 1} | question)
  if "k" not in change:
    with pytest.raises(ValueError, match=message):
      built.query(**question)


def test_scores_that_overflow_are_an_error_that_names_the_image(problem, copy):
  """As `influence` has it; when the image is deleted, the others answer."""
  rows = copy.rows.read(6 * GROUPS, 7 * GROUPS)
  copy.rows.write(6 * GROUPS, [np.full_like(array, np.inf) for array in rows], 0)
  copy.rows.reload()
  with pytest.raises(ValueError, match="not finite, first those of the training example 6:"):
    copy.query(problem.queries, damping=1e-3, **ASKED)
  copy.delete([6])
  assert np.isfinite(copy.query(problem.queries, damping=1e-3, **ASKED).values).all()


def test_a_store_says_how_it_was_made(built):
  assert built.settings["compression"] == ["Uncompressed", {}]
  assert {name: built.settings[name] for name in ("draws", "replicates", "seed")} == {
    "draws": 4,
    "replicates": 2,
    "seed": 5,
  }
  assert built.draws == DRAWS
  chunks = (built.rows.folder / "arrays").glob("leaf_*/c/*/*")
  assert built.num_bytes == sum(path.stat().st_size for path in chunks)


def test_images_of_another_size_are_refused(copy):
  """A convolutional network would take them."""
  larger = nets.random_images(2, (8, 8, 1))
  with pytest.raises(ValueError, match=r"The store is of examples \(4, 4, 1\); got \(8, 8, 1\)"):
    copy.query(Examples(larger), damping=1e-3, **ASKED)
  with pytest.raises(ValueError, match=r"The store is of examples \(4, 4, 1\)"):
    append(copy, larger, [17, 18])
  assert len(copy) == NUM_TRAIN


# --- on disk, again, and whatever a user's flags say ---


def test_a_store_of_arrays_on_disk_is_that_of_arrays_in_memory(problem, built, tmp_path):
  np.save(tmp_path / "train.npy", problem.train.data)
  lazy = Examples(np.load(tmp_path / "train.npy", mmap_mode="r"))
  assert_same_rows(build(problem, tmp_path / "store", train=lazy), built)
  again = build(problem, built.rows.folder, train=Examples(Stored(problem.train.data)))
  assert len(again) == NUM_TRAIN  # which is opened: it is known by what the images are


def test_new_queries_of_the_same_shape_compile_nothing(problem, built):
  ask = lambda seed: built.query(
    Examples(nets.random_images(NUM_QUERIES, seed=seed)), damping=1e-3, **ASKED
  )
  ask(3)
  with counted_compilations() as compilations:
    ask(4)
    built.top(problem.queries, 2, damping=1e-4, **ASKED)
    open_store(built.rows.folder, problem.curvature).query(problem.queries, damping=1.0, **ASKED)
  assert not compilations


@pytest.mark.parametrize(
  "flag",
  [
    lambda: jax.default_prng_impl("rbg"),
    lambda: jax.enable_x64(True),
    lambda: jax.threefry_partitionable(False),
  ],
  ids=["rbg", "x64", "not_partitionable"],
)
def test_global_flags_change_no_row_and_no_score(problem, built, expected, tmp_path, flag):
  with flag():
    store = build(problem, tmp_path)
    found = store.query(problem.queries, damping=1e-3, **ASKED)
  assert_same_rows(store, built)
  assert_scores(found, expected[1])
  assert_scores(found, built.query(problem.queries, damping=1e-3, **ASKED), tolerance=0)
