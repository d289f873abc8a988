"""The views say what the scores say: predictions of a part are those of the whole."""

import numpy as np
import pytest

from jaxinf.core.arrays import Chosen
from jaxinf.explorer import views
from jaxinf.explorer.alike import Alike
from jaxinf.explorer.findings import NotFound
from jaxinf.explorer.views import Choice, Filter
from tests.explorer.examples import NUM_SAMPLES, NUM_TRAIN, SCRIPT, findings

FOUND = findings()
SCORES = FOUND.scores()
IDS = FOUND.dataset.ids


def column(rows, name):
  return [row[name] for row in rows]


@pytest.mark.parametrize("k", [1, 7, NUM_TRAIN, 400])
def test_supporters_and_opposers_are_top_and_bottom_with_their_errors(k):
  shown = views.sample_view(FOUND, "sample_2", Choice(), k, Filter())
  k = min(k, NUM_TRAIN)
  for name, ranking in (("supporting", SCORES.top(k)), ("opposing", SCORES.bottom(k))):
    assert column(shown[name], "id") == ranking.ids[2].tolist()
    assert column(shown[name], "score") == ranking.values[2].tolist()
    assert column(shown[name], "error") == ranking.std_errors[2].tolist()
    assert column(shown[name], "modelError") == ranking.model_std_errors[2].tolist()
  assert shown["numMatching"] == NUM_TRAIN and shown["curve"] == np.sort(SCORES.values[2]).tolist()


def test_a_filter_leaves_the_order_of_what_it_keeps():
  everything = views.sample_view(FOUND, "sample_0", Choice(), NUM_TRAIN, Filter())
  shown = views.sample_view(FOUND, "sample_0", Choice(), NUM_TRAIN, Filter(2, "TABBY 1"))
  kept = [row for row in everything["supporting"] if row["label"] == "<i>owl"]
  kept = [row for row in kept if "tabby 1" in row["id"]]
  assert kept and shown["supporting"] == kept and shown["numMatching"] == len(kept)
  nothing = views.sample_view(FOUND, "sample_0", Choice(), 3, Filter(None, "no such"))
  assert nothing["supporting"] == nothing["curve"] == []
  assert views.training_view(FOUND, Filter(None, "NUMBER 29"), 0, 10)["rows"][0]["position"] == 29


def test_what_if_is_the_prediction_by_all_scores():
  ids = [IDS[3], IDS[4], SCRIPT]
  shown = views.what_if_view(FOUND, [*ids, IDS[3]], [0], Choice("attribute", 1))
  every = sorted({*ids, *IDS[FOUND.dataset.labels == 0]})
  expected = FOUND.scores("attribute", 1).predicted_change(every)
  assert shown["num"] == len(every)
  # float64 sums of the same numbers
  for name, values in (
    ("change", expected.changes), ("error", expected.std_errors),
    ("modelError", expected.model_std_errors),
  ):  # fmt: skip
    np.testing.assert_allclose(column(shown["changes"], name), values, rtol=1e-12)


@pytest.mark.parametrize(("ids", "labels"), [([], []), ([], [0, 1, 2])])
def test_nothing_and_everything_cannot_be_removed(ids, labels):
  with pytest.raises(ValueError, match=f"Remove 1…{NUM_TRAIN - 1} of the {NUM_TRAIN} training"):
    views.what_if_view(FOUND, ids, labels, Choice())


def test_an_image_has_its_column_and_its_prediction():
  shown = views.image_view(FOUND, IDS[5], Choice())
  order = np.argsort(-SCORES.values[:, 5], kind="stable")
  assert column(shown["samples"], "position") == order.tolist()
  assert column(shown["samples"], "score") == SCORES.values[order, 5].tolist()
  assert column(shown["samples"], "error") == SCORES.std_errors[order, 5].tolist()
  changes = SCORES.predicted_change([IDS[5]]).changes
  np.testing.assert_allclose(column(shown["samples"], "change"), changes[order], rtol=1e-12)
  assert shown["selfInfluence"]["value"] == FOUND.self_influence.values[5]


def test_scores_agree_with_themselves():
  same = views.compare_view(FOUND, "sample_1", Choice(), Choice("attribute", 0), 5)
  assert same == {"spearman": pytest.approx(1), "k": 5, "shared": 5}
  other = views.compare_view(FOUND, "sample_1", Choice(), Choice("score/pixel"), NUM_TRAIN)
  assert other["shared"] == NUM_TRAIN and abs(other["spearman"]) < 0.6  # of independent numbers


@pytest.mark.parametrize("largest", [True, False])
def test_self_influence_is_in_order_page_by_page(largest):
  pages = [views.own_view(FOUND, largest, start, 11)["rows"] for start in (0, 11, 22, 33)]
  values = np.sort(FOUND.self_influence.values)
  expected = (values[::-1] if largest else values).tolist()
  assert [row["value"] for page in pages for row in page] == expected


def test_what_is_not_there_is_named():
  for ask, complaint in (
    (lambda: views.sample_view(FOUND, "x", Choice(), 3, Filter()), "No sample has the id 'x'"),
    (lambda: views.image_view(FOUND, "x", Choice()), "No training image has the id 'x'"),
    (lambda: FOUND.scores("score/x"), "no scores 'score/x'; there are: attribute, score/pixel"),
    (lambda: FOUND.scores("attribute", 2), "has 2 dampings; got the number 2"),
    (lambda: views.own_view(findings(self_influence=None), True, 0, 9), "self-influence"),
    (lambda: views.about(findings(sources={}), Choice()), "run the stage attribute"),
  ):
    with pytest.raises(NotFound, match=complaint):
      ask()
  with pytest.raises(ValueError, match="k and count must lie in 1…500; got 501"):
    views.sample_view(FOUND, "sample_1", Choice(), 501, Filter())
  with pytest.raises(ValueError, match="label is a number in 0…2; got 3"):
    FOUND.matching(3, "")


def test_scores_of_other_images_are_refused():
  wrong = findings(read=lambda: [SCORES.with_values(lambda x: x, train_ids=IDS[::-1])])
  with pytest.raises(ValueError, match="other images or samples than this run's"):
    wrong.scores()


def test_two_sources_are_kept_and_each_is_read_once():
  reads = []
  found = findings(read=lambda: (reads.append(1), [SCORES])[1])
  for _ in range(3):
    found.scores("attribute")
    found.scores("score/pixel")
  assert len(reads) == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_nearest_images_and_pairs_are_those_of_all_distances(on_disk):
  pixels = FOUND.dataset.images
  images = Chosen(pixels, np.arange(NUM_TRAIN)) if on_disk else pixels
  levels = pixels.reshape(NUM_TRAIN, -1) / 127.5 - 1
  distances = np.sqrt(((levels[:, None] - levels[None]) ** 2).mean(axis=2))
  np.fill_diagonal(distances, np.inf)
  found = Alike(images).nearest(7, 4)
  assert [n for n, _ in found] == np.argsort(distances[7])[:4].tolist()
  # pixels in float32
  np.testing.assert_allclose([d for _, d in found], np.sort(distances[7])[:4], rtol=1e-6)
  pairs = Alike(images).pairs(10)
  assert pairs[0] == (NUM_TRAIN - 2, NUM_TRAIN - 1, 0.0)  # the same image twice
  expected = np.sort(distances[np.triu_indices(NUM_TRAIN, 1)])[:10]
  np.testing.assert_allclose([d for *_, d in pairs], expected, rtol=1e-6, atol=1e-7)


def test_samples_and_training_images_come_in_parts():
  assert views.samples_view(FOUND, 1, 2)["rows"][0]["id"] == "sample_1"
  assert views.samples_view(FOUND, 0, 500)["total"] == NUM_SAMPLES
  assert views.training_view(FOUND, Filter(1), 8, 500)["rows"] == [
    {"position": n, "id": IDS[n], "label": "dog", "caption": f"number {n} & <b>more</b>"}
    for n in (25, 28)
  ]
