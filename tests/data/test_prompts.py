"""Templates and names of classes as texts."""

import pytest

from flexivit_jax import errors
from flexivit_jax.data import prompts


def test_the_sets_have_as_many_templates_as_published_and_the_seven_are_among_the_eighty():
  numbers = {name: len(set(one)) for name, one in prompts.TEMPLATES.items()}
  assert numbers == {"name": 1, "one": 1, "clip_best": 7, "clip_paper": 80}
  assert set(prompts.TEMPLATES["clip_best"]) < set(prompts.TEMPLATES["clip_paper"])
  assert set(prompts.TEMPLATES["one"]) < set(prompts.TEMPLATES["clip_paper"])
  for some in ("a close-up photo of the {}.", "graffiti of a {}.", "the {} in a video game."):
    assert some in prompts.TEMPLATES["clip_paper"]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A photo of a {}.", "a photo of a {}"),
    ("sports_car", "sports car"),
    ("Jack-o'-lantern", "jackolantern"),
    ("  white   shark\n", "white shark"),
    ("Löwe", "löwe"),
    ("{}!", "{}"),
  ],
)
def test_the_canonical_form(text, expected):
  assert prompts.canonical(text) == expected


def test_names_are_what_they_are_called_first():
  names = ["tench, Tinca tinca", "Sports_Car", "goldfish"]
  assert prompts.class_texts(names, plain=True) == ("tench", "sports car", "goldfish")
  assert prompts.class_texts(names, plain=False)[0] == "tench, Tinca tinca"
  assert prompts.class_texts(["crane", "crane"], plain=True, repeated=True) == ("crane", "crane")


@pytest.mark.parametrize(
  ("names", "expected"),
  [
    (["cat", " "], "Name 1 of 2, ' ', is empty"),
    (["cat", "!?"], r"Name 1 of 2, '!\?', is empty"),
    (["cat", "dog", "Cat, felis"], r"Names 0 and 2 are the same text, 'cat' \('cat' and 'Cat, fel"),
  ],
)
def test_names_that_are_empty_or_there_twice_are_refused(names, expected):
  with pytest.raises(errors.UserError, match=expected):
    prompts.class_texts(names, plain=True)


def test_templates_are_a_name_a_file_or_a_list(tmp_path):
  file = tmp_path / "templates.txt"
  file.write_text("a photo of a {}.\n\n{} on a table\n")
  assert prompts.templates(str(file)) == ("a photo of a {}.", "{} on a table")
  assert prompts.templates("my {}") == ("my {}",)
  assert prompts.templates(["my {}", "{}"]) == ("my {}", "{}")
  for wrong, expected in {
    "best": "'best' is neither of name, one, clip_best, clip_paper nor a file",
    "{} and {}": r"has no place, or several, for a name; expected one \{\}",
  }.items():
    with pytest.raises(errors.UserError, match=expected):
      prompts.templates(wrong)
  file.write_text("\n")
  with pytest.raises(errors.UserError, match="templates is empty"):
    prompts.templates(str(file))
  with pytest.raises(
    errors.UserError, match="cannot be read as a file of one text a line: No such"
  ):
    prompts.listed(str(tmp_path / "no.txt"), "names")
