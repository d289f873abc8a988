"""Rows side by side in a few wide arrays: what goes in comes out, layer by layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.compression.compression import COMPRESSIONS
from jaxinf.store.packing import Packing

# A dense layer, a grouped convolution, one of more than a block of 64, and a single number.
SHAPES = {"dense": (3, 5), "grouped": (2, 3, 4), "wide": (7, 11), "scale": (1, 1)}
NUM_ROWS = 3
KEPT = sorted(set(COMPRESSIONS) - {"svd", "projection"}, key=str)


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(0)
  return {name: jnp.asarray(rng.normal(size=(NUM_ROWS, *s)), "f4") for name, s in SHAPES.items()}


@pytest.fixture(scope="module")
def eigenvalues():
  rng = np.random.default_rng(1)
  return {name: rng.uniform(size=s).astype(np.float32) for name, s in SHAPES.items()}


@pytest.fixture(params=KEPT, ids=str)
def packing(request):
  return Packing.of(COMPRESSIONS[request.param], SHAPES)


def test_every_set_of_layers_comes_back_as_it_was_compressed(packing, rows, eigenvalues):
  """Bit for bit, from the columns alone that `columns` names."""
  arrays = [np.asarray(array) for array in packing.pack(rows, eigenvalues)]
  compression = packing.compression
  for names in (tuple(SHAPES), ("grouped",), ("wide", "dense"), ("scale", "grouped")):
    cut = [
      array[:, begin:end]
      for array, (begin, end) in zip(arrays, packing.columns(names), strict=True)
    ]
    found = packing.unpack(cut, eigenvalues, names)
    assert tuple(found) == names
    for name in names:
      own = eigenvalues[name]
      expected = compression.restore(compression.compress(rows[name], own), own)
      np.testing.assert_array_equal(found[name], expected)


def test_layers_tile_the_arrays(packing, rows, eigenvalues):
  spans = [packing.columns([name]) for name in SHAPES]
  for k, width in enumerate(packing.widths):
    begins, ends = zip(*(span[k] for span in spans), strict=True)
    assert (*begins, width) == (0, *ends)


def test_the_bytes_of_a_row_are_those_of_its_layers(packing, rows, eigenvalues):
  arrays = packing.pack(rows, eigenvalues)
  assert [(a.shape, a.dtype) for a in arrays] == [
    ((NUM_ROWS, width), dtype) for width, dtype in zip(packing.widths, packing.dtypes, strict=True)
  ]
  expected = sum(map(packing.compression.num_bytes, SHAPES.values()))
  assert sum(a.nbytes for a in arrays) == NUM_ROWS * expected


def test_packings_of_the_same_layers_are_one_key_of_compiled_programs(packing):
  again = Packing.of(packing.compression, dict(SHAPES))
  assert again == packing and hash(again) == hash(packing)
  assert packing != Packing.of(packing.compression, {**SHAPES, "scale": (1, 2)})
  assert packing != Packing.of(packing.compression, dict(reversed(SHAPES.items())))
  assert packing != packing.compression


def test_layers_that_are_kept_in_different_ways_are_refused():
  shapes = {"small": (2, 3), "large": (60, 60)}  # of which rank 20 keeps the small one whole
  with pytest.raises(ValueError, match="svd, rank 20 keeps some layers otherwise than others"):
    Packing.of(COMPRESSIONS["svd"], shapes)
