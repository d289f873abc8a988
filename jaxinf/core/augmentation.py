"""What training does to an example at random: part of the mean over its draws, like (t, ε).

(Paper, Appendix J.8, for mirrored images.) Each part has random numbers of its own, so that adding
one changes no other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.arrays import as_float, fingerprint
from jaxinf.core.moments import LatentForm
from jaxinf.core.random import substreams
from jaxinf.core.types import PyTree


class Constants:
  """A pytree of arrays that is compared and hashed by value, so that kernels can hold it."""

  def __init__(self, tree: PyTree):
    self.tree = jax.tree.map(np.asarray, tree)
    leaves, structure = jax.tree.flatten(self.tree)
    self._key = structure, tuple((x.shape, x.dtype.str, x.tobytes()) for x in leaves)

  @property
  def digest(self) -> str:
    """A hash of the values."""
    leaves = jax.tree.leaves(self.tree)
    return fingerprint({str(number): leaf for number, leaf in enumerate(leaves)})[:16]

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Constants) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


@dataclasses.dataclass(frozen=True)
class ConditioningDropout:
  """Training that leaves the conditioning out now and then, for classifier-free guidance.

  Attributes:
    rate: the probability, in (0, 1).
    null: one row of the conditioning, what the model is given instead.
  """

  rate: float
  null: Constants


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What each draw does to an example.

  Attributes:
    random_flip: mirrors images [H, W, C] left to right with probability ½.
    latents: rows are `Moments`, of which a latent is made; None: rows are data.
    dropout: of the conditioning; None: it is always given.
  """

  random_flip: bool = False
  latents: LatentForm | None = None
  dropout: ConditioningDropout | None = None

  def data(self, rows: jax.Array, keys: jax.Array) -> jax.Array:
    """What the network's inputs are made of, [B, …] float32, from rows [B, …] and keys [B]."""
    if self.latents is not None:
      return self._latents(rows, keys)
    return self.mirrored(as_float(rows), keys)

  def mirrored(self, data: jax.Array, keys: jax.Array) -> jax.Array:
    """Images [B, H, W, C], each mirrored with probability ½ where random_flip is on."""
    if not self.random_flip:
      return data
    if data.ndim != 4:
      raise ValueError(f"random_flip mirrors images [B, H, W, C]; got data of shape {data.shape}.")
    return jnp.where(_flips(keys)[:, None, None, None], data[:, :, ::-1], data)

  def conditioning(self, rows: PyTree, keys: jax.Array) -> PyTree:
    """The conditioning [B, …], each row left out with the probability of `dropout`."""
    if self.dropout is None:
      return rows
    rate = self.dropout.rate
    left_out = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(
      substreams(keys, "conditioning dropout")
    )
    choose = lambda null, row: jnp.where(left_out.reshape(-1, *[1] * (row.ndim - 1)), null, row)
    return jax.tree.map(choose, self.dropout.null.tree, rows)

  def shape(self, row: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the network's data, of rows of that shape."""
    return row if self.latents is None else (*row[1:-1], row[-1] // 2)

  @property
  def settings(self) -> dict[str, Any]:
    """As JSON, for manifests and fingerprints; parts that came later only where they are on."""
    found: dict[str, Any] = {"random_flip": self.random_flip}
    if self.latents is not None:
      found["latents"] = dataclasses.asdict(self.latents)
    if self.dropout is not None:
      found["conditioning_dropout"] = self.dropout.rate
      found["null_conditioning"] = self.dropout.null.digest
    return found

  def _latents(self, rows: jax.Array, keys: jax.Array) -> jax.Array:
    """Latents [B, h, w, c] of moments [B, M, h, w, 2c]."""
    assert self.latents is not None
    rows = rows.astype(jnp.float32)
    own = rows[:, 0]
    if self.random_flip:
      own = jnp.where(_flips(keys)[:, None, None, None], rows[:, 1], own)
    mean, logvar = jnp.split(own, 2, axis=-1)
    if self.latents.sample:
      normal = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))
      mean += jnp.exp(logvar / 2) * normal(substreams(keys, "posterior"))
    return (mean - self.latents.shift_factor) * self.latents.scaling_factor


PLAIN = Augmentation()


def _flips(keys: jax.Array) -> jax.Array:
  """[B] booleans, true with probability ½."""
  return jax.vmap(jax.random.bernoulli)(substreams(keys, "flip"))
