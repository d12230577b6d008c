"""The sections of a config against the functions that they configure: the first wrong key is an error that names it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flexivit_jax import config, data, errors, schedules, sharding
from flexivit_jax.evaluators import EVALUATORS
from flexivit_jax.models import MODELS
from flexivit_jax.models.flexivit import UNNAMED
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.opening import load_init, load_teacher
from flexivit_jax.optim import make as _make_optimizer

# Arguments that the program provides, so no keys of a config.
_GIVEN_DATA = ("source", "seed", "num_steps", "start_step", "process_index", "process_count")
_GIVEN_EVALS = ("model", "batches", "train_batches", "num_classes", "mesh", "source")
_GIVEN_OPTIM = ("params", "total_steps", "batch_size", "dataset_size")
DURATIONS = ("steps", "epochs", "examples", "percent")


def check_sections(
  *,
  input: Mapping[str, Any],
  model: Mapping[str, Any],
  objective: Mapping[str, Any],
  optim: Mapping[str, Any],
  evals: Mapping[str, Any],
  checkpoint: Mapping[str, Any],
  init: Mapping[str, Any] | None = None,
  mesh: Mapping[str, Any] | None = None,
) -> None:
  """Raises a UserError for the first key that is misspelt, does not belong, or is missing."""
  network = _named("model", model, MODELS, "flexivit")
  config.check_known("objective", objective, *OBJECTIVES.values(), optional=("name",))
  goal = _named("objective", objective, OBJECTIVES, "supervised")
  config.check("input", input, data.train_batches, given=_GIVEN_DATA, needed=("data",))
  config.check("input.data", input["data"], data.make_source)
  config.check("model", model, network, given=UNNAMED, optional=("name",))
  config.check("objective", objective, goal, optional=("name",))
  for name, section in objective.get("teachers", {}).items():
    check_teacher(f"objective.teachers.{name}", section)
  if init is not None:
    config.check("init", init, load_init, given=("model",))
  config.check("mesh", mesh or {}, sharding.make_mesh, optional=("divide_teachers",))
  config.check("optim", optim, _make_optimizer, given=_GIVEN_OPTIM)
  if isinstance(optim.get("schedule"), Mapping):
    config.check("optim.schedule", optim["schedule"], schedules.make, given=_GIVEN_OPTIM)
  every = [f"every_{unit}" for unit in DURATIONS]
  config.check("checkpoint", checkpoint, optional=("keep", *every))
  for key, section in evals.items():
    check_evaluation(f"evals.{key}", section)


def check_evaluation(where: str, section: Mapping[str, Any]) -> None:
  """Raises a UserError for the first wrong key in a section of `evals`."""
  optional = ("type", "train_data", *(f"every_{unit}" for unit in DURATIONS))
  given = (*_GIVEN_EVALS, "process_index", "process_count")
  every: list[Callable[..., Any]] = [data.eval_batches, data.few_shots, *EVALUATORS.values()]
  # First what no evaluator has: a misspelt "type" is not the fault of the keys that belong to its value.
  config.check_known(where, section, *every, given=given, optional=("data", *optional))
  evaluator = _named(where, section, EVALUATORS, "classification", "type")
  functions, needed = [data.eval_batches, evaluator], ["data"]
  if "train_batches" in inspect.signature(evaluator).parameters:
    functions, needed = [*functions, data.few_shots], [*needed, "train_data"]
  optional = tuple(k for k in optional if k != "train_data" or k in needed)
  config.check(where, section, *functions, given=given, needed=needed, optional=optional)
  for key in needed:
    config.check(f"{where}.{key}", section[key], data.make_source)
  if "teacher" in section:
    check_teacher(f"{where}.teacher", section["teacher"])


def check_teacher(where: str, section: Mapping[str, Any]) -> None:
  """Raises a UserError for the first wrong key in the section of a teacher."""
  config.check(where, section, load_teacher)
  if section.get("model") is not None:
    model = _named(f"{where}.model", section["model"], MODELS, "flexivit")
    config.check(f"{where}.model", section["model"], model, given=UNNAMED, optional=("name",))


def _named(
  where: str, section: Mapping[str, Any], table: Mapping[str, Any], default: str, key: str = "name"
) -> Any:
  name = section.get(key, default)
  if name not in table:
    raise errors.unknown(f"{where}.{key}", name, table)
  return table[name]
