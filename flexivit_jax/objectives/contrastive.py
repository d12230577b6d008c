"""Contrastive losses over the images and texts of a batch: softmax (CLIP, LiT) and sigmoid (SigLIP).

Each image is compared with all texts of the global batch, whatever the mesh or the number of microbatches. Scores are
made for some texts at a time and made again in the backward pass, so that memory grows with the batch and not with its
square.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexivit_jax import errors, specs
from flexivit_jax.objectives.base import Batch, BatchLoss, Losses, Objective, Predict, keep
from flexivit_jax.trees import Tree

CHUNK = 1024  # texts whose scores are in memory at once

Images = Float[Array, "n e"]
Texts = Float[Array, "m e"]
PerImage = Float[Array, "n"]
PerText = Float[Array, "m"]


def softmax_contrastive(*, max_scale: float | None = 100.0, chunk: int = CHUNK) -> Objective:
  """Which text of the batch belongs to an image, and which image to a text: the mean of both cross-entropies.

  Source: CLIP (arXiv 2103.00020), LiT (arXiv 2111.07991).

  Args:
    max_scale: largest scale of the products, CLIP's 100; a scale above has no gradient. None: no limit.
    chunk: largest number of texts whose scores are in memory at once.
  """
  if max_scale is not None and not max_scale > 0:
    raise errors.UserError(f"max_scale={max_scale}; expected more than 0, or None.")

  def loss(embedded: Tree, batch: Batch) -> Losses:
    del batch
    scale = jnp.exp(embedded["t"])
    if max_scale is not None:
      scale = jnp.minimum(scale, max_scale)
    images, texts = embedded["image"] * scale[:, None], embedded["text"]
    by_image, by_text = _over_texts(_both_ways, images, texts, chunk)
    rows = jax.nn.logsumexp(by_image, axis=0)
    own = (images * texts).sum(-1)
    return Losses(0.5 * (rows + by_text) - own)

  return _objective(("image", "text", "t"), loss, chunk)


def sigmoid_contrastive(*, chunk: int = CHUNK) -> Objective:
  """Of each pair of an image and a text, whether they belong together; of an image the sum over the texts.

  Source: SigLIP (arXiv 2303.15343); the sum over texts is divided by the number of images, once.

  Args:
    chunk: largest number of texts whose scores are in memory at once.
  """

  def loss(embedded: Tree, batch: Batch) -> Losses:
    del batch
    images, bias = embedded["image"] * jnp.exp(embedded["t"])[:, None], embedded["b"]

    def no_pair(images: Images, texts: Texts) -> tuple[PerImage, PerText]:
      scores = _scores(images, texts) + bias[:, None]
      return jax.nn.softplus(scores).sum(1), jnp.zeros(len(texts))

    by_image, _ = _over_texts(no_pair, images, embedded["text"], chunk)
    # A pair that belongs together counts -log sigmoid(z), which is softplus(z) - z.
    own = (images * embedded["text"]).sum(-1) + bias
    return Losses(by_image.sum(0) - own)

  return _objective(("image", "text", "t", "b"), loss, chunk)


def of_embeddings(objective: Objective) -> Objective:
  """Returns the objective for images that are embedded already, "embedded" [n, e] in the place of "image"."""
  assert isinstance(objective.loss, BatchLoss)
  inputs = {"embedded": specs.spec("e"), "tokens": objective.inputs["tokens"]}

  def embed(predict: Predict, batch: Batch) -> Mapping[str, jax.Array]:
    out = predict({name: batch[name] for name in inputs})
    return {name: out[name] for name in objective.outputs}

  loss = objective.loss._replace(embed=embed)
  return objective._replace(inputs=inputs, prepare=keep(*inputs), loss=loss)


def _objective(
  outputs: tuple[str, ...], loss: Callable[[Tree, Batch], Losses], chunk: int
) -> Objective:
  if chunk < 1:
    raise errors.UserError(f"chunk={chunk}; expected at least 1.")
  inputs = {"image": specs.image(), "tokens": specs.spec("l", "int")}

  def embed(predict: Predict, batch: Batch) -> Mapping[str, jax.Array]:
    out = predict({name: batch[name] for name in inputs})
    return {name: out[name] for name in outputs}

  return Objective(inputs, outputs, keep(*inputs), BatchLoss(embed, loss))


def _scores(images: Images, texts: Texts) -> Float[Array, "n m"]:
  return jnp.matmul(images, texts.T, precision="highest")


def _both_ways(images: Images, texts: Texts) -> tuple[PerImage, PerText]:
  scores = _scores(images, texts)
  return jax.nn.logsumexp(scores, axis=1), jax.nn.logsumexp(scores, axis=0)


def _over_texts(
  part: Callable[[Images, Texts], tuple[Array, Array]], images: Images, texts: Texts, chunk: int
) -> tuple[Float[Array, "parts n"], PerText]:
  """Runs `part(images, texts)` for some texts at a time; returns what it gives per image, by part, and per text.

  The fewest parts of equal length are taken. Parts are interleaved, so that each device has its share of each.
  """
  n = len(texts)
  parts = next(k for k in range(1, n + 1) if n % k == 0 and n // k <= chunk)
  if parts == 1:
    by_image, by_text = part(images, texts)
    return by_image[None], by_text
  split = texts.reshape(n // parts, parts, -1).swapaxes(0, 1)
  by_image, by_text = jax.lax.map(jax.checkpoint(lambda some: part(images, some)), split)
  return by_image, by_text.swapaxes(0, 1).reshape(n)
