"""The stages before training of a model of latents are planned before there is an autoencoder."""

import numpy as np

from jaxinf.planning.latents import latent_costs
from jaxinf.planning.reduced import Subject
from tests.running import run_of

FIELDS = {
  "latent.autoencoder": "trained",
  "latent.batch_size": 4,
  "vae.channels": (2, 4),
  "vae.latent_channels": 2,
  "vae.norm_groups": 2,
  "vae.steps": 3,
  "vae.batch_size": 4,
}


def test_bytes_follow_from_shapes_and_time_is_measured(tmp_path):
  run = run_of(tmp_path / "work", FIELDS)
  (tmp_path / "scratch").mkdir()
  train, encode = latent_costs(Subject(run, tmp_path / "scratch"))
  assert (train.stage, encode.stage) == ("train-vae", "encode")
  assert train.total_seconds > 0 and encode.total_seconds > 0
  # 24 examples, means and log-variances of 4 × 4 × 2 latents, float32.
  assert encode.disk["moments"] == 24 * 2 * np.prod(run.shape) * 4
  assert not (tmp_path / "work").exists()


def test_models_of_the_data_themselves_have_none(tmp_path):
  assert not list(latent_costs(Subject(run_of(tmp_path), tmp_path)))
