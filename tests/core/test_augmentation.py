"""What a draw does to an example: closed forms of its distribution, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Examples, Moments
from jaxinf.core.augmentation import Augmentation, ConditioningDropout, Constants
from jaxinf.core.random import draw_keys, stream

NUM = 4_000  # draws of one example
SHAPE = (3, 2, 2)  # of a latent
SCALING, SHIFT = 0.5, 0.25


def keys_of(num: int = NUM) -> jax.Array:
  return draw_keys(stream(0, "test"), num)


def moments_of(num: int = 5, mirrored: bool = True, **fields) -> Moments:
  rng = np.random.default_rng(0)
  part = lambda scale: rng.normal(0, scale, (num, *SHAPE)).astype(np.float32)
  other = (part(1), part(0.5)) if mirrored else None
  fields = {"scaling_factor": SCALING, "shift_factor": SHIFT} | fields
  return Moments.of(part(1), part(0.5), mirrored=other, **fields)


def drawn(moments: Moments, random_flip: bool = False) -> np.ndarray:
  """[NUM, h, w, c] latents of the first example."""
  rows = jnp.repeat(jnp.asarray(moments[np.arange(1)]), NUM, axis=0)
  return np.asarray(Augmentation(random_flip, moments.form).data(rows, keys_of()))


def test_latents_have_the_mean_and_the_variance_of_the_posterior():
  moments = moments_of(mirrored=False)
  mean, logvar = np.split(moments[np.arange(1)][0, 0], 2, axis=-1)
  found = drawn(moments)
  variance = SCALING**2 * np.exp(logvar)
  # Five standard errors of a mean and of a variance of NUM normal numbers.
  error = np.abs(found.mean(axis=0) - SCALING * (mean - SHIFT))
  assert (error < 5 * np.sqrt(variance / NUM)).all()
  assert (np.abs(found.var(axis=0) / variance - 1) < 5 * np.sqrt(2 / NUM)).all()


def test_without_sampling_a_latent_is_the_scaled_mean():
  moments = moments_of(sample=False)
  mean = moments[np.arange(1)][0, 0, ..., : SHAPE[-1]]
  np.testing.assert_array_equal(drawn(moments)[7], (mean - np.float32(SHIFT)) * SCALING)


def test_half_of_the_draws_take_the_moments_of_the_mirror_image():
  moments = moments_of(sample=False)
  own, mirror = ((m[..., : SHAPE[-1]] - SHIFT) * SCALING for m in moments[np.arange(1)][0])
  found = drawn(moments, random_flip=True)
  is_own = np.isclose(found, own).all(axis=(1, 2, 3))
  is_mirror = np.isclose(found, mirror).all(axis=(1, 2, 3))
  assert (is_own ^ is_mirror).all()
  assert abs(is_mirror.mean() - 0.5) < 5 * np.sqrt(0.25 / NUM)


def test_conditioning_is_left_out_at_its_rate_and_whole():
  given = {"labels": np.int32(3), "text": np.ones((2, 4), np.float32)}
  null = {"labels": np.int32(10), "text": np.zeros((2, 4), np.float32)}
  rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (NUM, *x.shape)), given)
  augmentation = Augmentation(dropout=ConditioningDropout(0.2, Constants(null)))
  found = jax.tree.map(np.asarray, augmentation.conditioning(rows, keys_of()))
  left_out = found["labels"] == 10
  assert abs(left_out.mean() - 0.2) < 5 * np.sqrt(0.16 / NUM)
  np.testing.assert_array_equal(found["labels"][~left_out], 3)
  text = np.where(left_out[:, None, None], 0, 1) * given["text"]
  np.testing.assert_array_equal(found["text"], text)


def test_parts_do_not_disturb_each_other():
  """Flips are the same whether or not latents are sampled, and conditioning is left out."""
  moments = moments_of()
  flips = lambda m: np.isclose(drawn(m, True), drawn(m)).all(axis=(1, 2, 3))
  still = dataclasses.replace(moments, sample=False)
  np.testing.assert_array_equal(flips(moments), flips(still))


# --- as examples ---


def test_examples_of_moments_have_the_shape_of_latents():
  examples = Examples(moments_of(), random_flip=True)
  assert len(examples) == 5 and examples.shape == SHAPE
  assert repr(examples) == "Examples(5 × 3 × 2 × 2 moments)"
  part = dataclasses.replace(examples, ids=np.arange(5, 10)).take(np.array([3, 1]))
  assert part.shape == SHAPE and part.ids.tolist() == [8, 6] and part.latents == examples.latents
  np.testing.assert_array_equal(part.data[np.arange(2)], moments_of()[np.array([3, 1])])
  changed = dataclasses.replace(examples, data=moments_of(sample=False))
  names = {name for e in (examples, changed) for name in e.arrays("train")}
  assert names == {"train_data", "train_ids", "train_flips", "train_latents"}
  differ = [(e.arrays("train")["train_latents"]).tolist() for e in (examples, changed)]
  assert differ[0] != differ[1]


LABELS = {"labels": np.arange(5)}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Moments(np.zeros((5, 3, 2, 4))), "Moments.of"),
    (lambda: Moments(np.zeros((5, 3, 2, 2, 4))), "M is 1, or 2"),
    (lambda: Moments.of(np.zeros((5, 2, 2, 3)), np.zeros((5, 2, 2, 2))), "must have one shape"),
    (lambda: moments_of(scaling_factor=0.0), "scaling_factor must be positive; got 0.0"),
    (lambda: Examples(moments_of(mirrored=False), random_flip=True), "mirror images are missing"),
    (
      lambda: Examples(Moments(np.full((1, 1, 2, 2, 2), np.nan))),
      "Data must be finite; row 0 is not",
    ),
    (lambda: Examples(np.zeros((5, 2)), conditioning_dropout=1.0), r"a share in \[0, 1\); got 1.0"),
    (
      lambda: Examples(np.zeros((5, 2)), conditioning=LABELS, conditioning_dropout=0.1),
      "conditioning_dropout needs null_conditioning",
    ),
    (
      lambda: Examples(
        np.zeros((5, 2)),
        conditioning=LABELS,
        conditioning_dropout=0.1,
        null_conditioning={"text": 0},
      ),
      "must be like one row of the conditioning",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
