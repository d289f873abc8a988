"""Fits curvature to a model: passes over (example, draw) pairs (paper, Section 3.1)."""

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.core.arrays import fingerprint
from jaxinf.core.augmentation import Augmentation
from jaxinf.core.checks import checked_count
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.registry import named
from jaxinf.core.types import Batch, Eigenbasis, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.decompose import DECOMPOSERS, decomposed
from jaxinf.curvature.kinds import KFAC, ExactGGN, Kind, settings_of
from jaxinf.curvature.saving import exact_curvature
from jaxinf.curvature.targets import FISHERS, check_exact, curvature_pairs
from jaxinf.diffusion.content import content_of
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import Noised
from jaxinf.diffusion.process import Process
from jaxinf.engine import processes
from jaxinf.engine.checkpoints import PartialSums
from jaxinf.engine.compute import Compute
from jaxinf.engine.devices import num_devices
from jaxinf.engine.kernels import Kernel
from jaxinf.engine.reductions import reduce_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.coverage import SKIP_NORMALISATION, Selection
from jaxinf.layers.register import LOSSES, Cotangents, Registration, layers_of
from jaxinf.layers.specs import Layer

_LOG = logging.getLogger("jaxinf")


def fit_curvature(
  model: DiffusionModel,
  train: Examples,
  kind: Kind = KFAC(),
  *,
  draws: Draws = Draws(),
  skip: Sequence[str] = SKIP_NORMALISATION,
  diagonal: Sequence[str] = (),
  only: Sequence[str] | None = None,
  partitions: int = 1,
  decompose: str = "host",
  compute: Compute = Compute(),
) -> Curvature:
  """Fits the curvature of a model's loss over training examples.

  Warns where the model's mean training loss is above that of predicting zero, as of a model with
  another process, other data or untrained parameters.

  Args:
    model: the model.
    train: the training examples, with random_flip where training mirrored images: augmentation is
      part of the data (paper, Appendix J.8).
    kind: KFAC, EKFAC, Shampoo, Diagonal, Identity or ExactGGN.
    draws: how many draws of (t, ε) each example has, and their seed. Each pair is drawn by itself,
      whatever the design, because curvature is a mean over examples as well.
    skip: regular expressions on parameter paths to leave out; normalisation layers by default.
    diagonal: likewise, layers whose curvature is diagonal; scales and shifts have no other.
    only: likewise, parameters to keep, all others being left out; None for all.
    partitions: groups of layers fitted one after another, each by passes of its own: equal results
      in less memory.
    decompose: eigendecomposition on the "host" (float64) or on the "devices" (float32, the layers
      split among them by cost: eigenvalues below some 1e-7 of the largest are noise).
    compute: how; with a checkpoint, a killed fit goes on where it was.

  Raises:
    ValueError: a parameter is neither covered nor skipped, an expression finds none, the network's
      output for an example depends on the others of its batch, a factor is not finite, or the
      arguments don't fit together.
  """
  named(DECOMPOSERS, decompose, "decompose")
  partitions = checked_count(partitions, "partitions")
  if draws.stop is not None:
    raise ValueError("A curvature takes a fixed number of draws: Draws(num).")
  draws.check_plain("Curvature")
  selection = kind.selection(Selection(skip, diagonal, only))
  layers = layers_of(model, train, selection)
  _LOG.info("curvature: %s", layers.coverage.summary())
  skipped = layers.coverage.skipped
  some = ", ".join(skipped[:4]) + (" …" if len(skipped) > 4 else "")
  _LOG.info("curvature: skipped %s", some or "nothing")
  fit = Fit(model, train, layers, kind, draws, selection, decompose, compute)
  bases, diagnostics = fit.bases(partitions)
  fitted = Curvature(
    model, kind, layers.layers, bases, layers.coverage, selection, fit.settings, diagnostics
  )
  return exact_curvature(fitted, train, compute) if isinstance(kind, ExactGGN) else fitted


@dataclasses.dataclass(frozen=True)
class Fit:
  """The passes of one fit; the fields are arguments of `fit_curvature`, checked."""

  model: DiffusionModel
  train: Examples
  layers: Registration
  kind: Kind
  draws: Draws
  selection: Selection
  decompose: str
  compute: Compute

  @functools.cached_property
  def rows(self) -> Rows:
    """(example, draw) pairs."""
    return Rows.of(self.train, self.draws.num)

  @property
  def settings(self) -> dict[str, Any]:
    """How the curvature is fitted, as JSON."""
    return {
      "kind": settings_of(self.kind),
      "draws": self.draws.num,
      "seed": self.draws.seed,
      **self.train.augmentation.settings,
      "conditional": self.train.conditioning is not None,
      "selection": self.selection.as_dict(),
    }

  def bases(self, partitions: int) -> tuple[dict[str, Eigenbasis], dict]:
    """Layer name → eigenbasis, and diagnostics."""
    if not self.kind.passes:
      one = lambda layer: Eigenbasis(None, None, np.ones(layer.matrix_shape))
      return {layer.name: one(layer) for layer in self.layers.layers}, {}
    self._check_targets()
    bases: dict[str, Eigenbasis] = {}
    diagnostics: dict = {}
    for number, names in enumerate(partition(self.layers.layers, partitions), start=1):
      part = f"{number} of {partitions}" if partitions > 1 else ""
      found, notes = self._part_bases(self.layers.only(names), part)
      bases |= found
      diagnostics |= notes
    if diagnostics:
      _LOG.info(
        "curvature: clipped %d negative eigenvalues in %d layers to zero, at most %.1e of the "
        "largest",
        sum(d["num_clipped"] for d in diagnostics.values()),
        len(diagnostics),
        max(-d["most_negative"] for d in diagnostics.values()),
      )
    return {layer.name: bases[layer.name] for layer in self.layers.layers}, diagnostics

  def _check_targets(self) -> None:
    if self.kind.fisher != "exact":
      return
    num_pairs, devices = len(self.rows), num_devices(self.compute.devices)
    check_exact(
      self.model,
      self.layers,
      self.rows.padded_batch(0, 1),
      num_pairs=num_pairs,
      batch_size=math.ceil(min(self.compute.batch_size, num_pairs) / devices),
      augmentation=self.train.augmentation,
    )

  def _part_bases(self, layers: Registration, part: str) -> tuple[dict[str, Eigenbasis], dict]:
    sums = dict(self.first_pass(layers, part))
    # Once, whatever the number of partitions and processes.
    if layers.layers[0] == self.layers.layers[0] and processes.is_primary():
      _check_losses(sums[LOSSES])
    bases, diagnostics = decomposed(
      layers.factors(sums, total=len(self.rows)), self.decompose, self.compute.devices
    )
    for layer in layers.layers:
      if layer.structure == "diagonal":
        values = np.asarray(sums[layer.name], np.float64) / len(self.rows)
        bases[layer.name] = Eigenbasis(None, None, _finite(values, layer.name))
    if self.kind.corrects:
      bases |= self.second_pass(layers, bases, part)
    return bases, diagnostics

  def first_pass(self, layers: Registration, part: str = "") -> dict[str, PyTree]:
    """Layer name → sums of factors, or of squared gradients where the layer is diagonal."""
    return self._reduce(
      FactorKernel(layers, self._targets, self.kind.approx), (), "curvature", part
    )

  def second_pass(
    self, layers: Registration, bases: Mapping[str, Eigenbasis], part: str = ""
  ) -> dict[str, Eigenbasis]:
    """The bases of Kronecker layers, with eigenvalues corrected (EK-FAC, Shampoo)."""
    names = [layer.name for layer in layers.layers if layer.structure == "kronecker"]
    if not names:
      return {}
    single = lambda x: np.asarray(x, np.float32)
    rotations = {
      name: Eigenbasis(single(bases[name].q_in), single(bases[name].q_out), None) for name in names
    }
    kernel = EigenvalueKernel(layers.only(names), self._targets)
    sums = self._reduce(kernel, (rotations,), "eigenvalues", part)
    mean = lambda name: np.asarray(sums[name], np.float64) / len(self.rows)
    return {
      name: dataclasses.replace(bases[name], eigenvalues=_finite(mean(name), name))
      for name in names
    }

  @property
  def _targets(self) -> "Targets":
    own = self.train.augmentation
    return Targets(self.model.process, self.kind.fisher, self.kind.samples, own)

  def _reduce(self, kernel: Kernel, operands: tuple, label: str, part: str) -> PyTree:
    partial, checkpoint = None, self.compute.checkpoint
    if checkpoint is not None:
      name = f"{label} {part}".strip().replace(" ", "-")
      key = self.settings | {"pass": label, "part": part, "decompose": self.decompose}
      key |= content_of(self.model, train=self.train)
      if operands:  # sums in other bases, though they differ by rounding alone, do not add up
        leaves = enumerate(jax.tree.leaves(operands))
        key["bases"] = fingerprint({str(i): leaf for i, leaf in leaves})
      partial = PartialSums(checkpoint.path(f"{name}.npz"), key, checkpoint.every)
    return reduce_batches(
      kernel,
      (self.model.params, np.uint32(self.draws.seed), *operands),
      self.rows,
      batch_size=self.compute.batch_size,
      unit="pairs",
      devices=self.compute.devices,
      label=f"{label} ({part})" if part else label,
      partial=partial,
    )


@dataclasses.dataclass(frozen=True)
class Targets:
  """What a pass draws: pairs of (example, draw) rows, and cotangents at the network's outputs.

  It is what the kernels of all kinds of curvature have in common, so that two kinds of one Fisher
  share a compiled first pass.
  """

  process: Process
  fisher: str
  samples: int
  augmentation: Augmentation

  def __call__(self, seed, batch: Batch) -> tuple[Noised, Cotangents]:
    pairs, keys = curvature_pairs(self.process, seed, batch, self.augmentation)
    return pairs, FISHERS[self.fisher](keys, pairs, self.samples)


@dataclasses.dataclass(frozen=True)
class FactorKernel:
  """Kernel from (params, seed) and pairs to sums of factors; see Registration.factor_sums."""

  layers: Registration
  targets: Targets
  approx: str

  def __call__(self, operands, batch: Batch) -> dict[str, PyTree]:
    params, seed = operands
    pairs, cotangents = self.targets(seed, batch)
    return self.layers.factor_sums(params, pairs, cotangents, batch.mask, approx=self.approx)


@dataclasses.dataclass(frozen=True)
class EigenvalueKernel:
  """Kernel from (params, seed, eigenbases) and pairs to sums of squared gradients there."""

  layers: Registration
  targets: Targets

  def __call__(self, operands, batch: Batch) -> dict[str, PyTree]:
    params, seed, rotations = operands
    pairs, cotangents = self.targets(seed, batch)
    return self.layers.eigenvalue_sums(params, pairs, cotangents, batch.mask, rotations)


def partition(layers: Sequence[Layer], num: int) -> list[list[str]]:
  """Names of the layers in at most `num` groups of about equal memory, by d_in² + d_out²."""
  groups: list[list[str]] = [[] for _ in range(min(num, len(layers)))]
  sizes = [0] * len(groups)
  size = {layer.name: sum(d * d for d in layer.matrix_shape[-2:]) for layer in layers}
  for name in sorted(size, key=lambda name: -size[name]):
    least = sizes.index(min(sizes))
    groups[least].append(name)
    sizes[least] += size[name]
  return groups


def _check_losses(sums: np.ndarray) -> None:
  """Warns where a model's mean training loss is above that of predicting zero.

  Both are means over the same pairs, so that their ratio has little noise: 5 % of it are enough.
  """
  count, loss, zero = (float(x) for x in sums)
  if np.isfinite([loss, zero]).all() and loss > 1.05 * zero:
    warnings.warn(
      f"mean training loss {loss / count:.3g}: worse than predicting zero, {zero / count:.3g}. "
      "Check that the process is the one that the model was trained with (what it predicts, its "
      "schedule, its times), that data have the range that it was trained on, and that its "
      "parameters are the trained ones.",
      stacklevel=5,
    )


def _finite(values: np.ndarray, layer: str) -> np.ndarray:
  if not np.isfinite(values).all():
    raise ValueError(
      f"The eigenvalues of layer {layer} are not finite: its gradients overflow. Check that the "
      "model's outputs are finite for training examples at every time, or skip the layer by name."
    )
  return values
