"""How a stage trains: from its last checkpoint on, with checkpoints and a log on the way."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxinf.engine import artifacts
from jaxinf.networks.training import Hooks, NonFiniteLoss

_LOG = logging.getLogger("jaxinf")


class Trained(NamedTuple):
  """What a training ended with."""

  state: Any
  last_metrics: Any  # of the log
  resumed_at: int | None  # the step that it went on from; None: from scratch


def trained(
  folder: Path, label: str, state: Any, fit: Callable[[Any, Hooks], Any], advice: str = ""
) -> Trained:
  """fit(state, hooks), where `state` is replaced by the folder's last checkpoint.

  Args:
    folder: of the stage.
    label: of the stage, in messages.
    state: where training begins.
    fit: trains on from a state.
    advice: what to do besides, where the loss is not finite.

  Raises:
    ValueError: the loss is not finite; with the last good checkpoint.
  """
  checkpoints = artifacts.Checkpoints(folder / "checkpoints")
  step = checkpoints.latest()
  if step is not None:
    state = checkpoints.restore(step, state)
    _LOG.info("%s: resuming from the checkpoint at step %d", label, step)
  log = artifacts.MetricsLog(folder, step or 0)
  try:
    state = fit(state, Hooks(save=checkpoints.save, log=log.write))
  except NonFiniteLoss as error:
    good = checkpoints.latest()
    where = f"is that of step {good} in {folder / 'checkpoints'}" if good else "was yet to come"
    said = " ".join(filter(None, (str(error), advice)))
    raise ValueError(f"{said} The last good checkpoint {where}.") from error
  finally:
    checkpoints.close()
    log.close()
  return Trained(state, log.last(), step)
