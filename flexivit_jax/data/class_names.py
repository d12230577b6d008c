"""Class names: their order, which names are equal, and how the classes of data map to those of a model.

The rules, which stand only here:

- Names are compared after Unicode NFC normalisation: a folder that macOS wrote (NFD) is the class that Linux wrote.
  White space and case are part of a name.
- The classes of data are mapped to those of a model by name. The model may have more classes, but not fewer.
- If one side has no names, classes are matched by number. Both must have equally many, and the user gets a note.
- Anything else is an error that shows both lists.
- Class folders are ordered as numbers if all of them are numbers, else as text.
"""

import collections
import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors

_SHOWN = 5  # names of a long list

# Of a checkpoint or of a file with weights.
Record = Mapping[str, Any]


class Classes(NamedTuple):
  """The classes of a data set or of a model.

  Attributes:
    names: in the order of the labels, or of the logits; None: classes have only numbers.
    number: the number of classes.
    of: the owner, for messages, e.g. "the checkpoint runs/photos".
    by_text: folders named by numbers are in text order (0, 1, 10, 2), as in runs that did not record their names.
      Matters if `names` is None.
  """

  names: tuple[str, ...] | None
  number: int
  of: str
  by_text: bool = False


class Trained(NamedTuple):
  """The classes in the record of the checkpoint from which a run resumes.

  Attributes:
    model: the classes of its logits.
    data: the class names of its training data, by label; None: it had none, or they were not recorded.
    of: the checkpoint, for messages.
    recorded: whether the record holds the classes of the data.
  """

  model: Classes
  data: tuple[str, ...] | None
  of: str
  recorded: bool = True


class Match(NamedTuple):
  """How the classes of data map to those of a model.

  Attributes:
    labels: the number of the model's class for each class of the data; None: the numbers are equal.
    note: a line for the user; None: nothing to say.
  """

  labels: tuple[int, ...] | None
  note: str | None = None


def plain(name: str) -> str:
  """Returns a name in the form in which names are compared: NFC."""
  return unicodedata.normalize("NFC", name)


def in_order(names: Iterable[str]) -> list[str]:
  """Sorts class folders in the order of their labels: as numbers if all are numbers ("2" before "10"), else as text.

  Numbers consist of the digits 0 to 9. With leading zeros they are different names, but numbers too: "007" comes
  between "6" and "8", and "7" before "007". A single name that is no number ("10", "9", "other") makes all text.
  """
  names = sorted(names)
  numbers = all(name.isascii() and name.isdigit() for name in names)
  return sorted(names, key=lambda name: (int(name), len(name))) if numbers else names


def by_text(names: Iterable[str]) -> tuple[str, ...]:
  """Sorts class folders in the order of earlier runs, before numbers were ordered as numbers."""
  return tuple(sorted(names))


def check_distinct(names: Iterable[str], of: str) -> None:
  """Raises a UserError if two names are equal after normalisation."""
  spellings = collections.defaultdict(list)
  for name in names:
    spellings[plain(name)].append(name)
  for same in spellings.values():
    if len(same) > 1:
      shown = " and ".join(ascii(name) for name in same)
      raise errors.UserError(
        f"{of}: {shown} are the same class name. Put them into one, or rename one of them."
      )


def of_record(record: Record, count: int, of: str) -> Classes:
  """Returns the classes of a model, from its record.

  Args:
    record: the record of a checkpoint, see `weights.load_with_record`.
    count: the number of classes of the model.
    of: the owner, for messages.

  Raises:
    UserError: the names are not text, or their number differs from `count`.
  """
  names = record.get("class_names")
  if not names or not count:
    unrecorded = "step" in record and "data_classes" not in record
    return Classes(None, count, of, by_text=unrecorded)
  if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
    raise errors.UserError(f"The class_names of {of} are {names!r:.80}; expected a list of names.")
  if len(names) != count:
    raise errors.UserError(
      f"The record of {of} has {len(names)} class_names; the model has {count} classes."
    )
  return Classes(tuple(names), count, of)


def known_of(record: Record, count: int, of: str) -> tuple[Classes, ...]:
  """Returns the classes of a model and, if recorded, those of its training data; () for a model without classes.

  These are one without a head, and one whose head is a projection (CLIP's): probes fit them to any labels.
  """
  if not count or record.get("projection"):
    return ()
  model, data = of_record(record, count, of), record.get("data_classes")
  return (model, Classes(tuple(data), len(data), of)) if data else (model,)


def trained(record: Record, of: str) -> Trained:
  """Returns the classes in the record of a run's checkpoint; arguments as in `of_record`."""
  names = record.get("class_names") or ()
  model = of_record(record, len(names), f"the checkpoint in {of}")
  data = record.get("data_classes")
  return Trained(model, data and tuple(data), of, recorded="data_classes" in record)


def match(data: Classes, model: Classes, *, advice: str = "") -> Match:
  """Maps each class of the data to a class of the model.

  Args:
    data: the classes of the labels.
    model: the classes of the logits.
    advice: one sentence for the error: what to do about classes that do not fit.

  Raises:
    UserError: the model lacks a class of the data; a name occurs twice; one side has no names and the numbers of
      classes differ.
  """
  if data.names is None or model.names is None:
    return Match(None, _by_number(data, model, advice))
  ours, theirs = ([plain(name) for name in names] for names in (data.names, model.names))
  if ours == theirs:
    return Match(None)
  if _are_imagenet(ours, theirs) or _are_imagenet(theirs, ours):
    return Match(
      None,
      f"{_capital(data.of)} and {model.of} name ImageNet's 1000 classes differently; they are taken by number.",
    )
  place = {name: k for k, name in reversed(list(enumerate(theirs)))}
  if missing := [name for name in data.names if plain(name) not in place]:
    raise errors.UserError(_differ(data, model, missing, advice))
  check_distinct(data.names, data.of)
  asked = set(ours)
  check_distinct((name for name in model.names if plain(name) in asked), model.of)
  return Match(tuple(place[name] for name in ours))


def check_unchanged(data: Classes, trained: Trained) -> None:
  """Raises a UserError if the class names of a run's data have changed; names each class that is gone or new."""
  if data.names is None or trained.data is None:
    return
  now, then = ({plain(name) for name in names} for names in (data.names, trained.data))
  if now == then:
    return
  gone = [f"{name!r} is gone" for name in trained.data if plain(name) not in now]
  added = [f"{name!r} is new" for name in data.names if plain(name) not in then]
  raise errors.UserError(
    f"The classes of {data.of} are not those that {trained.of} was trained on: {'; '.join(gone + added)}. Make the"
    " class folders what they were; or start a new run with another --workdir and"
    f" --config.init=\"{{'checkpoint': {trained.of!r}, 'new_head': True}}\"."
  )


def shown(names: Sequence[str]) -> str:
  """Returns names as text, a long list without its middle."""
  if len(names) <= 2 * _SHOWN:
    return ", ".join(map(repr, names))
  first, last = names[:_SHOWN], names[-2:]
  return f"{', '.join(map(repr, first))}, ... {', '.join(map(repr, last))} ({len(names)} names)"


def _by_number(data: Classes, model: Classes, advice: str) -> str | None:
  if data.names is None and model.names is None:
    return None
  unnamed, named = (data, model) if data.names is None else (model, data)
  if data.number != model.number:
    raise errors.UserError(
      f"{_capital(unnamed.of)} names no classes, so they can only be taken by number: it has {unnamed.number}, and"
      f" {named.of} {named.number} ({shown(named.names or ())}). {advice}".rstrip()
    )
  return (
    f"{_capital(unnamed.of)} names no classes: its {data.number} are taken to be those of {named.of}, by number"
    f" ({shown(named.names or ())})."
  )


def _differ(data: Classes, model: Classes, missing: Sequence[str], advice: str) -> str:
  """Returns the message about classes that the model lacks."""
  known = model.names or ()
  near = []
  for name in missing[:_SHOWN]:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near.append(f"{name!r} (nearest: {close[0]!r})" if close else repr(name))
  more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
  ours, theirs = shown(data.names or ()), shown(known)
  return (
    f"{_capital(model.of)} does not have {len(missing)} of the {data.number} classes of {data.of}:"
    f" {', '.join(near)}{more}. It has {theirs}; the data have {ours}. {advice}"
  ).rstrip()


# Some of ImageNet-1k's classes by number: WordNet id, and a word with which the usual name begins.
_IMAGENET = {
  0: ("n01440764", "tench"),
  1: ("n01443537", "goldfish"),
  207: ("n02099601", "golden retriever"),
  281: ("n02123045", "tabby"),
  340: ("n02391049", "zebra"),
  404: ("n02690373", "airliner"),
  817: ("n04285008", "sports car"),
  963: ("n07873807", "pizza"),
  999: ("n15075141", "toilet tissue"),
}


def _are_imagenet(ids: Sequence[str], words: Sequence[str]) -> bool:
  """Whether `ids` are the ordered WordNet ids of ImageNet-1k and `words` its usual names in this order.

  Published lists differ in a few words ("toilet paper"), so two of nine may differ.
  """
  if len(ids) != 1000 or len(words) != 1000 or list(ids) != sorted(set(ids)):
    return False
  same = sum(word in words[k].lower() for k, (_, word) in _IMAGENET.items())
  return all(ids[k] == wordnet for k, (wordnet, _) in _IMAGENET.items()) and same >= 7


def _capital(text: str) -> str:
  """Capitalises "the" at the beginning of a sentence; leaves config keys as they are."""
  return "The" + text[3:] if text.startswith("the ") else text
