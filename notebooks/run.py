"""Executes notebooks from top to bottom, and writes their outputs: `make notebooks`.

python notebooks/run.py [notebooks/quickstart.ipynb …]

Each runs in an empty folder of its own, by the kernel of this Python. What comes back has no times
and nothing of this machine. A cell that fails, or that writes to stderr, is an error.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 900  # of a cell
MOST_BYTES = 400_000  # of a notebook with its pictures


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """The notebook with the outputs of one run.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
    ValueError: a cell wrote to stderr, which readers would be shown.
  """
  with tempfile.TemporaryDirectory() as folder:
    NotebookClient(
      notebook,
      timeout=MOST_SECONDS,
      kernel_name="python3",
      record_timing=False,
      coalesce_streams=True,
      resources={"metadata": {"path": folder}},
    ).execute()
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      if output.get("name") == "stderr":
        raise ValueError(f"The cell {cell.id} wrote to stderr, mend it:\n{output.text}")
  kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
  notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
  return notebook


def main(paths: list[Path]) -> None:
  os.environ["PYTHONPATH"] = str(ROOT)
  for path in paths:
    began = time.monotonic()
    notebook = executed(nbformat.read(path, as_version=4))
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MOST_BYTES:
      raise ValueError(f"{path.name} has {len(text.encode()):,} bytes: draw smaller pictures.")
    path.write_text(text)
    print(f"{path.name}: {time.monotonic() - began:.0f} s, {len(text.encode()):,} bytes")


if __name__ == "__main__":
  main([Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb")))
