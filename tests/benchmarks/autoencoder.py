"""Encoding and decoding with Stable Diffusion's autoencoder, against diffusers in the same process.

  make bench-autoencoder                                  # batches of 4 images of 128 × 128
  make bench-autoencoder ARGS="--size=256 --rounds=5 --decode"
  make bench-autoencoder ARGS="--folder=FOLDER"           # the autoencoder in a folder of diffusers

Rounds go through both in turn, so that slow drift of the machine hits both alike; medians are
shown. On a machine that others use too, compare CPU seconds. Both take what an image of the user's
takes: ours goes through the engine, from uint8 to NumPy. Peak memory is that of a process which
does one thing once, less what it held before. Weights are random without a folder: times do not
depend on them.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import absl.logging
import diffusers
import jax
import numpy as np
import torch
from absl import app, flags

from jaxinf import load_autoencoder
from jaxinf.engine.resources import measured
from tests.benchmarks.workloads import ROUNDS, Timing, alternating

_FOLDER = flags.DEFINE_string("folder", None, "An autoencoder as diffusers saves it.")
_SIZE = flags.DEFINE_integer("size", 128, "Height and width of images.")
_IMAGES = flags.DEFINE_integer("images", 4, "Images at a time.")
_DECODE = flags.DEFINE_boolean("decode", False, "Whether to decode, too.")
_PEAK_OF = flags.DEFINE_string("peak_of", None, "For our own processes: print its peak memory.")

LEVELS = 4


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  if _PEAK_OF.value:
    print_peak(calls(Path(_FOLDER.value))[_PEAK_OF.value])
    return
  with tempfile.TemporaryDirectory() as made:
    folder = Path(_FOLDER.value or made)
    if not _FOLDER.value:
      random_autoencoder().save_pretrained(folder, safe_serialization=True)
    both = calls(folder)
    peaks = {name: peak(name, folder) for name in both}
    timings = alternating({n: (_IMAGES.value, call) for n, call in both.items()}, ROUNDS.value)
  print_images(timings, peaks)


def random_autoencoder() -> "diffusers.AutoencoderKL":
  """Stable Diffusion's autoencoder with random weights."""
  return diffusers.AutoencoderKL(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * LEVELS,
    up_block_types=("UpDecoderBlock2D",) * LEVELS,
    layers_per_block=2,
  )


def calls(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
  """What is timed, by name: each goes through all images once and returns NumPy arrays."""
  ours = load_autoencoder(folder)
  theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
  num, size, small = _IMAGES.value, _SIZE.value, _SIZE.value // ours.module.factor
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num, size, size, ours.module.in_channels)).astype(np.uint8)
  shape = (num, small, small, ours.module.latent_channels)
  latents = rng.standard_normal(shape, dtype=np.float32)
  first = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)

  @torch.no_grad()
  def diffusers_encode():
    return theirs.encode(first(images).float() / 127.5 - 1).latent_dist.mean.numpy()

  @torch.no_grad()
  def diffusers_decode():
    return theirs.decode(first(latents)).sample.numpy()

  found = {
    "jaxinf encode": lambda: ours.encode(images, batch_size=num).mean,
    "diffusers encode": diffusers_encode,
    "jaxinf decode": lambda: ours.decode(latents, batch_size=num),
    "diffusers decode": diffusers_decode,
  }
  return {name: call for name, call in found.items() if "encode" in name or _DECODE.value}


def print_peak(call: Callable[[], np.ndarray]) -> None:
  """MiB that the call takes at most, with what it compiles, beyond what the process holds."""
  with measured() as before:
    pass
  with measured() as cost:
    call()
  print(cost["peak_host_mib"] - before["peak_host_mib"])


def peak(name: str, folder: Path) -> int:
  """The figure of `print_peak`, from a process of its own."""
  options = (f"--size={_SIZE.value}", f"--images={_IMAGES.value}", f"--decode={_DECODE.value}")
  command = (sys.executable, "-m", "tests.benchmarks.autoencoder", f"--folder={folder}", *options)
  # Freed memory goes back to the system, as it would seem to be held before otherwise.
  environ = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
  printed = subprocess.check_output([*command, f"--peak_of={name}"], text=True, env=environ)
  return int(printed.split()[-1])


def print_images(timings: dict[str, Timing], peaks: dict[str, int]) -> None:
  """Medians as Markdown."""
  size = f"{_IMAGES.value} × {_SIZE.value} × {_SIZE.value}"
  print(
    f"{size}, {torch.get_num_threads()} threads, jax {jax.__version__}, torch {torch.__version__}"
  )
  print("| | seconds | images/s | all rounds | CPU seconds | peak MiB |")
  print("| --- | --- | --- | --- | --- | --- |")
  for name, timing in timings.items():
    each = " ".join(f"{s:.2f}" for s in timing.seconds)
    rate, cpu = timing.num_pairs / timing.median, statistics.median(timing.cpu_seconds)
    print(f"| {name} | {timing.median:.2f} | {rate:.2f} | {each} | {cpu:.2f} | {peaks[name]} |")


if __name__ == "__main__":
  app.run(main)
