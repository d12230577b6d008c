"""Lists of class names: their order, which names are the same, and which class of a model a class of the data is.

The rules, which nothing else repeats:

- Names are compared after Unicode NFC normalisation: a folder that macOS wrote (NFD) is the class that Linux wrote.
  White space and case are part of a name.
- The classes of data are mapped to those of a model by name. The model may have more of them; it has to have all.
- Where one side has no names, classes are taken by number. There have to be as many, and the user is told.
- Anything else is an error that shows both lists.
- Class folders are ordered as numbers where all of them are numbers, and as text otherwise.
"""

import collections
import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors

_SHOWN = 5  # names of a long list


class Classes(NamedTuple):
  """The classes of a data set or of a model.

  Attributes:
    names: in the order of the labels, or of the logits; None: they have only numbers.
    number: how many.
    of: whose they are, for messages, e.g. "the checkpoint runs/photos".
    by_text: numbers that name folders are in the order of text (0, 1, 10, 2), as they were in runs that did not record
      their names. Matters where `names` is None.
  """

  names: tuple[str, ...] | None
  number: int
  of: str
  by_text: bool = False


class Trained(NamedTuple):
  """What the checkpoint that a run goes on from says of classes.

  Attributes:
    model: the classes of its logits.
    data: the names of its training data's classes, by label; None: they had none, or this was not recorded.
    of: which checkpoint, for messages.
    recorded: whether the checkpoint would say it.
  """

  model: Classes
  data: tuple[str, ...] | None
  of: str
  recorded: bool = True


class Match(NamedTuple):
  """How the classes of data become those of a model.

  Attributes:
    labels: for each class of the data the number of the model's; None: the numbers are the same.
    note: what the user should know; None: nothing.
  """

  labels: tuple[int, ...] | None
  note: str | None = None


def plain(name: str) -> str:
  """The form in which names are compared: NFC."""
  return unicodedata.normalize("NFC", name)


def in_order(names: Iterable[str]) -> list[str]:
  """Class folders in the order of their labels: as numbers where all are ("2" before "10"), else as text.

  Numbers are of the digits 0 to 9. Those with leading zeros are other names, but numbers too: "007" comes between "6"
  and "8", and "7" comes before "007". One name that is no number ("10", "9", "other") and all are text.
  """
  names = sorted(names)
  numbers = all(name.isascii() and name.isdigit() for name in names)
  return sorted(names, key=lambda name: (int(name), len(name))) if numbers else names


def by_text(names: Iterable[str]) -> tuple[str, ...]:
  """Class folders in the order that runs used until numbers were ordered as numbers."""
  return tuple(sorted(names))


def check_distinct(names: Iterable[str], of: str) -> None:
  """Raises a UserError for two names that are the same after normalisation."""
  spellings = collections.defaultdict(list)
  for name in names:
    spellings[plain(name)].append(name)
  for same in spellings.values():
    if len(same) > 1:
      shown = " and ".join(ascii(name) for name in same)
      raise errors.UserError(
        f"{of}: {shown} are the same class name. Put them into one, or rename one of them."
      )


def of_record(record: Mapping[str, Any], count: int, of: str) -> Classes:
  """The classes of a model, as its record names them.

  Args:
    record: of a checkpoint; what `weights.load_with_record` returns.
    count: classes of the model.
    of: whose they are, for messages.

  Raises:
    UserError: names that are not text, or not as many as the model has classes.
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


def known_of(record: Mapping[str, Any], count: int, of: str) -> tuple[Classes, ...]:
  """The classes of a model, and those of the data that it was trained on where the record names them; none: no head."""
  if not count:
    return ()
  model, data = of_record(record, count, of), record.get("data_classes")
  return (model, Classes(tuple(data), len(data), of)) if data else (model,)


def trained(record: Mapping[str, Any], of: str) -> Trained:
  """What the record of a run's checkpoint says of classes; arguments as of `of_record`."""
  names = record.get("class_names") or ()
  model = of_record(record, len(names), f"the checkpoint in {of}")
  data = record.get("data_classes")
  return Trained(model, data and tuple(data), of, recorded="data_classes" in record)


def match(data: Classes, model: Classes, *, advice: str = "") -> Match:
  """Which class of the model each class of the data is.

  Args:
    data: the classes of labels.
    model: those that the labels should be of.
    advice: what to do about classes that do not fit, in a sentence.

  Raises:
    UserError: the data have a class that the model has not; a name stands there twice; one side has no names, and
      another number of classes.
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
  """Raises a UserError that names each class that a run's data had and have no more, or have now and had not."""
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
  """A list of names, its middle left out where it is long."""
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
  """What to say of classes that the model does not have."""
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
  """Whether these are ImageNet-1k's WordNet ids in their order, and its usual names in the same order.

  Lists of names differ in a few words ("toilet paper"), so that two of the nine may.
  """
  if len(ids) != 1000 or len(words) != 1000 or list(ids) != sorted(set(ids)):
    return False
  same = sum(word in words[k].lower() for k, (_, word) in _IMAGENET.items())
  return all(ids[k] == wordnet for k, (wordnet, _) in _IMAGENET.items()) and same >= 7


def _capital(text: str) -> str:
  """For the beginning of a sentence; a key of a config stays as it is."""
  return "The" + text[3:] if text.startswith("the ") else text
