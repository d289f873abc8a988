"""Eigendecomposition of all layers, on the host or split over the devices."""

import logging
from collections.abc import Mapping, Sequence

import jax

from jaxinf.core.types import Array, Eigenbasis, KroneckerFactors
from jaxinf.curvature.eigenbasis import (
  Decomposition,
  checked_factors,
  decomposition,
  eigenbasis,
  eigh_on_device,
  eigh_on_host,
)
from jaxinf.engine import processes, spread

_LOG = logging.getLogger("jaxinf")


def decomposed(
  factors: Mapping[str, KroneckerFactors],
  where: str,
  devices: Sequence[jax.Device] | None = None,
) -> tuple[dict[str, Eigenbasis], dict[str, dict]]:
  """Layer name → eigenbasis, and layer name → its clipped eigenvalues where there are any.

  Args:
    factors: layer name → A and G, on the host.
    where: "host", layer by layer in float64, or "devices": in float32, every factor on one device,
      so that each has about the same Σ d³.
    devices: local devices; all of them where None.

  Raises:
    ValueError: a factor has infinite entries or NaN; names the layer.
  """
  matrices: dict[tuple[str, str], Array] = {}
  for name, factor in factors.items():
    checked = checked_factors(factor, name)
    matrices |= {(name, "a"): checked.a, (name, "g"): checked.g}
  if matrices:
    largest = max(m.shape[-1] for m in matrices.values())
    _LOG.info("curvature: decomposing %d factors, up to %d rows", len(matrices), largest)
  found = DECOMPOSERS[where](matrices, devices)
  # Of one process: on unlike processors, vectors of nearly equal eigenvalues would differ.
  bases = processes.of_primary(
    {name: eigenbasis(found[name, "a"], found[name, "g"]) for name in factors}
  )
  clipped = {}
  for name in factors:
    both = found[name, "a"], found[name, "g"]
    if any(d.num_clipped for d in both):
      clipped[name] = {
        "num_clipped": sum(d.num_clipped for d in both),
        "most_negative": min(d.most_negative for d in both),
      }
  return bases, clipped


def _on_host(matrices: Mapping, devices: Sequence[jax.Device] | None) -> dict:
  del devices
  return {key: decomposition(*eigh_on_host(matrix)) for key, matrix in matrices.items()}


def _on_devices(matrices: Mapping, devices: Sequence[jax.Device] | None) -> dict:
  cost = lambda matrix: float(matrix.size) * matrix.shape[-1]  # d³ for each of its groups
  results: dict[tuple[str, str], Decomposition] = {
    key: decomposition(*pair)
    for key, pair in spread(eigh_on_device, matrices, cost, devices).items()
  }
  return results


DECOMPOSERS = {"host": _on_host, "devices": _on_devices}
