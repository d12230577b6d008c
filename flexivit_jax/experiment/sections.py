"""The sections of a config against the functions that they configure: an error names the first wrong key or value."""

import inspect
from collections.abc import Mapping
from typing import Any

from flexivit_jax import config, data, errors
from flexivit_jax.config import Function, Section
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators.registry import EVALUATORS
from flexivit_jax.experiment import monitor
from flexivit_jax.experiment.loaders import PART_LOADERS, load_init, load_teacher, load_whole
from flexivit_jax.experiment.settings import Settings
from flexivit_jax.models import MODELS, UNNAMED, FlexiViT, TextTower, TwoTowers
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.running import wandb_run
from flexivit_jax.training import schedules, token_budget as token_budgets
from flexivit_jax.training.optim import make as _make_optimizer

# Arguments that the program provides, so no keys of a config.
_GIVEN_DATA = ("source", "seed", "num_steps", "start_step", "process_index", "process_count")
_GIVEN_EVALS = (
  "model", "batches", "train_batches", "num_classes", "mesh", "source", "class_names",
  "class_groups", "tokens",
)  # fmt: skip
_GIVEN_OPTIM = ("params", "total_steps", "batch_size", "dataset_size")
_GIVEN_SIZE = ("self", "image_hw")
DURATIONS = ("steps", "epochs", "examples", "percent")
_NAME = {"name": str}
_PARTS: dict[str, Function] = {"FlexiViT": FlexiViT, "TextTower": TextTower}  # of a model of parts
_EVERY = {f"every_{unit}": schedules.Duration for unit in DURATIONS}


def check_sections(settings: Settings) -> None:
  """Raises a UserError for the first key that is misspelt, does not belong, or is missing, or value of a wrong type."""
  network = _named("model", settings.model, MODELS, "flexivit")
  config.check_known("objective", settings.objective, *OBJECTIVES.values(), optional=("name",))
  goal = _named("objective", settings.objective, OBJECTIVES, "supervised")
  config.check(
    "input", settings.input, data.train_batches, given=_GIVEN_DATA, needed={"data": Mapping}
  )
  config.check("input.data", settings.input["data"], data.make_source)
  config.check_known(
    "model", settings.model, *MODELS.values(), given=UNNAMED, optional=("name", "like")
  )
  like = {"like": str | None}
  config.check("model", settings.model, network, given=UNNAMED, optional=_NAME | like)
  for part, of in getattr(network, "PARTS", {}).items():
    section, files = settings.model.get(part, {}), like if of == "FlexiViT" else {}
    config.check(f"model.{part}", section, _PARTS[of], given=UNNAMED, optional=files)
  config.check("objective", settings.objective, goal, optional=_NAME)
  for name, section in settings.objective.get("teachers", {}).items():
    check_teacher(f"objective.teachers.{name}", section)
  if "size" in settings.objective:
    config.check("objective.size", settings.objective["size"], network.grid, given=_GIVEN_SIZE)
  if settings.init is not None:
    _check_init(settings.init, network)
  of_mesh = {"divide_teachers": bool, "gather_dtype": str}
  config.check("mesh", settings.mesh or {}, sharding.make_mesh, optional=of_mesh)
  config.check("optim", settings.optim, _make_optimizer, given=_GIVEN_OPTIM)
  schedule = settings.optim.get("schedule") or {}
  for section in [schedule] if isinstance(schedule, Mapping) else [kw for _, kw in schedule if kw]:
    config.check("optim.schedule", section, schedules.make, given=_GIVEN_OPTIM)
  best = {"best": str | None, "best_mode": monitor.Mode | None}
  config.check("checkpoint", settings.checkpoint, optional={"keep": int | None, **best, **_EVERY})
  config.check_known("flexi", settings.flexi, network.grid, given=_GIVEN_SIZE)
  if settings.token_budget is not None:
    config.check("token_budget", settings.token_budget, token_budgets.make)
  if settings.early_stopping is not None:
    config.check(
      "early_stopping", settings.early_stopping, monitor.early_stopping, given=("evals",)
    )
  if settings.wandb is not None:
    config.check(
      "wandb", settings.wandb, wandb_run.open_run, given=("workdir", "settings", "begun")
    )
  for key, section in settings.evals.items():
    check_evaluation(f"evals.{key}", section)


def check_evaluation(where: str, section: object) -> None:
  """Raises a UserError for the first wrong key or type of a value in a section of `evals`."""
  given = (*_GIVEN_EVALS, "process_index", "process_count", "waiting")
  every: list[Function] = [data.eval_batches, data.few_shots, *EVALUATORS.values()]
  optional = {"type": str, **_EVERY}
  # First what no evaluator has: a misspelt "type" is not the fault of the keys that belong to its value.
  keys = config.check_known(
    where, section, *every, given=given, optional=("data", "train_data", *optional)
  )
  if keys.get("type") in ("confusion", "confusion_matrix", "per_class"):
    raise errors.UserError(
      f"{where}.type is {keys['type']!r}; a confusion matrix is per_class=True of the type 'classification'."
    )
  evaluator = _named(where, keys, EVALUATORS, "classification", "type")
  functions, needed = [data.eval_batches, evaluator], {"data": Mapping}
  if "train_batches" in inspect.signature(evaluator).parameters:
    functions, needed = [*functions, data.few_shots], needed | {"train_data": Mapping}
  config.check(where, section, *functions, given=given, needed=needed, optional=optional)
  for key in needed:
    config.check(f"{where}.{key}", keys[key], data.make_source)
  if "teacher" in keys:
    check_teacher(f"{where}.teacher", keys["teacher"])


def _check_init(section: Section, network: Any) -> None:
  """Raises a UserError for the first wrong key or type in what says where weights to start from are."""
  given = ("model", "labels")
  if not (parts := getattr(network, "PARTS", {})):
    config.check("init", section, load_init, given=given)
    return
  if "checkpoint" in section and network is not TwoTowers:
    config.check("init", section, load_whole, given=given)
    return
  if "checkpoint" in section:
    raise errors.UserError(
      f"init.checkpoint of a model of parts; say which part it is for: init.{next(iter(parts))}.checkpoint."
    )
  for name, one in config.check("init", section, optional=dict.fromkeys(parts, Mapping)).items():
    config.check(f"init.{name}", one, PART_LOADERS[parts[name]], given=given)


def check_teacher(where: str, section: object) -> None:
  """Raises a UserError for the first wrong key or type of a value in the section of a teacher."""
  keys = config.check(where, section, load_teacher)
  if keys.get("model") is not None:
    model = _named(f"{where}.model", keys["model"], MODELS, "flexivit")
    config.check(f"{where}.model", keys["model"], model, given=UNNAMED, optional=_NAME)


def _named(where: str, section: Section, table: Section, default: str, key: str = "name") -> Any:
  name = section.get(key, default)
  if not isinstance(name, str) or name not in table:
    raise errors.unknown(f"{where}.{key}", name, table)
  return table[name]
