"""The study's numbers against explicit gradient matrices in float64, and what must not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

import jaxinf
from jaxinf.compression.compression import Bfloat16, LowRank, Uncompressed
from jaxinf.compression.projection import RandomProjection, Truncation
from jaxinf.compression.quantise import Quantisation
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.evaluation.compression_study import compression_study
from jaxinf.layers.specs import to_matrices
from jaxinf.report.studies import write_compression_study
from tests import nets

NUM, QUERIES, DRAWS, SEED, DAMPING = 12, 3, 2, 2, 1e-2
VARIANTS = {
  "float32": Uncompressed(),
  "bfloat16": Bfloat16(),
  "int4": Quantisation(4),
  "svd, rank 1": LowRank(1),
  "truncation, 30 %": Truncation(0.3),
  "projection, 50 %": RandomProjection(0.5, seed=0),
}
TRAIN, ASKED = nets.random_images(NUM), nets.random_images(QUERIES, seed=1)


@pytest.fixture(scope="module")
def task():
  return nets.conv_task()


@pytest.fixture(scope="module")
def curvature(task):
  return fitted(task, "ekfac")


def fitted(task, method, **options):
  return jaxinf.fit_curvature(
    task, TRAIN, method=method, draws=2, seed=0, skip=(), devices=jax.local_devices()[:1], **options
  )


def study(task, curvature, variants=VARIANTS, train=TRAIN, asked=ASKED, **options):
  options = dict(damping=DAMPING, draws=DRAWS, devices=jax.local_devices()[:1]) | options
  return compression_study(task, curvature, train, asked, seed=SEED, variants=variants, **options)


@pytest.fixture(scope="module")
def found(task, curvature):
  return study(task, curvature)


def gradients(task, curvature, images, name) -> dict[str, np.ndarray]:
  """Layer name → [n, d_out, d_in] float64 of the loss, by jax.grad one image at a time."""

  @jax.grad
  def gradient(params, image, number):
    key = fold_in_each(stream(SEED, name), DrawDesign().numbers(number[None]))
    keys = jax.vmap(lambda k: draw_keys(k, DRAWS))(key)
    values = LOSS.evaluate(
      task.apply_fn, params, task.schedule, image[None], keys, design=DrawDesign()
    )
    return values.sum()

  gradient = jax.jit(gradient)
  numbers = np.arange(len(images), dtype=np.uint32)
  grads = [gradient(task.params, *pair) for pair in zip(images, numbers, strict=True)]
  stacked = jax.tree.map(lambda *g: np.stack(g).astype(np.float64), *grads)
  return to_matrices(curvature.layers, stacked)


def kron(basis) -> np.ndarray:
  """E [P, P]: eigenvectors of the layer's H in columns."""
  if basis.q_in is None:
    return np.eye(basis.eigenvalues.size)
  return np.kron(np.asarray(basis.q_out), np.asarray(basis.q_in))


def naively(variant, rows, basis) -> np.ndarray:
  """What a variant makes of rows [Q, d_out, d_in]."""
  eigenvalues = np.asarray(basis.eigenvalues)
  if isinstance(variant, Bfloat16):
    return rows.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
  if isinstance(variant, LowRank):
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    kept = variant.rank if variant.num_bytes(rows.shape[1:]) < 4 * rows[0].size else len(values[0])
    return (left[..., :kept] * values[..., None, :kept]) @ right[..., :kept, :]
  if isinstance(variant, Truncation):
    vectors = kron(basis)
    least = np.sort(eigenvalues, axis=None)[-int(np.ceil(variant.share * eigenvalues.size))]
    mask = eigenvalues.ravel() >= least
    return (rows.reshape(len(rows), -1) @ (vectors * mask) @ vectors.T).reshape(rows.shape)
  single = jnp.asarray(rows, jnp.float32)
  restored = variant.restore(variant.compress(single, eigenvalues), eigenvalues)
  return np.asarray(restored, np.float64)


def naive_numbers(task, curvature, variant):
  """(errors, Pearson's, Spearman's) [Q] each, from dense solves and explicit matrices."""
  asked = gradients(task, curvature, ASKED, "query_gradients")
  train = gradients(task, curvature, TRAIN, "train_gradients")
  exact, restored = [], []
  for name, basis in curvature.bases.items():
    vectors, flat = kron(basis), asked[name].reshape(QUERIES, -1)
    dense = (vectors * (np.ravel(basis.eigenvalues) + DAMPING)) @ vectors.T
    rows = np.linalg.solve(dense, flat.T).T.reshape(asked[name].shape)
    exact.append(rows.reshape(QUERIES, -1))
    restored.append(naively(variant, rows, basis).reshape(QUERIES, -1))
  exact, restored = np.concatenate(exact, 1), np.concatenate(restored, 1)
  matrix = np.concatenate([train[name].reshape(NUM, -1) for name in curvature.bases], 1)
  scores = [(matrix @ a, matrix @ b) for a, b in zip(exact, restored, strict=True)]
  errors = np.linalg.norm(restored - exact, axis=1) / np.linalg.norm(exact, axis=1)
  return errors, *([f(*pair).statistic for pair in scores] for f in (pearsonr, spearmanr))


@pytest.mark.parametrize("name", VARIANTS)
def test_errors_and_correlations_are_those_of_explicit_matrices(task, curvature, found, name):
  errors, pearson, spearman = naive_numbers(task, curvature, VARIANTS[name])
  v = found.names.index(name)
  # float32 gradients and rotations; no integer of int4 and no number of bfloat16 rounds otherwise.
  np.testing.assert_allclose(found.errors[v], errors, rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose(found.pearson[v], pearson, rtol=0, atol=1e-4)
  # Two of twelve scores that nearly tie may change places: 6 · 2 / (12 · 143) = 0.007.
  np.testing.assert_allclose(found.spearman[v], spearman, rtol=0, atol=0.008)


def test_truncation_needs_no_rotation_where_the_curvature_is_diagonal(task):
  diagonal, variants = fitted(task, "diagonal"), {"half": Truncation(0.5)}
  errors, pearson, _ = naive_numbers(task, diagonal, variants["half"])
  found = study(task, diagonal, variants)
  np.testing.assert_allclose(found.errors[0], errors, rtol=1e-3)
  np.testing.assert_allclose(found.pearson[0], pearson, rtol=0, atol=1e-4)


def test_sizes_are_bytes_of_what_compression_leaves(curvature, found):
  for name, size in zip(found.names, found.sizes, strict=True):
    leaves, num = [], 0
    for basis in curvature.bases.values():
      eigenvalues = np.asarray(basis.eigenvalues, np.float32)
      leaves += jax.tree.leaves(
        VARIANTS[name].compress(jnp.asarray(eigenvalues)[None], eigenvalues)
      )
      num += eigenvalues.size
    assert size == sum(leaf.nbytes for leaf in leaves) / (4 * num)


def test_what_is_not_compressed_correlates_perfectly(found):
  assert found.names[0] == "float32" and found.sizes[0] == 1
  assert (found.errors[0] == 0).all()
  # One number and itself, but for the rounding of float64.
  np.testing.assert_allclose([found.pearson[0], found.spearman[0]], 1, rtol=0, atol=1e-14)
  assert (found.errors[1:] > 0).all() and (found.pearson <= 1 + 1e-14).all()


def test_neither_other_variants_nor_batches_nor_devices_change_a_variant(task, curvature, found):
  name = "truncation, 30 %"
  alone = study(task, curvature, {name: VARIANTS[name]}, batch_size=5, devices=jax.local_devices())
  v = found.names.index(name)
  for field in ("errors", "pearson", "spearman"):
    # float32 sums in another order; ranks agree exactly here.
    np.testing.assert_allclose(getattr(alone, field)[0], getattr(found, field)[v], rtol=1e-5)


def test_the_page_and_the_table_show_every_variant(found, tmp_path):
  page, figure = write_compression_study(tmp_path, found)
  text, table = page.read_text(), found.table()
  for name, size in zip(found.names, found.sizes, strict=True):
    (line,) = (line for line in table.splitlines() if line.startswith(name))
    assert f"{100 * size:.3g} %" in line and name in text
  assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_least_correlation_stands_beside_the_mean(found):
  spread = dataclasses.replace(
    found, names=("a",), sizes=np.ones(1), errors=np.ones((1, 2)),
    pearson=np.array([[1.0, 0.5]]), spearman=np.array([[0.75, 0.25]]),
  )  # fmt: skip
  assert spread.table().splitlines()[1].split() == (
    ["a", "100", "%", "1", "0.7500", "0.5000", "0.5000", "0.2500"]
  )


def test_what_does_not_fit_together_is_refused(task, curvature):
  with pytest.raises(ValueError, match="damping must be positive"):
    study(task, curvature, damping=0.0)
  with pytest.raises(ValueError, match="got 0, 2, 3 and 12"):
    study(task, curvature, {})
  with pytest.raises(ValueError, match="two training images"):
    study(task, curvature, train=TRAIN[:1])
  with pytest.raises(ValueError, match="do not match training images of shape"):
    study(task, curvature, asked=nets.random_images(2, (6, 6, 1)))
  with pytest.raises(ValueError, match="another task"):
    study(nets.conv_task(seed=1), curvature)
  with pytest.raises(ValueError, match="not the exact one"):
    study(task, dataclasses.replace(curvature, exact=fitted(task, "cg").exact))
