"""Queries of open-vocabulary detection: which classes an example asks for, and as which texts or vectors.

A class that the example has is asked for with classes that it has not, so that a model learns to say no.
`query_labels` is int32 [number]: numbers of classes, -1 for padding. `box_targets` is float32 [m, number]: 1 where a
query names the box.
"""

import functools
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from flexivit_jax.data import prompts, text as text_lib
from flexivit_jax.errors import UserError, nearest, unknown

Example = dict[str, Any]
Names = tuple[str, ...]
PADDING = -1  # in `query_labels`
RANDOM = "random:"  # in the place of a file of vectors, before their length
_LONGEST = 2**16
_SHOWN = 5  # names of a long list


def sample_queries(
  record: Example, number: int, negatives: int, *, num_classes: int, rng: np.random.Generator
) -> Example:
  """Draws the classes that an example is asked for: `query_labels` [number], and `box_targets` [m, number].

  First its own classes, then those that the record says are not there (`neg_labels`), then any others, until there are
  `negatives` or no room. Of a class that the record says is not exhaustively annotated (`not_exhaustive`), nothing is
  asked unless a box has it. Source: scenic's owl_vit; there, others are drawn as often as they occur in the data.

  Args:
    record: has `box_labels`, or `box_targets` [m, classes] of `merge_boxes`.
    number: of queries.
    negatives: classes that no box has. All of `neg_labels` are taken, even where they are more.
    num_classes: of the data.

  Errors: more own classes than queries.
  """
  given = _targets(record, num_classes)
  own = np.flatnonzero(given.any(0))
  if len(own) > number:
    raise UserError(
      f"Its boxes have {len(own)} classes, for which sample_queries({number}) has no room; take a larger number."
    )
  kept_out = np.union1d(own, np.asarray(record.get("not_exhaustive", ()), np.int64))
  stated = np.setdiff1d(np.asarray(record.get("neg_labels", ()), np.int64), kept_out)
  stated = rng.permutation(stated)[: number - len(own)]
  room = min(number - len(own), negatives) - len(stated)
  others = np.setdiff1d(np.arange(num_classes), np.concatenate([kept_out, stated]))
  others = rng.permutation(others)[: max(0, room)]
  found = np.concatenate([own, stated, others]).astype(np.int32)
  queries = np.full(number, PADDING, np.int32)
  queries[: len(found)] = found
  targets = np.zeros((len(given), number), np.float32)
  targets[:, : len(found)] = given[:, found]
  return record | {"query_labels": queries, "box_targets": targets}


def federated(record: Example, *, num_classes: int) -> Example:
  """`neg_labels` and `not_exhaustive` as vectors, float32 [classes], for LVIS's rules in an evaluation.

  Of data that state neither, every box is there: all classes that no box has are not in the image.

  Args:
    record: has `box_labels`.
    num_classes: of the data.
  """
  made = {}
  for key in ("neg_labels", "not_exhaustive"):
    made[key] = np.zeros(num_classes, np.float32)
    made[key][np.asarray(record.get(key, ()), np.int64)] = 1
  if record.keys().isdisjoint(made):
    made["neg_labels"] = 1 - _targets(record, num_classes).max(0, initial=0).astype(np.float32)
  return record | made


def query_tokens(
  record: Example,
  path: str,
  *,
  length: int,
  pad: str | int,
  end: str | int | None,
  lower: bool = False,
  templates: str | Sequence[str] = "clip_paper",
  canonical: bool = True,
  same_names: bool = False,
  class_names: Names,
  rng: np.random.Generator,
) -> Example:
  """`query_labels` -> `queries` int32 [number, length], tokens of their names, each in a template drawn for it.

  Rows of padding are zeros.

  Args:
    record: the example.
    path, length, pad, end, lower: as of `tokenize`.
    templates: see `prompts.templates`.
    canonical: take the first alias of each name, lower case, blanks for "_" and no punctuation, also in templates.
    same_names: whether two classes may have one name.
    class_names: of the data.

  Errors: a text that begins with the token 0, which is that of padding.
  """
  texts, made = _texts(class_names, canonical, same_names), _templates(templates, canonical)
  tokens = load_tokens(path, length, pad, end, lower)
  labels = _query_labels(record)
  queries = np.zeros((len(labels), length), np.int32)
  rows = np.flatnonzero(labels != PADDING)
  drawn = rng.integers(len(made), size=len(rows)).tolist()
  sentences = [
    prompts.sentence(made[k], texts[label])
    for k, label in zip(drawn, labels[rows].tolist(), strict=True)
  ]
  queries[rows] = tokens.encode(sentences)
  if (queries[rows, 0] == 0).any():
    raise UserError(
      f"{sentences[int(np.argmax(queries[rows, 0] == 0))]!r} begins with the token 0, which stands for a query of"
      " padding; take a tokenizer whose token 0 is padding."
    )
  return record | {"queries": queries}


def query_vectors(record: Example, path: str, *, class_names: Names) -> Example:
  """`query_labels` -> `queries` float32 [number, d], vectors of their names; rows of padding are zeros.

  Args:
    record: the example.
    path: an .npz with "names" [k] and "vectors" [k, d], among which are all names of the data; see `vectors_of`.
    class_names: of the data.
  """
  vectors = vectors_of(path, class_names)
  labels = _query_labels(record)
  return record | {"queries": np.where((labels != PADDING)[:, None], vectors[labels], 0)}


# --- what is checked when preprocessing meets its data ---


def _check_sample(number: int, negatives: int, *, num_classes: int) -> None:
  if number < 1 or negatives < 0:
    raise UserError(
      f"sample_queries({number}, {negatives}); expected 1 or more queries, 0 or more negatives."
    )
  if num_classes < 1:
    raise UserError("sample_queries asks for classes, and the data have none; take other data.")


def _check_tokens(
  path: str,
  *,
  class_names: Names,
  length: int,
  pad: str | int,
  end: str | int | None,
  lower: bool = False,
  templates: str | Sequence[str] = "clip_paper",
  canonical: bool = True,
  same_names: bool = False,
) -> None:
  load_tokens(path, length, pad, end, lower)
  _texts(class_names, canonical, same_names)
  _templates(templates, canonical)


def _check_vectors(path: str, *, class_names: Names) -> None:
  vectors_of(path, class_names)


CHECKS: Mapping[Callable[..., Any], Callable[..., None]] = {
  sample_queries: _check_sample,
  query_tokens: _check_tokens,
  query_vectors: _check_vectors,
}
"""Raise a UserError at the start of a run for arguments of an operation that do not fit the classes of the data."""


# --- names ---


# A file is read once in each process.
@functools.lru_cache(maxsize=16)
def load_tokens(
  path: str, length: int, pad: str | int, end: str | int | None, lower: bool
) -> text_lib.Tokens:
  """As `text.load`."""
  return text_lib.load(path, length=length, pad=pad, end=end, lower=lower)


@functools.lru_cache(maxsize=16)
def _texts(class_names: Names, canonical: bool, same_names: bool) -> Names:
  _check_named(class_names, "query_tokens")
  return prompts.class_texts(class_names, plain=canonical, repeated=same_names)


def _templates(given: str | Sequence[str], canonical: bool) -> Names:
  return _made(given if isinstance(given, str) else tuple(given), canonical)


@functools.lru_cache(maxsize=16)
def _made(given: str | Names, canonical: bool) -> Names:
  made = prompts.templates(given)
  return tuple(map(prompts.canonical, made)) if canonical else made


@functools.lru_cache(maxsize=16)
def vectors_of(
  path: str | os.PathLike[str], class_names: Names
) -> Float32[np.ndarray, "classes d"]:
  """Returns a vector for each name, of an .npz with "names" [k] and "vectors" [k, d], matched by name.

  In the place of a file, "random:384" stands for a random unit vector of this length for each name, always the same for
  the same name: what a model learns with these owes nothing to the meaning of names.

  Raises:
    UserError: no such file; a name that it lacks, or has twice; a vector that is zero or not finite.
  """
  _check_named(class_names, "query_vectors")
  if str(path).startswith(RANDOM):
    return _random(str(path), class_names)
  try:
    with np.load(path) as content:
      names, vectors = (content[key] for key in ("names", "vectors"))
  except (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    zipfile.BadZipFile,
  ) as e:
    raise UserError(
      f"{path} cannot be read as an .npz with 'names' and 'vectors' ({e}); expected the vectors of texts."
    ) from e
  good = names.ndim == 1 and vectors.ndim == 2 and len(names) == len(vectors)
  if not (good and names.dtype.kind == "U" and vectors.dtype.kind == "f"):
    raise UserError(
      f"{path} has names {names.dtype} {list(names.shape)} and vectors {vectors.dtype} {list(vectors.shape)}; expected"
      " texts [k] and floats [k, d]."
    )
  row_of: dict[str, int] = {}
  for row, name in enumerate(names.tolist()):
    if name in row_of:
      raise UserError(f"{path} has two vectors of {name!r}; expected one of each name.")
    row_of[name] = row
  if absent := [name for name in class_names if name not in row_of]:
    shown = ", ".join(map(repr, absent[:_SHOWN])) + " ..." * (len(absent) > _SHOWN)
    raise UserError(
      f"{path} has no vector of {len(absent)} of the {len(class_names)} classes: {shown}. Make the file of"
      f" these names.{nearest(absent[0], row_of)}"
    )
  chosen = vectors[[row_of[name] for name in class_names]].astype(np.float32)
  usable = np.isfinite(chosen).all(1) & chosen.any(1)
  if not usable.all():
    name = class_names[int(np.argmin(usable))]
    raise UserError(f"The vector of {name!r} in {path} is zero or not finite; expected another.")
  return chosen


def _random(path: str, names: Names) -> Float32[np.ndarray, "k d"]:
  length = path.removeprefix(RANDOM)
  if not length.isdecimal() or not 0 < int(length) <= _LONGEST:
    raise UserError(f"{path!r}; expected {RANDOM}LENGTH, 1 to {_LONGEST}.")
  seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()) for name in names]
  rows = np.array([np.random.default_rng(seed).standard_normal(int(length)) for seed in seeds])
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _check_named(class_names: Names, what: str) -> None:
  if not class_names:
    raise UserError(
      f"{what} needs the names of the classes, and the data have none; name them in the data (docs/annotated_data.md)."
    )


# --- records ---


def _query_labels(record: Example) -> Int32[np.ndarray, " number"]:
  if "query_labels" not in record:
    raise UserError("No queries are drawn; expected sample_queries(NUMBER, NEGATIVES) before.")
  return record["query_labels"]


def _targets(record: Example, num_classes: int) -> Float[np.ndarray, "m classes"]:
  """Returns 1 at the classes of each box."""
  if "box_targets" in record:
    return np.asarray(record["box_targets"])
  if "box_labels" not in record:
    raise unknown("key of an example", "box_labels", record)
  return one_hot(np.asarray(record["box_labels"]), num_classes)


def one_hot(labels: Int[np.ndarray, " m"], num_classes: int) -> Float32[np.ndarray, "m classes"]:
  """Returns float32 [m, classes]; a row of zeros for a label of -1."""
  return (labels[:, None] == np.arange(num_classes)).astype(np.float32)
