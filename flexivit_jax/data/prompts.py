"""Names of classes as sentences, which a text tower embeds in the place of a classifier's weights."""

import pathlib
import string
from collections.abc import Iterable, Mapping, Sequence

from flexivit_jax import errors

_ARTICLES = ("a", "the")
_PHOTOS = (
  "", "bad ", "low resolution ", "cropped ", "bright ", "dark ", "close-up ", "black and white ", "pixelated ",
  "jpeg corrupted ", "blurry ", "good ",
)  # fmt: skip
_KINDS = ("clean", "dirty", "cool", "large", "nice", "weird", "small", "hard to see")
_MADE = (
  "a sculpture", "a rendering", "a tattoo", "a drawing", "a painting", "a doodle", "a sketch", "a rendition",
  "graffiti", "art", "itap",
)  # fmt: skip
_OF = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")

TEMPLATES: Mapping[str, tuple[str, ...]] = {
  "name": ("{}",),
  "one": ("a photo of a {}.",),
  # The seven that do best, and all eighty, of CLIP's notebook on prompts for ImageNet (arXiv 2103.00020).
  "clip_best": (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
  ),
  "clip_paper": (
    *(f"a {photo}photo of {article} {{}}." for photo in _PHOTOS for article in _ARTICLES),
    *(f"a photo of {article} {kind} {{}}." for kind in _KINDS for article in _ARTICLES),
    *(f"{made} of {article} {{}}." for made in _MADE for article in _ARTICLES),
    *(f"{article} {of} {{}}." for of in _OF for article in _ARTICLES),
    *(f"{article} {{}} in a video game." for article in _ARTICLES),
    *("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
  ),
}


def templates(given: str | Sequence[str]) -> tuple[str, ...]:
  """Returns the templates of a name in `TEMPLATES`, of a file with one a line, or those of a list.

  Raises:
    UserError: no such name or file; a template without exactly one `{}`.
  """
  if isinstance(given, str) and given in TEMPLATES:
    return TEMPLATES[given]
  if isinstance(given, str) and "{}" not in given and not pathlib.Path(given).is_file():
    raise errors.UserError(
      f"templates={given!r} is neither of {', '.join(TEMPLATES)} nor a file; expected one of these, a file with a"
      " template a line, or a list, e.g. ['a photo of a {}.']."
    )
  chosen = (given,) if isinstance(given, str) and "{}" in given else listed(given, "templates")
  for one in chosen:
    if one.count("{}") != 1:
      raise errors.UserError(
        f"The template {one!r} has no place, or several, for a name; expected one {{}}."
      )
  return chosen


def listed(given: str | Sequence[str], what: str) -> tuple[str, ...]:
  """Returns the texts of a list, or the lines of a file that are not empty.

  Raises:
    UserError: no such file, or no text in it.
  """
  if not isinstance(given, str):
    texts = tuple(given)
  else:
    try:
      lines = pathlib.Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
      why = getattr(e, "strerror", None) or e
      raise errors.UserError(
        f"{what}={given!r} cannot be read as a file of one text a line: {why}."
      ) from e
    texts = tuple(line.strip() for line in lines if line.strip())
  if not texts:
    raise errors.UserError(f"{what} is empty; expected at least one text.")
  return texts


def first_alias(name: str) -> str:
  """The first of several names of a class, which are divided by commas: "tench" of "tench, Tinca tinca"."""
  return name.partition(",")[0].strip()


def canonical(text: str) -> str:
  """Lower case, blanks for `_`, no punctuation but `{}`; what big_vision does with names and templates.

  Source: big_vision, evaluators/proj/image_text/prompt_engineering.py. Words that a hyphen divides are joined.
  """
  plain = str.maketrans("", "", string.punctuation)
  parts = (part.translate(plain) for part in text.replace("_", " ").lower().split("{}"))
  return " ".join("{}".join(parts).split())


def class_texts(names: Sequence[str], *, plain: bool, repeated: bool = False) -> tuple[str, ...]:
  """Returns what the names of classes are called in a sentence.

  Args:
    names: of the classes.
    plain: take their first alias, in `canonical` form.
    repeated: whether several classes may be called the same.

  Raises:
    UserError: a name that is empty; names that are the same.
  """
  texts = tuple(canonical(first_alias(name)) if plain else name.strip() for name in names)
  if empty := [k for k, text in enumerate(texts) if not text]:
    raise errors.UserError(
      f"Name {empty[0]} of {len(names)}, {names[empty[0]]!r}, is empty; every class needs a word to be found by."
    )
  if not repeated and (same := _same(texts)):
    shown = " and ".join(repr(names[k]) for k in same)
    raise errors.UserError(
      f"Names {' and '.join(map(str, same))} are the same text, {texts[same[0]]!r} ({shown}), so that no image can be"
      " told to be of one of them. Give them different names."
    )
  return texts


def _same(texts: Iterable[str]) -> list[int]:
  """Returns the numbers of the first texts that are equal; [] where all differ."""
  seen: dict[str, list[int]] = {}
  for k, text in enumerate(texts):
    seen.setdefault(text, []).append(k)
  return next((numbers for numbers in seen.values() if len(numbers) > 1), [])


def sentence(template: str, text: str) -> str:
  """A template with a class's text in the place of `{}`."""
  return template.replace("{}", text)
