"""Figures from the library: what stands in them is what the scores say, of the examples given."""

import numpy as np
import pytest

import jaxinf

VALUES = np.array([[3.0, -2.0, 0.1, 1.0], [-1.0, 5.0, 0.5, -0.2]], np.float32)


def scores(**fields) -> jaxinf.Scores:
  given = dict(query_ids=np.array(["a", "b"]), train_ids=np.array([10, 11, 12, 13]), settings={})
  return jaxinf.Scores(VALUES[None], **(given | fields))


def pictures(num, shape=(4, 4, 1)):
  return np.random.default_rng(num).integers(0, 256, (num, *shape)).astype(np.uint8)


def texts(figure) -> list[str]:
  (axes,) = figure.axes
  return [text.get_text() for text in axes.texts]


def test_a_line_a_query_with_its_examples_in_the_order_of_their_scores():
  """The picture of the best example is drawn first of those that support."""
  train = pictures(4)
  figure = jaxinf.plot.attributions(scores(), pictures(2), train, k=2)
  said = [text for text in texts(figure) if text]
  assert [s for s in said if s in ("a", "b")] == ["a", "b"]
  first, second = said.index("a"), said.index("b")
  assert said[first + 1 : second] == ["+3.00", "+1.00", "−2.00", "+0.10", "+0.10", "+1.00"]
  shown = [image.get_array()[..., 0] for image in figure.axes[0].images]
  assert len(shown) == 2 * (1 + 3 * 2)
  np.testing.assert_array_equal(shown[1], train[0, ..., 0])
  np.testing.assert_array_equal(shown[7 + 1], train[1, ..., 0])  # of the second query
  assert figure._repr_png_().startswith(b"\x89PNG")  # as notebooks show it


def test_examples_without_pictures_are_named_and_fewer_queries_are_shown():
  volumes = np.zeros((4, 2, 2, 2, 5), np.float32)
  given = jaxinf.Examples(volumes, np.array([10, 11, 12, 13]))
  said = texts(jaxinf.plot.attributions(scores(), pictures(2), given, k=1, num_queries=1))
  assert "b" not in said and {"a", "10", "11", "12"} <= set(said)


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (dict(queries=jaxinf.Examples(pictures(2), ["b", "a"])), "queries that are not these 2"),
    (dict(train=jaxinf.Examples(pictures(4))), "training examples that are not these 4"),
    (dict(train=pictures(3)), "2 queries and 4 training examples; got 2 and 3 to show"),
    (dict(k=0), "k must be at least 1"),
    (dict(num_queries=0), "num_queries must be at least 1"),
  ],
)
def test_examples_of_other_scores_are_refused(given, said):
  arguments = dict(queries=pictures(2), train=pictures(4)) | given
  with pytest.raises(ValueError, match=said):
    jaxinf.plot.attributions(scores(), **arguments)
