"""What the stage attribute takes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import score_kernel
from jaxinf.attribution.queries import query_rows
from jaxinf.compression.compression import Compression, compression_named
from jaxinf.core.types import PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.layers.specs import Layer
from jaxinf.planning.cost import StageCost
from jaxinf.planning.gradients import Draws, Gradients, try_on_gradients
from jaxinf.planning.subject import Subject, random_basis
from jaxinf.planning.trials import Call, Trial, added, random_like, times

_OPERAND_BYTES = 2**30  # of query rows in a trial, which more of them are scaled from
_CHECKED = 32  # training images that are scored in float32 too


@dataclasses.dataclass(frozen=True)
class _Scoring:
  """The score kernel, for a batch of gradients.

  Attributes:
    trial: of as many query rows as were tried.
    seconds: for all query rows.
    operations: likewise, on all local devices.
    row_bytes: of one query row.
    in_block: query rows of a block, of which one at a time is on the devices.
  """

  trial: Trial
  seconds: float | None
  operations: float | None
  row_bytes: int
  in_block: int


def attribute_cost(subject: Subject, found: Gradients) -> StageCost:
  """Gradients of queries, then of training images past them."""
  run, config = subject.run, subject.run.config.attribute
  draws = Draws.of(config)
  num_train, num_queries = len(subject.ids), run.config.sample.num_samples
  dampings = 1 + len(config.sweep)
  rows = num_queries * config.query_groups * dampings
  compression = compression_named(config.compression, config.compression_size)
  blocks = min(config.query_blocks, rows)

  # 1. Query rows: gradients, preconditioned and compressed.
  asked = draws.query_draws // config.query_groups
  query_size, query_batches = subject.batches(
    num_queries * config.query_groups, max(1, config.batch_size // asked)
  )
  preparing = _preparing(subject, compression, query_size, query_batches, dampings)

  # 2. Training gradients and scores; then a sample of them once more, to check the compression.
  scoring = _try_scores(subject, compression, found.size, rows, blocks)
  num_rows = num_train * config.draw_groups
  batches = draws.rounds * subject.batches(num_rows, found.size)[1]
  checks = config.compression is not None or config.precision is not None
  sample = min(num_train, max(_CHECKED, math.ceil(found.size / config.draw_groups)))
  checked = math.ceil(sample * config.draw_groups / found.size) if checks else 0
  pairs = (batches + checked) * found.size * draws.group_size + query_batches * query_size * asked
  compilations = 1 + checks, 2 + (config.precision is not None)  # of scores, of gradients

  products = 4 * num_rows * rows
  of_queries = config.query_groups if config.query_groups > 1 else 0
  scores = 4 * num_queries * num_train * dampings * (config.draw_groups + of_queries)
  seconds = added([found.seconds_of(pairs), times(scoring.seconds, batches)])
  return StageCost(
    "attribute", num_rows * draws.group_size * draws.rounds + num_queries * draws.query_draws,
    "pairs",
    operations=added([found.operations_of(pairs), times(scoring.operations, batches)]),
    seconds={
      "compiling": subject.registering + preparing.first
      + scoring.trial.compiling * compilations[0] + found.trial.compiling * compilations[1],
      "batches": None if run.config.curvature.method == "cg" else seconds,
      "preconditioning": preparing.again,
      "disk": (scores + products) / subject.disk_rate,
    },
    device={
      "parameters": subject.params_bytes,
      "rows of queries": scoring.in_block * scoring.row_bytes,
      "eigenvalues": subject.gradient_bytes,
      "gradients": blocks * found.size // len(subject.devices) * subject.gradient_bytes,
      "workspace": max(found.trial.workspace, scoring.trial.workspace),
    },
    host={
      "images": subject.images_bytes, "eigenbases": subject.eigenbases_bytes,
      "rows of queries": rows * scoring.row_bytes, "scores": products + scores,
    },
    disk={"scores": scores, "partial scores": products},
    notes=_notes(subject),
  )  # fmt: skip


def _try_scores(
  subject: Subject, compression: Compression, size: int, rows: int, blocks: int
) -> _Scoring:
  """Tries the scores of `size` gradients for `rows` query rows in so many blocks."""
  in_block = math.ceil(rows / blocks)
  row_bytes = sum(compression.num_bytes(layer.matrix_shape) for layer in subject.model.layers)
  tried = max(1, min(in_block, _OPERAND_BYTES // max(row_bytes, subject.gradient_bytes)))
  operands = _random_rows(subject, compression, tried)
  trial, operations = try_on_gradients(subject, score_kernel(compression), operands, size)
  moving = trial.placing if blocks > 1 else 0.0  # a block comes once for as many batches
  seconds = None if trial.batch is None else (trial.batch * blocks + moving) * in_block / tried
  return _Scoring(trial, seconds, times(operations, rows / tried), row_bytes, in_block)


def _random_rows(subject: Subject, compression: Compression, num: int) -> PyTree:
  """`num` random compressed rows of queries, and eigenvalues, as the score kernel takes them."""

  def of(layer: Layer) -> PyTree:
    shape = layer.matrix_shape
    rows = jax.ShapeDtypeStruct((num, *shape), jnp.float32)
    eigenvalues = jax.ShapeDtypeStruct(shape, jnp.float32)
    return random_like((jax.eval_shape(compression.compress, rows, eigenvalues), eigenvalues))

  return {layer.name: of(layer) for layer in subject.model.layers}


def _preparing(
  subject: Subject, compression: Compression, size: int, batches: int, dampings: int
) -> Call:
  """Seconds for compiling what makes query rows of gradients, and for running it on all."""
  alike: dict[tuple, list[Layer]] = {}
  for layer in subject.model.layers:
    alike.setdefault((layer.matrix_shape, layer.structure), []).append(layer)
  compiling = computing = 0.0
  for layers in alike.values():
    call = _prepared(subject, layers[0], compression, size, dampings)
    compiling += (call.first - call.again) * min(2, batches)  # the last batch has fewer rows
    computing += call.again * len(layers) * batches
  return Call(compiling, computing)


def _prepared(
  subject: Subject, layer: Layer, compression: Compression, size: int, dampings: int
) -> Call:
  """Seconds for the query rows of one layer and batch."""
  basis = jax.tree.map(lambda x: x.astype(np.float64), random_basis(layer))
  curvature = Curvature((layer,), {layer.name: basis}, subject.model.coverage, subject.task, {})
  grads = random_like({layer.name: jax.ShapeDtypeStruct((size, *layer.matrix_shape), jnp.float32)})
  values = tuple(1e-3 * 2.0**i for i in range(dampings))
  return subject.watch.call(
    lambda: (
      query_rows(
        curvature, iter([grads]), num_rows=size, dampings=values, compression=compression
      ).compressed
    )
  )


def _notes(subject: Subject) -> tuple[str, ...]:
  config = subject.run.config
  found = []
  if config.attribute.auto_draws:
    found.append("with attribute.auto_draws this is the most; it may stop after fewer draws.")
  if config.curvature.method == "cg":
    found.append("how long the exact curvature's solves take is not known beforehand.")
  return tuple(found)
