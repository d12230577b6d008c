"""Error messages that say what was got, what was expected, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake in what the user gave; the command line prints it as one line and exits with 2."""


def nearest(name: str, known: Iterable[str], alike: float = 0.5) -> str:
  """Returns `" Did you mean 'x'?"` for the known name closest to `name`, or "" where none is `alike` (of 1) to it."""
  close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=alike)
  return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
  """Returns (does not raise) the error for a name that is not in a look-up table.

  Args:
    kind: what the name is of, e.g. "loss".
    name: what was got.
    known: the names that would have been right.
  """
  known = sorted(str(k) for k in known)
  return UserError(
    f"Unknown {kind} {name!r}; known: {', '.join(known)}.{nearest(str(name), known)}"
  )
