"""What the stages of a run will take on this machine, before anything long starts.

Bytes follow from shapes, operations from XLA's count, and seconds from a few batches of the very
kernels that a stage drives, with random parameters, so that no trained model is needed. Planning
takes about as long as compiling them: nearly half of a run of minutes, nothing of one of hours.
"""

from jaxinf.planning.cost import Plan, StageCost
from jaxinf.planning.limits import Limits
from jaxinf.planning.stages import plan, show
from jaxinf.planning.trials import Call, Program, Stopwatch, Trial

__all__ = ["Call", "Limits", "Plan", "Program", "StageCost", "Stopwatch", "Trial", "plan", "show"]
