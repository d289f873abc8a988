"""The page shows what the scores say, needs nothing but itself, and its images are the data's."""

import dataclasses

import numpy as np
import pytest

from jaxinf.configs import digits
from jaxinf.data.dataset import Dataset
from jaxinf.layers.coverage import Coverage, Row
from jaxinf.report.rows import common_unit, explained_rows
from jaxinf.report.run_page import write_report
from jaxinf.report.words import Unit, scientific
from jaxinf.runs.config import typed
from jaxinf.scores.scores import Scores
from tests.report.parsed import Page, decoded

NUM_TRAIN, NUM_QUERIES, TOP_K = 30, 2, 3

COVERAGE = Coverage(
  (
    Row("conv_in/kernel", (3, 3, 1, 4), "conv2d (K-FAC expand)"),
    Row("norm/scale", (4,), "skipped"),
  )
)


def dataset_of(channels=1, dtype=np.uint8, **fields) -> Dataset:
  levels = np.random.default_rng(1).integers(0, 256, (NUM_TRAIN, 4, 4, channels), np.uint8)
  images = levels if dtype == np.uint8 else (levels / 127.5 - 1).astype(np.float32)
  ids = np.array([f"folder/im<{n:02d}>&.png" for n in range(NUM_TRAIN)])
  return Dataset(**(dict(name="tiny", images=images, ids=ids) | fields))


@dataclasses.dataclass
class AnyData:
  """What the page reads of a data set, with examples of any shape."""

  name: str
  images: np.ndarray
  ids: np.ndarray
  labels: np.ndarray | None = None
  captions: np.ndarray | None = None

  def __len__(self):
    return len(self.images)


def scores_of(dataset, num_groups=4, scale=1e-4) -> Scores:
  values = np.random.default_rng(2).normal(size=(num_groups, NUM_QUERIES, len(dataset)))
  settings = {"measurement": "loss", "damping": 1e-8, "draws": 8}
  query_ids = np.array([f"sample_{q}" for q in range(NUM_QUERIES)])
  return Scores((scale * values).astype(np.float32), query_ids, dataset.ids, settings)


def samples_of(dataset) -> np.ndarray:
  shape = (NUM_QUERIES, *dataset.images.shape[1:])
  return np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32)


def config_of(num_queries=NUM_QUERIES, top_k=TOP_K):
  config = digits.get_config()
  config.report.num_queries, config.report.top_k = num_queries, top_k
  return typed(config)


def manifest(seconds, device_mib=None, revision=None) -> dict:
  cost = {"seconds": seconds, "peak_host_mib": 2048, "peak_device_mib": device_mib}
  versions = {"python": "3.12.1", "jax": "0.9.9"}
  return {"cost": cost, "versions": versions, "devices": ["cpu"], "git_revision": revision}


def write(folder, dataset, scores, **overrides) -> Page:
  inputs = dict(
    config=config_of(), dataset=dataset, samples=samples_of(dataset), scores=scores,
    coverage=COVERAGE, manifests={"train": manifest(75), "attribute": manifest(1.25, 512, "abc1")},
  )  # fmt: skip
  (page, figure) = write_report(folder, **(inputs | overrides))
  assert sorted(folder.iterdir()) == [figure, page]  # and no unfinished file
  assert (page.name, figure.name) == ("index.html", "attributions.png")
  return Page(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_the_samples_and_the_ranked_training_images_pixel_by_pixel(
  tmp_path, channels, dtype
):
  dataset = dataset_of(channels, dtype)
  scores, samples = scores_of(dataset), samples_of(dataset)
  levels = dataset_of(channels).images  # uint8, also where the data set holds float32
  expected = []
  for q in range(NUM_QUERIES):
    expected.append(np.rint((samples[q] + 1) * 127.5).astype(np.uint8))
    for ranking in (scores.top(TOP_K), scores.bottom(TOP_K), scores.neutral(TOP_K)):
      expected += list(levels[ranking.positions[q]])
  shown = write(tmp_path, dataset, scores).pixels()
  assert len(shown) == len(expected)
  for actual, wanted in zip(shown, expected, strict=True):
    np.testing.assert_array_equal(actual, wanted[..., 0] if channels == 1 else wanted)


def test_every_shown_image_has_its_id_score_and_error(tmp_path):
  dataset = dataset_of()
  scores = scores_of(dataset)
  text = write(tmp_path, dataset, scores).text
  assert "Scores are in units of 10⁻⁶" in text  # the largest is some 150e-6
  for ranking in (scores.top(TOP_K), scores.bottom(TOP_K), scores.neutral(TOP_K)):
    fields = (ranking.ids, ranking.values, ranking.std_errors)
    for n, value, error in zip(*(field.flat for field in fields), strict=True):
      number = f"{value * 1e6:+.0f}".replace("-", "−")
      number = number[1:] if number[1:] == "0" else number
      assert f" {number} ± {error * 1e6:.0f} {n} " in text


def test_the_page_needs_nothing_but_itself(tmp_path):
  assert write(tmp_path, dataset_of(), scores_of(dataset_of())).needs_nothing_else


def test_settings_coverage_costs_and_versions_are_there(tmp_path):
  text = write(tmp_path, dataset_of(), scores_of(dataset_of())).text
  for part in (
    "replicates", "channels 16, 32", "num_examples not set",
    "conv_in/kernel 3 × 3 × 1 × 4 36 conv2d (K-FAC expand)", "norm/scale 4 4 skipped",
    "train 1 min 15 s 2.0 GiB –", "attribute 1.2 s 2.0 GiB 512 MiB", "jax 0.9.9",
    "git revision not recorded; abc1", "Model parameters 40", "Damping λ 10⁻⁸",
  ):  # fmt: skip
    assert part in text


def test_the_example_is_what_the_scores_predict(tmp_path):
  scores = scores_of(dataset_of())
  best = scores.top(TOP_K).ids[0]
  found = scores.predicted_change(best)
  text = write(tmp_path, dataset_of(), scores).text
  change, error = scientific(found.changes[0]), scientific(found.std_errors[0])
  assert f"leaving out {best[0]} is predicted to raise it by " in text
  assert f"all {TOP_K} that support it most, to raise it by {change} ± {error}." in text


def test_labels_are_named_where_there_are_any(tmp_path):
  labels = np.arange(NUM_TRAIN) % 2
  scores = scores_of(dataset_of())
  texts = [
    write(tmp_path / str(i), dataset_of(**fields), scores).text
    for i, fields in enumerate(
      ({}, {"labels": labels}, {"labels": labels, "label_names": ("horse", "car")})
    )
  ]
  best = scores.top(1)
  (n, position) = (best.ids[0, 0], best.positions[0, 0])
  assert f"{n} label {position % 2} " in texts[1]
  assert f"{n} {('horse', 'car')[position % 2]} " in texts[2]
  assert "label" not in texts[0] and f"{n} " in texts[0]


def test_one_group_of_draws_shows_no_errors_and_says_what_is_missing(tmp_path):
  dataset = dataset_of()
  text = write(tmp_path, dataset, scores_of(dataset, num_groups=1)).text
  assert "±" not in text and "nan" not in text.lower()
  assert "attribute.replicates ≥ 2" in text
  assert "it has one replicate of draws only" in text


def test_errors_are_of_the_draws_that_had_groups(tmp_path):
  dataset = dataset_of()
  scores = scores_of(dataset)
  alone, both = "(those of the sample itself are not in it)", "and for the sample itself;"
  text = write(tmp_path / "train", dataset, scores).text
  assert alone in text and both not in text
  grouped = dataclasses.replace(scores, query_replicate_values=scores.replicate_values[:2])
  text = write(tmp_path / "both", dataset, grouped).text
  assert both in text and alone not in text


def test_the_check_says_whether_the_ranking_repeats(tmp_path):
  dataset = dataset_of()
  noise = scores_of(dataset)
  values = noise.replicate_values.copy()
  values[:, :, :10] += 1e-2  # a hundred standard deviations
  planted = dataclasses.replace(noise, replicate_values=values)
  assert "does not clearly repeat" in write(tmp_path / "noise", dataset, noise).text
  text = write(tmp_path / "planted", dataset, planted).text
  assert "So the ranking repeats under fresh draws" in text
  assert "in 2 of 2 samples" in text
  assert "only retraining without them proves that" in text


def test_the_check_takes_fewer_images_where_there_are_few_and_says_why(tmp_path):
  dataset = dataset_of().take(range(7))
  text = write(tmp_path, dataset, scores_of(dataset)).text
  assert "(3 and not 10, as there are 7 training images.)" in text


def test_more_samples_asked_for_than_there_are_shows_all(tmp_path):
  dataset = dataset_of()
  few = write(tmp_path / "few", dataset, scores_of(dataset), config=config_of(num_queries=1))
  many = write(tmp_path / "many", dataset, scores_of(dataset), config=config_of(num_queries=99))
  assert "the first 1 of 2" in few.text and len(few.images) == 1 + 3 * TOP_K
  assert "the first" not in many.text and len(many.images) == 2 * (1 + 3 * TOP_K)


def test_more_training_images_asked_for_than_there_are_shows_all_and_says_so(tmp_path):
  dataset = dataset_of().take(range(5))
  page = write(tmp_path / "5", dataset, scores_of(dataset), config=config_of(top_k=8))
  cut = "Each group shows all of the training images: there are 5, and report.top_k asks for 8."
  assert cut in page.text
  assert len(page.images) == NUM_QUERIES * (1 + 3 * 5)
  assert "asks for" not in write(tmp_path / "3", dataset, scores_of(dataset)).text
  alone = dataset.take([0])
  assert "it has one training image only" in write(tmp_path / "1", alone, scores_of(alone)).text


@pytest.mark.parametrize("num_groups", [1, 4])
def test_the_page_says_what_rounding_did_to_the_order(tmp_path, num_groups):
  dataset = dataset_of()
  check = {"num_examples": 16, "num_queries": 2, "spearman": 0.62, "least_spearman": 0.41}

  def text(name, **found):
    scores = scores_of(dataset, num_groups)
    settings = {**scores.settings, "compression": "int8", "precision": None}
    settings["check"] = check | found
    return write(tmp_path / name, dataset, dataclasses.replace(scores, settings=settings)).text

  lost = text("lost")
  for part in (
    "Rounding changed the order of these scores, and a comparison of halves of the draws cannot "
    "see it.", "(int8)", "common to both halves", "not part of any ±", "on 16 of the training",
    "0.6200 on average over 2 samples and 0.4100 for the worst",
  ):  # fmt: skip
    assert part in lost
  assert "Against float32 queries" not in lost
  # One sample out of order is enough to say so, whatever the mean.
  assert "Rounding changed the order" in text("one", spearman=0.9951, least_spearman=0.9899)
  kept = text("kept", spearman=0.9999, least_spearman=0.99)
  assert "rank correlation is 0.9999 (least of 2: 0.9900)" in kept and "Rounding" not in kept
  unknown = text("unknown", spearman=None, least_spearman=None)
  assert "rank correlation" not in unknown and "Rounding" not in unknown


@pytest.mark.parametrize(
  "shape, pictures, sentence",
  [
    ((4, 9, 3), "image", None),
    ((9,), "line", "The examples are vectors (9): each is drawn as a line"),
    ((7, 2), "line", "The examples are series (7 × 2): each is drawn as one line for every"),
    ((4, 4, 16), None, "(4 × 4 × 16) are neither images"),
    ((2, 4, 4, 3), None, "(2 × 4 × 4 × 3) are neither images"),
  ],
)
def test_examples_of_any_shape_have_a_page(tmp_path, shape, pictures, sentence):
  rng = np.random.default_rng(5)
  data = rng.uniform(-1, 1, (NUM_TRAIN, *shape)).astype(np.float32)
  dataset = AnyData("any", data, dataset_of().ids)
  scores, samples = scores_of(dataset), data[:NUM_QUERIES]
  page = write(tmp_path, dataset, scores, samples=samples)
  noun = "image" if pictures == "image" else "example"
  assert page.headings[0] == ("h1", f"Which training {noun}s made these any samples?")
  num_shown = NUM_QUERIES * (1 + 3 * TOP_K)
  assert len(page.images) == (num_shown if pictures else 0)
  if pictures:
    shape_of = {"image": shape, "line": (112, 168, 3)}
    assert {pixels.shape for pixels in page.pixels()} == {shape_of[pictures]}
  else:
    ids = scores.top(TOP_K).ids.ravel()
    assert all(f"{identity} " in page.text for identity in ids)
  if sentence is None:
    assert "The examples" not in page.text
  else:
    assert sentence in page.text and "training image" not in page.text


@pytest.mark.parametrize("shape", [(4, 4, 1), (2, 4, 4, 1)])
def test_ids_may_hold_what_a_figure_takes_for_mathematics(tmp_path, shape):
  dataset = AnyData("any", np.zeros((3, *shape), np.uint8), np.array(["$^$", "$_$", "\\$"]))
  scores = dataclasses.replace(scores_of(dataset), query_ids=np.array(["$\\x$", "b"]))
  assert "$_$" in write(tmp_path, dataset, scores, samples=dataset.images[:2]).text


def test_wrong_inputs_are_named(tmp_path):
  dataset = dataset_of()
  scores = scores_of(dataset)
  with pytest.raises(ValueError, match=r"report\.top_k must be at least 1; got 0"):
    write(tmp_path, dataset, scores, config=config_of(top_k=0))
  with pytest.raises(ValueError, match=r"report\.num_queries must be at least 1"):
    write(tmp_path, dataset, scores, config=config_of(num_queries=0))
  with pytest.raises(ValueError, match="not those of data set 'tiny'"):
    write(tmp_path, dataset.take(range(29)), scores)
  with pytest.raises(ValueError, match="Got 1 samples and scores of 2 samples"):
    write(tmp_path, dataset, scores, samples=samples_of(dataset)[:1])
  broken = dataclasses.replace(
    scores, replicate_values=scores.replicate_values * np.float32(np.nan)
  )
  with pytest.raises(ValueError, match="NaN or infinity"):
    write(tmp_path, dataset, broken)
  assert not list(tmp_path.iterdir())


def test_the_figure_shows_the_ranked_images_and_no_others(tmp_path):
  colours = np.stack([np.array([8 * n, 250 - 8 * n, 90]) for n in range(NUM_TRAIN)])
  images = np.broadcast_to(colours[:, None, None].astype(np.uint8), (NUM_TRAIN, 4, 4, 3))
  dataset = dataset_of(images=images)
  scores = scores_of(dataset)
  write(tmp_path, dataset, scores)
  figure = decoded((tmp_path / "attributions.png").read_bytes())[..., :3]
  rankings = (scores.top(TOP_K), scores.bottom(TOP_K), scores.neutral(TOP_K))
  shown = np.concatenate([ranking.positions.ravel() for ranking in rankings]).tolist()
  for n, colour in enumerate(colours):
    area = (figure == colour).all(axis=-1).sum()
    # An image is 88 pixels wide; a pixel at each edge may be blended.
    assert area >= 86**2 * shown.count(n)
    assert area <= 90**2 * shown.count(n) + 20  # letters' smoothed edges may hit a colour


@pytest.mark.parametrize(
  "largest, error, unit",
  [
    (155.0, 8.0, Unit(0, 1)),
    (0.0155, 0.0008, Unit(-3, 2)),
    (2.5e4, 30.0, Unit(3, 3)),
    (0.5, None, Unit(-3, 0)),
    (3.21, None, Unit(0, 2)),
    (0.0, 0.0, Unit(0, 0)),
  ],
)
def test_numbers_share_a_power_of_ten_and_two_digits_of_the_error(largest, error, unit):
  dataset = dataset_of()
  values = np.zeros((2, NUM_QUERIES, NUM_TRAIN), np.float32) + np.float32(largest)
  if error is None:
    values = values[:1]
  else:
    values += np.array([1, -1], np.float32)[:, None, None] * np.float32(error)
  scores = dataclasses.replace(scores_of(dataset), replicate_values=values)
  rows = explained_rows(
    dataset, samples=samples_of(dataset), scores=scores, num_queries=NUM_QUERIES, top_k=TOP_K
  )
  assert common_unit(rows) == unit
