"""Which class of a model a class of the data is: by name, whatever the order and the form of Unicode."""

import itertools
import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

from flexivit_jax.data import class_names
from flexivit_jax.data.class_names import Classes
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

NAMES = st.lists(
  st.text(st.sampled_from("abcé Å0179_\u0301"), min_size=1, max_size=4),
  min_size=1,
  max_size=6,
  unique_by=class_names.plain,
)


def classes(names, of):
  return Classes(None if names is None else tuple(names), len(names or "ab"), of)


@given(NAMES, st.randoms(use_true_random=False), st.sampled_from(["NFC", "NFD"]))
def test_a_class_is_mapped_to_the_one_of_its_name(names, random, form):
  shuffled = random.sample(names, random.randint(1, len(names)))  # a subset in another order
  data = classes([unicodedata.normalize(form, n) for n in shuffled], "data")
  labels = class_names.match(data, classes(names, "model")).labels
  found = [names[k] for k in (range(len(shuffled)) if labels is None else labels)]
  assert [class_names.plain(n) for n in found] == [class_names.plain(n) for n in shuffled]


@given(NAMES, NAMES)
def test_what_the_model_does_not_have_is_refused_and_named(names, others):
  missing = [n for n in names if class_names.plain(n) not in map(class_names.plain, others)]
  if not missing:
    assert class_names.match(classes(names, "data"), classes(others, "the model")).note is None
    return
  with pytest.raises(UserError, match=f"^The model does not have {len(missing)} of the") as said:
    class_names.match(classes(names, "data"), classes(others, "the model"), advice="Do this.")
  assert all(repr(name) in str(said.value) for name in names + others)
  assert str(said.value).endswith("Do this.") and "\n" not in str(said.value)


def test_case_and_space_are_part_of_a_name_and_the_nearest_is_named():
  for name in ("Cat", "cat ", "cats"):
    with pytest.raises(UserError, match=r"nearest: 'cat'"):
      class_names.match(classes([name], "data"), classes(["cat", "dog"], "model"))


def test_without_names_classes_are_taken_by_number_which_is_said():
  named, unnamed = classes(["a", "b"], "the data"), classes(None, "the file x.npz")
  assert class_names.match(unnamed, unnamed) == (None, None)
  for pair in ((named, unnamed), (unnamed, named)):
    labels, note = class_names.match(*pair)
    assert labels is None and note.startswith("The file x.npz names no classes") and "'a'" in note
  assert class_names.match(unnamed, unnamed._replace(number=3)) == (None, None)  # said elsewhere
  for pair in ((named, unnamed._replace(number=3)), (unnamed._replace(number=3), named)):
    with pytest.raises(UserError, match=r"x.npz names no classes.*it has 3, and the data 2 .*'b'"):
      class_names.match(*pair)


def test_a_name_that_stands_there_twice_matters_where_it_is_asked_for():
  model = classes(["crane", "cat", "crane"], "model")
  assert class_names.match(model, model).labels is None
  assert class_names.match(classes(["cat"], "data"), model).labels == (1,)
  with pytest.raises(UserError, match="model: 'crane' and 'crane' are the same"):
    class_names.match(classes(["crane"], "data"), model)
  with pytest.raises(UserError, match="data: 'e\\\\u0301' and '\\\\xe9' are the same"):
    class_names.match(classes(["e\u0301", "é"], "data"), classes(["é", "a"], "model"))


@given(st.lists(st.integers(0, 3000), unique=True, min_size=1))
def test_folders_that_are_numbers_are_in_their_order(numbers):
  assert class_names.in_order(map(str, numbers)) == [str(n) for n in sorted(numbers)]
  assert class_names.in_order(f"{n:05}" for n in numbers) == [f"{n:05}" for n in sorted(numbers)]


@pytest.mark.parametrize(
  "ordered",
  [
    ["6", "7", "007", "8"],
    ["0", "00", "1", "10"],
    ["10", "9", "other"],
    ["-1", "10", "9"],
    ["1.5", "10", "9"],
    ["10", "9", "²"],
    ["b", "e", "z", "é"],
    ["class_1", "class_10", "class_2"],
  ],
)
def test_other_folders_are_in_the_order_of_text(ordered):
  assert class_names.in_order(reversed(ordered)) == ordered


def test_a_record_names_as_many_classes_as_the_model_has_or_none():
  assert class_names.of_record({"class_names": ["a", "b"]}, 2, "x").names == ("a", "b")
  assert class_names.of_record({"class_names": None}, 2, "x") == Classes(None, 2, "x")
  assert class_names.known_of({"class_names": ["a"]}, 0, "x") == ()
  assert class_names.known_of({"projection": True}, 512, "x") == ()
  with pytest.raises(UserError, match="record of x has 3 class_names; the model has 2 classes"):
    class_names.of_record({"class_names": ["a", "b", "c"]}, 2, "x")
  with pytest.raises(UserError, match="expected a list of names"):
    class_names.of_record({"class_names": [1, 2]}, 2, "x")


def test_long_lists_are_shortened():
  names = [f"n{k}" for k in range(1000)]
  with pytest.raises(UserError) as said:
    class_names.match(classes([f"m{k}" for k in range(1000)], "data"), classes(names, "model"))
  assert len(str(said.value)) < 700 and "'n0'" in str(said.value) and "'n999'" in str(said.value)


def test_imagenets_ids_and_usual_names_are_the_same_classes():
  ids, names = ([f"n{k:08}" for k in range(1000)], [f"thing {k}" for k in range(1000)])
  for k, (wordnet, word) in class_names._IMAGENET.items():
    ids[k], names[k] = wordnet, f"{word.title()}, Latin"
  between = sorted(class_names._IMAGENET)
  for low, high in itertools.pairwise(between):
    start = int(ids[low][1:])
    for k in range(low + 1, high):
      ids[k] = f"n{start + k - low:08}"
  data, model = classes(ids, "data"), classes(names, "model")
  for pair in ((data, model), (model, data)):
    labels, note = class_names.match(*pair)
    assert labels is None and "ImageNet's 1000 classes" in note
  with pytest.raises(UserError, match="does not have 1000"):
    class_names.match(classes(ids, "data"), classes([*names[1:], names[0]], "model"))


def test_what_changed_is_named_one_by_one():
  trained = class_names.Trained(classes("ab", "x"), ("cat", "dog", "fox"), "runs/x")
  for same in (["dog", "fox", "cat"], None):
    class_names.check_unchanged(classes(same, "input.data"), trained)
  with pytest.raises(
    UserError, match=r"'cat' is gone; 'tomcat' is new; 'wolf' is new.*'checkpoint': 'runs/x'"
  ):
    class_names.check_unchanged(classes(["dog", "fox", "tomcat", "wolf"], "input.data"), trained)
