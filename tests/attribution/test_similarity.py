"""Similarities in closed form, the same for uint8 and float images; embeddings by id."""

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
from jaxinf.data.files import read_embeddings


def images(num, *, seed=0, channels=3):
  return np.random.default_rng(seed).integers(0, 256, (num, 4, 5, channels)).astype(np.uint8)


def as_float(images):
  return (images / 127.5 - 1).astype(np.float32)


def test_pixel_similarity_equals_a_loop_over_pairs():
  queries, train = images(3), images(7, seed=1)
  found = {metric: pixel_similarity(queries, train, metric=metric).values for metric in METRICS}
  for q, query in enumerate(as_float(queries).astype(float)):
    for n, image in enumerate(as_float(train).astype(float)):
      cosine = np.vdot(query, image) / np.linalg.norm(query) / np.linalg.norm(image)
      # Scores are float32, of images that were rounded to it here.
      assert found["cosine"][q, n] == pytest.approx(cosine, abs=1e-6)
      assert found["l2"][q, n] == pytest.approx(-np.linalg.norm(query - image), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_the_image_itself_comes_first(metric):
  train = images(6)
  found = pixel_similarity(train[[4, 1]], train, metric=metric, train_ids=np.array(list("abcdef")))
  ranking = found.top(6)
  assert ranking.ids[:, 0].tolist() == ["e", "b"]
  best = {"cosine": 1, "l2": 0}[metric]
  np.testing.assert_allclose(ranking.values[:, 0], best, atol=1e-6)  # cancellation, float32
  assert found.group_values.shape == (1, 2, 6) and np.isnan(found.std_errors).all()
  assert found.settings == {"method": "pixel", "metric": metric}


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_depends_on_neither_type_nor_number_of_images(metric):
  queries, train = images(2), images(1100, seed=1)  # more than go through at a time
  found = pixel_similarity(queries, train, metric=metric).values
  of_floats = pixel_similarity(as_float(queries), as_float(train), metric=metric).values
  np.testing.assert_allclose(of_floats, found, atol=1e-6)  # the images' rounding to float32
  some = pixel_similarity(queries[1:], train[1020:1030], metric=metric).values
  # float64 products of matrices of other shapes, rounded to float32.
  np.testing.assert_allclose(some, found[1:, 1020:1030], rtol=1e-6)


def test_cosine_has_the_opposite_sign_for_the_negative_and_none_for_grey():
  image = as_float(images(1))
  train = np.concatenate([-image, 0.5 * image, 0 * image])
  np.testing.assert_allclose(pixel_similarity(image, train).values, [[-1, 1, 0]], atol=1e-6)


def test_cosines_of_embeddings_in_closed_form():
  query, train = np.array([[1.0, 0], [1, 1]]), np.array([[2.0, 0], [0, 3], [-1, -1], [0, 0]])
  found = embedding_similarity(query, train, train_ids=np.array(list("abcd")), name="clip")
  half = np.sqrt(0.5)
  np.testing.assert_allclose(found.values, [[1, 0, -half, 0], [half, half, -1, 0]], atol=1e-7)
  assert found.settings == {"method": "clip", "metric": "cosine"}
  assert found.train_ids.tolist() == list("abcd") and found.query_ids.tolist() == [0, 1]


def test_random_scores_belong_to_pairs_of_ids():
  found = random_scores(np.arange(20), np.arange(400), seed=0)
  some = random_scores(np.array([7, 3]), np.array([5, 399]), seed=0)
  np.testing.assert_array_equal(some.values, found.values[[7, 3]][:, [5, 399]])
  assert (random_scores(np.arange(20), np.arange(400), seed=1).values != found.values).any()
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
  with refuse("the metrics are cosine, l2"):
    pixel_similarity(images(1), images(2), metric="dot")
  with refuse("do not match training images"):
    pixel_similarity(images(1, channels=1), images(2))
  with refuse("train_ids must be 2 different ids"):
    pixel_similarity(images(1), images(2), train_ids=np.array([1, 1]))
  with refuse("got shapes (2, 3) and (2, 4)"):
    embedding_similarity(np.ones((2, 3)), np.ones((2, 4)))
  with refuse("must be finite"):
    embedding_similarity(np.ones((2, 3)), np.full((2, 3), np.nan))


def test_clip_without_its_libraries_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "transformers", None)
  with pytest.raises(ValueError, match=re.escape("pip install 'jaxinf[clip]'")):
    clip_embeddings(images(1), tmp_path)
  with pytest.raises(ValueError, match="grey or RGB images; got 4"):
    clip_embeddings(images(1, channels=4), tmp_path)
