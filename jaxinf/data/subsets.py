"""Random subsets of the training examples, on which models are retrained (paper, J.5)."""

import dataclasses

import numpy as np

from jaxinf.core.checks import checked_count, checked_seed


@dataclasses.dataclass(frozen=True, eq=False)
class Subsets:
  """M subsets of N training examples, checked when they are made.

  Attributes:
    membership: [M, N] bool; True: the example is in the subset, and its model is trained on it.
    train_ids: [N] unique ids, integers or strings.

  Raises:
    ValueError: the arrays don't fit together, ids repeat, or a subset is empty.
  """

  membership: np.ndarray
  train_ids: np.ndarray

  def __post_init__(self):
    shape, dtype = np.shape(self.membership), getattr(self.membership, "dtype", np.dtype(object))
    if len(shape) != 2 or not all(shape) or dtype.kind != "b":
      raise ValueError(
        f"membership must be a NumPy array [M, N] of booleans; got shape {shape}, {dtype}. "
        "Compare ids with np.isin to make one."
      )
    if np.shape(self.train_ids) != shape[1:]:
      raise ValueError(
        f"train_ids must be one id for each of the {shape[1]} columns of membership; "
        f"got shape {np.shape(self.train_ids)}."
      )
    if len(np.unique(self.train_ids)) < shape[1]:
      raise ValueError("train_ids must be unique: some come more than once. Rename or drop them.")
    empty = np.flatnonzero(~self.membership.any(axis=1))
    if len(empty):
      raise ValueError(f"Subset {empty[0]} is empty: no model can be trained on it. Leave it out.")

  def __len__(self) -> int:
    return len(self.membership)

  def positions(self, j: int) -> np.ndarray:
    """Positions among the N examples, ascending, of those in subset j."""
    return np.flatnonzero(self.membership[j])


def random_subsets(train_ids: np.ndarray, num_subsets: int, *, share: float, seed: int) -> Subsets:
  """Subsets number 0 … num_subsets − 1 of round(share · N) examples each.

  Each is drawn without replacement and independently of the others: of the random order that
  (seed, j) gives to N positions, subset number j is the beginning. So more subsets extend fewer,
  and a smaller share lies within a larger. The numbers come from NumPy's raw Philox stream, which
  does not change between its versions.

  Args:
    train_ids: [N] unique ids.
    num_subsets: M.
    share: of the examples in a subset; the paper's is ½. An N · share halfway between two integers
      goes to the even one.
    seed: of the draws.

  Raises:
    ValueError: a subset would be empty or the whole, or a number is out of range.

  Examples:
    >>> subsets = random_subsets(np.array(["cat", "dog", "elk", "fox"]), 3, share=0.5, seed=0)
    >>> subsets.membership.sum(axis=1).tolist()
    [2, 2, 2]
    >>> more = random_subsets(subsets.train_ids, 5, share=0.5, seed=0)
    >>> (more.membership[:3] == subsets.membership).all().item()
    True
  """
  num_train = len(train_ids)
  size = round(share * num_train)
  if not 1 <= size < num_train:
    raise ValueError(
      f"A subset must hold between 1 and {num_train - 1} of the {num_train} examples; a share of "
      f"{share:g} gives {size}. Choose another, such as 0.5."
    )
  num_subsets, seed = checked_count(num_subsets, "num_subsets"), checked_seed(seed)
  membership = np.zeros((num_subsets, num_train), bool)
  for number, row in enumerate(membership):
    stream = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(number,)))
    row[np.argsort(stream.random_raw(num_train), kind="stable")[:size]] = True
  return Subsets(membership, np.asarray(train_ids))
