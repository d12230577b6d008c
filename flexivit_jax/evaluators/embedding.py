"""Embeddings of images at every patch size, and of texts once: what evaluators of images and texts share."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh

from flexivit_jax import errors
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.evaluators.per_size import PerSize
from flexivit_jax.models import Model
from flexivit_jax.objectives.base import Batch
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.trees import Params


def check_texts(model: Model) -> None:
  """Raises a UserError if a model embeds no texts."""
  if not {"image", "text"} <= set(model.outputs):
    raise errors.UserError(
      f"A {type(model).__name__} embeds no texts (it gives {sorted(model.outputs)}); take a model of two towers,"
      " model.name='two_towers', or another type of evaluator."
    )


def images(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  sizes: list[SizeArgs],
  more: tuple[str, ...] = (),
) -> PerSize:
  """Returns what embeds images: its `outputs` give "image" [n, e] and "_mask" [n], whole on every device.

  Args:
    model: two towers; the sizes and the costs are those of its image tower.
    batches: re-iterable, of "image" and "_mask".
    mesh: where it runs.
    sizes: static arguments of the model.
    more: other keys of the batches, which come back as they are.
  """
  fn = functools.partial(_image_step, model=model, mesh=mesh, more=more)
  return PerSize(fn, model, batches, mesh, sizes=sizes, inputs=("image", *more))


def _image_step(
  params: Params, batch: Batch, *, model: Model, mesh: Mesh, more: tuple[str, ...], **size: Any
) -> dict[str, jax.Array]:
  _, out = model.apply({"params": params}, batch["image"], **size)
  made = {"image": out["image"], **{k: batch[k] for k in ("_mask", *more)}}
  return jax.lax.with_sharding_constraint(made, sharding.replicated(mesh))


@final
class Texts:
  """One program that embeds texts of one shape, divided over the mesh as a batch is.

  Args:
    model: two towers.
    mesh: where it runs.
    params: the model's, or their shapes and shardings.
    example: this process's share of a batch: "texts" int32 [n, l] or [n, k, l], and any other arrays [n, ...].
  """

  def __init__(self, model: Model, mesh: Mesh, params: Params, example: Mapping[str, np.ndarray]):
    self._mesh = mesh
    specs = sharding.specs(dict(example), mesh)
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
      fn = functools.partial(_text_step, model=model, mesh=mesh)
      self._program = compilation.compile_one(fn, (params, specs), "the text tower")

  def __call__(self, params: Params, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the batch of all processes and "embedded" [n, ..., e], whole on every device, without waiting."""
    return self._program.run(params, sharding.put_batch(dict(batch), self._mesh))


def _text_step(params: Params, batch: Batch, *, model: Model, mesh: Mesh) -> dict[str, jax.Array]:
  tokens = batch["texts"]
  _, out = model.apply({"params": params}, tokens=tokens.reshape(-1, tokens.shape[-1]))
  embedded = out["text"].reshape(*tokens.shape[:-1], -1)
  return jax.lax.with_sharding_constraint(
    {**batch, "embedded": embedded}, sharding.replicated(mesh)
  )
