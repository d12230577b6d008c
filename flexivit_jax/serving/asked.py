"""What the query of a request asks for."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from starlette.datastructures import QueryParams

from flexivit_jax import errors, sizes
from flexivit_jax.budget import choose
from flexivit_jax.data import prompts
from flexivit_jax.serving import served
from flexivit_jax.sizes import SeqHw, size_text

MOST_S = 600.0  # the longest deadline


class Asked(NamedTuple):
  """A request without its images.

  Attributes:
    size: tokens per side; None: the server chooses.
    batch: images of the program; None: the server chooses.
    budget: limits of the size.
    deadline_s: seconds from the arrival of the request; infinite: none.
    cascade: coarse sizes first, finer ones where they are unsure.
    names, templates: classes that are texts.
    top_k: how many classes an answer has.
  """

  size: SeqHw | None = None
  batch: int | None = None
  budget: choose.Budget | None = None
  deadline_s: float = math.inf
  cascade: bool = False
  names: tuple[str, ...] | None = None
  templates: str = "name"
  top_k: int = 5


_OF_PREDICT = ("names", "templates", "top_k", "cascade")
KNOWN = ("seqhw", "batch", "budget", "deadline_ms", *_OF_PREDICT)


def parse(
  what: str,
  query: QueryParams,
  of: Sequence[SeqHw],
  batches: Sequence[int],
  *,
  towers: bool,
  pictures: bool = False,
) -> Asked:
  """Parses a query.

  Args:
    what: the route, of `served.WHAT`.
    query: the query.
    of: the sizes that are served.
    batches: of how many images there are programs.
    towers: whether classes are texts.
    pictures: whether answers are masks or boxes, which have no keys of classes.

  Raises:
    UserError: a key that is unknown, or there twice; a value that is not what it should be; keys that exclude each
      other; no names where classes are texts, or names where they are not.
  """
  keys = [key for key, _ in query.multi_items()]
  of_classes = what == "predict" and not pictures
  known = [key for key in KNOWN if of_classes or key not in _OF_PREDICT]
  for key in keys:
    if key not in known:
      raise errors.unknown("key of the query", key[:80], known)
    if keys.count(key) > 1:
      raise errors.UserError(f"{key}= is there twice")
  given = dict(query)
  ways = [key for key in ("seqhw", "budget", "cascade") if key in given]
  if len(ways) > 1:
    raise errors.UserError(f"{' and '.join(ways)} exclude each other; give one of them")
  if "batch" in given and "seqhw" not in given:
    raise errors.UserError("batch= goes with seqhw=")
  _check_names(what, given, towers)
  return Asked(
    size=_size(given["seqhw"], of) if "seqhw" in given else None,
    batch=_batch(given["batch"], batches) if "batch" in given else None,
    budget=choose.parse(given["budget"]) if "budget" in given else None,
    deadline_s=_deadline(given["deadline_ms"]) if "deadline_ms" in given else math.inf,
    cascade=_flag(given.get("cascade", "0")),
    names=tuple(given["names"].split(",")) if "names" in given else None,
    templates=given.get("templates", "name"),
    top_k=_whole("top_k", given.get("top_k", "5")),
  )


def _check_names(what: str, given: dict[str, str], towers: bool) -> None:
  if what == "predict" and towers != ("names" in given):
    raise errors.UserError(
      "this model chooses among texts; give names=cat,dog"
      if towers
      else "this model has classes of its own; leave names= out"
    )
  if "templates" in given:
    if "names" not in given:
      raise errors.UserError("templates= are for names=")
    if given["templates"] not in prompts.TEMPLATES:  # never a file of the server
      raise errors.unknown("templates", given["templates"][:80], prompts.TEMPLATES)
  if given.get("names", "").count(",") >= served.NAMES:
    raise errors.UserError(f"more than {served.NAMES} names")


def _size(text: str, of: Sequence[SeqHw]) -> SeqHw:
  size = sizes.from_text(text[:80])
  if size not in of:
    known = ", ".join(str(size_text(one)) for one in of)
    raise errors.UserError(f"seqhw={size_text(size)} is not served; served are {known}")
  return size


def _batch(text: str, batches: Sequence[int]) -> int:
  batch = _whole("batch", text)
  if batch not in batches:
    raise errors.UserError(
      f"batch={batch} is not served; served are {', '.join(map(str, batches))}"
    )
  return batch


def _deadline(text: str) -> float:
  try:
    seconds = float(text) / 1e3
  except ValueError:
    seconds = math.nan
  if not 0 < seconds <= MOST_S:
    raise errors.UserError(
      f"deadline_ms={text[:80]!r}; expected milliseconds, above 0 and at most {MOST_S * 1e3:.0f}"
    )
  return seconds


def _flag(text: str) -> bool:
  if text not in ("0", "1"):
    raise errors.UserError(f"cascade={text[:80]!r}; expected 0 or 1")
  return text == "1"


def _whole(name: str, text: str) -> int:
  if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text) > 0):
    raise errors.UserError(f"{name}={text[:80]!r}; expected a whole number above 0")
  return int(text)
