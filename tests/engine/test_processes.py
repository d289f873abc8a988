"""Several processes: two real ones give the results of one, and go on after kill −9."""

import shutil
import signal
import socket
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Compute, Draws, Examples, Identity, fit_curvature, influence
from jaxinf.engine import artifacts, processes
from jaxinf.runs import run as runs
from jaxinf.runs import serving
from jaxinf.runs.perform import perform
from jaxinf.runs.stage import MAIN_LINE
from tests import nets, running

# Shares of 24 images, 3 samples and 40 draws in groups of 2 that 2 processes split unevenly, and
# enough of them that a process can be killed on the way. int16 rounds by 1/32767 of a block.
ATTRIBUTE = {
  "attribute.draws": 38,
  "attribute.replicates": 19,
  "attribute.query_replicates": 2,
  "attribute.compression": "int16",
}
# Of the largest number, for float32 sums in another order; training and sampling amplify it.
TOLERANCE = 1e-3


# --- one process at a time, in threads that take its place ---


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_shares_cover_all_rows_in_order_and_none_is_larger_than_need_be(
  in_processes, num_processes, num_rows
):
  shares = in_processes(num_processes, lambda: processes.share(num_rows))
  assert [row for share in shares for row in range(*share)] == list(range(num_rows))
  assert max(end - begin for begin, end in shares) == -(-num_rows // num_processes)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, bool, "U3", jnp.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_gathered_rows_are_those_that_were_shared_out_bit_for_bit(
  in_processes, monkeypatch, num_rows, dtype
):
  """Types that JAX would narrow too, and over several exchanges."""
  monkeypatch.setattr(processes, "_PIECE_BYTES", 20)
  values = np.random.default_rng(0).normal(size=(num_rows, 2)) * 1e9
  rows = (values > 0 if dtype is bool else values).astype(dtype)
  for found in in_processes(
    3, lambda: processes.gathered(rows[slice(*processes.share(num_rows))], num_rows)
  ):
    assert found.dtype == rows.dtype
    np.testing.assert_array_equal(found, rows)


def test_sums_are_the_same_everywhere_and_rounded_once(in_processes, monkeypatch):
  """float32: 1e8 + 3 − 1e8 = 3, which sums in float32 would make 0 or 8."""
  monkeypatch.setattr(processes, "_PIECE_BYTES", 8)
  terms = np.float32([1e8, 3, -1e8])
  own = lambda: [np.full((2, 3), terms[jax.process_index()]), terms[jax.process_index()]]
  for matrix, scalar in in_processes(3, lambda: processes.summed(own())):
    np.testing.assert_array_equal(matrix, np.full((2, 3), 3, np.float32))
    np.testing.assert_array_equal(scalar, np.float32(3))


def test_what_the_primary_has_is_what_all_have(in_processes):
  own = lambda: {"a": np.array([0.1, -3e300]) * (1 + jax.process_index()), "b": np.arange(3)}
  for found in in_processes(3, lambda: processes.of_primary(own())):
    np.testing.assert_array_equal(found["a"], np.array([0.1, -3e300]))
    assert found["b"].dtype == np.arange(3).dtype and found["b"].tolist() == [0, 1, 2]


def test_the_primary_decides_and_differences_are_refused_everywhere(in_processes):
  own = lambda: jax.process_index() == 0
  assert in_processes(3, lambda: processes.agreed(own())) == [True] * 3
  assert in_processes(3, lambda: processes.agreed(not own())) == [False] * 3
  assert in_processes(2, lambda: processes.check_same("seed 0", "settings")) == [None] * 2
  for error in in_processes(3, lambda: processes.check_same(f"seed {own()}", "settings")):
    assert "The processes differ in settings" in str(error)


@pytest.mark.parametrize(("num_processes", "num_checked"), [(2, 2), (3, 1), (8, None)])
def test_all_processes_know_what_rounding_does_to_the_queries_of_the_first(
  in_processes, num_processes, num_checked
):
  """Whole queries, of two replicates each; a process with one row has none to compare."""
  train, queries = Examples(nets.random_images(5)), Examples(nets.random_images(4, seed=1))
  curvature = fit_curvature(nets.conv_model(), train, Identity())
  one = Compute(4, jax.local_devices()[:1])
  ask = lambda: influence(
    curvature, queries=queries, train=train, damping=1e-3, draws=Draws(4, 2), compression="int8",
    compute=one,
  )  # fmt: skip
  checks = [scores.settings["check"] for scores in in_processes(num_processes, ask)]
  assert all(check == checks[0] for check in checks)
  assert checks[0]["num_queries"] == num_checked
  assert num_checked is None or checks[0]["least_pearson"] > 0.99


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((None, 2, 0), r"coordinator \(HOST:PORT\), num_processes and process_id together"),
    (("localhost:1234", 2, None), "together"),
    (("localhost", 2, 0), "coordinator must be HOST:PORT; got 'localhost'"),
    (("localhost:1234", 0, 0), "num_processes must be at least 1; got 0"),
    (("localhost:1234", 2, 2), "process_id must lie in 0…1; got 2"),
  ],
)
def test_processes_that_cannot_meet_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    processes.connect(*arguments)


# --- two real processes ---


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start(
  stage: str, workdir: Path, *, by_slurm: bool = False, fields=None, of_second=None
) -> list[subprocess.Popen]:
  """Both processes of a run, told of one another by flags or by a cluster's variables."""
  fields = ATTRIBUTE | (fields or {})
  coordinator, started = f"localhost:{free_port()}", []
  for index, own in enumerate((fields, fields | (of_second or {}))):
    flags = [f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={index}"]
    variables = {
      "JAX_COORDINATOR_ADDRESS": coordinator,
      "SLURM_JOB_ID": "1",
      "SLURM_NTASKS": "2",
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_STEP_NUM_NODES": "1",
      "SLURM_PROCID": str(index),
      "SLURM_LOCALID": str(index),
    }
    if by_slurm:
      process = running.start(stage, workdir, "--distributed", fields=own, variables=variables)
    else:
      process = running.start(stage, workdir, *flags, fields=own)
    started.append(process)
  return started


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The same run by one process and by two, and what the two said.

  The two take training over from the first checkpoint of the one.
  """
  one, two = (
    running.run_of(tmp_path_factory.mktemp(name), fields=ATTRIBUTE) for name in ("one", "two")
  )
  perform(one, "train")
  shutil.copytree(one.folder("train"), two.folder("train"))
  for made_later in ("manifest.json", "arrays.npz", "checkpoints/20"):
    path = two.folder("train") / made_later
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  processes = start("all", two.workdir)
  perform(one, "all")
  return one, two, running.succeed(*processes)


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_two_processes_give_the_results_of_one(finished):
  one, two, _ = finished
  assert artifacts.read(two.folder("train")).notes["resumed_at_step"] == 10
  for stage in ("train", "sample", "attribute"):
    theirs, ours = (artifacts.read(run.folder(stage)).arrays for run in (one, two))
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
      assert ours[name].dtype == expected.dtype
      if expected.dtype.kind == "f":
        assert_close(ours[name], expected)
      else:
        np.testing.assert_array_equal(ours[name], expected)
  # Eigenvectors have free signs: compare what the curvature does to a vector.
  model = runs.load_model(one)
  vector = jax.tree.map(np.ones_like, model.params)
  products = [runs.load_curvature(run, model).multiply(vector, 1e-4) for run in (one, two)]
  jax.tree.map(assert_close, *reversed(products))


def test_two_processes_write_the_store_that_one_writes(finished):
  one, two, _ = finished
  processes = start("index", two.workdir)
  perform(one, "index")
  running.succeed(*processes)
  samples = Examples(artifacts.read(one.folder("sample")).arrays["images"])
  answers = [
    serving.load_store(run).query(samples, damping=1e-4, draws=Draws(4, 1)) for run in (one, two)
  ]
  np.testing.assert_array_equal(answers[1].train_ids, answers[0].train_ids)
  # Eigenvectors have free signs, so that the rows are rounded to int8 otherwise: by 1/254 of the
  # largest of 64 numbers each.
  theirs, ours = (answer.replicate_values for answer in answers)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2 * np.abs(theirs).max())


def test_the_first_process_writes_and_speaks_alone(finished):
  one, two, (primary, other) = finished
  files = [{p.relative_to(run.workdir) for p in run.workdir.rglob("*.*")} for run in (one, two)]
  of_stages = [
    {p for p in paths if p.parts[1] not in ("checkpoints", "tensorboard")} for paths in files
  ]
  assert of_stages[0] == of_stages[1]
  lines = [(run.folder("train") / "metrics.jsonl").read_text().count("\n") for run in (one, two)]
  assert lines[0] == lines[1]
  assert all(f"{stage}: wrote" in primary for stage in MAIN_LINE)
  assert not any(stage in other for stage in MAIN_LINE)


def copied(run: runs.Run, workdir: Path, names: tuple[str, ...]) -> Path:
  for stage in names:
    shutil.copytree(run.folder(stage), workdir / stage)
  return workdir


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_processes_go_on_to_the_same_scores(finished, tmp_path):
  """Both killed amid the scores, then started as a cluster starts them."""
  _, two, _ = finished
  workdir = copied(two, tmp_path, ("train", "sample", "curvature"))
  pace = {"attribute.checkpoint_every": 1, "attribute.batch_size": 4}
  saved = [workdir / "attribute/sums/round-000" / f"rows-000003.{i}of2.npz" for i in range(2)]
  running.kill_when(
    lambda: all(path.exists() for path in saved), *start("attribute", workdir, fields=pace)
  )
  assert not (workdir / "attribute/manifest.json").exists() and all(p.exists() for p in saved)
  running.succeed(*start("attribute", workdir, by_slurm=True, fields=pace))
  assert not (workdir / "attribute/sums").exists()
  expected = artifacts.read(two.folder("attribute")).arrays
  for name, array in artifacts.read(workdir / "attribute").arrays.items():
    if array.dtype.kind == "f":
      assert_close(array, expected[name])


def test_processes_with_different_settings_end_together(finished, tmp_path):
  """They would add up different things; and neither waits for the other for ever."""
  workdir = copied(finished[1], tmp_path, ("train",))
  processes = start("sample", workdir, of_second={"sample.num_samples": 4})
  said = "".join(running.outcome(process) for process in processes)
  assert all(process.returncode for process in processes)
  assert "The processes differ in what the stage sample depends on" in said
  assert not (workdir / "sample").exists()
