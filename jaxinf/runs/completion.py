"""Scripts that make shells complete jaxinf's words: stages, flags, configs by name, and fields.

They are text made from the tables once, so that completing starts no Python.
"""

from collections.abc import Callable

from jaxinf.core.registry import named
from jaxinf.runs.config_files import CONFIGS
from jaxinf.runs.fields import fields_read
from jaxinf.runs.help import flags_of
from jaxinf.runs.stage import STAGES, Stage

_SWITCHES = ("distributed", "dry-run", "json", "stale")  # flags without a value


def completion(shell: str = "") -> str:
  """The script of a shell; its first lines say where it goes.

  Raises:
    ValueError: there is none of that shell.
  """
  return named(SHELLS, shell, "shell")()


def words_of(stage: Stage) -> list[str]:
  """What may follow a stage; what takes a value ends in =."""
  flags = [f"--{flag}" if flag in _SWITCHES else f"--{flag}=" for flag in flags_of(stage)]
  return [*flags, "--help", *(f"--config.{field.path}=" for field in fields_read(stage))]


def _bash() -> str:
  cases = "\n".join(
    f"        {stage.name}) words='{' '.join(words_of(stage))}' ;;" for stage in STAGES.values()
  )
  return f"""# jaxinf completion bash > ~/.local/share/bash-completion/completions/jaxinf
_jaxinf() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" words=''
  local current="${{line##*[[:space:]]}}"
  if [ "$COMP_CWORD" -le 1 ]; then
    words='{" ".join(STAGES)} --help'
  else
    case "$current" in
      --config=*) words='{" ".join(CONFIGS)}'; current="${{current#--config=}}" ;;
      --*=*) ;;
      *) case "${{COMP_WORDS[1]}}" in
{cases}
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o bashdefault -o default -F _jaxinf jaxinf
"""


def _zsh() -> str:
  stages = "\n".join(f"      {_quoted(f'{s.name}:{s.help}')}" for s in STAGES.values())
  cases = "\n".join(
    f"    {stage.name}) compadd -S '' -- {' '.join(words_of(stage))} ;;"
    for stage in STAGES.values()
  )
  return f"""#compdef jaxinf
# jaxinf completion zsh > a folder of $fpath, as a file _jaxinf
_jaxinf() {{
  local -a stages
  if (( CURRENT == 2 )); then
    stages=(
{stages}
    )
    _describe stage stages
    return
  fi
  if compset -P '--config='; then
    compadd -- {" ".join(CONFIGS)}
    _files -g '*.py'
    return
  fi
  if compset -P '--*='; then
    _files
    return
  fi
  case "$words[2]" in
{cases}
  esac
}}
compdef _jaxinf jaxinf
"""


def _fish() -> str:
  lines = [
    "# jaxinf completion fish > ~/.config/fish/completions/jaxinf.fish",
    "complete -c jaxinf -f",
    "complete -c jaxinf -l help",
  ]
  first = "-n 'test (count (commandline -opc)) -eq 1'"
  for stage in STAGES.values():
    lines.append(f"complete -c jaxinf {first} -a {stage.name} -d {_quoted(stage.help)}")
    chosen = f"-n '__fish_seen_subcommand_from {stage.name}'"
    for flag in flags_of(stage):
      if flag in _SWITCHES:
        lines.append(f"complete -c jaxinf {chosen} -l {flag}")
      elif flag == "config":
        names = f"-x -a '{' '.join(CONFIGS)} (__fish_complete_suffix .py)'"
        lines.append(f"complete -c jaxinf {chosen} -l config {names}")
      else:
        lines.append(f"complete -c jaxinf {chosen} -l {flag} -r -F")
    for field in fields_read(stage):
      said = f" -d {_quoted(field.meaning)}" if field.meaning else ""
      lines.append(f"complete -c jaxinf {chosen} -l config.{field.path} -x{said}")
  return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
  """As one word between single quotes, for zsh and fish alike."""
  return "'" + text.replace("\\", "").replace("'", "’") + "'"


SHELLS: dict[str, Callable[[], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
