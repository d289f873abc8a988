"""The study's numbers against explicit gradient matrices in float64, and what must not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

import jaxinf
from jaxinf import Compute, Curvature, Draws, Examples
from jaxinf.compression.compression import Bfloat16, LowRank, Uncompressed
from jaxinf.compression.projection import RandomProjection, Truncation
from jaxinf.compression.quantise import Quantisation
from jaxinf.curvature.curvature import ExactCurvature
from jaxinf.evaluation.compression_study import compression_study
from jaxinf.report.studies import write_compression_study
from tests import nets
from tests.evaluation.gradients import gradients_of

NUM, QUERIES, DAMPING = 12, 3, 1e-2
DRAWS, COMPUTE = Draws(2, seed=2), Compute(devices=jax.local_devices()[:1])
VARIANTS = {
  "float32": Uncompressed(),
  "bfloat16": Bfloat16(),
  "int4": Quantisation(4),
  "svd, rank 1": LowRank(1),
  "truncation, 30 %": Truncation(0.3),
  "projection, 50 %": RandomProjection(0.5, seed=0),
}
TRAIN, ASKED = (Examples(nets.random_images(num, seed=num)) for num in (NUM, QUERIES))


@pytest.fixture(scope="module")
def curvature():
  return fitted(jaxinf.EKFAC())


def fitted(kind: jaxinf.KFAC | jaxinf.Diagonal) -> Curvature:
  fit = functools.partial(jaxinf.fit_curvature, nets.conv_model(), TRAIN, draws=Draws(2))
  with pytest.warns(UserWarning, match="worse than predicting zero"):  # parameters are random
    return fit(kind, skip=(), compute=COMPUTE)


def study(curvature, variants=VARIANTS, train=TRAIN, asked=ASKED, damping=DAMPING, compute=COMPUTE):
  return compression_study(
    curvature,
    queries=asked,
    train=train,
    damping=damping,
    draws=DRAWS,
    variants=variants,
    compute=compute,
  )


@pytest.fixture(scope="module")
def found(curvature):
  return study(curvature)


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


def naive_numbers(curvature, variant):
  """(errors, Pearson's, Spearman's) [Q] each, from dense solves and explicit matrices."""
  asked = gradients_of(curvature, ASKED, "query_gradients", DRAWS)
  train = gradients_of(curvature, TRAIN, "train_gradients", DRAWS)
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
def test_errors_and_correlations_are_those_of_explicit_matrices(curvature, found, name):
  errors, pearson, spearman = naive_numbers(curvature, VARIANTS[name])
  v = found.names.index(name)
  # float32 gradients and rotations; no integer of int4 and no number of bfloat16 rounds otherwise.
  np.testing.assert_allclose(found.errors[v], errors, rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose(found.pearson[v], pearson, rtol=0, atol=1e-4)
  # Two of twelve scores that nearly tie may change places: 6 · 2 / (12 · 143) = 0.007.
  np.testing.assert_allclose(found.spearman[v], spearman, rtol=0, atol=0.008)


def test_truncation_needs_no_rotation_where_the_curvature_is_diagonal():
  diagonal, variants = fitted(jaxinf.Diagonal()), {"half": Truncation(0.5)}
  errors, pearson, _ = naive_numbers(diagonal, variants["half"])
  found = study(diagonal, variants)
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


def test_neither_other_variants_nor_batches_nor_devices_change_a_variant(curvature, found):
  name = "truncation, 30 %"
  alone = study(curvature, {name: VARIANTS[name]}, compute=Compute(5, jax.local_devices()))
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


def test_what_does_not_fit_together_is_refused(curvature):
  with pytest.raises(ValueError, match="damping must be positive"):
    study(curvature, damping=0.0)
  with pytest.raises(ValueError, match="at least one variant .* got 0 and 12"):
    study(curvature, {})
  with pytest.raises(ValueError, match="two training examples; got 6 and 1"):
    study(curvature, train=TRAIN.take([0]))
  with pytest.raises(ValueError, match="do not match training examples of shape"):
    study(curvature, asked=Examples(nets.random_images(2, (6, 6, 1))))
  fields = {field.name: getattr(curvature, field.name) for field in dataclasses.fields(curvature)}
  with pytest.raises(ValueError, match="not the exact one"):
    study(ExactCurvature(**fields))
