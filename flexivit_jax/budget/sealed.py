"""JSON files that carry their format and the sha256 of their content, so that damage and edits by hand are noticed."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flexivit_jax import errors

Json = dict[str, Any]


def seal(kind: str, key: str, content: Any) -> Json:
  """Returns the file's object: "format", "sha256", and the content under its key."""
  return {"format": kind, "sha256": _sha256(content), key: content}


def text(sealed: Mapping[str, Any]) -> str:
  """The file."""
  return json.dumps(sealed, indent=1, allow_nan=False) + "\n"


def parse(data: bytes, path: pathlib.Path, advice: str) -> Any:
  """Parses JSON.

  Args:
    data: of the file.
    path: for errors.
    advice: what to do about a damaged file, as the end of a sentence.

  Raises:
    UserError: it is no JSON.
  """
  try:
    return json.loads(data)
  except ValueError as e:
    raise errors.UserError(f"{path} is damaged, or no file of this kind ({e}); {advice}.") from e


def opened(sealed: Any, kind: str, key: str, path: pathlib.Path, advice: str) -> Any:
  """Returns the content of a parsed file.

  Args:
    sealed: what `seal` made.
    kind: the format that this version reads.
    key: of the content.
    path, advice: as for `parse`.

  Raises:
    UserError: no such file, another format, or another sha256.
  """
  try:
    found, content, sha256 = sealed["format"], sealed[key], sealed["sha256"]
  except (KeyError, TypeError) as e:
    raise errors.UserError(f"{path} is damaged, or no file of this kind ({e!r}); {advice}.") from e
  if found != kind:
    raise errors.UserError(f"{path} has the format {found!r}; this version reads {kind!r}.")
  if sha256 != _sha256(content):
    raise errors.UserError(f"{path} is damaged or was changed by hand (wrong sha256); {advice}.")
  return content


def _sha256(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
