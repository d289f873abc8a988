"""The README's library example runs as it stands, on a small model and few draws."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinf.networks import diffusers
from jaxinf.networks.unet import UNet

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:mean training loss")  # the network is random
def test_the_library_example_runs(tmp_path, monkeypatch):
  """Read from the README, with fewer draws, against a saved model and images in the folder."""
  (example,) = re.findall(r"```python\n(import jaxinf\n.*?)```", README.read_text(), re.DOTALL)
  assert len([line for line in example.splitlines() if line]) <= 12
  monkeypatch.chdir(tmp_path)
  model = UNet(
    out_channels=3, channels=(4, 8), blocks_per_level=1, attention_levels=(False, False),
    mid_attention=False, norm_groups=2, norm_eps=1e-5, scale_shift=True, sin_first=True,
    freq_shift=1.0, dropout=0.0, downsample_padding=0,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (14, 4, 4, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1], np.zeros(1, np.int32))
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes["params"])
  diffusers.save("my-ddpm", model, params, image_size=4)
  np.savez("images.npz", train=images[:12], samples=images[12:])
  names: dict = {}
  exec(example.replace("Draws(250", "Draws(10"), names)
  assert names["scores"].values.shape == (2, 12)
  assert names["best"].ids.shape == (2, 10)
  assert np.isfinite(names["best"].std_errors).all()


def test_the_readme_shows_the_two_commands():
  text = README.read_text()
  assert "make demo" in text and "make test" in text
