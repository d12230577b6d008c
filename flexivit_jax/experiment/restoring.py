"""How a run begins: from nothing, or from the newest checkpoint that fits its config; and what a checkpoint records."""

import contextlib
import json
import pathlib
import shlex
from typing import NamedTuple

from clu import parameter_overview
from jax.sharding import Mesh

from flexivit_jax import data, errors, files
from flexivit_jax.data import class_names
from flexivit_jax.evaluators import results
from flexivit_jax.experiment import preparation
from flexivit_jax.experiment.build import Experiment
from flexivit_jax.running import checkpoint, distributed, run_folder
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.running.session import Session, note
from flexivit_jax.training import patch_schedule, steps
from flexivit_jax.trees import Json


class Start(NamedTuple):
  """Where a run begins.

  Attributes:
    state: of the training.
    schedule: state of the schedule of sizes.
    early: state of early stopping.
    resumed: there is a checkpoint, and this is its state.
  """

  state: steps.TrainState
  schedule: patch_schedule.State
  early: Json
  resumed: bool


def trained(workdir: pathlib.Path) -> class_names.Trained | None:
  """Returns what the newest checkpoint in a run folder says of its classes; None: there is none. Writes nothing.

  Process 0 reads it for all.
  """
  newest = distributed.on_first(
    lambda: checkpoint.read_record(workdir / "checkpoints"), "its newest checkpoint"
  )
  return newest and class_names.trained(newest[1], str(workdir))


def start(
  run: Session,
  exp: Experiment,
  mesh: Mesh,
  batches: data.TrainBatches,
  settings: Json,
  *,
  resume: str = "latest",
  allow_change: bool = False,
) -> tuple[Start, run_folder.Start | None]:
  """Returns the state that a run begins with, and how the config differs from that of the folder (process 0 only).

  Nothing in the folder changes; `batches` are set to where the checkpoint was.

  Args:
    run: the session.
    exp: the experiment.
    mesh: where the state lives.
    batches: of the training data.
    settings: the config.
    resume: see `Checkpoints.choose`.
    allow_change: see `run_folder.check_config`.

  Raises:
    UserError: no checkpoint that can be read; one that does not fit the config; no room for the next.
  """
  differences: list[run_folder.Start] = []
  with contextlib.closing(run.reader()) as checkpoints:

    def choose() -> int | None:
      latest = checkpoints.choose(resume, note)
      differences.append(run_folder.compare(run.workdir, settings, begun=latest is not None))
      for line in differences[0].notes:
        note(line)
      state = preparation.abstract_state(exp)
      if latest is not None:
        misfit = _misfit(exp, checkpoints, latest, state, batches, settings)
        run_folder.check_config(
          run.workdir, settings, differences[0], allow_change=allow_change, misfit=misfit
        )
      checkpoints.check_room(state)
      return latest

    latest = distributed.on_first(choose, "its checkpoints or its config")
    run.ledger.go_on_from(latest or 0)
    begun = _first_or_restored(run, exp, mesh, batches, checkpoints, latest)
  return begun, (differences[0] if differences else None)


def _misfit(
  exp: Experiment,
  checkpoints: Checkpoints,
  latest: int,
  state: steps.TrainState,
  batches: data.TrainBatches,
  settings: Json,
) -> str | None:
  """Returns why a run of this config cannot resume from a checkpoint, whatever the user allows; None: it can."""
  record, where = checkpoints.record(latest), checkpoints.folder / str(latest)
  try:
    checkpoints.check_fit(latest, state.params, preparation.rest(state))
    check_frozen(exp, record.get("frozen", {}), where)
    check_text(exp, record.get("text"), where)
    check_data(batches.get_state(), record["data"], settings["input"]["data"], where.parent.parent)
  except errors.UserError as e:
    return str(e)
  return None


def _first_or_restored(
  run: Session,
  exp: Experiment,
  mesh: Mesh,
  batches: data.TrainBatches,
  checkpoints: Checkpoints,
  latest: int | None,
) -> Start:
  state = preparation.first_state(exp, mesh)
  if latest is None:
    return Start(state, patch_schedule.init_state(exp.flexi), {}, resumed=False)
  params, rest, record = run.restore(checkpoints, latest, state.params, preparation.rest(state))
  batches.set_state(record["data"])
  seen = record["data"]["step"] * record["data"]["batch_size"]
  epoch = seen / record["data"]["examples"]
  note(
    f"resumed from {checkpoints.folder / str(latest)}: step {latest}/{exp.total_steps}, epoch {epoch:.2f},"
    f" {seen} images seen; {run.ledger.lost:.0f} s of work lost"
  )
  state = steps.TrainState(params=params, **rest)
  return Start(state, record.get("schedule", {}), record.get("early_stopping", {}), resumed=True)


def write_start(
  workdir: pathlib.Path,
  settings: Json,
  difference: run_folder.Start | None,
  state: steps.TrainState,
) -> None:
  """Writes what a start leaves in its folder: its config, where it is another one, and the list of parameters."""

  def write() -> None:
    if difference is not None:
      run_folder.write_config(workdir, settings, difference)
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    files.write_atomically(workdir / "parameters.txt", overview + "\n")

  distributed.on_first(write, "its folder")


def record(
  exp: Experiment, step: int, schedule: patch_schedule.State, batches: data.TrainBatches
) -> Json:
  """Returns what a checkpoint records of itself: enough to resume training, and to predict without the config."""
  main = exp.evaluations.get(results.main_of(exp.evaluations))
  # An evaluator that fits its own classifier, or a label map, may be of other classes than the model.
  scored = main is not None and not main.section.keys() & {"train_data", "label_map", "teacher"}
  same = scored and main.source.num_classes == exp.model.num_classes
  names = exp.class_names or (main.source.class_names if same else None)
  return {
    "name": exp.name,
    "step": step,
    "data": batches.get_state(),
    "model": exp.model_record,
    "image_shape": list(exp.image_shape),
    "pp": main.pp if main else None,
    **({"short_side": main.section["short_side"]} if main and "short_side" in main.section else {}),
    "class_names": list(names) if names else None,
    "data_classes": list(exp.data_classes) if exp.data_classes else None,
    "frozen": exp.frozen_digests,
    "schedule": schedule,
    **({} if exp.tokens is None else {"text": exp.tokens.record()}),
    **({"projection": True} if exp.projection else {}),
    "trained": {name: list(choice.values) for name, choice in exp.flexi.items()},
  }


def check_frozen(exp: Experiment, stored: dict[str, str], where: pathlib.Path) -> None:
  """Raises a UserError if a checkpoint was trained with other teachers."""
  if exp.frozen_digests != stored:
    raise errors.UserError(
      f"{where} was trained with other teachers: {stored} there, {exp.frozen_digests} here (sha256);"
      " give the same ones, or another --workdir."
    )


def check_text(exp: Experiment, stored: Json | None, where: pathlib.Path) -> None:
  """Raises a UserError if a checkpoint was trained with texts as other tokens."""
  own = exp.tokens and exp.tokens.record()
  if own != stored:
    keys = [
      k for k in {**(own or {}), **(stored or {})} if (own or {}).get(k) != (stored or {}).get(k)
    ]
    raise errors.UserError(
      f"{where} was trained with texts as other tokens, which differ in {', '.join(keys)}; give the same tokenizer and"
      " options of tokenize, or another --workdir."
    )


def check_data(own: Json, stored: Json, data: Json, where: pathlib.Path) -> None:
  """Compares where in the data a checkpoint was with what this config's data are.

  Args:
    own: state of this run's batches.
    stored: state of those of the checkpoint.
    data: the config's `input.data`, for the message.
    where: the checkpoint.

  Raises:
    UserError: another number of examples, batch size, seed or sampler: the next batches would be other ones.
  """
  named = pathlib.Path(str(data.get("data_dir") or data.get("name")), str(data.get("split")))
  lines = {
    "examples": f"{named} has {own['examples']} examples, and had {stored['examples']}",
    "batch_size": f"it was trained in batches of {stored['batch_size']}, not of {own['batch_size']}",
  }
  keys = [k for k in {**own, **stored} if k != "step" and own.get(k) != stored.get(k)]
  if keys:
    differs = "; ".join(lines.get(k, f"{k} was {stored.get(k)}, and is {own.get(k)}") for k in keys)
    weights = shlex.quote(json.dumps({"checkpoint": str(where)}, ensure_ascii=False))
    raise errors.UserError(
      f"{where} cannot be gone on from: {differs}. The order of the examples depends on that. Put it back, or"
      f" give another --workdir, where --config.init={weights} starts from these weights."
    )
