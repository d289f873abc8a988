"""A class-conditional model of latents through the whole line, its autoencoder included."""

import dataclasses

import numpy as np
import pytest

from jaxinf.core.augmentation import Constants
from jaxinf.data import Dataset
from jaxinf.diffusion.sampler import Guided
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.networks.latent_cache import open_moments
from jaxinf.runs import serving
from jaxinf.runs.perform import perform
from jaxinf.runs.run import load_model, load_scores, moments_folder
from jaxinf.runs.sampling import load_samples
from tests.running import run_of

FIELDS = {
  "data.conditioning": ("labels",),
  "latent.autoencoder": "trained",
  "vae.channels": (2, 4),
  "vae.latent_channels": 2,
  "vae.norm_groups": 2,
  "vae.steps": 4,
  "vae.batch_size": 8,
  "train.conditioning_dropout": 0.2,
  "sample.guidance_scale": 2.0,
  "sample.keep_trajectory": False,
  "attribute.compression": None,
  "index.compression": None,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  run = run_of(tmp_path_factory.mktemp("latent"), FIELDS)
  perform(run, "all")
  perform(run, "index")
  return run


def test_latents_stand_for_images_from_training_on(finished):
  train = finished.train
  assert train.shape == finished.shape == (4, 4, 2) and finished.dataset.image_shape == (8, 8, 1)
  moments = open_moments(moments_folder(finished), finished.autoencoder)
  posterior = finished.autoencoder.encode(finished.dataset.images)
  np.testing.assert_allclose(moments.array[:, 0, ..., :2], posterior.mean, rtol=1e-4, atol=1e-5)
  latents = finished.autoencoder.scaled(posterior.mean)
  np.testing.assert_allclose(np.std(latents), 1, rtol=1e-3)  # the scaling that was found
  assert load_scores(finished).settings["latents"]["sample"] is True
  assert load_scores(finished).settings["conditioning_dropout"] == 0.2


def test_samples_have_latents_pictures_and_the_classes_in_turn(finished):
  samples, pictures = load_samples(finished), load_samples(finished, "pictures")
  assert samples.shape == (4, 4, 2) and pictures.shape == (8, 8, 1)
  assert samples.conditioning["labels"].tolist() == [0, 1, 2]
  vae = finished.autoencoder
  decoded = np.clip(vae.decode(vae.unscaled(samples.data)), -1, 1)
  np.testing.assert_allclose(pictures.data, decoded, rtol=0, atol=1e-5)


def test_guidance_moves_predictions_away_from_those_without_labels(finished):
  """At scale 1 samples are others: the model's own."""
  model, samples = load_model(finished), load_samples(finished)
  t = np.full(3, 7, np.int32)
  predict = lambda labels: model.apply_fn(model.params, samples.data, t, {"labels": labels})
  given, plain = predict(samples.conditioning["labels"]), predict(np.full(3, 10))

  guided = Guided(model.apply_fn, 2.0, Constants(finished.null_conditioning))
  found = guided(model.params, samples.data, t, samples.conditioning)
  np.testing.assert_allclose(found, 2 * given - plain, rtol=1e-4, atol=1e-5)


def test_the_page_shows_pixels_and_classes(finished):
  page = (finished.folder("report") / "index.html").read_text(encoding="utf-8")
  assert "sample_0001, label 1" in page and "train-vae" in page and "encode" in page


def test_the_store_answers_images_by_their_latents(finished, tmp_path):
  """A training image asks as itself, with its own class."""
  images, labels = finished.dataset.images[:1], finished.dataset.labels[:1]
  np.savez(tmp_path / "one.npz", images=images, labels=labels)

  asked = dataclasses.replace(finished, images=tmp_path / "one.npz")
  found = perform(asked, "query").arrays
  assert np.isfinite(found["values"]).all() and found["values"].shape == (1, 3)


def test_labels_of_no_class_are_refused(finished, tmp_path):
  images = finished.dataset.images[:1]
  np.savez(tmp_path / "one.npz", images=images, labels=np.array([10]))
  for stage in ("query", "index-append"):
    asked = dataclasses.replace(finished, images=tmp_path / "one.npz")
    with pytest.raises(ValueError, match=r"must lie in 0…9, the classes of .*; got 10…10"):
      perform(asked, stage)


def test_a_folder_of_images_has_the_classes_of_the_run():
  """Sub-folders are numbered anew in every folder: names say which class is meant."""
  of = lambda names, labels: Dataset(
    "toy", np.zeros((len(labels), 2, 2, 1)), np.array(list("abc"[: len(labels)])),
    np.array(labels), names, conditioning={"labels": np.array(labels, np.int32)},
  )  # fmt: skip
  found = serving._with_classes_of(of(("cat", "horse"), [0, 1]), of(("horse",), [0]))
  assert found.labels.tolist() == found.conditioning["labels"].tolist() == [1]
  assert found.label_names == ("cat", "horse")
  with pytest.raises(ValueError, match="no classes of 'toy': zebra. There are: cat, horse"):
    serving._with_classes_of(of(("cat", "horse"), [0, 1]), of(("zebra",), [0]))


def test_an_autoencoder_of_other_settings_is_not_taken_for_this_one(finished):
  changed = run_of(finished.workdir, FIELDS | {"vae.steps": 5})
  with pytest.raises(StaleArtifact, match="steps: 4 → 5"):
    perform(changed, "encode")


def test_other_ways_to_sample_latents_are_not_taken_for_these(finished):
  changed = run_of(finished.workdir, FIELDS | {"latent.sample": False})
  with pytest.raises(StaleArtifact, match="latents_sampled: True → False"):
    perform(changed, "train")
  artifact = artifacts.read(finished.folder("encode"))
  assert artifact.notes["files"] == ["moments"]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"data.conditioning": ()}, "data.conditioning names none"),
    ({"vae.channels": (2, 3)}, "norm_groups"),
    ({"latent.autoencoder": "nowhere"}, "no config.json in nowhere"),
  ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, fields, message):
  run = run_of(tmp_path, FIELDS | fields)
  with pytest.raises(ValueError, match=message):
    perform(run, "all")
  assert not (tmp_path / "train").exists()
