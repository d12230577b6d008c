"""Whether the embeddings of a run's image tower can be cached, and on what they depend."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from flexivit_jax import data, errors, storage
from flexivit_jax.config import Section
from flexivit_jax.models import Model, TwoTowers
from flexivit_jax.objectives.base import Objective
from flexivit_jax.trees import Json, Tree


class TowerCache(NamedTuple):
  """A folder of embeddings, the number of examples, and what they depend on but the tower's weights."""

  folder: str
  examples: int
  about: Json

  def identity(self, digest: str) -> Json:
    """Everything that an embedding depends on but the size and the example; `digest` is that of the weights."""
    return {**self.about, "tower": digest}


def tower_cache(
  folder: str,
  *,
  source: data.Source,
  section: Section,
  model: Model,
  fields: Mapping[str, object],
  objective: Objective,
  frozen: Tree | None,
) -> TowerCache:
  """Returns the cache that the setting `tower_cache` asks for.

  Args:
    folder: of the setting.
    source: the training data.
    section: the config's `input`.
    model: of the run.
    fields: of its image tower.
    objective: of the run.
    frozen: which parameters do not move; None: all do.

  Raises:
    UserError: a tower that moves or draws, images that are drawn anew in each epoch, another objective.
  """
  operations, drawn = data.image_operations(section["pp"])
  moves = frozen is None or not all(jax.tree.leaves(frozen["image"]))
  reasons = {
    "the model is no two_towers": not isinstance(model, TwoTowers),
    f"the objective takes {sorted(objective.inputs)}": set(objective.inputs) != {"image", "tokens"},
    'the image tower is not locked (optim.freeze=("image/.*",))': moves,
    "the image tower has dropout or stochastic depth": getattr(model, "is_random", False),
    f"{', '.join(drawn)} in input.pp change an image from epoch to epoch": bool(drawn),
    "it cannot be in a bucket": storage.address(folder) is not None,
    "there are several processes": jax.process_count() > 1,
  }
  if why := [reason for reason, holds in reasons.items() if holds]:
    raise errors.UserError(
      f"tower_cache cannot be used: {'; '.join(why)}. Change that, or remove it."
    )
  about = dict(
    data={**section["data"], "examples": len(source)},
    operations=operations,
    model=dict(fields),
    backend=jax.devices()[0].device_kind,
    jax=jax.__version__,
  )
  return TowerCache(folder, len(source), about)
