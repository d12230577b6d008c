"""Which patches a class's logit rests on: attention weighted by its gradient, block by block.

The rule is that of Chefer et al. 2021 (arXiv 2103.15679), for self-attention: from R = I, with the softmaxed
attention A of each block and the gradient G of the logit with respect to it, R = R + M @ R where M is the mean over
heads of max(G * A, 0). FlexiViT's figure 13, top, shows attention relevance at several patch sizes (arXiv 2212.08013);
whether by this rule, no source tells that we could read.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexivit_jax import errors
from flexivit_jax.models import vit
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.models.grid import which_depth
from flexivit_jax.trees import Params

POOLS = ("tok", "gap", "tok+gap")
PerHead = Float[Array, "n heads l l"]


class Relevance(NamedTuple):
  """The relevance of each patch, 0 or more and without a unit, and the logits."""

  map: Float[Array, "n gh gw"]
  logits: Float[Array, "n k"]


def relevance(
  model: FlexiViT,
  params: Params,
  image: Float[Array | np.ndarray, "n h w c"],
  classes: Int[Array | np.ndarray, " n"] | None = None,
  **size: Any,
) -> Relevance:
  """How much the logit of a class rests on each patch, by way of attention; pure, the size is static.

  It is the row of R that the head reads: the class token's, the mean of the patches' rows, or both added ("tok+gap").
  What R begins with, I, is left out: with "gap" it would give every patch the same 1 / patches.

  Args:
    model: with a head; always run in float32 and without attention's fast forms, so that of each block several arrays
      [n, heads, tokens, tokens] are held.
    params: of the model, blocks stacked (`scan`) or not.
    image: pixels in [-1, 1].
    classes: of which the logits are asked about; default: of each image the one of the largest logit at this size.
    size: static arguments of the model, `seqhw=8` or others.

  Raises:
    UserError: a model without a head or of another `pool_type` ("map" has an attention of its own, "tok+reg" reads a
      register); a class that it does not have, seen only outside of jit; a size that does not fit.
  """
  check_classes(model, classes)
  grid = model.grid(image.shape[1:3], **size).grid_hw
  start = pooled(model, grid[0] * grid[1])
  weights, gradients, logits = with_gradients(model, params, image, classes, **size)
  row = rule(weights, gradients, start)[:, model.prefix_length :]
  return Relevance(row.reshape(-1, *grid), logits)


def check_classes(model: FlexiViT, classes: Any) -> None:
  """Raises a UserError for a model without a head, or where classes that are known are none of its."""
  if not model.num_classes:
    raise errors.UserError("Relevance is of a class's logit; this model has no head.")
  if classes is None or isinstance(classes, jax.core.Tracer):
    return
  if len(strange := np.setdiff1d(classes, np.arange(model.num_classes))):
    raise errors.UserError(
      f"Relevance for class {strange[0]}; expected 0 to {model.num_classes - 1}."
    )


def pooled(model: FlexiViT, patches: int) -> Float[np.ndarray, " l"]:
  """The share of each token in what the head reads.

  Raises:
    UserError: for a `pool_type` other than "tok", "gap" and "tok+gap".
  """
  if model.pool_type not in POOLS:
    raise errors.UserError(
      f"Relevance of a model with pool_type={model.pool_type!r}; expected one of {', '.join(POOLS)}."
    )
  share = np.zeros(model.prefix_length + patches, np.float32)
  if "tok" in model.pool_type:
    share[0] = 1
  if "gap" in model.pool_type:
    share[model.prefix_length :] = 1 / patches
  return share


def rule(
  weights: Sequence[PerHead], gradients: Sequence[PerHead], start: Float[np.ndarray, " l"]
) -> Float[Array, "n l"]:
  """`start @ (R - I)` with R = (I + M_last) ... (I + M_first), M = mean over heads of max(weights * gradients, 0).

  Row times matrix, from the last block to the first: no R is ever made.
  """
  first = row = jnp.tile(jnp.asarray(start), (len(weights[0]), 1))
  for w, g in zip(reversed(weights), reversed(gradients), strict=True):
    row = row + jnp.einsum("nq,nqk->nk", row, jnp.maximum(w * g, 0).mean(axis=1))
  return row - first


def with_gradients(
  model: FlexiViT,
  params: Params,
  image: Float[Array | np.ndarray, "n h w c"],
  classes: Int[Array | np.ndarray, " n"] | None = None,
  **size: Any,
) -> tuple[list[PerHead], list[PerHead], Float[Array, "n k"]]:
  """Of each block the attention weights and the gradient of each image's logit with respect to them; and the logits."""
  gh, gw = model.grid(image.shape[1:3], **size).grid_hw
  tokens = model.prefix_length + gh * gw
  blocks = which_depth(model.depth, size.get("depth"))

  def score(nudges: list[PerHead]) -> tuple[jax.Array, tuple]:
    logits, weights = nudged(model, params, image, nudges, **size)
    asked = logits.argmax(axis=-1) if classes is None else jnp.asarray(classes)
    # Images do not interact: the gradient of the sum holds the gradient of each.
    return jnp.take_along_axis(logits, asked[:, None], axis=1).sum(), (weights, logits)

  zeros = [jnp.zeros((len(image), model.num_heads, tokens, tokens))] * blocks
  gradients, (weights, logits) = jax.grad(score, has_aux=True)(zeros)
  return weights, gradients, logits


def nudged(
  model: FlexiViT,
  params: Params,
  image: Float[Array | np.ndarray, "n h w c"],
  nudges: Sequence[PerHead],
  **size: Any,
) -> tuple[Float[Array, "n k"], list[PerHead]]:
  """The logits where `nudges` are added to the attention weights of each block, and the weights without them.

  The model's own code but for two calls: the encoder, which traces one block for all, and attention, whose fast forms
  never hold the weights.
  """
  model = model.clone(dtype="float32", scan=False)
  weights: list[PerHead] = []

  def instead(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    if isinstance(module, vit.Encoder):
      return _encode(module, *args)
    if isinstance(module, vit.Attention):
      x, found = _attend(module.variables["params"], args[0], nudges[len(weights)])
      weights.append(found)
      return x
    return call(*args, **kwargs)

  with nn.intercept_methods(instead):
    logits, _ = model.apply({"params": vit.unstack_blocks(params)}, image, **size)
  return logits, weights


def _encode(encoder: vit.Encoder, x: Array, train: bool, depth: int) -> tuple[Array, dict]:
  """What the encoder computes, each block traced on its own."""
  params, eps = encoder.variables["params"], encoder.config.layer_norm_eps
  block = vit.EncoderBlock(encoder.config, parent=None)
  for i in range(depth):
    x, _ = block.apply({"params": params[f"encoderblock_{i}"]}, x)
  return nn.LayerNorm(eps, parent=None).apply({"params": params["encoder_norm"]}, x), {}


def _attend(
  params: Params, x: Float[Array, "n l d"], nudge: PerHead
) -> tuple[Float[Array, "n l d"], PerHead]:
  """What `vit.Attention` of `x` over itself computes where `nudge` is added to the weights; and the weights."""
  query, key, value = (
    jnp.einsum("nld,dhe->nlhe", x, params[name]["kernel"]) + params[name]["bias"][None, None]
    for name in ("query", "key", "value")
  )
  scores = jnp.einsum("nqhe,nkhe->nhqk", query, key) * query.shape[-1] ** -0.5
  weights = jax.nn.softmax(scores)
  heads = jnp.einsum("nhqk,nkhe->nqhe", weights + nudge, value)
  out = jnp.einsum("nqhe,hed->nqd", heads, params["out"]["kernel"])
  return out + params["out"]["bias"][None, None], weights
