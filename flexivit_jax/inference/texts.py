"""Texts for image files: names among which a model of two towers chooses, and queries that it looks for."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped
from scipy import special

from flexivit_jax import errors
from flexivit_jax.data import prompts, text
from flexivit_jax.evaluators.zero_shot import unit
from flexivit_jax.inference import outputs, predictor
from flexivit_jax.models import OwlViT, TwoTowers
from flexivit_jax.trees import Params

Vectors = Callable[[Int32[np.ndarray, "n l"]], Float32[np.ndarray, "n e"]]
_ROWS = 64  # texts that are embedded at a time


class Names(NamedTuple):
  """Classes that are texts.

  Attributes:
    names: as they were given.
    vectors: of length 1, what stands for each.
    scale: of the products.
    bias: what is added to these; None: the model was trained to choose among texts, not to judge each.
  """

  names: tuple[str, ...]
  vectors: Float[np.ndarray, "k e"]
  scale: float
  bias: float | None

  def scores(self, image: Float[np.ndarray, "e"]) -> Float[np.ndarray, "k"]:
    """Returns the products of an image with the names, scaled, without the bias."""
    return self.scale * (self.vectors @ image.astype(np.float64))

  def probabilities(self, image: Float[np.ndarray, "e"]) -> Float[np.ndarray, "k"]:
    """Returns those of an image: a softmax over the names, or of each by itself (sigmoid) where there is a bias."""
    scores = self.scores(image)
    return special.softmax(scores) if self.bias is None else special.expit(scores + self.bias)


def embedding(result: predictor.Result) -> Float[Array, "n e"]:
  """What of a model's result is compared with texts."""
  return result[1]["image"]


def of_names(
  loaded: predictor.Loaded,
  names: Sequence[str],
  templates: str | Sequence[str] = "name",
  vectors: Vectors | None = None,
) -> Names:
  """Embeds names, each in all templates: the mean of unit vectors, made a unit vector.

  Args:
    loaded: two towers, see `predictor.load`.
    names: as they stand in a sentence.
    templates: see `prompts.templates`.
    vectors: tokens -> embeddings; default `in_blocks`, which compiles.

  Raises:
    UserError: a name that is empty or twice; see `embed`.
  """
  plain = prompts.class_texts(names, plain=False)
  chosen = prompts.templates(templates)
  sentences = [prompts.sentence(template, name) for template in chosen for name in plain]
  of_tokens = vectors or functools.partial(in_blocks, loaded)
  rows = of_tokens(encoded(loaded, sentences))
  each = rows.astype(np.float64).reshape(len(chosen), len(plain), -1)
  scale, bias = float(np.exp(loaded.params["t"][0])), loaded.params.get("b")
  return Names(plain, unit(each.sum(axis=0)), scale, None if bias is None else float(bias[0]))


def embed(loaded: predictor.Loaded, texts: Sequence[str]) -> Float32[np.ndarray, "n e"]:
  """Returns unit vectors of texts; a note on stderr says where some are cut.

  Args:
    loaded: two towers, or a detector with a text tower.
    texts: any.

  Raises:
    UserError: the weights have no tokenizer; a text without words; vectors that are not finite.
  """
  return in_blocks(loaded, encoded(loaded, texts))


def encoded(loaded: predictor.Loaded, texts: Sequence[str]) -> Int32[np.ndarray, "n l"]:
  """Returns the tokens of texts as the model was trained with them; see `embed`."""
  made = tokenizer(loaded)
  tokens = made.encode(texts)
  if cut := sum(made.full_length(one) > made.length for one in texts):
    outputs.note(f"{cut} of {len(texts)} texts are longer than {made.length} tokens and are cut")
  return tokens


def tokenizer(loaded: predictor.Loaded) -> text.Tokens:
  """Returns how the model's texts become tokens; raises a UserError where the weights do not say it."""
  if not loaded.record.get("text"):
    raise errors.UserError(
      f"{loaded.name} has no tokenizer beside its text tower, so texts cannot be encoded; take the run itself, whose"
      " checkpoints have it, or weights that come with their tokenizer."
    )
  return text.of_record(loaded.record["text"])


def in_blocks(
  loaded: predictor.Loaded, rows: Shaped[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n e"]:
  """Returns the embeddings of tokens (of a detector: of its queries, whatever they are), so many at a time.

  Raises:
    UserError: they are not finite.
  """
  program = jax.jit(
    functools.partial(_of_queries if isinstance(loaded.model, OwlViT) else _of_texts, loaded.model)
  )
  return _blocks(loaded, functools.partial(program, loaded.params), min(_ROWS, len(rows)), rows)


def compiled(loaded: predictor.Loaded, number: int) -> Vectors:
  """Returns `in_blocks` of two towers with one program, of so many texts, that is compiled before this returns.

  Blocks of another length may round otherwise.
  """
  example = jax.ShapeDtypeStruct((number, tokenizer(loaded).length), np.int32)
  jitted = jax.jit(functools.partial(_of_texts, loaded.model))
  program = functools.partial(jitted.lower(loaded.params, example).compile(), loaded.params)
  return functools.partial(_blocks, loaded, program, number)


def _blocks(
  loaded: predictor.Loaded,
  program: Callable[[np.ndarray], Array],
  number: int,
  rows: Shaped[np.ndarray, "n d"],
) -> Float32[np.ndarray, "n e"]:
  parts = []
  for start in range(0, len(rows), number):
    block = rows[start : start + number]
    padded = np.concatenate([block, block[:1].repeat(number - len(block), axis=0)])
    parts.append(np.asarray(program(padded))[: len(block)])
  vectors = np.concatenate(parts)
  if not np.isfinite(vectors).all():
    raise errors.UserError(
      f"{loaded.name}: its text embeddings are not finite; are its weights whole?"
    )
  return vectors


def _of_texts(model: TwoTowers, params: Params, rows: Array) -> Array:
  return model.apply({"params": params}, tokens=rows)[1]["text"]


def _of_queries(model: OwlViT, params: Params, rows: Array) -> Array:
  return model.apply({"params": params}, queries=rows[None])[0][0]
