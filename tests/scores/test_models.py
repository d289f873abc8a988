"""Means over models: what they are in closed form, and that order of ids does not matter."""

import dataclasses
import re

import numpy as np
import pytest

from jaxinf.scores.models import mean_scores, shared_top
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep


def model(seed, **settings) -> Scores:
  """Scores of one model: 2 queries, 6 examples of 3 artists, 4 and 3 replicates of draws."""
  rng = np.random.default_rng(seed)
  draw = lambda num: rng.normal(size=(num, 2, 6)).astype(np.float32)
  groups = np.array(["miro", "klee", "miro", "arp", "klee", "miro"])
  own = {"measurement": "loss", "damping": 0.1, "draws": 8} | settings
  return Scores(draw(4), np.array(["a", "b"]), np.arange(6) + 10, own, draw(3), groups)


def test_a_mean_is_that_of_each_replicate_and_remembers_its_models():
  models = [model(seed) for seed in range(3)]
  mean = mean_scores(models)
  for name in ("replicate_values", "query_replicate_values"):
    # Three float32 numbers in another order.
    expected = np.mean([getattr(x, name) for x in models], axis=0)
    np.testing.assert_allclose(getattr(mean, name), expected, rtol=1e-6, atol=1e-7)
  values = np.stack([x.values for x in models])
  np.testing.assert_array_equal(mean.model_values, values)
  np.testing.assert_allclose(mean.values, values.mean(axis=0), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(
    mean.model_std_errors, values.std(axis=0, ddof=1) / np.sqrt(3), rtol=1e-6
  )
  best = mean.top(2)
  np.testing.assert_array_equal(
    best.model_std_errors, np.take_along_axis(mean.model_std_errors, best.positions, axis=1)
  )
  assert mean.settings == models[0].settings | {"num_models": 3}
  assert "3 models" in repr(mean)
  assert mean_scores(models[:1]) is models[0]
  assert (
    np.isnan(models[0].model_std_errors).all() and np.isnan(models[0].top(1).model_std_errors).all()
  )


def test_predictions_carry_the_error_between_models():
  mean = mean_scores([model(seed) for seed in range(3)])
  found = mean.predicted_change([11, 14], 0.5)
  weights = np.where(mean.values < 0, 0.5, 1)  # by the sign of the mean, in every model
  each = (weights * mean.model_values.astype(float))[..., [1, 4]].sum(axis=-1) / 6
  np.testing.assert_allclose(
    found.model_std_errors, each.std(axis=0, ddof=1) / np.sqrt(3), rtol=1e-12
  )
  np.testing.assert_allclose(found.changes, each.mean(axis=0), rtol=1e-5)  # float32 means
  of_groups = mean.discounted(0.5).by_group().predicted_change(["klee"], 1)
  np.testing.assert_allclose(of_groups.model_std_errors, found.model_std_errors, rtol=1e-5)


def test_the_shared_top_counts_examples_of_both_lists():
  values = np.array([[[5, 4, 3, 2, 1, 0]], [[0, 5, 4, 3, 2, 1]], [[5, 4, 0, 1, 2, 3]]], np.float32)
  ids = np.array(["a"]), np.arange(6)
  mean = mean_scores([Scores(each[None], *ids, {}) for each in values])
  # The sums are 10, 13, 7, 6, 5, 4: examples 1, 0 and 2 lead; the models' lists are
  # {0, 1, 2}, {1, 2, 3} and {0, 1, 5}.
  np.testing.assert_allclose(shared_top(mean, 3), [[1, 2 / 3, 2 / 3]])
  with pytest.raises(ValueError, match="of one model"):
    shared_top(model(0), 3)


def test_ids_are_matched_whatever_their_order():
  first, second = model(0), model(1)
  rows, columns = np.array([1, 0]), np.array([3, 0, 5, 1, 4, 2])
  shuffled = dataclasses.replace(
    second.with_values(lambda values: values[:, rows][..., columns]),
    query_ids=second.query_ids[rows],
    train_ids=second.train_ids[columns],
    train_groups=second.train_groups[columns],
  )
  expected, found = mean_scores([first, second]), mean_scores([first, shuffled])
  np.testing.assert_array_equal(found.replicate_values, expected.replicate_values)
  np.testing.assert_array_equal(found.model_values, expected.model_values)
  np.testing.assert_array_equal(found.train_groups, expected.train_groups)


def test_settings_that_differ_are_left_out_and_the_worst_check_is_kept():
  check = lambda least: {"spearman": 0.9, "least_spearman": least}
  models = [model(0, draws=8, check=check(0.8)), model(1, draws=9, check=check(0.7))]
  settings = mean_scores(models).settings
  assert "draws" not in settings and settings["check"] == check(0.7)
  sweeps = [[model(seed, damping=damping) for damping in (0.1, 0.2)] for seed in (0, 1)]
  means = Sweep(map(mean_scores, zip(*sweeps, strict=True)))
  assert means.dampings.tolist() == [0.1, 0.2]
  part = lambda scores, q: scores.with_values(
    lambda values: values[:, q : q + 1], query_ids=scores.query_ids[q : q + 1]
  )
  halves = [Sweep(part(scores, q) for scores in means) for q in (0, 1)]
  whole = Sweep.of_parts(halves)
  np.testing.assert_array_equal(whole[1].model_values, means[1].model_values)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(query_ids=np.array(["a", "c"])), "model 1 and of the first have other query ids."),
    (dict(train_ids=np.arange(6)), "other training ids."),
    (dict(replicate_values=np.zeros((5, 2, 6))), "other numbers of replicates."),
    (dict(num_examples=7), "other number of training examples N."),
    (dict(train_groups=None), "other groups of training examples."),
    (dict(train_groups=np.arange(6)), "some belong to other groups"),
    (dict(settings={"measurement": "elbo", "damping": 0.1}), "other measurement."),
    (dict(settings={"measurement": "loss", "damping": 0.2}), "other damping."),
    (dict(model_values=np.zeros((2, 2, 6))), "other models (one of them is a mean)."),
  ],
)
def test_scores_that_differ_in_more_than_the_model_are_refused(change, message):
  other = dataclasses.replace(model(1), **change)
  with pytest.raises(ValueError, match=re.escape(message)):
    mean_scores([model(0), other])


def test_a_mean_is_made_of_scores():
  for given in ([], [np.zeros((2, 6))]):
    with pytest.raises(ValueError, match="of Scores of models, one or more"):
      mean_scores(given)
