"""Standard errors of scores and of their sums: how far noise of both gradients may move them."""

import dataclasses
import re

import numpy as np
import pytest

from jaxinf.scores.scores import NEGATIVE_WEIGHT, Scores


def bilinear_scores(*, noise, num_groups=4, num_query_groups=3, num_repeats=40_000, size=3):
  """Scores [repeats, 1] of one query and one example, from noisy groups of both gradients; truth.

  Each gradient has `size` entries, and a group's are off by N(0, noise²).
  """
  rng = np.random.default_rng(0)
  query, example = np.array([1.0, -2.0, 0.5]), np.array([0.5, 1.0, 2.0])
  noisy = lambda v, num: v + noise * rng.normal(size=(num, num_repeats, size))
  queries, examples = noisy(query, num_query_groups), noisy(example, num_groups)
  product = lambda a, b: np.sum(a * b, axis=-1, keepdims=True).astype(np.float32)
  scores = Scores(
    product(examples, queries.mean(axis=0)), np.arange(num_repeats), np.arange(1), {},
    query_replicate_values=product(queries, examples.mean(axis=0)),
  )  # fmt: skip
  return scores, query, example


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_std_errors_are_as_large_as_the_deviations_from_the_truth(noise):
  scores, query, example = bilinear_scores(noise=noise)
  squares = scores.std_errors[:, 0].astype(np.float64) ** 2
  deviations = (scores.values[:, 0].astype(np.float64) - query @ example) ** 2
  # Var of a product of means: first order |q|² σ²/G + |g|² σ²/A, second d σ⁴ / (G A). Groups see
  # the second-order term on both sides.
  first = noise**2 * (query @ query / 4 + example @ example / 3)
  second = 3 * noise**4 / 12
  ratio = (first + 2 * second) / (first + second)
  assert ratio == pytest.approx(1, abs=0.001 if noise == 0.1 else 0.1)
  within = lambda x: 4 * x.std() / np.sqrt(len(x))  # four sampling errors of the mean over repeats
  assert abs((squares - ratio * deviations).mean()) < within(squares - ratio * deviations)
  assert abs((squares - first - 2 * second).mean()) < within(squares)


def test_values_and_errors_of_groups_in_closed_form():
  # Training replicates 1, 3: variance 2, mean 2. Query groups 0, 2, 4: variance 4, mean 2.
  column = lambda *values: np.array(values, np.float32).reshape(-1, 1, 1)
  scores = Scores(column(1, 3), np.arange(1), np.arange(1), {}, column(0, 2, 4))
  assert scores.values.item() == 2
  # One rounding of float32 or two.
  assert scores.std_errors.item() == pytest.approx(np.sqrt(2 / 2 + 4 / 3), rel=3e-7)
  for ungrouped in (None, column(2)):
    alone = dataclasses.replace(scores, query_replicate_values=ungrouped)
    assert alone.std_errors.item() == 1  # over training draws alone
  one_group = dataclasses.replace(scores, replicate_values=column(2))
  assert np.isnan(one_group.std_errors).all() and one_group.std_errors.shape == (1, 1)
  assert scores.top(1).std_errors == scores.std_errors


def grouped_scores(*, num_query_groups=3) -> Scores:
  """Scores of 2 queries for 6 examples of 3 artists, in 4 replicates of draws."""
  rng = np.random.default_rng(0)
  draw = lambda num: rng.normal(size=(num, 2, 6)).astype(np.float32)
  return Scores(
    draw(4),
    np.array(["a", "b"]),
    np.arange(6) + 10,
    {"damping": 0.1},
    draw(num_query_groups) if num_query_groups else None,
    train_groups=np.array(["miro", "klee", "miro", "arp", "klee", "miro"]),
  )


def test_scores_by_group_are_sums_over_its_examples():
  scores = grouped_scores()
  summed = scores.by_group()
  assert summed.train_ids.tolist() == ["arp", "klee", "miro"]
  for column, members in enumerate(([3], [1, 4], [0, 2, 5])):
    for name in ("replicate_values", "query_replicate_values"):
      expected = getattr(scores, name)[..., members].astype(np.float64).sum(axis=-1)
      # Rounded to float32 once.
      np.testing.assert_allclose(getattr(summed, name)[..., column], expected, rtol=1e-7)
  assert summed.query_replicate_values.shape == (3, 2, 3) and summed.train_groups is None
  assert grouped_scores(num_query_groups=0).by_group().query_replicate_values is None
  with pytest.raises(ValueError, match="need train_groups"):
    summed.by_group()


@pytest.mark.parametrize("shared", [True, False])
def test_errors_of_sums_are_right_whether_or_not_examples_share_their_draws(shared):
  """100 examples with noise 1 in each of 4 groups: their sum has the error 100 / √4 or 10 / √4."""
  noise = np.random.default_rng(0).normal(size=(4, 500, 1 if shared else 100))
  values = np.broadcast_to(noise, (4, 500, 100)).astype(np.float32)
  groups = np.zeros(100, int)
  scores = Scores(values, np.arange(500), np.arange(100), {}, train_groups=groups)
  errors = scores.by_group().std_errors
  # The variance from 4 groups is off by √(2/3) of itself: ten percent is 2.7 errors of 500.
  assert np.mean(errors**2) == pytest.approx((100**2 if shared else 100) / 4, rel=0.1)


@pytest.mark.parametrize("num_query_groups", [0, 1, 3])
@pytest.mark.parametrize("weight", [1, 0.3, 0])
def test_a_predicted_change_is_the_weighted_sum_over_n_with_the_error_of_the_sum(
  num_query_groups, weight
):
  scores = grouped_scores(num_query_groups=num_query_groups)
  found = scores.predicted_change([15, 10, 12, 10], weight)
  weights = np.where(scores.values < 0, weight, 1.0)
  summed = lambda values: (weights * values)[..., [0, 2, 5]].sum(axis=-1) / 6
  replicates = summed(scores.replicate_values)
  # Sums of float32 numbers in float64, on both sides.
  np.testing.assert_allclose(found.changes, replicates.mean(axis=0), rtol=1e-12)
  variance = replicates.var(axis=0, ddof=1) / 4
  if num_query_groups == 3:
    variance = variance + summed(scores.query_replicate_values).var(axis=0, ddof=1) / 3
  np.testing.assert_allclose(found.std_errors, np.sqrt(variance), rtol=1e-12)
  assert np.isnan(found.model_std_errors).all()
  # A group is removed by its name, and N still counts examples; sums are rounded to float32.
  of_groups = scores.discounted(weight).by_group().predicted_change(["miro"], 1)
  np.testing.assert_allclose(of_groups.changes, found.changes, rtol=1e-5)
  np.testing.assert_allclose(of_groups.std_errors, found.std_errors, rtol=1e-5)


def test_a_prediction_without_removals_is_zero_and_others_are_refused():
  scores = grouped_scores()
  nothing = scores.predicted_change([])
  assert (nothing.changes == 0).all() and (nothing.std_errors == 0).all()
  default = scores.predicted_change([10, 11, 12])
  expected = scores.predicted_change([10, 11, 12], NEGATIVE_WEIGHT)
  np.testing.assert_array_equal(default.changes, expected.changes)
  for identity in (9, "10"):
    with pytest.raises(ValueError, match=f"1 ids are of no training example: {identity!r}. There"):
      scores.predicted_change([identity, 10] if identity == 9 else [identity])
  for weight in (-0.1, 1.5, float("nan")):
    with pytest.raises(ValueError, match="negative_weight must lie in"):
      scores.predicted_change([10], weight)


WEIGHTS = np.array([0.5, -2.0])


@pytest.mark.parametrize("num_query_groups", [0, 3])
def test_a_query_set_has_the_weighted_sum_of_scores_with_the_error_of_the_sum(num_query_groups):
  scores = grouped_scores(num_query_groups=num_query_groups)
  found = scores.of_query_set({"b": -2.0, np.str_("a"): 0.5})
  replicates = np.einsum("q,gqn->gn", WEIGHTS, scores.replicate_values.astype(np.float64))
  assert found.values.shape == (1, 6) and found.query_ids.tolist() == ["query set"]
  # Rounded to float32 a few times.
  np.testing.assert_allclose(found.values[0], replicates.mean(axis=0), rtol=1e-5, atol=1e-6)
  variance = replicates.var(axis=0, ddof=1) / 4
  if num_query_groups:
    parts = np.einsum("q,gqn->gn", WEIGHTS, scores.query_replicate_values.astype(np.float64))
    variance = variance + parts.var(axis=0, ddof=1) / 3
  np.testing.assert_allclose(found.std_errors[0], np.sqrt(variance), rtol=1e-5)
  assert found.settings == {"damping": 0.1, "query_weights": [0.5, -2.0]}
  # Sets of queries and groups of examples commute; N still counts examples.
  both, other = found.by_group(), scores.by_group().of_query_set(WEIGHTS)
  np.testing.assert_allclose(both.replicate_values, other.replicate_values, atol=1e-5)
  np.testing.assert_allclose(both.std_errors, other.std_errors, rtol=1e-4)
  assert both.top(2).ids.tolist() == other.top(2).ids.tolist()
  change = lambda scores: scores.predicted_change([10, 13], negative_weight=1).changes
  np.testing.assert_allclose(change(found), WEIGHTS @ change(scores), rtol=1e-5, atol=1e-7)


def test_a_difference_of_queries_that_share_their_noise_has_the_error_of_the_difference():
  """Noise common to both is none of the difference's; each query's own counts."""
  rng = np.random.default_rng(0)
  common, own = rng.normal(size=(4, 1, 500)), 0.1 * rng.normal(size=(4, 2, 500))
  values = np.broadcast_to(common, (4, 2, 500)) + own
  scores = Scores(values.astype(np.float32), np.array([7, 8]), np.arange(500), {})
  errors = scores.of_query_set({7: 1, 8: -1}).std_errors
  # √(2 · 0.1² / 4), where two independent errors would give √(2 / 4): 500 variances of 3 degrees.
  assert np.mean(errors**2) == pytest.approx(2 * 0.01 / 4, rel=0.15)
  assert np.mean(scores.std_errors**2) == pytest.approx(1.01 / 4, rel=0.15)


@pytest.mark.parametrize(
  ("weights", "message"),
  [
    ({"a": 1.0, "c": 2.0}, "1 ids are of no query, such as 'c'. There are 2, such as ['a', 'b']"),
    (np.ones(3), "weights must be 2 numbers, one a query"),
    ([1.0, np.nan], "finite, and not all 0"),
    ({"a": 0.0}, "not all 0"),
  ],
)
def test_weights_that_ask_about_nothing_are_refused(weights, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    grouped_scores().of_query_set(weights)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(replicate_values=np.zeros((2, 6))), "got shape (2, 6)"),
    (dict(replicate_values=np.zeros((0, 2, 6))), "G ≥ 1 replicates"),
    (dict(query_ids=np.arange(3)), "query_ids must be 2"),
    (dict(train_ids=np.arange(2)), "train_ids must be 6, as replicate_values (4, 2, 6) has them"),
    (dict(train_groups=np.arange(5)), "train_groups must be 6"),
    (dict(query_replicate_values=np.zeros((3, 6, 2))), "scores [A, 2, 6]"),
    (dict(model_values=np.zeros((3, 2, 5))), "model_values must be scores [K, 2, 6]"),
  ],
)
def test_shapes_that_do_not_agree_are_refused(change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dataclasses.replace(grouped_scores(), **change)


def test_scores_are_shown_in_a_line():
  scores = grouped_scores()
  said = "2 queries × 6 training examples, 4 replicates of draws, 3 of query draws"
  assert repr(scores) == f"Scores({said}; λ = 0.1)"
  assert scores.summary().startswith(f"{said}; damping 0.1, root mean square ")


@pytest.mark.parametrize("replicates", [1, 3])
def test_scores_are_read_as_they_were_saved(replicates, tmp_path):
  values = np.random.default_rng(0).normal(size=(replicates, 2, 4)).astype(np.float32)
  scores = Scores(
    values, np.array(["a", "b"]), np.arange(4),
    {"method": "toy", "damping": 1e-8, "design": {"shared": True}},
    query_replicate_values=2 * values if replicates > 1 else None,
    train_groups=np.array([0, 0, 1, 1]), num_examples=9,
  )  # fmt: skip
  scores.save(tmp_path / "scores.npz")
  assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]
  again = Scores.load(tmp_path / "scores.npz")
  for field in dataclasses.fields(Scores):
    ours, theirs = getattr(scores, field.name), getattr(again, field.name)
    np.testing.assert_array_equal(theirs, ours)  # of None too
  np.testing.assert_array_equal(again.by_group().values, scores.by_group().values)


def test_three_arrays_are_scores(tmp_path):
  values = np.arange(6.0).reshape(2, 3)
  np.savez(tmp_path / "mine.npz", values=values, query_ids=["x", "y"], train_ids=[5, 6, 7])
  scores = Scores.load(tmp_path / "mine.npz")
  np.testing.assert_array_equal(scores.values, values)
  assert scores.settings == {} and scores.top(1).ids.tolist() == [[7], [7]]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"train_ids": None}, "expected the arrays values.* got values, query_ids"),
    ({"value": np.zeros(3)}, "Rename, add or drop some"),
    ({"replicate_values": np.zeros((1, 2, 3))}, "expected the arrays values"),
    ({"values": np.zeros((1, 2, 3))}, r"values as numbers \[Q, N\]; got shape \(1, 2, 3\)"),
    ({"values": np.zeros((3, 2))}, r"mine.npz: query_ids must be 3"),
    ({"values": np.full((2, 3), "1")}, "got shape .* of type <U1"),
    ({"settings": np.array("{")}, "mine.npz: Expecting property name"),
  ],
)
def test_files_of_other_arrays_are_refused(change, message, tmp_path):
  arrays = {"values": np.zeros((2, 3)), "query_ids": np.arange(2), "train_ids": np.arange(3)}
  path = tmp_path / "mine.npz"
  np.savez(path, **{k: x for k, x in (arrays | change).items() if x is not None})
  with pytest.raises(ValueError, match=message):
    Scores.load(path)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
  scores = Scores(np.zeros((1, 1, 1)), np.arange(1), np.arange(1), {})
  with pytest.raises(ValueError, match="expected the name of an .npz file"):
    scores.save(tmp_path / "scores.json")
  with pytest.raises(ValueError, match="settings must be numbers"):
    dataclasses.replace(scores, settings={"draws": object()}).save(tmp_path / "scores.npz")
  with pytest.raises(ValueError, match="query_ids hold objects"):
    dataclasses.replace(scores, query_ids=np.array([None])).save(tmp_path / "scores.npz")
  with pytest.raises(ValueError, match="expected an .npz file, got none"):
    Scores.load(tmp_path / "scores.npz")
