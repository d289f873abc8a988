"""Results of several programs on one workload, as JSON lines in one file, and their table."""

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.workloads import Timing

_PACKAGES = ("numpy", "jax", "jaxlib", "flax", "kfac-jax", "jaxinf")


def append_line(path: Path, benchmark: str, timing: Timing, plain: Timing, **fields: Any) -> None:
  """Appends a result, with its ratios to `plain` of the same rounds."""
  ratio = lambda of, of_plain: round(of / of_plain, 3)
  seconds = _summary(timing.seconds)
  line = dict(
    benchmark=benchmark,
    pairs=timing.num_pairs,
    **fields,
    peak_rss_mib=timing.cost["peak_host_mib"],
    peak_device_mib=timing.cost["peak_device_mib"],
    seconds=seconds,
    plain_seconds=_summary(plain.seconds),
    cpu_seconds=round(statistics.median(timing.cpu_seconds), 4),
    ratio_to_plain=ratio(timing.median, plain.median),
    ratio_to_plain_min=ratio(min(timing.seconds), min(plain.seconds)),
    ratio_to_plain_cpu=ratio(
      statistics.median(timing.cpu_seconds), statistics.median(plain.cpu_seconds)
    ),
    stages={
      stage: _summary(times) | {"ratio_to_plain": ratio(statistics.median(times), plain.median)}
      for stage, times in timing.stages.items()
    },
    pairs_per_s=round(timing.num_pairs / seconds["median"], 1),
    threads=os.cpu_count(),
    cpu=_cpu_name(),
    load_1min=round(os.getloadavg()[0], 2),
    malloc={key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    versions={"python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in _PACKAGES},
  )
  with path.open("a") as file:
    file.write(json.dumps(line) + "\n")


def print_results(path: Path) -> None:
  """All results of the file that have times, as Markdown."""
  print("| benchmark | seconds, all pairs | ÷ plain | pairs/s | peak MiB |")
  print("| --- | --- | --- | --- | --- |")
  for line in map(json.loads, path.read_text().splitlines()):
    if "seconds" not in line:
      continue
    peak = line.get("peak_device_mib") or line.get("peak_rss_mib")
    cells = line["benchmark"], f"{line['seconds']['median']:.1f}", line.get("ratio_to_plain", "–")
    print(f"| {' | '.join(map(str, cells))} | {line.get('pairs_per_s', '–')} | {peak:.0f} |")
    for stage, value in line.get("stages", {}).items():
      print(f"| – {stage} | {value['median']:.1f} | {value['ratio_to_plain']} | | |")


def _summary(times: Sequence[float]) -> dict[str, Any]:
  exact = {"min": min(times), "median": statistics.median(times)}
  return {key: round(t, 4) for key, t in exact.items()} | {"all": [round(t, 4) for t in times]}


def _cpu_name() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return (names or [platform.processor()])[0]
