"""How something is computed: sizes that are derived, folders within folders, what is refused."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinf import Checkpointing, Compute, Draws


@pytest.mark.parametrize(
  ("batch_size", "draws", "rows"),
  [(128, Draws(250, 5), 2), (128, Draws(250, 1), 1), (4, Draws(4, 2), 2), (3, Draws(2, 2), 3)],
)
def test_at_least_one_replicate_goes_through_at_once(batch_size, draws, rows):
  assert Compute(batch_size).rows(draws) == rows


@pytest.mark.parametrize(("chunk", "blocks"), [(None, 1), (1, 7), (3, 3), (7, 1), (100, 1)])
def test_queries_are_cut_into_chunks(chunk, blocks):
  assert Compute(query_chunk=chunk).query_blocks(7) == blocks


def test_parts_of_a_computation_keep_their_files_apart(tmp_path):
  compute = Compute(3, jax.local_devices()[:1], Checkpointing(tmp_path, 7), query_chunk=2)
  part = compute.within("seed-1")
  assert part.checkpoint == Checkpointing(tmp_path / "seed-1", 7)
  assert dataclasses.replace(part, checkpoint=compute.checkpoint) == compute
  assert Compute().within("seed-1") == Compute()


def test_a_checkpoint_folder_may_be_text():
  kept = Checkpointing("somewhere", np.int64(5))
  assert kept.folder == Path("somewhere") and kept == Checkpointing(Path("somewhere"), 5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(batch_size=0), "batch_size must be at least 1; got 0"),
    (dict(batch_size=1.5), "batch_size must be a whole number"),
    (dict(query_chunk=0), "query_chunk must be at least 1"),
    (dict(block_mib=0), "block_mib must be positive; got 0"),
  ],
)
def test_sizes_that_are_too_small_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Compute(**fields)
  with pytest.raises(ValueError, match="every must be at least 1; got 0"):
    Checkpointing("somewhere", every=0)
