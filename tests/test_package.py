"""The wheel holds all that jaxinf needs, and works in a bare folder as a checkout does."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jaxinf

ROOT = Path(__file__).parents[1]
FOLDERS, FILES = ("jaxinf", "configs"), ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# As the console script does, but that it tells first where jaxinf is from.
STATUS = """
import sys, jaxinf
from jaxinf.__main__ import run
print(jaxinf.__file__)
sys.argv = ["jaxinf", "status", "--config.seed=1", "--config=digits_mlp", *sys.argv[1:]]
run()
"""


def test_the_citation_is_of_this_version():
  text = (ROOT / "CITATION.cff").read_text()
  assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [jaxinf.__version__]


def test_the_wheel_carries_configs_and_runs_in_a_bare_folder(tmp_path):
  """Built offline, unpacked before all else on the path, and started far from the checkout.

  A named config is read, which imports others, and what a terminal of ASCII cannot show is
  replaced.
  """
  source, site, bare = (tmp_path / name for name in ("source", "site", "bare"))
  source.mkdir()
  for name in FOLDERS:
    shutil.copytree(ROOT / name, source / name, symlinks=True)
  for name in FILES:
    shutil.copy(ROOT / name, source)
  build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
  options = ["--wheel-dir", str(tmp_path), str(source)]
  subprocess.run([sys.executable, *build, *options], check=True, capture_output=True, text=True)
  (wheel,) = tmp_path.glob("jaxinf-*.whl")
  names = zipfile.ZipFile(wheel).namelist()
  modules = {f"jaxinf/{path.relative_to(ROOT / 'jaxinf')}" for path in ROOT.glob("jaxinf/**/*.py")}
  configs = {f"jaxinf/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
  others = {"jaxinf/py.typed", "jaxinf/report/page.html.j2"}
  found = {name for name in names if ".dist-info/" not in name}
  assert modules | configs | others <= found
  assert all(name.startswith("jaxinf/") for name in found)

  zipfile.ZipFile(wheel).extractall(site)
  (bare / "work" / "train").mkdir(parents=True)
  (bare / "work" / "train" / "started.json").write_text("{}")
  environment = os.environ | {"PYTHONPATH": str(site), "PYTHONIOENCODING": "ascii"}
  ended = subprocess.run(
    [sys.executable, "-c", STATUS, f"--workdir={bare / 'work'}"],
    cwd=bare, env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert (ended.returncode, ended.stderr) == (0, "")
  origin, head, *table = ended.stdout.splitlines()
  assert Path(origin).parent == site / "jaxinf"
  assert str(bare / "work") in head and "?" in table[1]  # for a dash
