"""Embeddings of a small, randomly initialised CLIP that lies in a local folder."""

import re

import numpy as np
import pytest

from jaxinf.attribution.similarity import clip_embeddings

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A CLIP for 16 × 16 pixels, its preprocessing, and the folder of both."""
  folder = tmp_path_factory.mktemp("clip")
  torch.manual_seed(0)
  tokens = dict(vocab_size=32, max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
  config = transformers.CLIPConfig(
    text_config=TOWER | tokens,
    vision_config=TOWER | dict(image_size=16, patch_size=8),
    projection_dim=12,
  )
  model = transformers.CLIPModel(config).eval()
  model.save_pretrained(folder)
  preprocess = transformers.CLIPImageProcessor(
    size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
  )
  preprocess.save_pretrained(folder)
  return model, preprocess, folder


def images(num, channels=3):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (num, 16, 16, channels)).astype(np.uint8)


def test_embeddings_are_those_of_the_vision_tower_and_its_projection(clip):
  model, preprocess, folder = clip
  pixels = images(5)
  # At the tower's own size preprocessing only rescales and normalises: written out.
  mean, std = np.array(preprocess.image_mean), np.array(preprocess.image_std)
  inputs = torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    pooled = model.vision_model(pixel_values=inputs).pooler_output
    expected = pooled.numpy() @ model.visual_projection.weight.numpy().T
  found = clip_embeddings(pixels, folder, batch_size=2)
  assert found.shape == (5, 12) and found.dtype == np.float32
  # float32 in batches of other sizes.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert np.abs(found - found[:1]).max() > 100 * 1e-5 * np.abs(expected).max()  # images matter


def test_float_and_grey_images_are_the_rgb_bytes_they_show(clip):
  _, _, folder = clip
  pixels = images(2, channels=1)
  found = clip_embeddings(np.repeat(pixels, 3, axis=-1), folder)
  np.testing.assert_array_equal(clip_embeddings(pixels, folder), found)
  np.testing.assert_array_equal(
    clip_embeddings((pixels / 127.5 - 1).astype(np.float32), folder), found
  )


def test_folders_without_a_whole_clip_are_refused(clip, tmp_path):
  model, preprocess, _ = clip
  refuse = lambda message: pytest.raises(ValueError, match=re.escape(message))
  with refuse("got no config.json"):
    clip_embeddings(images(1), tmp_path / "missing")
  preprocess.save_pretrained(tmp_path)
  model.vision_model.save_pretrained(tmp_path)
  with refuse("expected a CLIP in transformers' format; 398 weights are missing"):
    clip_embeddings(images(1), tmp_path)
