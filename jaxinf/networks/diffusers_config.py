"""Translates diffusers' `UNet2DModel` options to the fields of `UNet` and back.

An option that changes the output and that `UNet` lacks is refused by name, never ignored.
"""

from collections.abc import Mapping
from typing import Any

from jaxinf.networks.unet import UNet

# The options of UNet2DModel and the values that diffusers takes where a config leaves them out.
DEFAULTS: dict[str, Any] = {
  "sample_size": None,
  "in_channels": 3,
  "out_channels": 3,
  "center_input_sample": False,
  "time_embedding_type": "positional",
  "time_embedding_dim": None,
  "freq_shift": 0,
  "flip_sin_to_cos": True,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
  "mid_block_type": "UNetMidBlock2D",
  "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
  "block_out_channels": [224, 448, 672, 896],
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "downsample_padding": 1,
  "downsample_type": "conv",
  "upsample_type": "conv",
  "dropout": 0.0,
  "act_fn": "silu",
  "attention_head_dim": 8,
  "norm_num_groups": 32,
  "attn_norm_num_groups": None,
  "norm_eps": 1e-5,
  "resnet_time_scale_shift": "default",
  "add_attention": True,
  "class_embed_type": None,
  "num_class_embeds": None,
  "num_train_timesteps": None,  # read by diffusers' learned time embedding only
}

# Options without a field in UNet, and those with a field that knows fewer values than diffusers.
SUPPORTED: dict[str, tuple[Any, ...]] = {
  "center_input_sample": (False,),
  "time_embedding_type": ("positional",),
  "mid_block_type": ("UNetMidBlock2D",),
  "mid_block_scale_factor": (1,),
  "downsample_padding": (0, 1),
  "downsample_type": ("conv",),
  "upsample_type": ("conv",),
  "act_fn": ("silu", "swish"),
  "resnet_time_scale_shift": ("default", "scale_shift"),
  "attn_norm_num_groups": (None,),
  "class_embed_type": (None,),
  "num_class_embeds": (None,),
}

# (without attention, with attention)
BLOCK_TYPES = {
  "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
  "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}


def from_config(config: Mapping[str, Any]) -> UNet:
  """Returns the UNet that a `UNet2DModel` config describes; options left out take DEFAULTS.

  Raises:
    ValueError: an option, or a value of one, that `UNet` lacks, or fields that do not fit.
  """
  options = read_options(config)
  down = [_has_attention(options, "down_block_types", b) for b in options["down_block_types"]]
  up = [_has_attention(options, "up_block_types", b) for b in options["up_block_types"]]
  if up != down[::-1]:
    raise ValueError(
      f"unsupported diffusers config: up_block_types={options['up_block_types']}; supported: "
      f"attention at the levels where down_block_types={options['down_block_types']} has it"
    )
  return UNet(
    out_channels=options["out_channels"],
    channels=tuple(options["block_out_channels"]),
    blocks_per_level=options["layers_per_block"],
    attention_levels=tuple(down),
    norm_groups=options["norm_num_groups"],
    norm_eps=options["norm_eps"],
    scale_shift=options["resnet_time_scale_shift"] == "scale_shift",
    sin_first=not options["flip_sin_to_cos"],
    freq_shift=options["freq_shift"],
    dropout=options["dropout"],
    downsample_padding=options["downsample_padding"],
    mid_attention=options["add_attention"],
    head_dim=options["attention_head_dim"],
  )


def to_config(model: UNet, *, in_channels: int, image_size: int) -> dict[str, Any]:
  """Returns the inverse of `from_config`, every option spelled out."""
  down, up = BLOCK_TYPES["down_block_types"], BLOCK_TYPES["up_block_types"]
  return DEFAULTS | {
    "_class_name": "UNet2DModel",
    "sample_size": image_size,
    "in_channels": in_channels,
    "out_channels": model.out_channels,
    "block_out_channels": list(model.channels),
    "layers_per_block": model.blocks_per_level,
    "down_block_types": [down[used] for used in model.attention_levels],
    "up_block_types": [up[used] for used in reversed(model.attention_levels)],
    "norm_num_groups": model.norm_groups,
    "norm_eps": model.norm_eps,
    "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
    "flip_sin_to_cos": not model.sin_first,
    "freq_shift": model.freq_shift,
    "dropout": model.dropout,
    "downsample_padding": model.downsample_padding,
    "add_attention": model.mid_attention,
    "attention_head_dim": model.head_dim,
  }


def read_options(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns all options of `config`, DEFAULTS filled in; refuses those that `UNet` lacks."""
  options = given_options(config, "UNet2DModel", DEFAULTS)
  for option in ("block_out_channels", "norm_num_groups"):
    if not options[option]:
      raise ValueError(f"unsupported diffusers config: {option}={options[option]!r}")
  supported = dict(SUPPORTED)
  # These two may also spell out what None means for this net.
  supported["time_embedding_dim"] = (None, 4 * options["block_out_channels"][0])
  if options["resnet_time_scale_shift"] == "default":
    supported["attn_norm_num_groups"] = (None, options["norm_num_groups"])
  check_supported(options, supported)
  return options


def given_options(
  config: Mapping[str, Any], class_name: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns `defaults` with the options of `config`, a config of diffusers' class `class_name`.

  Raises:
    ValueError: a config of another class, or an option that is not among the defaults.
  """
  given_name = config.get("_class_name", class_name)
  if given_name != class_name:
    raise ValueError(
      f"unsupported diffusers config: _class_name={given_name!r}; supported: {class_name!r}"
    )
  given = {key: value for key, value in config.items() if not key.startswith("_")}
  unknown = sorted(set(given) - set(defaults))
  if unknown:
    raise ValueError(
      f"unsupported diffusers config: options {unknown}; supported: {sorted(defaults)}"
    )
  return dict(defaults) | given


def check_supported(options: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
  """Raises a ValueError that names the first option whose value is not among those supported."""
  for option, values in supported.items():
    if options[option] not in values:
      raise ValueError(
        f"unsupported diffusers config: {option}={options[option]!r}; supported: "
        f"{', '.join(map(repr, values))}"
      )


def _has_attention(options: Mapping[str, Any], option: str, block: str) -> bool:
  """Whether a block type has attention; raises where `UNet` lacks that kind of block."""
  plain, attention = BLOCK_TYPES[option]
  name = block.removeprefix("UNetRes")  # an old spelling that diffusers still reads
  if name not in (plain, attention):
    raise ValueError(
      f"unsupported diffusers config: {block!r} in {option}={list(options[option])}; supported: "
      f"{plain!r}, {attention!r}"
    )
  return name == attention
