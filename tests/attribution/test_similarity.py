"""Similarities in closed form, the same for uint8 and float images; random scores by id."""

import re
import sys

import numpy as np
import pytest

from jaxinf.attribution.similarity import (
  METRICS,
  clip_embeddings,
  embedding_similarity,
  pixel_similarity,
  random_scores,
)
from jaxinf.core.examples import Examples
from jaxinf.data.files import read_embeddings
from tests.twins import assert_close

LETTERS = np.array(list("abcdef"))


def pixels(num, *, seed=0, channels=3):
  return np.random.default_rng(seed).integers(0, 256, (num, 4, 5, channels)).astype(np.uint8)


def as_float(images):
  return (images / 127.5 - 1).astype(np.float32)


def similarity(queries, train, metric="cosine"):
  return pixel_similarity(queries=Examples(queries), train=Examples(train), metric=metric).values


def test_pixel_similarity_equals_a_loop_over_pairs():
  queries, train = pixels(3), pixels(7, seed=1)
  found = {metric: similarity(queries, train, metric) for metric in METRICS}
  for q, query in enumerate(as_float(queries).astype(float)):
    for n, image in enumerate(as_float(train).astype(float)):
      cosine = np.vdot(query, image) / np.linalg.norm(query) / np.linalg.norm(image)
      # Scores are float32, of images that were rounded to it here.
      assert found["cosine"][q, n] == pytest.approx(cosine, abs=1e-6)
      assert found["l2"][q, n] == pytest.approx(-np.linalg.norm(query - image), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_the_image_itself_comes_first(metric):
  train = Examples(pixels(6), LETTERS)
  queries = Examples(train.data[[4, 1]])
  found = pixel_similarity(queries=queries, train=train, metric=metric)
  ranking = found.top(6)
  assert ranking.ids[:, 0].tolist() == ["e", "b"]
  best = {"cosine": 1, "l2": 0}[metric]
  np.testing.assert_allclose(ranking.values[:, 0], best, atol=1e-6)  # cancellation, float32
  assert found.replicate_values.shape == (1, 2, 6) and np.isnan(found.std_errors).all()
  assert found.settings == {"method": "pixel", "metric": metric}


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_depends_on_neither_type_nor_blocks(metric, monkeypatch):
  queries, train = pixels(2), pixels(50, seed=1)
  found = similarity(queries, train, metric)
  of_floats = similarity(as_float(queries), as_float(train), metric)
  np.testing.assert_allclose(of_floats, found, atol=1e-6)  # the images' rounding to float32
  monkeypatch.setattr("jaxinf.core.arrays._BLOCK_BYTES", 7 * train[0].nbytes)
  # float64 products of matrices of other shapes, rounded to float32.
  np.testing.assert_allclose(similarity(queries, train, metric), found, rtol=1e-6)


def test_cosine_has_the_opposite_sign_for_the_negative_and_none_for_grey():
  image = as_float(pixels(1))
  train = np.concatenate([-image, 0.5 * image, 0 * image])
  np.testing.assert_allclose(similarity(image, train), [[-1, 1, 0]], atol=1e-6)


def test_cosines_of_embeddings_in_closed_form():
  queries = Examples(np.array([[1.0, 0], [1, 1]]))
  train = Examples(np.array([[2.0, 0], [0, 3], [-1, -1], [0, 0]]), LETTERS[:4])
  found = embedding_similarity(queries=queries, train=train, name="clip")
  half = np.sqrt(0.5)
  assert_close(found.values, np.array([[1, 0, -half, 0], [half, half, -1, 0]]), 1e-7)
  assert found.settings == {"method": "clip", "metric": "cosine"}
  assert found.train_ids.tolist() == list("abcd") and found.query_ids.tolist() == [0, 1]


def numbered(ids) -> Examples:
  return Examples(np.zeros((len(ids), 1), np.uint8), ids)


def test_random_scores_belong_to_pairs_of_ids():
  everyone = dict(queries=numbered(np.arange(20)), train=numbered(np.arange(400)))
  found = random_scores(**everyone)
  some = random_scores(queries=numbered(np.array([7, 3])), train=numbered(np.array([5, 399])))
  np.testing.assert_array_equal(some.values, found.values[[7, 3]][:, [5, 399]])
  assert (random_scores(**everyone, seed=1).values != found.values).any()
  # 8,000 independent N(0, 1): four standard errors of mean, variance and a product.
  assert abs(found.values.mean()) < 4 / np.sqrt(8000)
  assert abs(found.values.var() - 1) < 4 * np.sqrt(2 / 8000)
  assert abs((found.values[:10] * found.values[10:]).mean()) < 4 / np.sqrt(4000)


def test_embeddings_are_read_by_id(tmp_path):
  path, embeddings = tmp_path / "clip.npz", np.arange(6.0).reshape(3, 2)
  for ids in (np.array(["a", "b", "c"]), np.arange(3)):
    np.savez(path, embeddings=embeddings, ids=ids)
    np.testing.assert_array_equal(read_embeddings(path, ids[[2, 0]]), embeddings[[2, 0]])
  with pytest.raises(ValueError, match="1 of 2 ids have no embedding, such as '9'"):
    read_embeddings(path, np.array(["1", "9"]))
  np.savez(path, embeddings=embeddings, ids=np.array(["a", "b", "a"]))
  with pytest.raises(ValueError, match="n different ids; got shapes"):
    read_embeddings(path, np.array(["a"]))
  np.savez(path, embedings=embeddings, ids=np.arange(3))
  with pytest.raises(ValueError, match="expected the arrays embeddings and ids; got embedings"):
    read_embeddings(path, np.arange(3))


def test_what_does_not_fit_is_refused():
  refuse = lambda message: pytest.raises(ValueError, match=re.escape(message))
  with refuse("Unknown metric 'dot'; there are: cosine, l2."):
    similarity(pixels(1), pixels(2), "dot")
  with refuse("do not match training examples"):
    similarity(pixels(1, channels=1), pixels(2))
  with refuse("got shapes (2, 3) and (2, 4)"):
    embedding_similarity(queries=Examples(np.ones((2, 3))), train=Examples(np.ones((2, 4))))
  with refuse("seed must be a whole number in [0, 2**32); got True."):
    random_scores(queries=numbered([0]), train=numbered([0]), seed=True)


def test_clip_without_its_libraries_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "transformers", None)
  with pytest.raises(ValueError, match=re.escape("pip install 'jaxinf[clip]'")):
    clip_embeddings(pixels(1), tmp_path)
  with pytest.raises(ValueError, match=re.escape("grey or RGB images [B, H, W, C]; got shape")):
    clip_embeddings(pixels(1, channels=4), tmp_path)
