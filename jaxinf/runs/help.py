"""What --help shows: all stages; or of one stage what it does, needs and reads."""

import textwrap
from collections.abc import Mapping

from jaxinf.runs.config_files import CONFIGS
from jaxinf.runs.fields import Field, fields_read
from jaxinf.runs.stage import STAGES, Stage, hint

_WIDTH = 98
_COLUMN = 46  # where meanings begin
_EVERY = ("config", "workdir")  # flags of all stages of a run


def overview(doc: str, flags: Mapping[str, str]) -> str:
  """All stages with what they do, the configs that come with jaxinf, and the flags.

  Args:
    doc: what jaxinf is, and how it is called.
    flags: name → its meaning.
  """
  lines = [doc.strip()]
  for group in dict.fromkeys(stage.group for stage in STAGES.values()):
    rows = {
      f"{stage.name} {stage.takes}".strip(): stage.help
      for stage in STAGES.values()
      if stage.group == group
    }
    column = max(map(len, rows)) + 4
    lines += ["", *textwrap.wrap(f"{group}:", _WIDTH)]
    lines += [_entry(name, text, column) for name, text in rows.items()]
  lines += ["", *textwrap.wrap(f"Configs by name: {', '.join(CONFIGS)}.", _WIDTH)]
  lines += ["", "Flags:", *(_entry(f"--{name}", text, 20) for name, text in flags.items())]
  return "\n".join([*lines, "", "jaxinf STAGE --help lists what a stage reads of the config."])


def of_stage(stage: Stage, flags: Mapping[str, str]) -> str:
  """What a stage does and needs, its flags, and the fields of the config that it reads."""
  read = {name: text for name, text in flags.items() if name in flags_of(stage)}
  named = [f"--{name}=…" for name in _EVERY if name in flags_of(stage)]
  lines = [" ".join(filter(None, ("jaxinf", stage.name, stage.takes, *named))), ""]
  lines += textwrap.wrap(f"{stage.help[0].upper()}{stage.help[1:]}.", _WIDTH)
  if stage.steps:
    lines.append(f"It does: {', '.join(stage.steps)}.")
  if stage.needs:
    lines.append(f"It needs: {', '.join(stage.needs)}.")
  if stage.kept:
    lines.append(f"Its result is kept in DIR/{stage.name}/.")
  if after := hint(stage.name).format(folder=f"DIR/{stage.name}"):
    lines.append(f"Then: {after.removeprefix('next: ')}.")
  if read:
    lines += ["", "Flags:", *(_entry(f"--{name}", text, 20) for name, text in read.items())]
  if fields := fields_read(stage):
    lines += ["", "Of the config it reads, with these defaults:"]
    lines += [_field(field) for field in fields]
  if any(field.path == "model.name" for field in fields):
    lines += ["", "Another model.name has the fields of its class in jaxinf.networks.MODELS."]
  return "\n".join(lines)


def flags_of(stage: Stage) -> tuple[str, ...]:
  """The flags of the command line that a stage reads."""
  if not stage.of_run:
    return stage.flags
  processes = ("coordinator", "num_processes", "process_id", "distributed")
  return (*_EVERY, *stage.flags, *(["dry-run"] if stage.dry_run else []), *processes)


def as_typed(value: object) -> str:
  """A value as one types it after --config.FIELD=."""
  text = str(value)
  return f"'{text}'" if isinstance(value, tuple) else text


def _field(field: Field) -> str:
  return _entry(f"--config.{field.path}={as_typed(field.default)}", field.meaning, _COLUMN)


def _entry(name: str, text: str, column: int) -> str:
  """A name and its meaning in two columns; where the name is too long the meaning is below it."""
  first = f"  {name}"
  below = bool(text) and len(first) + 2 > column
  begin = "" if below else first
  lines = textwrap.wrap(
    text, _WIDTH, initial_indent=begin.ljust(column), subsequent_indent=" " * column
  )
  return "\n".join([first, *lines] if below else lines or [first])
