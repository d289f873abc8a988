"""What the stages of the main line take, and the index."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.influence import AUTO
from jaxinf.compression.compression import QUERY_COMPRESSION, compression_named
from jaxinf.curvature.fit import partition
from jaxinf.curvature.kinds import ExactGGN
from jaxinf.curvature.memory import LayerMemory, layer_memory
from jaxinf.curvature.products import AT_ONCE, ProductKernel
from jaxinf.engine import processes
from jaxinf.engine.rehearsal import Rehearsal, num_operations
from jaxinf.engine.worklist import Rows
from jaxinf.planning.cost import StageCost
from jaxinf.planning.reduced import Reduced, Subject, examples_of_batches, keep
from jaxinf.runs.run import fresh_model, kind_of_config
from jaxinf.runs.stage import STAGES
from jaxinf.runs.stages import draws_of
from jaxinf.store.packing import Packing
from jaxinf.store.rows import RowStore

OFTEN = {"log_every": 2}  # steps of training, between two looks at the clock
_SAMPLING_STEPS = 10  # rehearsed
CHECKED = 33  # training examples: one more than the check of compression takes


def train_cost(subject: Subject) -> StageCost:
  """Steps, and the state that they change: parameters, their EMA, and two moments of Adam."""
  config = subject.run.config.train
  often = {**OFTEN, "checkpoint_every": config.steps}
  run = subject.reduced("train", config.batch_size, train=often)
  with subject.rehearsal(run) as found:
    STAGES["train"].function(run)
  state, written = subject.state_bytes, subject.params_bytes
  saves = math.ceil(config.steps / config.checkpoint_every)
  return cost_of(
    subject, "train", config.steps, "steps", found,
    written=saves * state + written,
    device={"state": state - written, "gradients": written},  # parameters are part of the state
    host={"state": state},
    disk={"checkpoints": min(2, saves) * state, "parameters": written},
  )  # fmt: skip


def sample_cost(subject: Subject) -> StageCost:
  """Samples, by a few steps of the sampler."""
  config, steps = subject.run.config.sample, subject.sampling_steps
  tried = min(steps, _SAMPLING_STEPS)
  run = subject.reduced("sample", 2, 4 * config.batch_size, sample={"num_steps": tried})
  with subject.rehearsal(run, math.ceil(config.num_samples * steps / tried)) as found:
    STAGES["sample"].function(run)
  size = math.ceil(min(config.batch_size, config.num_samples) / subject.num_devices)
  each = 4 * math.prod(run.shape) * (1 + (steps + 1) * config.keep_trajectory)
  each += 4 * math.prod(run.dataset.image_shape) * run.is_latent  # decoded
  written = config.num_samples * each
  cost = cost_of(
    subject, "sample", config.num_samples, "samples", found,
    written=written,
    device={"images": size * each},
    host={"images": subject.images_bytes + written},
    disk={"images": written},
  )  # fmt: skip
  forward = _forward_operations(subject, size)  # the sampler's own are in a loop
  calls = steps * math.ceil(config.num_samples / (size * subject.num_devices))
  calls *= 1 if config.guidance_scale == 1 else 2  # with the conditioning, and without
  operations = None if forward is None else forward * calls * subject.num_devices
  return dataclasses.replace(cost, operations=operations)


def _forward_operations(subject: Subject, size: int) -> float | None:
  """Of the network on so many examples."""
  model, one = fresh_model(subject.run), subject.run.stand_in
  struct = jax.ShapeDtypeStruct
  given = jax.tree.map(lambda x: struct((1, size, *x.shape), x.dtype), one.conditioning_structs)
  return num_operations(
    lambda params, x, t, *given: model.apply_fn(params, *model.process.inputs(x, t), *given),
    (
      jax.tree.map(lambda p: struct((1, *p.shape), p.dtype), model.params),
      struct((1, size, *one.shape), jnp.float32),
      struct((1, size), jnp.int32 if model.process.is_discrete else jnp.float32),
      *([] if one.conditioning is None else [given]),
    ),
  )


def curvature_cost(subject: Subject) -> tuple[StageCost, Reduced]:
  """The passes of a fit and the decomposition of factors; and the run, to go on with it."""
  config, kind = subject.run.config.curvature, kind_of_config(subject.run.config.curvature)
  draws, asked = (d.split() for d in draws_of(subject.run))
  attribute = subject.run.config.attribute
  compute = subject.run.compute(attribute.batch_size)
  examples = max(
    CHECKED,
    examples_of_batches(config.batch_size, config.draws),
    examples_of_batches(compute.rows(draws), draws.replicates or 1),
  )
  row = query_row_bytes(subject, attribute.compression, attribute.compression_size)
  row *= (asked.replicates or 1) * (1 + len(attribute.sweep))
  queries = examples_of_batches(compute.rows(asked), asked.replicates or 1, row)
  run = subject.reduced("curved", examples, queries, states=True)
  with subject.rehearsal(run) as found:
    arrays, notes, _ = STAGES["curvature"].function(run)
  keep(run, "curvature", arrays, notes=notes)
  memory = memory_of(subject)
  groups = partition(subject.layers.layers, config.partitions)
  most = lambda field: max(
    sum(getattr(m, field) for m in memory if m.layer.name in names) for names in groups
  )
  bases, passes = sum(m.eigenbasis for m in memory), kind.passes * (1 + kind.corrects)
  kept = most("sums") * subject.num_devices if passes else 0
  num = len(subject.run.dataset) * config.draws
  saves = math.ceil(num / config.batch_size / config.checkpoint_every) * len(groups) * passes
  exact = ("nothing is fitted for the exact curvature: the solves of attribute take the time.",)
  return cost_of(
    subject, "curvature", num, "pairs", found,
    written=bases + saves * kept,
    device={"sums": most("sums"), "rotations": most("rotations")},
    host={"sums": kept, "eigenbases": bases},
    disk={"eigenbases": bases, "partial sums": kept},
    notes=exact if isinstance(kind, ExactGGN) and not kind.passes else (),
  ), run  # fmt: skip


def attribute_cost(subject: Subject, curved: Reduced) -> StageCost:
  """Gradients of queries, then of training examples past them.

  Args:
    subject: the run.
    curved: the reduced run, with its curvature.
  """
  run, config = subject.run, subject.run.config.attribute
  draws, asked = (d.split() for d in draws_of(run))
  compute = run.compute(config.batch_size, query_chunk=config.query_chunk)
  num_train, num_queries = len(run.dataset), run.config.sample.num_samples
  rounds = max(1, config.draws // draws.num)
  exact = isinstance(kind_of_config(run.config.curvature), ExactGGN)
  few = curved.config.sample.num_samples
  chunk = config.query_chunk and max(1, config.query_chunk * few // num_queries)
  changed = dataclasses.replace(config, query_chunk=chunk, draws=draws.num)
  reduced = dataclasses.replace(
    curved, config=dataclasses.replace(curved.config, attribute=changed)
  )
  if exact:  # whose solves take as long as they take
    reduced = _with_identity(subject, reduced)
  with subject.rehearsal(reduced, num_train=num_train * rounds, scores=True) as found:
    STAGES["attribute"].function(reduced)

  groups, query_replicates = draws.replicates or 1, asked.replicates or 1
  dampings, num_rows = 1 + len(config.sweep), num_train * groups
  rows = num_queries * query_replicates * dampings
  row = query_row_bytes(subject, config.compression, config.compression_size)
  blocks = min(compute.query_blocks(num_queries), rows)
  products = 4 * num_rows * rows
  of_queries = query_replicates if query_replicates > 1 else 0
  scores = 4 * num_queries * num_train * dampings * (groups + of_queries)
  size = min(math.ceil(compute.rows(draws) / subject.num_devices), num_rows)
  cost = cost_of(
    subject, "attribute", num_rows * draws.size * rounds + num_queries * asked.num, "pairs", found,
    written=scores + products,
    device={
      "rows of queries": math.ceil(rows / blocks) * row,
      "eigenvalues": subject.gradient_bytes,
      "gradients": blocks * size * subject.gradient_bytes,
    },
    host={
      "eigenbases": eigenbases_bytes(subject),
      "rows of queries": rows * row, "scores": products + scores,
    },
    disk={"scores": scores, "partial scores": products},
    notes=_attribute_notes(subject, query_replicates * dampings if exact else 0),
  )  # fmt: skip
  return dataclasses.replace(cost, seconds={**cost.seconds, "batches": None}) if exact else cost


def _with_identity(subject: Subject, run: Reduced) -> Reduced:
  """The same with the identity for its curvature."""
  identity = dataclasses.replace(run.config.curvature, kind="identity")
  run = dataclasses.replace(
    run,
    config=dataclasses.replace(run.config, curvature=identity),
    folders={"curvature": subject.folder / "identity"},
  )
  arrays, notes, _ = STAGES["curvature"].function(run)
  keep(run, "curvature", arrays, notes=notes)
  return run


def _attribute_notes(subject: Subject, solves: int) -> tuple[str, ...]:
  """On draws, and on the exact curvature's solves, of which each query has so many."""
  most = ("with attribute.auto_draws this is the most; it may stop after fewer draws.",)
  notes = most * subject.run.config.attribute.auto_draws
  return (*notes, solves_note(subject, solves)) if solves else notes


def solves_note(subject: Subject, solves: int) -> str:
  """What a query's solves with the exact curvature take at most: products × pairs × FLOPs."""
  config = subject.run.config.curvature
  pairs = len(subject.run.dataset) * config.draws
  if config.solver.method == "stochastic":
    pairs = min(pairs, config.solver.step_pairs)
  products = solves * (config.solver.max_iterations + 1)
  each = _product_operations(subject)
  flops = "" if each is None else f", {products * pairs * each:.1e} FLOPs"
  return (
    f"a query takes at most {products:,} products with the exact curvature over {pairs:,} pairs"
    f"{flops}; how long solves take is not known beforehand."
  )


def _product_operations(subject: Subject) -> float | None:
  """Of a product with the exact curvature over one pair, where several share the network."""
  model, struct = fresh_model(subject.run), jax.ShapeDtypeStruct
  found = (position for layer in subject.layers.layers for position in (layer.kernel, layer.bias))
  covered = tuple(sorted(position for position in found if position is not None))
  leaves = jax.tree.leaves(model.params)
  one = lambda tree: jax.tree.map(lambda x: struct((1, *np.shape(x)), x.dtype), tree)
  operands = (
    one(model.params),
    [struct((1, AT_ONCE, *leaves[i].shape), jnp.float32) for i in covered],
    struct((1,), jnp.int32),
    struct((1,), jnp.uint32),
  )
  batch = one(Rows.of(subject.run.stand_in, 1).padded_batch(0, 1))
  operations = num_operations(
    ProductKernel(model.apply_fn, model.process, covered), (operands, batch)
  )
  return None if operations is None else operations / AT_ONCE


def index_cost(subject: Subject, curved: Reduced) -> StageCost:
  """Gradients of training examples, in the eigenbasis, compressed and written."""
  config, num_train = subject.run.config.index, len(subject.run.dataset)
  draws = subject.run.draws(config.draws, config.replicates, config.design).split()
  groups, size = draws.replicates or 1, subject.run.compute(config.batch_size).rows(draws)
  run = subject.reduced("index", examples_of_batches(size, groups), index={"reserve_mib": 0})
  run = dataclasses.replace(run, folders={"curvature": curved.folder("curvature")})
  with subject.rehearsal(run) as found:
    STAGES["index"].function(run)
  compression = compression_named(config.compression, config.compression_size)
  matrices = {layer.name: layer.matrix_shape for layer in subject.layers.layers}
  packing = Packing.of(compression, matrices)
  rows, chunk = store_bytes(subject, packing, groups)
  bases = eigenbases_bytes(subject)
  each = math.ceil(min(size, num_train * groups) / subject.num_devices)
  return cost_of(
    subject, "index", num_train * config.draws, "pairs", found,
    written=rows // processes.count(),
    device={
      "rotations": bases // 2,
      "gradients": each * (subject.gradient_bytes + packing.row_bytes),
    },
    host={
      "eigenbases": bases, "rotations": bases // 2,
      "rows": 2 * chunk,  # those that wait, and those being written
    },
    disk={"rows": rows},
  )  # fmt: skip


def cost_of(
  subject: Subject,
  stage: str,
  amount: int,
  unit: str,
  found: Rehearsal,
  *,
  device: Mapping[str, int],
  host: Mapping[str, int],
  disk: Mapping[str, int],
  written: int = 0,
  notes: tuple[str, ...] = (),
) -> StageCost:
  """The cost of a stage that was rehearsed; the rest as for `StageCost`.

  Args:
    written: bytes that go to the disk, over and over perhaps.
  """
  operations = found.operations
  return StageCost(
    stage, amount, unit,
    operations=None if operations is None else operations * subject.num_devices,
    seconds={
      "compiling": found.compiling,
      "batches": found.seconds,
      "besides": found.besides + found.decomposing,
      "disk": written / subject.disk_rate,
    },
    device={
      "parameters": subject.params_bytes, **device,
      "workspace": found.workspace_in_full,
    },
    host={"images": subject.images_bytes, **host},
    disk=disk,
    notes=notes,
  )  # fmt: skip


def query_row_bytes(subject: Subject, compression: str | None, size: float | None) -> int:
  """Of one row of a query's compressed gradients; of "auto", in the precision it takes first."""
  found = compression_named(QUERY_COMPRESSION if compression == AUTO else compression, size)
  return sum(found.num_bytes(layer.matrix_shape) for layer in subject.layers.layers)


def store_bytes(subject: Subject, packing: Packing, groups: int) -> tuple[int, int]:
  """Bytes of a store of all training examples, and of one chunk of it."""
  num = len(subject.run.dataset)
  place = subject.folder / f"empty{processes.suffix()}"  # an empty store knows its chunks
  store = RowStore.create(place, {}, packing.widths, packing.dtypes, groups)
  names = np.array([f"{n}" for n in range(num)])
  full = dataclasses.replace(store, ledger=store.ledger.extended(names, names))
  return full.num_bytes, store.ledger.chunk_rows * packing.row_bytes


def eigenbases_bytes(subject: Subject) -> int:
  """Of all layers, float64."""
  return sum(layer.eigenbasis for layer in memory_of(subject))


def memory_of(subject: Subject) -> tuple[LayerMemory, ...]:
  """What the curvature of each layer takes."""
  config, train = subject.run.config.curvature, subject.run.stand_in
  each = math.ceil(config.batch_size / subject.num_devices)
  row = Rows.of(train, 1).padded_batch(0, 1)
  kind, model = kind_of_config(config), fresh_model(subject.run)
  return layer_memory(
    subject.layers, model, row, kind, batch_size=each, augmentation=train.augmentation
  )
