"""Whether rounding lost the order of the scores, and what to say and to do then.

Scores of a few queries and training examples are computed twice: from float32 query rows in the
network's own precision, and as the run computes them (attribution/scoring.py). Here the rank
correlations of the two are judged. Nothing is computed, logged or raised.
"""

from collections.abc import Mapping
from typing import Any

from jaxinf.compression.compression import COMPRESSIONS, Compression, Uncompressed
from jaxinf.compression.quantise import Quantisation
from jaxinf.core.damping import Damping, RelativeDamping, number_of

# A rank correlation of r costs an LDS a factor of about r: measured on an MLP, r = 0.74 took an LDS
# of 87 to 69. At 0.99 that is 0.9, about two standard errors of an LDS over 100 subsets.
LEAST_CORRELATION = 0.99


class LostOrder(UserWarning):
  """The scores of a query are in another order than without rounding."""


def verdict(
  check: Mapping[str, Any] | None,
  compression: Compression,
  *,
  damping: Damping | None = None,
  precision: str | None = None,
) -> str | None:
  """What to warn of, or None where the order is kept or was not measured.

  The order counts as lost where the rank correlation of any checked query is below
  LEAST_CORRELATION, because scores are read query by query.

  Args:
    check: `spearman` and `least_spearman`, the mean and the least rank correlation over
      `num_queries` queries and `num_examples` training examples. None, or a mean of None, where
      nothing was measured.
    compression: of the query rows.
    damping: of these scores, for the wording.
    precision: of the network's products; None where it is the network's own.
  """
  if check is None or check["spearman"] is None or keeps_order(check):
    return None
  kind = "relative " if isinstance(damping, RelativeDamping) else ""
  where = "" if damping is None else f"At {kind}damping {number_of(damping):g}, "
  what = f"{compression.description} query gradients" * (compression != Uncompressed())
  products = f"{precision} products" * (precision is not None)
  causes = " and ".join(filter(None, (what, products))) or "rounding"
  return (
    f"{where}{causes} changed the order of the scores: rank correlation with unrounded scores "
    f"{check['spearman']:.3f}, least {check['least_spearman']:.3f}, over {check['num_queries']} "
    f"queries and {check['num_examples']} training examples. Below {LEAST_CORRELATION} the order "
    f"is not safe. {_advice(compression, precision)}"
  )


def keeps_order(check: Mapping[str, Any]) -> bool:
  """Whether the least rank correlation is high enough; NaN is not."""
  return check["least_spearman"] >= LEAST_CORRELATION


def fallback_of(compression: Compression) -> Compression | None:
  """The compression to take where this one lost the order; None where there is no finer one.

  After int16 it is float32. After all others it is int16, because its rounding errors are 1/256 of
  those of int8, in about as many bytes as bfloat16's.
  """
  if compression == Uncompressed():
    return None
  wide = isinstance(compression, Quantisation) and compression.bits == 16
  return Uncompressed() if wide else COMPRESSIONS["int16"]


def _advice(compression: Compression, precision: str | None) -> str:
  """What a user can change, in words."""
  changes = [] if precision is None else ["precision=None"]
  finer = fallback_of(compression)
  if finer is not None:
    (name,) = (name for name, value in COMPRESSIONS.items() if value == finer)
    changes.insert(0, "compression=None" if name is None else f'compression="{name}"')
  if not changes:
    return "Take a larger damping."
  return f"Take {' and '.join(changes)}, or a larger damping."
