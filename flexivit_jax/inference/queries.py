"""What a detector looks for: its own classes, or names that become its classes."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors
from flexivit_jax.data import class_names, prompts, queries
from flexivit_jax.inference import predictor, texts
from flexivit_jax.models.owl_vit import with_queries
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import model_records

Read = tuple[Any, Params, Json]  # as `weights.tasks.load` returns it


class Asked(NamedTuple):
  """What a detector is asked for.

  Attributes:
    names: for one that takes queries, else None.
    templates: sentences for the names, see `prompts.templates`; None: the names as they are.
    vectors: an .npz with "names" and "vectors", where the detector has no text tower.
    as_typed: names and templates go to the text tower as they are; else as `query_tokens` puts them in training: in
      lower case, without punctuation, of a name what is before a comma.
  """

  names: Sequence[str] | None = None
  templates: str | Sequence[str] | None = None
  vectors: pathlib.Path | None = None
  as_typed: bool = False

  def options(self) -> list[str]:
    """Returns the options that were given."""
    return [
      f"--{name}"
      for name, value in zip(self._fields, self, strict=True)
      if value not in (None, False)
    ]


def adapted(asked: Asked, name: str, model: Any, params: Params, record: Json) -> Read:
  """Returns a model as it is to be written: a detector as `closed` has it.

  Args:
    asked: what a detector is asked for.
    name: what the user called the checkpoint.
    model, params, record: what `weights.tasks.load` returns.

  Raises:
    UserError: see `closed`; names for a model that is no detector.
  """
  if not predictor.gives_boxes(model):
    for option in asked.options():
      raise errors.UserError(f"{option} is for detectors; {name} gives no boxes.")
    return model, params, record
  loaded = closed(predictor.Loaded(model, params, record, name, np.asarray), asked)
  return loaded.model, loaded.params, loaded.record


def closed(loaded: predictor.Loaded, asked: Asked) -> predictor.Loaded:
  """Returns a detector whose classes are what it is to look for, named in its record.

  A name's scores are the mean over its sentences, as OWL-ViT has it (arXiv 2205.06230). Sentences that are longer than
  the text tower takes are cut, as in training and evaluation, with a note.

  Args:
    loaded: the detector.
    asked: what it is to look for.

  Raises:
    UserError: names that are missing, empty or equal; names or vectors that the detector has no use for; a name
      without a vector.
  """
  model, name = loaded.model, loaded.name
  names, templates, vectors, as_typed = asked
  if not model.open:
    for option in asked.options():
      raise errors.UserError(
        f"{name} detects its own {model.num_classes} classes and compares no texts; leave {option} out."
      )
    return loaded
  if names is None:
    trained = class_names.shown(loaded.record.get("class_names") or ())
    seen = f" It was trained on {trained}." if trained else ""
    raise errors.UserError(
      f"{name} finds what it is asked for; give --names, e.g. --names='cat,remote control'.{seen}"
    )
  plain = prompts.class_texts(names, plain=False)
  if model.text is None:
    if vectors is None:
      raise errors.UserError(
        f"{name} has no text tower: it compares images with vectors of {model.query_length} numbers; give --vectors,"
        " the .npz with the vectors of names that it was trained with, or one of the same text tower."
      )
    for option in asked.options():
      if option in ("--templates", "--as_typed"):
        raise errors.UserError(
          f"--vectors has a vector for each name as it is; leave {option} out."
        )
    embedded = texts.in_blocks(loaded, _of_file(loaded, vectors, plain))
  else:
    if vectors is not None:
      raise errors.UserError(
        f"{name} has a text tower, which makes the vectors; leave --vectors out."
      )
    made = prompts.templates(templates or "name")
    words = plain if as_typed else prompts.class_texts(names, plain=True)
    made = made if as_typed else tuple(map(prompts.canonical, made))
    embedded = _of_sentences(loaded, words, made)
  model, params = with_queries(model, loaded.params, embedded)
  record = {k: v for k, v in loaded.record.items() if k not in ("text", "data_classes")}
  record |= {"model": model_records.record_of(model), "class_names": [*plain]}
  return loaded._replace(model=model, params=params, record=record)


def _of_file(
  loaded: predictor.Loaded, path: pathlib.Path, names: tuple[str, ...]
) -> Float[np.ndarray, "k d"]:
  vectors = queries.vectors_of(os.fspath(path), names)
  if vectors.shape[1] != (length := loaded.model.query_length):
    raise errors.UserError(
      f"--vectors={path} has vectors of {vectors.shape[1]} numbers, {loaded.name} compares images with {length}; give"
      " those of the text tower that it was trained with."
    )
  return vectors


def _of_sentences(
  loaded: predictor.Loaded, names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "k e"]:
  """The mean over the templates of each name's embeddings."""
  sentences = [prompts.sentence(template, name) for template in templates for name in names]
  tokens = texts.encoded(loaded, sentences)
  if len(padding := np.flatnonzero(tokens[:, 0] == 0)):
    raise errors.UserError(
      f"{sentences[padding[0]]!r} begins with token 0, which {loaded.name} takes for padding; give another name."
    )
  each = texts.in_blocks(loaded, tokens).astype(np.float64)
  return each.reshape(len(templates), len(names), -1).mean(axis=0)
