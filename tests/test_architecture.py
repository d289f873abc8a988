"""Imports point downward; devices, ConfigDict and array files each have one home."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxinf"
ORDER = (
  "types", "random", "sections", "config", "progress", "hosts", "rows", "parallel", "costs",
  "artifacts", "unfinished",
  "data", "models", "diffusion", "training", "retraining", "curvature", "gradients", "attribution",
  "evaluation",
  "report", "runs", "studies", "serving", "planning", "stages", "proof",
  "commands", "__main__",
)  # fmt: skip
MODULES = sorted(
  path.relative_to(PACKAGE).as_posix()
  for path in PACKAGE.rglob("*.py")
  if path != PACKAGE / "__init__.py"  # the public names, from everywhere
)


def parts(module):
  """Modules and packages of jaxinf that a module imports, anywhere in its text."""
  for node in ast.walk(tree(module)):
    if isinstance(node, ast.ImportFrom) and node.module == "jaxinf":
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxinf."):
      yield node.module.split(".")[1]
    elif isinstance(node, ast.Import):
      yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("jaxinf."))
    assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute"


def tree(module):
  return ast.parse((PACKAGE / module).read_text())


def identifiers(module):
  """Names a module uses; numpy's carry their module, as np.load, and imports their packages."""
  for node in ast.walk(tree(module)):
    if isinstance(node, ast.Attribute):
      yield node.attr
      yield ast.unparse(node)
    elif isinstance(node, ast.Import | ast.ImportFrom):
      yield from (part for alias in node.names for part in alias.name.split("."))
      yield from (getattr(node, "module", None) or "").split(".")
    elif isinstance(node, ast.Name | ast.keyword | ast.arg):
      yield getattr(node, "id", None) or node.arg


def test_every_module_has_a_place_in_the_order():
  assert {module.split("/")[0].removesuffix(".py") for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
  own = module.split("/")[0].removesuffix(".py")
  allowed = set(ORDER[: ORDER.index(own)]) | ({own} if "/" in module else set())
  if own == "curvature":
    allowed.remove("training")  # a model trained elsewhere is attributed just as well
  assert set(parts(module)) <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_devices_configs_and_array_files_have_one_home(module):
  homes = {
    "pmap psum axis_name": ("parallel/",),
    "ConfigDict": ("config.py",),
    "np.save np.load savez savez_compressed safetensors orbax": (
      "artifacts.py",
      "unfinished.py",
      "gradients/store.py",
      "data/",
      "models/diffusers",
    ),
  }
  used = set(identifiers(module))
  for names, places in homes.items():
    assert module.startswith(places) or not used & set(names.split())


@pytest.mark.parametrize("module", MODULES)
def test_no_module_passes_300_lines(module):
  assert len((PACKAGE / module).read_text().splitlines()) <= 300
