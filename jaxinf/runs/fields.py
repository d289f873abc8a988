"""The fields of a config that a stage reads, each with its default and its meaning.

A meaning has one home, the class of the section: the comment beside the field, or above it, or the
field's words under `Attributes` in the docstring. They are read from the source.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from jaxinf.networks import MODELS
from jaxinf.runs.sections import Config, ModelConfig
from jaxinf.runs.stage import EVERY_SECTION, STAGES, Stage


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a config.

  Attributes:
    path: such as train.steps.
    default: its value where a config does not set it.
    meaning: in words; empty where its name says it.
  """

  path: str
  default: Any
  meaning: str


def fields_read(stage: Stage) -> list[Field]:
  """Every field that a stage reads, its own section before the others."""
  return [field for path in sections_read(stage) for field in _fields(path)]


def sections_read(stage: Stage) -> tuple[str, ...]:
  """The sections that a stage reads, as its row says; "curvature.skip" for a single field."""
  if not stage.of_run:
    return ()
  everything = tuple(field.name for field in dataclasses.fields(Config))
  if stage.steps:
    found = [path for name in stage.steps for path in sections_read(STAGES[name])]
    found += ["vae"]  # the stages of latents come before, where the config needs them
  else:
    found = [stage.section] if stage.section else []
    found += [*stage.reads, *(stage.also if stage.also != EVERY_SECTION else everything)]
    found += ["data", "latent"] if stage.data else []
    found += ["model", "diffusion"] if "train" in stage.needs else []
  alone = lambda path: path.partition(".")[0] not in found  # a field whose section is not there
  kept = [path for path in found if "." not in path or alone(path)]
  return tuple(dict.fromkeys([*kept, "seed"]))


def _fields(path: str) -> Iterator[Field]:
  """Of a section, or the one field that the path names."""
  section: Any = Config()
  meaning = ""
  for name in path.split("."):
    owner: Any = type(section)
    meaning, section = meanings(owner).get(name, ""), getattr(section, name)
  if isinstance(section, ModelConfig):
    yield Field(f"{path}.name", section.name, meanings(ModelConfig)["name"])
    network: Any = MODELS[section.name]
    said = meanings(network)
    for name, value in section.fields.items():
      yield Field(f"{path}.{name}", value, said[name])
  elif dataclasses.is_dataclass(section):
    for field in dataclasses.fields(section):
      yield from _fields(f"{path}.{field.name}")
  else:
    yield Field(path, section, meaning)


@functools.cache  # reading the source of a class parses the whole file
def meanings(cls: Any) -> dict[str, str]:
  """Field → its meaning, of a class whose fields are annotated in its body."""
  source = textwrap.dedent(inspect.getsource(cls))
  (node,) = ast.parse(source).body
  assert isinstance(node, ast.ClassDef)
  comments = _comments(source)
  lines = source.splitlines()
  found = {}
  for statement in node.body:
    if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
      continue
    last = statement.end_lineno or statement.lineno
    words = [comments[n] for n in range(statement.lineno, last + 1) if n in comments]
    above = statement.lineno - 1
    while not words[:1] and above in comments and lines[above - 1].lstrip().startswith("#"):
      above -= 1
    words = words or [comments[n] for n in range(above + 1, statement.lineno)]
    found[statement.target.id] = " ".join(words)
  return found | _documented(ast.get_docstring(node) or "")


def _comments(source: str) -> dict[int, str]:
  """Line → the comment on it, but those that are for programs."""
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  found = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
  return {n: text for n, text in found.items() if not re.match(r"(fmt|type|noqa)\b", text)}


def _documented(doc: str) -> dict[str, str]:
  """Name → words under `Attributes` of a docstring; several names may share theirs."""
  _, _, block = doc.partition("Attributes:\n")
  block = re.split(r"\n\n?(?=\S)", block)[0]  # the next heading is not indented
  entries = re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", block, re.MULTILINE)
  return {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}
