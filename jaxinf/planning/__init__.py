"""What the stages of a run will take on this machine, before anything long starts.

The stages themselves are rehearsed (jaxinf/engine/rehearsal.py): with few training examples and
samples, a few batches of every pass, and random parameters, so that no trained model is needed.
Bytes follow from shapes. Planning takes about as long as compiling what the stages compile.
"""

from jaxinf.planning.cost import Plan, StageCost
from jaxinf.planning.limits import Limits
from jaxinf.planning.stages import plan, show

__all__ = ["Limits", "Plan", "StageCost", "plan", "show"]
