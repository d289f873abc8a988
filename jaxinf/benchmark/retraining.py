"""Which models a proof retrains, and training them: each one an artefact of its own.

A model is known by its name, such as `subset-0003-seed-1`, and its key holds all it depends on, so
that more subsets or seeds extend what is there, and shards trained on several machines add up when
their folders are put together.
"""

import dataclasses
import hashlib
import logging
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np

from jaxinf.core.types import Params
from jaxinf.data.subsets import Subsets, random_subsets
from jaxinf.engine import artifacts, num_devices, processes
from jaxinf.engine.progress import clock
from jaxinf.engine.resources import measured
from jaxinf.networks.retraining import Member, Retraining
from jaxinf.networks.training import Hooks, TrainConfig, TrainState
from jaxinf.runs.run import SEED_STEP, Run, key_of, own_settings

_LOG = logging.getLogger("jaxinf")


@dataclasses.dataclass(frozen=True)
class Spec:
  """A model to retrain.

  Attributes:
    name: of its folder.
    member: the examples it trains on, and their weights.
    seed: k, from 0; training takes the run's seed + 1 + k, so that none is the attributed model's,
      but for −1 where retrain.same_batches asks for it.
    steps: of training.
  """

  name: str
  member: Member
  seed: int
  steps: int


def subset_name(subset: int | None, seed: int) -> str:
  """The name of the model of a subset (None: all training images) with training seed k."""
  which = "full" if subset is None else f"subset-{subset:04d}"
  return f"{which}-seed-{seed}"


def subsets_of(run: Run) -> Subsets:
  """The random subsets of the run's training images."""
  config = run.config.retrain
  return random_subsets(
    run.dataset.ids, num_subsets=config.num_subsets, share=config.share, seed=run.config.seed
  )


def subset_specs(run: Run) -> list[Spec]:
  """The models of all images, then those of each subset, every one with each of the seeds."""
  config, subsets = run.config.retrain, subsets_of(run)
  everyone = np.arange(len(run.dataset))
  seeds = range(config.num_seeds)
  if config.num_seeds < 1:
    raise ValueError(f"retrain.num_seeds must be at least 1; got {config.num_seeds}.")
  if run.config.train.num_models > 1 and config.num_seeds >= SEED_STEP:
    raise ValueError(
      f"retrain.num_seeds must be below {SEED_STEP} where train.num_models is above 1, because "
      f"further models are trained with seeds {SEED_STEP} apart; got {config.num_seeds}."
    )
  if not 0 <= config.outside_weight < 1:
    raise ValueError(
      f"retrain.outside_weight must lie in [0, 1); got {config.outside_weight}. 0 removes images."
    )
  full = run.config.train.steps
  if config.same_batches:
    return _same_batches(run, subsets)
  specs = [Spec(subset_name(None, k), Member(everyone), k, full) for k in seeds]
  for number, inside in enumerate(subsets.membership):
    if config.outside_weight:
      weights = np.where(inside, 1.0, config.outside_weight).astype(np.float32)
      member, steps = Member(everyone, weights), full
    else:
      member, steps = Member(np.flatnonzero(inside)), config.steps
    specs += [Spec(subset_name(number, k), member, k, steps) for k in seeds]
  return specs


def _same_batches(run: Run, subsets: Subsets) -> list[Spec]:
  """The attributed model's training again, with weights: its seed, its batches, and all its steps.

  The model of all images is trained again as well, beside the others, so that they differ in their
  weights alone and not in the order of sums.
  """
  config, everyone = run.config.retrain, np.arange(len(run.dataset))
  if config.num_seeds != 1:
    raise ValueError(
      "retrain.same_batches trains with the seed of the attributed model, of which there is one; "
      f"got retrain.num_seeds={config.num_seeds}: set it to 1."
    )
  weights = [np.ones(len(everyone)), *np.where(subsets.membership, 1.0, config.outside_weight)]
  names = [subset_name(None, 0), *(subset_name(m, 0) for m in range(len(subsets.membership)))]
  return [
    Spec(name, Member(everyone, own.astype(np.float32)), -1, run.config.train.steps)
    for name, own in zip(names, weights, strict=True)
  ]


def folder(run: Run, stage: str) -> Path:
  """The folder of a stage on retrained models; those with weights are kept apart."""
  config = run.config.retrain
  stage += "-same-batches" if config.same_batches else ""
  weight = config.outside_weight
  return run.folder(f"{stage}-weight-{weight:g}" if weight else stage)


def train_config(run: Run, steps: int) -> TrainConfig:
  """The settings of `train` for another number of steps: warm-up is the same share of them."""
  config = run.config.train
  warmup = round(config.warmup_steps * steps / config.steps)
  return dataclasses.replace(config, steps=steps, warmup_steps=warmup)


def common_key(run: Run) -> dict:
  """What every retrained model depends on, besides its examples, seed and steps."""
  key = {name: value for name, value in key_of(run, "train").items() if name != "train"}
  own = own_settings(run, "train")
  return key | {
    "train": {k: v for k, v in own.items() if k not in ("steps", "warmup_steps")},
    "warmup_share": run.config.train.warmup_steps / run.config.train.steps,
  }


def model_key(run: Run, spec: Spec) -> dict:
  """What one retrained model depends on."""
  digest = hashlib.sha256(np.asarray(spec.member.examples, np.int64).tobytes())
  if spec.member.weights is not None:
    digest.update(np.asarray(spec.member.weights, np.float32).tobytes())
  examples = {"number": len(spec.member.examples), "hash": digest.hexdigest()[:32]}
  return common_key(run) | {"examples": examples, "training_seed": spec.seed, "steps": spec.steps}


def load_params(run: Run, name: str, stage: str = "retrain") -> Params:
  """The EMA parameters of a retrained model."""
  arrays = artifacts.read(folder(run, stage) / name).arrays
  return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")


def missing(run: Run, specs: Sequence[Spec], stage: str = "retrain") -> list[Spec]:
  """The models that are not trained yet; StaleArtifact where one was trained otherwise."""
  root = folder(run, stage)
  return [s for s in specs if not artifacts.finished(root / s.name, model_key(run, s))]


def train_models(
  run: Run,
  specs: Sequence[Spec],
  *,
  stage: str = "retrain",
  done: Collection[str] = (),
) -> list[Spec]:
  """Trains those models of the run's shard that are missing; returns all that are still missing.

  Every n-th model belongs to a shard, whatever is there already, so that shards on one folder never
  train the same model.

  Args:
    run: with its shard.
    specs: all models, the same in every shard.
    stage: folder of the models.
    done: names of models that are needed no more.

  Raises:
    ValueError: impossible settings, several processes, or a model whose loss diverges.
  """
  if processes.count() > 1:
    raise ValueError(
      "Retraining splits over machines by --shard: start each alone, as with --shard=0/2."
    )
  at_once = run.config.retrain.models_at_once
  if at_once < 1:
    raise ValueError(f"retrain.models_at_once must be at least 1; got {at_once}.")
  needed = [spec for spec in specs if spec.name not in done]
  absent = {spec.name for spec in missing(run, needed, stage)}
  index, num_shards = run.shard
  groups = list(groups_of(specs[index::num_shards], at_once * num_devices(run.devices)))
  groups = [group for group in groups if any(spec.name in absent for spec in group)]
  total = sum(spec.name in absent for group in groups for spec in group)
  if total:
    _LOG.info("%s: %d models to train, in %d groups", stage, total, len(groups))
  engines: dict[int, Retraining] = {}
  num_done = 0
  for group in groups:
    todo = [spec for spec in group if spec.name in absent]
    if _unfinished(run, group, stage).exists():  # it was stopped with all of them under way
      todo = group
    steps = group[0].steps
    if steps not in engines:
      engines[steps] = Retraining(
        run.model, run.process, run.train, train_config(run, steps), run.devices
      )
    with measured() as cost:
      state, loss = _train_group(run, engines[steps], todo, stage, f"{stage} {num_done}/{total}")
    _save(run, todo, state, stage, cost, loss)
    shutil.rmtree(_unfinished(run, todo, stage), ignore_errors=True)  # only now: they are safe
    num_done += len(todo)
    took = clock(cost["seconds"])
    _LOG.info("%s: %d of %d models, the last %d in %s", stage, num_done, total, len(todo), took)
  left = missing(run, needed, stage)
  if not left:  # of groups that were put together otherwise
    shutil.rmtree(folder(run, stage) / "unfinished", ignore_errors=True)
  return left


def groups_of(specs: Sequence[Spec], at_once: int) -> Iterator[list[Spec]]:
  """Models that train together: of one seed and number of steps, in groups of about equal size."""
  alike: dict[tuple, list[Spec]] = {}
  for spec in specs:
    weighted = spec.member.weights is not None
    alike.setdefault((spec.steps, spec.seed, weighted), []).append(spec)
  for together in alike.values():
    num = math.ceil(len(together) / at_once)
    size = math.ceil(len(together) / num)
    yield from (together[i : i + size] for i in range(0, len(together), size))


def _unfinished(run: Run, group: Sequence[Spec], stage: str) -> Path:
  """Where the checkpoints of a group lie while it trains."""
  keys = [model_key(run, spec) for spec in group] + [{"devices": num_devices(run.devices)}]
  return folder(run, stage) / "unfinished" / artifacts.fingerprint_of(artifacts.plain(keys))


def _train_group(
  run: Run, engine: Retraining, group: Sequence[Spec], stage: str, label: str
) -> tuple[TrainState, float]:
  """The trained states of a group, going on from its checkpoint, and their last mean loss."""
  checkpoints = artifacts.Checkpoints(_unfinished(run, group, stage))
  seed = run.config.seed + 1 + group[0].seed
  members = [spec.member for spec in group]
  losses: list[float] = []
  hooks = Hooks(save=checkpoints.save, log=lambda step, metrics: losses.append(metrics["loss"]))
  try:
    step, state = checkpoints.latest(), None
    if step is not None:
      state = checkpoints.restore(step, engine.start(len(members), seed))
      _LOG.info("%s: resuming a group of %d models at step %d", stage, len(group), step)
    state = engine.fit(members, seed=seed, state=state, hooks=hooks, label=label)
  finally:
    checkpoints.close()
  return state, losses[-1]


def _save(
  run: Run, group: Sequence[Spec], state: TrainState, stage: str, cost: dict, loss: float
) -> None:
  """Writes every model of a group; their notes hold the group's last mean training loss."""
  share = cost | {"seconds": round(cost["seconds"] / len(group), 2), "models_at_once": len(group)}
  for number, spec in enumerate(group):
    params = jax.tree.map(lambda x: x[number], state.ema_params)  # noqa: B023
    arrays = flax.traverse_util.flatten_dict(params, sep="/")
    place, notes = folder(run, stage) / spec.name, {"mean_last_loss": loss}
    artifacts.write(place, model_key(run, spec), arrays, notes=notes, cost=share)
