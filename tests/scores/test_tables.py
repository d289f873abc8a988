"""Scores as a table: one row a pair, whose numbers are those of the arrays to the last bit."""

import csv
import sys

import numpy as np
import pytest

from jaxinf.scores.scores import Scores

RNG = np.random.default_rng(0)


def scores(num_replicates=3, **fields) -> Scores:
  values = RNG.normal(size=(num_replicates, 2, 3)).astype(np.float32)
  ids = np.array(["a", 'quoted, "b"']), np.array([7, 8, 9])
  return Scores(values, *ids, {}, **fields)


def rows_of(path) -> list[dict[str, str]]:
  with path.open(newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def test_a_csv_file_holds_every_pair_and_reads_back_exactly(tmp_path):
  models = RNG.normal(size=(2, 2, 3)).astype(np.float32)
  given = scores(model_values=models, train_groups=np.array(["x", "y", "x"]))
  given.to_csv(tmp_path / "scores.csv")
  rows = rows_of(tmp_path / "scores.csv")
  assert [row["query"] for row in rows] == 3 * ["a"] + 3 * ['quoted, "b"']
  assert [row["train"] for row in rows] == 2 * ["7", "8", "9"]
  assert [row["group"] for row in rows] == 2 * ["x", "y", "x"]
  names = {"score": "values", "std_error": "std_errors", "model_std_error": "model_std_errors"}
  for column, name in names.items():
    numbers = np.array([row[column] for row in rows], np.float32)
    np.testing.assert_array_equal(numbers, getattr(given, name).ravel())


def test_errors_that_are_not_known_are_empty(tmp_path):
  scores(num_replicates=1).to_csv(tmp_path / "scores.csv")
  rows = rows_of(tmp_path / "scores.csv")
  assert list(rows[0]) == ["query", "train", "score", "std_error"]
  assert {row["std_error"] for row in rows} == {""}


def test_a_frame_is_the_same_table(tmp_path):
  pandas = pytest.importorskip("pandas")
  given = scores(train_groups=np.array(["x", "y", "x"]))
  given.to_csv(tmp_path / "scores.csv")
  read = pandas.read_csv(tmp_path / "scores.csv")
  pandas.testing.assert_frame_equal(given.to_frame(), read, check_dtype=False)
  best = given.to_frame().groupby("query", sort=False)["score"].max()
  np.testing.assert_array_equal(best, given.values.max(axis=1))


def test_without_pandas_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "pandas", None)
  with pytest.raises(ImportError, match=r"pip install 'jaxinf\[pandas\]'.* to_csv"):
    scores().to_frame()
