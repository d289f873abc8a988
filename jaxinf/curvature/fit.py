"""Fits curvature to a model: one or two passes over (example, draw) pairs (paper, Section 3.1).

kfac:     factors A and G of every layer, then their eigenbasis;
ekfac:    then a second pass for the eigenvalues in that basis, over the same pairs;
diagonal: the second pass alone, in the identity basis;
identity: no pass, H = I: scores are inner products of gradients;
cg:       the exact GGN (exact.py), preconditioned by a sketch of it or by ekfac.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxinf import engine
from jaxinf.core.random import example_numbers
from jaxinf.core.types import Array, Batch, Eigenbasis, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.decompose import DECOMPOSERS, decomposed
from jaxinf.curvature.ggn import GGN, Solver
from jaxinf.curvature.targets import ESTIMATORS, checked_targets, curvature_pairs
from jaxinf.diffusion.model import Task, checked_conditioning, checked_ids, checked_images
from jaxinf.engine.artifacts import fingerprint
from jaxinf.engine.checkpoints import PartialSums, Resume
from jaxinf.layers.coverage import Selection
from jaxinf.layers.factors import SHARINGS
from jaxinf.layers.register import Registration, register
from jaxinf.layers.specs import Layer

_LOG = logging.getLogger("jaxinf")

SKIP_NORMALISATION = (r"(?i)norm[^/]*/(scale|bias)$",)
METHODS = ("kfac", "ekfac", "diagonal", "identity", "cg")


def fit_curvature(
  task: Task,
  images: Array,
  *,
  draws: int,
  seed: int,
  ids: np.ndarray | None = None,
  conditioning: PyTree = None,
  method: str = "kfac",
  sharing: str = "expand",
  estimator: str = "mc",
  targets: int = 1,
  random_flip: bool = False,
  skip: Sequence[str] = SKIP_NORMALISATION,
  diagonal: Sequence[str] = (),
  only: Sequence[str] | None = None,
  partitions: int = 1,
  decompose: str = "host",
  solver: Solver | None = None,
  batch_size: int = 128,
  resume: Resume | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Curvature:
  """Fits the curvature of a model's loss over training images.

  Args:
    task: the model.
    images: [N, H, W, C] float32 in [-1, 1] or uint8.
    draws: draws of (t, ε) for each image.
    seed: of the draws and targets.
    ids: [N] stable ids of the images, which their random keys follow; 0 … N − 1 where None.
    conditioning: pytree of arrays [N, …], further inputs of the model; None for none.
    method: "kfac", "ekfac" (eigenvalues corrected), "diagonal", "identity" or "cg" (exact GGN by
      conjugate gradients: a referee for small sets).
    sharing: K-FAC over positions, "expand" or "reduce".
    estimator: "mc" (model-sampled targets), "empirical" (true noise) or "exact" (all outputs;
      small networks only).
    targets: model-sampled targets for each draw ("mc").
    random_flip: mirror the image of each draw with probability ½, as training did: augmentation is
      part of the data (paper, Appendix J.8). Outer products are of single draws, also "empirical".
    skip: regular expressions on parameter paths to leave out; normalisation layers by default.
    diagonal: likewise, layers whose curvature is diagonal; scales and shifts have no other.
    only: likewise, parameters to keep, all others being left out; None for all.
    partitions: groups of layers fitted one after another, each by passes of its own: equal results
      in less memory.
    decompose: eigendecomposition on the "host" (float64) or on the "devices" (float32, the layers
      split among them by cost: eigenvalues below some 1e-7 of the largest are noise).
    solver: of "cg": tolerance, iterations and precision.
    batch_size: (image, draw) pairs at a time over all devices.
    resume: keeps sums on disk; None: a killed fit begins again.
    devices: local devices; all of them where None.

  Raises:
    ValueError: a parameter is neither covered nor skipped, a factor is not finite, or the
      arguments don't fit together.
  """
  choices = (
    (method, METHODS, "method"), (sharing, SHARINGS, "sharing"),
    (estimator, tuple(ESTIMATORS), "estimator"), (decompose, tuple(DECOMPOSERS), "decompose"),
  )  # fmt: skip
  for value, valid, what in choices:
    if value not in valid:
      raise ValueError(f"Unknown {what} {value!r}; there are: {', '.join(valid)}.")
  for count, what in ((draws, "draws"), (targets, "targets"), (partitions, "partitions")):
    if count < 1:
      raise ValueError(f"{what} must be at least 1; got {count}.")
  selection = Selection(skip, (".",) if method == "diagonal" else diagonal, only)
  images = checked_images(images)
  conditioning = checked_conditioning(conditioning, len(images), "conditioning")
  rows = engine.Rows(
    images, example_numbers(checked_ids(ids, len(images), "ids")), draws, conditioning
  )
  task.check_images(images.shape[1:], conditioning)
  if method != "identity":  # which takes no pass
    targets = checked_targets(task, images.shape[1:], conditioning, len(rows), estimator, targets)
  model = register(
    task.apply_fn, task.params, images.shape[1:], selection, conditioning=conditioning
  )
  skipped = model.coverage.skipped
  _LOG.info("curvature: %s", model.coverage.summary())
  some = ", ".join(skipped[:4]) + (" …" if len(skipped) > 4 else "")
  _LOG.info("curvature: skipped %s", some or "nothing")
  settings = dict(
    method=method, sharing=sharing, estimator=estimator, targets=targets, draws=draws,
    seed=seed, random_flip=random_flip,
    solver=None if method != "cg" else dataclasses.asdict(solver or Solver()),
    conditional=conditioning is not None, **selection.as_dict(),
  )  # fmt: skip
  fit = Fit(task, model, rows, settings, batch_size, decompose, resume, devices)
  bases, diagnostics = fit.bases(partitions)
  exact = None
  if method == "cg":
    exact = GGN(
      task, model.layers, rows, seed=seed, batch_size=batch_size, devices=devices, solver=solver,
      random_flip=random_flip,
    )  # fmt: skip
  return Curvature(model.layers, bases, model.coverage, task, settings, diagnostics, exact)


@dataclasses.dataclass(frozen=True)
class Fit:
  """The passes of one fit; the fields are arguments of `fit_curvature`, checked."""

  task: Task
  model: Registration
  rows: engine.Rows
  settings: Mapping
  batch_size: int = 128
  decompose: str = "host"
  resume: Resume | None = None
  devices: Sequence[jax.Device] | None = None

  def bases(self, partitions: int = 1) -> tuple[dict[str, Eigenbasis], dict]:
    """Layer name → eigenbasis, and diagnostics."""
    solver = self.settings["solver"]
    if self.settings["method"] == "identity" or (solver and solver["sketch_rank"]):
      one = lambda layer: Eigenbasis(None, None, np.ones(layer.matrix_shape))
      return {layer.name: one(layer) for layer in self.model.layers}, {}
    bases: dict[str, Eigenbasis] = {}
    diagnostics: dict = {}
    for number, names in enumerate(partition(self.model.layers, partitions), start=1):
      part = f"{number} of {partitions}" if partitions > 1 else ""
      found, notes = self._part_bases(self.model.only(names), part)
      bases |= found
      diagnostics |= notes
    if diagnostics:
      _LOG.info(
        "curvature: clipped %d negative eigenvalues in %d layers to zero, at most %.1e of the "
        "largest", sum(d["num_clipped"] for d in diagnostics.values()), len(diagnostics),
        max(-d["most_negative"] for d in diagnostics.values()),
      )  # fmt: skip
    return {layer.name: bases[layer.name] for layer in self.model.layers}, diagnostics

  def _part_bases(self, model: Registration, part: str) -> tuple[dict[str, Eigenbasis], dict]:
    sums = self.first_pass(model, part)
    bases, diagnostics = decomposed(
      model.factors(sums, total=len(self.rows)), self.decompose, self.devices
    )
    for layer in model.layers:
      if layer.structure == "diagonal":
        values = np.asarray(sums[layer.name], np.float64) / len(self.rows)
        bases[layer.name] = Eigenbasis(None, None, _finite(values, layer.name))
    if self.settings["method"] in ("ekfac", "cg"):
      bases |= self.second_pass(model, bases, part)
    return bases, diagnostics

  def first_pass(self, model: Registration, part: str = "") -> dict[str, PyTree]:
    """Layer name → sums of factors, or of squared gradients where the layer is diagonal."""

    def kernel(params, batch: Batch):
      pairs, cotangents = self._targets(batch)
      return model.factor_sums(
        params, pairs, cotangents, batch.mask, sharing=self.settings["sharing"]
      )

    return self._reduce(kernel, self.task.params, "curvature", part)

  def second_pass(
    self, model: Registration, bases: Mapping[str, Eigenbasis], part: str = ""
  ) -> dict[str, Eigenbasis]:
    """The bases of Kronecker layers, with eigenvalues corrected (EK-FAC)."""
    names = [layer.name for layer in model.layers if layer.structure == "kronecker"]
    rotated = model.only(names)

    def kernel(operands, batch: Batch):
      params, rotations = operands
      pairs, cotangents = self._targets(batch)
      return rotated.eigenvalue_sums(params, pairs, cotangents, batch.mask, rotations)

    single = lambda x: np.asarray(x, np.float32)
    rotations = {
      name: Eigenbasis(single(bases[name].q_in), single(bases[name].q_out), None) for name in names
    }
    if not names:
      return {}
    sums = self._reduce(kernel, (self.task.params, rotations), "eigenvalues", part)
    mean = lambda name: np.asarray(sums[name], np.float64) / len(self.rows)
    return {
      name: dataclasses.replace(bases[name], eigenvalues=_finite(mean(name), name))
      for name in names
    }

  def _targets(self, batch: Batch):
    """The pairs of a batch's rows, and their cotangents."""
    seed, flips = self.settings["seed"], self.settings["random_flip"]
    pairs, keys = curvature_pairs(self.task.schedule, seed, batch, flips)
    cotangents = ESTIMATORS[self.settings["estimator"]](keys, pairs, self.settings["targets"])
    return pairs, cotangents

  def _reduce(self, kernel: engine.Kernel, operands: PyTree, label: str, part: str) -> PyTree:
    partial = None
    if self.resume is not None:
      name = f"{label} {part}".strip().replace(" ", "-")
      key = dict(self.settings) | {
        "pass": label, "part": part, "decompose": self.decompose, "inputs": self._content,
      }  # fmt: skip
      partial = PartialSums(self.resume.folder / f"{name}.npz", key, self.resume.every)
    return engine.reduce_batches(
      kernel, operands, self.rows, batch_size=self.batch_size, unit="pairs", devices=self.devices,
      label=f"{label} ({part})" if part else label, partial=partial,
    )  # fmt: skip

  @property
  def _content(self) -> str:
    """Hash of everything the sums come from, but for the network's code."""
    trees = (self.task.params, self.task.schedule, self.rows.conditioning)
    arrays = {f"tree_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
    return fingerprint({"images": np.asarray(self.rows.images), "ids": self.rows.ids, **arrays})


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


def _finite(values: np.ndarray, layer: str) -> np.ndarray:
  if not np.isfinite(values).all():
    raise ValueError(
      f"The eigenvalues of layer {layer} are not finite: its gradients overflow. Check that the "
      "model's outputs are finite for training images at every timestep, or skip the layer by name."
    )
  return values
