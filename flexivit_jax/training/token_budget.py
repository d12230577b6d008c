"""Steps of about equal cost: where a patch size has few tokens, a step takes several batches at once.

The batch of a size is in proportion to 1 / tokens, in whole batches of the loader: `most tokens / tokens` of them,
rounded down. The loss is the mean over all images of the step, as ever. A batch that is k times as large has a gradient
with less noise, for which the update is multiplied by k ** lr_power: 0.5 keeps the noise of Adam's updates (square root
scaling, arXiv 2205.10287), 1 that of gradient descent (linear scaling, arXiv 1706.02677), 0 leaves lr alone.
"""

from typing import NamedTuple

from flexivit_jax import errors


class Budget(NamedTuple):
  """See `make`."""

  most: int
  lr_power: float

  def batches(self, tokens: int, most_tokens: int) -> int:
    """How many batches a step takes that sees `tokens` an image, where the finest size has `most_tokens`."""
    return max(1, min(self.most, most_tokens // tokens))

  def update_scale(self, batches: int) -> float:
    """By what the update of such a step is multiplied."""
    return batches**self.lr_power


def make(*, most: int = 8, lr_power: int | float = 0.5) -> Budget:
  """Checks what a config gives.

  Args:
    most: batches in a step.
    lr_power: see the module; 0 to 1.
  """
  if most < 1 or not 0 <= lr_power <= 1:
    raise errors.UserError(
      f"token_budget has most={most}, lr_power={lr_power}; expected at least 1, and 0 to 1."
    )
  return Budget(most, float(lr_power))
