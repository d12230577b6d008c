"""What a detector looks for: its own classes, or names that become its classes."""

import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors
from flexivit_jax.data import class_names, prompts
from flexivit_jax.inference import predictor, texts
from flexivit_jax.models.owl_vit import with_queries


def names_of(loaded: predictor.Loaded) -> list[str]:
  """Returns the names of a detector's classes, "" for each of one that has none."""
  of, k = f"the checkpoint {loaded.name}", loaded.model.num_classes
  return [*(class_names.of_record(loaded.record, k, of).names or [""] * k)]


def closed(
  loaded: predictor.Loaded,
  names: Sequence[str] | None,
  templates: str | Sequence[str] = "name",
  vectors: pathlib.Path | None = None,
) -> predictor.Loaded:
  """Returns a detector whose classes are what it is to look for, named in its record.

  A name's scores are the mean over its sentences, as OWL-ViT has it (arXiv 2205.06230).

  Args:
    loaded: the detector.
    names: for one that takes queries, else None.
    templates: sentences, see `prompts.templates`.
    vectors: an .npz with "names" and "vectors", where the detector has no text tower.

  Raises:
    UserError: names that are missing, empty, equal, or longer than the text tower takes; names or vectors that the
      detector has no use for; a name without a vector.
  """
  model, name = loaded.model, loaded.name
  if not model.open:
    if names is not None or vectors is not None:
      given = "--names" if names is not None else "--vectors"
      raise errors.UserError(
        f"{name} detects its own {model.num_classes} classes and compares no texts; leave {given} out."
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
    if tuple(prompts.templates(templates)) != prompts.TEMPLATES["name"]:
      raise errors.UserError(
        "--vectors has a vector for each name as it is; leave --templates out."
      )
    embedded = texts.in_blocks(loaded, of_file(vectors, plain, model.query_length))
  else:
    if vectors is not None:
      raise errors.UserError(
        f"{name} has a text tower, which makes the vectors; leave --vectors out."
      )
    embedded = _of_sentences(loaded, plain, prompts.templates(templates))
  model, params = with_queries(model, loaded.params, embedded)
  return loaded._replace(
    model=model, params=params, record=loaded.record | {"class_names": [*plain]}
  )


def _of_sentences(
  loaded: predictor.Loaded, names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "k e"]:
  """The mean over the templates of each name's embeddings."""
  made = texts.tokenizer(loaded)
  sentences = [prompts.sentence(template, name) for template in templates for name in names]
  for one in sentences:
    if made.full_length(one) > made.length:
      raise errors.UserError(
        f"{one!r} is {made.full_length(one)} tokens, {loaded.name} takes {made.length}; give a shorter name, or other"
        " --templates."
      )
  tokens = made.encode(sentences)
  if len(padding := np.flatnonzero(tokens[:, 0] == 0)):
    raise errors.UserError(
      f"{sentences[padding[0]]!r} begins with token 0, which {loaded.name} takes for padding; give another name."
    )
  each = texts.in_blocks(loaded, tokens).astype(np.float64)
  return each.reshape(len(templates), len(names), -1).mean(axis=0)


def of_file(
  path: pathlib.Path, names: Sequence[str], length: int
) -> Float[np.ndarray, "k {length}"]:
  """Returns the vectors of names in an .npz with "names" [n] and "vectors" [n, length], matched by name.

  Raises:
    UserError: no such file; names that it lacks; vectors of another length, or all zeros.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      known, vectors = [str(name) for name in file["names"]], np.asarray(file["vectors"])
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
    raise errors.UserError(
      f"--vectors={path}: {e}; expected an .npz with names [n] and vectors [n, {length}]."
    ) from e
  if vectors.shape != (len(known), length):
    raise errors.UserError(
      f"--vectors={path} has {len(known)} names and vectors of shape {list(vectors.shape)}; expected [{len(known)},"
      f" {length}], as the detector takes them."
    )
  class_names.check_distinct(known, str(path))
  rows = {class_names.plain(name): k for k, name in enumerate(known)}
  if lacking := [name for name in names if class_names.plain(name) not in rows]:
    raise errors.UserError(
      f"--vectors={path} has no vector of {class_names.shown(lacking)}; it has {class_names.shown(known)}. Embed these"
      " names with the text tower that made the file."
    )
  chosen = vectors[[rows[class_names.plain(name)] for name in names]].astype(np.float32)
  if not (good := np.isfinite(chosen).all(1) & chosen.any(1)).all():
    name = names[int(np.argmin(good))]
    raise errors.UserError(
      f"--vectors={path}: the vector of {name!r} is all zeros or not finite; a detector takes zeros for padding."
    )
  return chosen
