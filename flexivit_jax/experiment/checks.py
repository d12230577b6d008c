"""What a config may not say although each of its values is of the right type: the parts do not fit together."""

import functools
import math
from collections.abc import Mapping, Sequence

import flax.errors
import jax

from flexivit_jax import config, data, errors, specs, trees
from flexivit_jax.experiment.settings import Settings
from flexivit_jax.models.base import Model
from flexivit_jax.objectives.base import Objective
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.specs import Shapes, Specs
from flexivit_jax.trees import Params


def check_channels(params: Params | None, image_shape: Sequence[int]) -> None:
  """Raises a UserError where weights to start from take images of another number of channels than there are."""
  for name, kernel in trees.flatten(params or {}).items():
    patches = f"/{name}".endswith("/embedding/kernel") and kernel.ndim == 4
    if patches and kernel.shape[2] != image_shape[-1]:
      raise errors.UserError(
        f"init: the weights take images of {kernel.shape[2]} channels, the data's have {image_shape[-1]}; start from"
        f" weights for {image_shape[-1]}."
      )


def check_ranges(settings: Settings) -> None:
  """Raises a UserError for a number that is out of its range; None is none."""
  keep = settings.checkpoint.get("keep", 1)
  counts = {
    "log_every": settings.log_every,
    "skip_limit": settings.skip_limit,
    "checkpoint.keep": keep,
  }
  for key, count in counts.items():
    if count is not None and count < 1:
      raise errors.UserError(f"{key}={count}; expected at least 1.")
  limits = {"hang_after": settings.hang_after, "skip_above": settings.skip_above}
  for key, limit in limits.items():
    if limit is not None and not limit > 0:
      raise errors.UserError(f"{key}={limit}; expected more than 0, or None.")
  if isinstance(settings.accumulate, str) and settings.accumulate != "auto":
    raise errors.UserError(f"accumulate={settings.accumulate!r}; expected a number, or 'auto'.")
  bias, seed = settings.init_head_bias, settings.seed
  if not math.isfinite(bias or 0.0):
    raise errors.UserError(f"init_head_bias={bias}; expected a finite number.")
  if not 0 <= seed < 2**32:
    raise errors.UserError(f"seed={seed}; expected 0 to {2**32 - 1}.")


def check_accumulate(
  accumulate: int | str, memory_gib: float | None, batch_size: int, model: Model, shapes: Shapes
) -> None:
  """Raises a UserError for parts that do not divide the batch, and for "auto" where the result would depend on it."""
  if accumulate == "auto":
    if _draws(model, shapes):
      raise errors.UserError(
        "accumulate='auto' with dropout or stochastic depth: masks would depend on the memory of the device; give"
        " accumulate a number."
      )
    if memory_gib is not None and not memory_gib > 0:
      raise errors.UserError(f"memory_gib={memory_gib}; expected more than 0.")
    return
  if not isinstance(accumulate, int) or accumulate < 1 or batch_size % accumulate:
    raise errors.UserError(
      f"Got accumulate={accumulate!r}, batch_size={batch_size}; expected a divisor of batch_size, or 'auto'."
    )
  if memory_gib is not None:
    raise errors.UserError(f"memory_gib={memory_gib} has no effect without accumulate='auto'.")


def _draws(model: Model, shapes: Shapes) -> bool:
  """Whether the model draws anything in training: it then asks for random numbers, of which it is given none here."""
  inputs, size = model.example(shapes)
  params = jax.eval_shape(functools.partial(model.init, **size), jax.random.key(0), **inputs)
  try:
    jax.eval_shape(functools.partial(model.apply, train=True, **size), params, **inputs)
  except flax.errors.InvalidRngError:
    return True
  return False


def check_size(model: Model, image_shape: Sequence[int], size: SizeArgs) -> None:
  """Raises a UserError if a model cannot run images (h, w, c) with these static arguments."""
  model.grid(tuple(image_shape[:2]), **size)


def check_teachers(
  teachers: Mapping[str, Teacher], shapes: Shapes, model: Model, outputs: Sequence[str]
) -> None:
  """Raises a UserError for a teacher of other classes, or whose size does not divide its image.

  Args:
    teachers: by name.
    shapes: of the batch's arrays, of one example.
    model: the student.
    outputs: what the objective compares, by name.
  """
  for name, teacher in teachers.items():
    for output in outputs:
      _check_same_length(f"objective.teachers.{name}", output, teacher.model, model)
    teacher.model.grid(shapes[teacher.image][:2], **teacher.size)


def _check_same_length(where: str, output: str, teacher: Model, model: Model) -> None:
  if output == "logits" and teacher.num_classes != model.num_classes:
    raise errors.UserError(
      f"{where} has {teacher.num_classes} classes, the model {model.num_classes}."
    )
  theirs, ours = (m.outputs[output].shape[0] for m in (teacher, model))
  if theirs != ours:
    raise errors.UserError(f"{where} has {output} of length {theirs}, the model of {ours}.")


def example_arrays(
  source: data.Source, pp: str, on_error: str = "raise"
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype on a device of each array that the preprocessing makes of the first example."""
  with config.naming("input"):
    batches = data.eval_batches(source, pp, batch_size=1, threads=0, on_error=on_error)
    example = next(iter(batches))
  dtype = jax.dtypes.canonicalize_dtype
  return {
    name: jax.ShapeDtypeStruct(array.shape[1:], dtype(array.dtype))
    for name, array in example.items()
  }


def check_inputs(
  arrays: Mapping[str, jax.ShapeDtypeStruct], *all_specs: Specs, num_classes: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns those of the arrays that the specs name, after a comparison; labels have to fit the model.

  Args:
    arrays: of one example, see `example_arrays`.
    *all_specs: the model's inputs, the objective's, its teachers'.
    num_classes: of the model: the length of "classes".

  Raises:
    UserError: see `specs.check`.
  """
  lengths: Mapping[str, int] = {}
  for one in all_specs:
    if "labels" in one and one["labels"].shape == ("classes",):
      _check_labels(arrays.get("labels"), num_classes)
    lengths = specs.check(arrays, one, {"classes": num_classes, **lengths})
  return {name: arrays[name] for name in specs.merge(*all_specs)}


def _check_labels(labels: jax.ShapeDtypeStruct | None, num_classes: int) -> None:
  if labels is not None and labels.shape == (num_classes,):
    return
  got = "no 'labels'" if labels is None else f"labels of shape {labels.shape}"
  fix = f"use onehot({num_classes}), or onehot(), which counts them, and keep 'labels'"
  fix += " (configs/folder.py: leave num_classes out)"
  raise errors.UserError(f"input.pp gives {got}; the model has {num_classes} classes: {fix}.")


def check_outputs(objective: Objective, model: Model) -> None:
  """Raises a UserError where an objective takes what the model does not give."""
  lacking = [name for name in objective.outputs if name not in model.outputs]
  if lacking:
    raise errors.UserError(
      f"The objective takes {lacking} from the model, {type(model).__name__} gives {sorted(model.outputs)}; choose"
      " another objective.name or model.name."
    )


def check_pairs(objective: Objective, batch_size: int) -> None:
  """Raises a UserError for a batch of one where examples are compared with each other."""
  if not objective.separable and batch_size < 2:
    raise errors.UserError(
      f"input.batch_size={batch_size}, but the objective compares the examples of a batch with each other; expected at"
      " least 2."
    )
