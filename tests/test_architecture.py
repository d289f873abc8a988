"""Three bands whose imports point downward; devices, ConfigDict and array files have one home."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxinf"
GROUND = {"core", "engine", "scores", "data"}
LIBRARY = {
  "diffusion",
  "networks",
  "layers",
  "curvature",
  "compression",
  "attribution",
  "store",
  "evaluation",
}
PROGRAMS = {"report", "runs", "benchmark", "planning", "explorer", "plot", "__main__"}
BANDS = (GROUND, LIBRARY, PROGRAMS)
MOST_LINES, MOST_ARGUMENTS = 60, 10  # of a function, without its docstring; of a signature
MODULES = sorted(
  path.relative_to(PACKAGE).as_posix()
  for path in PACKAGE.rglob("*.py")
  if path != PACKAGE / "__init__.py"  # the public names, from everywhere
)


def room(module):
  return module.split("/")[0].removesuffix(".py")


def tree(module):
  return ast.parse((PACKAGE / module).read_text())


def imports(module):
  """Packages of jaxinf that a module imports, anywhere in its text."""
  for node in ast.walk(tree(module)):
    if isinstance(node, ast.ImportFrom) and node.module == "jaxinf":
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxinf."):
      yield node.module.split(".")[1]
    elif isinstance(node, ast.Import):
      yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("jaxinf."))
    assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute"


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


def test_every_module_is_in_one_band():
  assert {room(module) for module in MODULES} == set.union(*BANDS)
  assert sum(map(len, BANDS)) == len(set.union(*BANDS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
  (band,) = [number for number, rooms in enumerate(BANDS) if room(module) in rooms]
  assert set(imports(module)) <= set.union(*BANDS[: band + 1])


@pytest.mark.parametrize("module", MODULES)
def test_devices_configs_and_array_files_have_one_home(module):
  homes = {
    "pmap psum axis_name": ("engine/",),
    "ConfigDict": ("runs/config.py",),
    "np.save np.load savez savez_compressed safetensors orbax": (
      "engine/artifacts.py",
      "engine/checkpoints.py",
      "store/rows.py",
      "data/",
      "networks/diffusers",
    ),
  }
  used = set(identifiers(module))
  for names, places in homes.items():
    assert module.startswith(places) or not used & set(names.split())


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short_and_take_few_arguments(module):
  for node in ast.walk(tree(module)):
    if isinstance(node, ast.FunctionDef):
      doc = ast.get_docstring(node, clean=False)
      lines = node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)
      every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
      arguments = [a for a in every if a.arg not in ("self", "cls")]
      assert lines <= MOST_LINES, f"{node.name} has {lines} lines"
      assert len(arguments) <= MOST_ARGUMENTS, f"{node.name} takes {len(arguments)} arguments"
