"""Translates diffusers' `AutoencoderKL` options to an autoencoder of ours and back.

An option that changes the output and that `AutoencoderKL` lacks is refused by name, never ignored.
"""

from collections.abc import Mapping
from typing import Any

from jaxinf.core.checks import checked_count
from jaxinf.networks.autoencoder import AutoencoderKL
from jaxinf.networks.diffusers_config import check_supported, given_options

CLASS_NAME = "AutoencoderKL"
DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"
NORM_EPS = 1e-6  # no option there

# The options of AutoencoderKL and the values that diffusers takes where a config leaves them out.
DEFAULTS: dict[str, Any] = {
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": [DOWN_BLOCK],
  "up_block_types": [UP_BLOCK],
  "block_out_channels": [64],
  "layers_per_block": 1,
  "act_fn": "silu",
  "latent_channels": 4,
  "norm_num_groups": 32,
  "sample_size": 32,  # of diffusers' tiles; the net takes any size
  "scaling_factor": 0.18215,
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
  "force_upcast": True,  # whether half precision overflows; ours is float32
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
}

# Options without a field in ours, and those whose values are fewer than in diffusers.
SUPPORTED: dict[str, tuple[Any, ...]] = {
  "act_fn": ("silu", "swish"),
  "latents_mean": (None,),
  "latents_std": (None,),
  "use_quant_conv": (True, False),
  "use_post_quant_conv": (True, False),
  "mid_block_add_attention": (True, False),
}


def from_config(config: Mapping[str, Any]) -> tuple[AutoencoderKL, float, float]:
  """Returns the net that a config describes, its scaling factor and its shift factor.

  Raises:
    ValueError: an option, or a value of one, that `AutoencoderKL` lacks, or fields that do not fit.
  """
  options = given_options(config, CLASS_NAME, DEFAULTS)
  check_supported(options, SUPPORTED)
  for option in ("block_out_channels", "norm_num_groups", "scaling_factor"):
    if not options[option]:
      raise ValueError(f"unsupported diffusers config: {option}={options[option]!r}")
  for option, block in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
    if list(options[option]) != [block] * len(options["block_out_channels"]):
      raise ValueError(
        f"unsupported diffusers config: {option}={list(options[option])}; supported: {block!r} for "
        f"each of block_out_channels={list(options['block_out_channels'])}"
      )
  module = AutoencoderKL(
    in_channels=options["in_channels"],
    out_channels=options["out_channels"],
    latent_channels=options["latent_channels"],
    channels=tuple(options["block_out_channels"]),
    blocks_per_level=options["layers_per_block"],
    norm_groups=options["norm_num_groups"],
    norm_eps=NORM_EPS,
    mid_attention=options["mid_block_add_attention"],
    use_quant_conv=options["use_quant_conv"],
    use_post_quant_conv=options["use_post_quant_conv"],
  )
  return module, options["scaling_factor"], options["shift_factor"] or 0.0


def to_config(
  module: AutoencoderKL, scaling_factor: float, shift_factor: float, image_size: int
) -> dict[str, Any]:
  """Returns the inverse of `from_config`, every option spelled out.

  Raises:
    ValueError: a norm_eps that diffusers lacks, or an image size that the net does not take.
  """
  if module.norm_eps != NORM_EPS:
    raise ValueError(
      f"diffusers' {CLASS_NAME} has norm_eps={NORM_EPS} and no other; got {module.norm_eps}"
    )
  if checked_count(image_size, "image_size") % module.factor:
    raise ValueError(
      f"image_size must be a multiple of {module.factor}, pixels for one latent; got {image_size}"
    )
  return DEFAULTS | {
    "_class_name": CLASS_NAME,
    "in_channels": module.in_channels,
    "out_channels": module.out_channels,
    "down_block_types": [DOWN_BLOCK] * len(module.channels),
    "up_block_types": [UP_BLOCK] * len(module.channels),
    "block_out_channels": list(module.channels),
    "layers_per_block": module.blocks_per_level,
    "latent_channels": module.latent_channels,
    "norm_num_groups": module.norm_groups,
    "sample_size": image_size,
    "scaling_factor": float(scaling_factor),
    "shift_factor": float(shift_factor) or None,
    "use_quant_conv": module.use_quant_conv,
    "use_post_quant_conv": module.use_post_quant_conv,
    "mid_block_add_attention": module.mid_attention,
  }
