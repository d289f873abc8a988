"""What is pinned, computed through the library: all contact of the golden tests with its names.

Each function of `SECTIONS`, at the foot, gives arrays by name; a change of names or places in the
library is followed here alone, and leaves every number as it is. Inputs are made from seeds.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxinf import (
  DAS,
  DTRAK,
  EKFAC,
  KFAC,
  TRAK,
  Compute,
  Diagonal,
  DiffusionModel,
  Draws,
  Examples,
  Identity,
  JourneyTRAK,
  Process,
  Projection,
  Schedule,
  Sweep,
  fit_curvature,
  influence_sweep,
  pixel_similarity,
  random_scores,
  random_subsets,
)
from jaxinf import benchmark as proof
from jaxinf.attribution.kernels import Replicate
from jaxinf.benchmark import counterfactuals, evaluating
from jaxinf.benchmark.measuring import retrained
from jaxinf.configs import base, digits_mlp, digits_unet
from jaxinf.core import random as keys_of
from jaxinf.core.augmentation import Augmentation
from jaxinf.core.draws import TIMESTEPS
from jaxinf.core.types import Batch
from jaxinf.curvature.targets import FISHERS, curvature_pairs
from jaxinf.diffusion import noise, sampler
from jaxinf.engine.artifacts import holds, read
from jaxinf.networks.training import Batches
from jaxinf.runs import run as runs
from jaxinf.runs.config import typed
from jaxinf.runs.perform import perform
from jaxinf.runs.sampling import load_samples
from tests import tiny
from tests.nets import conv_model

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SEED = 3
IDS = np.array([0, 1, 7, 2**32 - 1], np.uint32)
NAMES = np.array(["digits_0000", "sample_0003", "cats/tabby.png", "7"])
STREAMS = (
  "init", "train", "dropout", "sample", "curvature", "train_gradients", "query_gradients",
  "measure", "random_scores",
)  # fmt: skip
PARTS = ("t", "noise", "flip", "targets")

Arrays = dict[str, np.ndarray]


# Runs by config, which several sections share.


def digits_run(workdir: Path) -> runs.Run:
  """The multilayer perceptron of tests/tiny.py on 24 digits, which are not mirrored."""
  config = tiny.get_config()
  config.attribute.sweep = (1e-2,)
  config.retrain.steps = config.train.steps  # so that all models share a program
  config.score.measurements = ("loss",)
  config.attribute.compression = "int8"
  config.score.compression = None  # an int8 step may swap ranks, of which few subsets have few
  for section in (config.attribute, config.index, config.score):
    section.loss_power = 1.0  # as when the numbers were kept
  return _run(config, workdir)


def flipped_run(workdir: Path, unet: bool) -> runs.Run:
  """Twelve coloured 8 × 8 images in a file, mirrored at random: an MLP, or the least U-Net."""
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / "images.npz"
  images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
  np.savez(path, images=images)
  config = tiny.get_config()
  config.data.name, config.data.num_examples = "arrays", None
  config.data.path = str(path)
  config.index.compression = None  # an int8 step may swap the best images; digits have int8
  config.attribute.loss_power = config.index.loss_power = 1.0  # as when the numbers were kept
  if unet:
    config.model = base.get_config().model
    config.model.channels, config.model.attention_levels = (4,), (False,)
    config.model.blocks_per_level, config.model.norm_groups = 1, 2
    config.model.dropout = 0.1
    config.curvature.skip = base.get_config().curvature.skip
    config.attribute.compression = None
  return _run(config, workdir, random_flip=True)


def _run(config: ConfigDict, workdir: Path, random_flip: bool = False) -> runs.Run:
  """A run on one device; files of images have no field for flips, so that they are set here."""
  run = runs.Run(typed(config), workdir, jax.devices()[:1])
  if random_flip:
    run.__dict__["dataset"] = dataclasses.replace(run.dataset, random_flip=True)
  return run


def stages(run: runs.Run, *names: str) -> Arrays:
  """The arrays that stages leave, as stage/array; a curvature as `of_basis` gives it."""
  found: Arrays = {}
  for name in names:
    perform(run, name)
    arrays = read(run.folder(name)).arrays
    if name == "curvature":
      layers = sorted({path.rsplit("/", 1)[0] for path in arrays})
      part = lambda layer, field: arrays.get(f"{layer}/{field}")  # noqa: B023
      bases = {
        layer: [part(layer, field) for field in ("q_in", "q_out", "eigenvalues")]
        for layer in layers
      }
      arrays = {f"{x}/{k}": v for x, basis in bases.items() for k, v in of_basis(*basis).items()}
    kept = {key: array for key, array in arrays.items() if key != "train_groups"}  # came later
    found |= {f"{name}/{key}": array for key, array in kept.items()}
  return found


def uncompressed(run: runs.Run) -> Arrays:
  """The scores of the stage `attribute` with query gradients in float32."""
  config = dataclasses.replace(
    run.config, attribute=dataclasses.replace(run.config.attribute, compression=None)
  )
  other = dataclasses.replace(
    run, config=config, folders={"attribute": run.workdir / "attribute-float32"}
  )
  other.__dict__["dataset"] = run.dataset
  arrays = stages(other, "attribute")
  return {name.replace("attribute/", "attribute-float32/"): x for name, x in arrays.items()}


def stored(run: runs.Run) -> Arrays:
  """The best training images of the samples, from the store of the stages `index` and `query`."""
  perform(run, "index")
  samples = read(run.folder("sample")).arrays
  path = run.workdir / "queries.npz"
  np.savez(path, images=samples["images"].clip(-1, 1), ids=samples["ids"])
  asked = dataclasses.replace(run, images=path)
  asked.__dict__["dataset"] = run.dataset
  return {f"query/{name}": x for name, x in perform(asked, "query").arrays.items()}


def of_basis(q_in: np.ndarray | None, q_out: np.ndarray | None, values: np.ndarray) -> Arrays:
  """Λ of one layer, and what the signs of its eigenvectors leave as it is.

  These are Q_in diag(Σ_o Λ) Q_inᵀ, Q_out diag(Σ_i Λ) Q_outᵀ and H V of a fixed V [d_out, d_in].
  """
  found = {"eigenvalues": values}
  rows, columns = values.shape[-2:]
  v = np.cos(np.arange(rows * columns)).reshape(rows, columns)
  if q_in is None or q_out is None:
    return found | {"product": values * v}
  rebuilt = lambda q, w: (q * w[..., None, :]) @ np.swapaxes(q, -1, -2)
  rotated = values * (np.swapaxes(q_out, -1, -2) @ v @ q_in)
  return found | {
    "in": rebuilt(q_in, values.sum(axis=-2)),
    "out": rebuilt(q_out, values.sum(axis=-1)),
    "product": q_out @ rotated @ np.swapaxes(q_in, -1, -2),
  }


# Sections.


def keys(workdir: Path) -> Arrays:
  """Random keys by stream, id and draw, and what designs of draws, batches and samples make."""
  del workdir
  data = lambda key: np.asarray(jax.random.key_data(key))
  numbers = keys_of.example_numbers(NAMES)
  found = {"numbers/strings": numbers, "numbers/integers": keys_of.example_numbers(IDS)}
  for name in STREAMS:
    stream = keys_of.stream(SEED, name)
    examples = keys_of.fold_in_each(stream, jnp.asarray(np.append(IDS, numbers)))
    drawn = [data(keys_of.draw_keys(key, 2, first=5)) for key in examples]
    found |= {f"stream/{name}": data(stream), f"stream/{name}/draws": np.stack(drawn)}
  found |= {f"part/{name}": data(keys_of.substreams(examples, name)) for name in PARTS}
  return found | _designs() | _pairs_of_curvature() | _batches() | _samples_of_noise()


def _designs() -> Arrays:
  """(t, ε) of all designs, and images as drawn: mirrored as the flips say, then noised."""
  process, found = Process.epsilon(Schedule.linear(10, 0.01, 0.5)), {}
  images = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 2, 3, 1)), jnp.float32)
  for timesteps in TIMESTEPS:
    for antithetic in (False, True):
      for shared in (False, True):
        draws = Draws(10, 2, timesteps=timesteps, antithetic=antithetic, shared=shared, seed=SEED)
        ids = np.array([4, 9], np.uint32)
        origin = np.uint32(SEED), np.uint32(keys_of.stream_number("train_gradients"))
        batch = Batch(images, ids, np.array([1, 1], np.int32), np.ones(2, np.float32))
        drawn = Replicate.of(draws).keys(origin, batch)
        pairs = noise.draw_pairs(process, images, drawn, draws, Augmentation(random_flip=True))
        named = f"{timesteps}-antithetic-{antithetic}-shared-{shared}"
        found |= {f"design/{named}/{x}": y for x, y in _noised(pairs).items()}
  return found


def _pairs_of_curvature() -> Arrays:
  """The pairs that curvature is fitted on, with flips, and model-sampled targets of them."""
  images = np.random.default_rng(2).integers(0, 256, (4, 2, 3, 1)).astype(np.uint8)
  batch = Batch(images, jnp.asarray(IDS), jnp.arange(4), np.ones(4, np.float32))
  process = Process.epsilon(Schedule.linear(10, 0.01, 0.5))
  pairs, batch_keys = curvature_pairs(process, SEED, batch, Augmentation(random_flip=True))
  targets = FISHERS["mc"](batch_keys, pairs, 2)(pairs.target)
  return {f"curvature/{x}": y for x, y in _noised(pairs).items()} | {
    "curvature/targets": np.asarray(targets)
  }


def _noised(pairs: noise.Noised) -> Arrays:
  """What the network is given, and the noise that it predicts."""
  named = {"x_t": pairs.inputs, "t": pairs.t, "noise": pairs.target}
  return {name: np.asarray(value) for name, value in named.items()}


def _batches() -> Arrays:
  """Which examples the steps of training see, and which each random subset holds."""
  batches = Batches(num_examples=10, batch_size=4, seed=SEED)
  order = np.stack([batches.examples(step, np.arange(4)) for step in range(8)])
  ids = np.array([f"digits_{n:04d}" for n in range(20)])
  subsets = random_subsets(ids, num_subsets=4, share=0.5, seed=SEED)
  return {"batches": order, "subsets": subsets.membership}


def _samples_of_noise() -> Arrays:
  """Samples of a network that predicts nothing: the sampler's noise alone, not clipped."""
  sample_keys = keys_of.fold_in_each(keys_of.stream(SEED, "sample"), jnp.arange(2))
  nothing = lambda params, x_t, t: 0 * x_t
  process = Process.epsilon(Schedule.linear(5, 0.01, 0.5))
  return {
    f"sampler/{name}": np.asarray(
      sampler.sample(nothing, {}, process, sample_keys, (2, 2, 1), sampler=name, clip=False)[0]
    )
    for name in ("ddpm", "ddim")
  }


def digits(workdir: Path) -> Arrays:
  """Every stage of the MLP on digits, at two dampings, in int8 and in float32."""
  run = digits_run(workdir)
  found = stages(run, "train", "sample", "curvature", "attribute")
  return found | uncompressed(run) | stored(run)


def mirrored(workdir: Path) -> Arrays:
  """The stages up to scores of a U-Net, trained on images mirrored at random.

  Without the bias of attention's keys: its gradient is zero, as softmax does not see it, so that
  training moves it by rounding alone.
  """
  found = stages(flipped_run(workdir, unet=True), "train", "sample", "curvature", "attribute")
  return {k: x for k, x in found.items() if not (k.startswith("train/") and "to_k/bias" in k)}


def benchmark(workdir: Path) -> Arrays:
  """The proof on the digits run: measurements, LDS tables, changes by removal."""
  run = digits_run(workdir)
  proof.benchmark(run)
  proof.counterfactual(run)
  found = {f"measured/{name}": retrained(run, name).values for name in ("loss", "elbo")}
  found |= _tables(read(run.folder("evaluate")).notes["tables"])
  return found | {"counterfactual/change": read(run.folder("counterfactual")).arrays["change"]}


def _tables(tables: Mapping[str, Any]) -> Arrays:
  """LDS of a table's rows: mean, standard error, intervals and the sweep; oracle and ceiling."""
  found: Arrays = {}
  for target, table in tables.items():
    rows = {entry["name"]: entry for entry in table["entries"]}
    summaries = {name: row["default"] for name, row in rows.items()} | {"oracle": table["oracle"]}
    for name, summary in summaries.items():
      numbers = (summary["mean"], summary["std_error"])
      intervals = (*summary["interval"], *summary["interval_both"])
      found[f"lds/{target}/{name}"] = np.array([*numbers, *intervals], np.float64)
      if "sweep" in rows.get(name, {}):
        found[f"lds/{target}/{name}/sweep"] = np.array(rows[name]["sweep"])
    ceiling = table["ceiling"]
    numbers = [ceiling["ceiling"], *ceiling["interval"], ceiling["between_seeds"]]
    found[f"lds/{target}/ceiling"] = np.array(numbers)
  return found


def results(workdir: Path) -> Arrays:
  """The committed results: their tables as `evaluate` reuses them, and part of them made anew.

  Similarities of pixels and random scores take seconds, the others hours; the oracle and the
  ceiling need no scores.
  """
  return {
    f"{name}/{key}": array
    for name, config in (("digits_mlp", digits_mlp), ("digits_unet", digits_unet))
    for key, array in _committed(name, config.get_config(), workdir / name).items()
  }


def _committed(name: str, config: ConfigDict, workdir: Path) -> Arrays:
  shutil.copytree(RESULTS / name, workdir)
  run = _run(config, workdir)
  place = run.folder("evaluate")
  # Otherwise it would begin to score for hours.
  assert holds(place, evaluating.evaluate_key(run)), f"{place} is no longer reused"
  found = {f"reused/{k}": x for k, x in _reused(run).items() if not k.endswith("/sweep")}
  quick = tuple(m for m in ("pixel", "pixel-l2", "random") if m in config.score.methods)
  config.score.methods, config.measure.measurements = quick, ("loss",)
  again = _run(config, workdir)
  proof.evaluate(again)
  return found | {f"again/{k}": x for k, x in _tables(read(place).notes["tables"]).items()}


def _reused(run: runs.Run) -> Arrays:
  before = (run.folder("evaluate") / "manifest.json").stat().st_mtime_ns
  proof.evaluate(run)
  assert (run.folder("evaluate") / "manifest.json").stat().st_mtime_ns == before
  found = _tables(read(run.folder("evaluate")).notes["tables"])
  if (run.folder("counterfactual") / "manifest.json").exists():
    assert holds(run.folder("counterfactual"), counterfactuals.counterfactual_key(run))
    proof.counterfactual(run)
    found["change"] = read(run.folder("counterfactual")).arrays["change"]
  return found


def library(workdir: Path) -> Arrays:
  """Curvatures and scores by function calls, of the MLP that was trained on mirrored images."""
  run = flipped_run(workdir, unet=False)
  found = stages(run, "train", "sample", "curvature") | stored(run)
  model, train = runs.load_model(run), run.train
  queries, ways = load_samples(run), load_samples(run, "trajectories")
  compute, dampings = Compute(devices=run.devices), (1e-4, 1e-2)

  # 1. Curvatures, and scores in one that has no eigenvectors.
  unnamed = dataclasses.replace(train, ids=None)
  curvatures = {name: _fitted(model, unnamed, kind) for name, kind in CURVATURES.items()}
  grey = dataclasses.replace(unnamed, data=train.data[..., :1])
  positions = _fitted(conv_model(), grey, KFAC("reduce"))
  for name, fitted in (*curvatures.items(), ("reduce", positions)):
    for layer, basis in fitted.bases.items():
      arrays = of_basis(*map(_array, (basis.q_in, basis.q_out, basis.eigenvalues)))
      found |= {f"curvature/{name}/{layer}/{key}": value for key, value in arrays.items()}

  # 2. Influence: measurements, designs, compressions and ways to choose the number of draws.
  draws, asked = Draws(4, 2, seed=SEED, loss_power=1.0), Draws(8, 2, seed=SEED)
  own = Draws(4, 2, "uniform", antithetic=False, shared=False, seed=SEED, loss_power=1.0)
  stable = Draws.until_stable(seed=SEED).of_power(1.0)
  rounds = Draws.until_stable(
    top_k=3, agreement=0.95, most=16, replicates=2, size=2, seed=SEED
  ).of_power(1.0)
  cases: dict[str, dict[str, Any]] = {
    "loss": {},
    "elbo": {"compression": "int8"},
    "simple_elbo": {"draws": own},
    "square_norm": {"draws": stable, "query_draws": asked},
    "loss_at_timestep(3)": {"draws": rounds, "query_draws": asked},
    "trajectory": {},
  }
  kfac = runs.load_curvature(run, model)
  for name, fitted, options in (
    *((name, kfac, options) for name, options in cases.items()),
    ("loss", curvatures["diagonal"], {}),
  ):
    arguments = {"draws": draws, "compression": None} | options
    scores = influence_sweep(
      fitted,
      queries=ways if name == "trajectory" else queries,
      train=train,
      dampings=dampings,
      measurement=name,
      compute=compute,
      **arguments,
    )
    label = name if fitted is kfac else "diagonal"
    found |= _scores(f"influence/{label}", scores)
    found[f"influence/{label}/draws"] = np.array([x.settings["draws"] for x in scores])

  # 3. Methods of projected gradients, and those that see no model.
  signs, normal = Projection(64, SEED), Projection(64, SEED, "normal")
  methods = {
    "trak": TRAK(model, signs, dampings),
    "dtrak": DTRAK(model, normal, dampings),
    "das": DAS(model, signs, dampings),
    "journey-trak": JourneyTRAK(model, signs, (4, 12), dampings),
  }
  for name, method in methods.items():
    asked_of = ways if name == "journey-trak" else queries
    scores = method.scores(queries=asked_of, train=train, draws=draws, compute=compute)
    found |= _scores(name, scores)
  for metric in ("cosine", "l2"):
    alike = pixel_similarity(queries=queries, train=train, metric=metric)
    found |= _scores(f"pixel/{metric}", Sweep((alike,)))
  chance = random_scores(queries=queries, train=train, seed=SEED)
  return found | _scores("random", Sweep((chance,)))


CURVATURES = {
  "empirical": KFAC(fisher="empirical"),
  "exact": KFAC(fisher="exact"),
  "ekfac": EKFAC(samples=2),
  "diagonal": Diagonal(),
  "identity": Identity(),
}


def _fitted(model: DiffusionModel, train: Examples, kind: Any) -> Any:
  compute = Compute(devices=jax.devices()[:1])
  return fit_curvature(model, train, kind, draws=Draws(3, seed=SEED), skip=(), compute=compute)


def _array(values: Any) -> np.ndarray | None:
  return None if values is None else np.asarray(values)


def _scores(name: str, found: Sequence[Any]) -> Arrays:
  """Values of the replicates of draws at each damping."""
  arrays = {f"{name}/groups": np.stack([scores.replicate_values for scores in found])}
  if found[0].query_replicate_values is not None:
    arrays[f"{name}/query-groups"] = np.stack([scores.query_replicate_values for scores in found])
  return arrays


# Name → (what computes it, the section whose folder it goes on from or None).
SECTIONS: dict[str, tuple[Callable[[Path], Arrays], str | None]] = {
  "keys": (keys, None),
  "digits": (digits, None),
  "mirrored": (mirrored, None),
  "library": (library, None),
  "benchmark": (benchmark, "digits"),
  "results": (results, None),
}
