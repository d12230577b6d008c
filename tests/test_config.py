"""Loading a config, its arguments, overrides, and the check of sections against functions."""

import inspect
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, strategies as st

from flexivit_jax import config, errors, experiment
from flexivit_jax.objectives.distill import Teacher

pytestmark = pytest.mark.faults

FILE = """
import ml_collections
from flexivit_jax.config import parse_arg

def get_config(arg=""):
  arg = parse_arg(arg, width=8, debug=False)
  c = ml_collections.ConfigDict()
  c.name = "one"
  c.count, c.rate, c.on, c.sizes = 3, 0.5, True, (2, 4)
  c.model = dict(width=arg.width, deep=dict(depth=1))
  c.folder = ml_collections.config_dict.placeholder(str)
  c.again = c.get_ref("folder")
  c.debug = arg.debug
  return c
"""


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
  path = tmp_path / "experiment.py"
  path.write_text(FILE)
  return path


def test_loads_plain_values(file):
  assert config.load(str(file)) == {
    "name": "one",
    "count": 3,
    "rate": 0.5,
    "on": True,
    "sizes": (2, 4),
    "model": {"width": 8, "deep": {"depth": 1}},
    "folder": None,
    "again": None,
    "debug": False,
  }
  assert type(config.load(str(file))["model"]["deep"]) is dict


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py", "configs/digits"])
def test_shipped_configs_are_found_from_any_folder(name, tmp_path, monkeypatch, repository):
  expected = config.load(str(repository / "configs" / "digits.py"))
  monkeypatch.chdir(tmp_path)
  assert config.load(name) == expected


def test_an_own_file_comes_before_a_shipped_one(file, tmp_path, monkeypatch):
  file.rename(tmp_path / "digits.py")
  monkeypatch.chdir(tmp_path)
  assert config.load("digits.py")["name"] == "one"
  assert config.load("digits")["name"] == "FlexiViT"


def test_another_path_is_never_replaced_by_a_shipped_config(tmp_path):
  with pytest.raises(errors.UserError, match=r"Unknown config .*known: cifar10, detect_bccd, "):
    config.load(str(tmp_path / "digits.py"))


def test_misspelt_name_names_the_nearest():
  with pytest.raises(errors.UserError, match="Did you mean 'digits'"):
    config.load("digit")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(arg=''):\n  return 1 / 0", r"own.py:2: ZeroDivisionError: division by zero"),
    ("import flexivit_nothing", r"own.py:1: ModuleNotFoundError: No module"),
    ("def get_config(arg=''):\n  return {", r"own.py:2: SyntaxError: '\{' was never closed"),
    ("def get_config(arg=''):\n  return {}", r"get_config returns a dict; expected an ml_coll"),
    ("def get_config():\n  pass", r"own.py: TypeError: .*positional argument"),
  ],
)
def test_a_mistake_in_a_config_is_one_line_with_its_place(tmp_path, text, message):
  file = tmp_path / "own.py"
  file.write_text(text)
  with pytest.raises(errors.UserError, match=message) as error:
    config.load(str(file))
  assert "\n" not in str(error.value)


def test_choose_and_grids():
  assert config.choose("axis", "a", {"a": 1}) == 1
  assert config.choose("init", "random", ("teacher", "random")) == "random"
  with pytest.raises(errors.UserError, match=r"Unknown config argument axis 'aa'; known: ab, c"):
    config.choose("axis", "aa", {"ab": 1, "c": 2})
  assert config.grids(240) == (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)
  for side in (0, -5, 7, 251):
    with pytest.raises(errors.UserError, match=f"res={side}: no patch of 8 to 48 pixels"):
      config.grids(side)


def test_files_that_are_no_configs(tmp_path):
  (tmp_path / "text.txt").write_text("x")
  with pytest.raises(errors.UserError, match="is not a Python file"):
    config.load(str(tmp_path / "text.txt"))
  (tmp_path / "empty.py").write_text("x = 1")
  with pytest.raises(errors.UserError, match="has no get_config"):
    config.load(str(tmp_path / "empty.py"))


# --- arguments ---


def test_arguments_reach_the_config(file):
  assert config.load(f"{file}:width=16,debug") == config.load(f"{file}:debug=True,width=16")
  assert config.load(f"{file}:width=16,debug")["model"]["width"] == 16


NUMBERS = (st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())


@given(*NUMBERS, st.from_regex(r"[a-z][\w./-]*", fullmatch=True))
def test_parse_arg_reads_what_is_written(count, rate, on, name):
  text = f"count={count},rate={rate!r},on={on},name={name}"
  values = config.parse_arg(text, count=0, rate=0.0, on=False, name="x").to_dict()
  assert values == {"count": count, "rate": rate, "on": on, "name": name}


def test_parse_arg_defaults():
  assert config.parse_arg("", count=1, on=False).to_dict() == {"count": 1, "on": False}
  assert config.parse_arg("rate=2", rate=1.0).rate == 2.0
  assert config.parse_arg("name=2024", name="x").name == "2024"


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("widht=3", r"Unknown config argument 'widht'.*Did you mean 'width'"),
    ("debugg", r"Did you mean 'debug'"),
    ("width=many", r"width is 'many'; expected a int, like 8"),
    ("width=1.5", r"width is 1.5; expected a int"),
    ("width=True", r"width is True; expected a int"),
    ("debug=1", r"debug is 1; expected a bool"),
    ("width", r"width needs a value: width=8"),
  ],
)
def test_bad_arguments(file, arg, message):
  with pytest.raises(errors.UserError, match=message):
    config.load(f"{file}:{arg}")


# --- overrides ---


@pytest.mark.parametrize(
  ("override", "key", "value"),
  [
    ("count=4", "count", 4),
    ("rate=1e-3", "rate", 1e-3),
    ("rate=2", "rate", 2.0),  # A whole number is fine where a float is.
    ("on=False", "on", False),
    ("name=other", "name", "other"),
    ("name=2024", "name", "2024"),
    ("name='a b'", "name", "a b"),
    ("name=a=b", "name", "a=b"),
    ("sizes=(1,2,3)", "sizes", (1, 2, 3)),
    ("sizes=[1, 2]", "sizes", (1, 2)),
    ("rate=None", "rate", None),
    ("folder=/data", "folder", "/data"),
    ("folder=/data", "again", "/data"),  # One value, referred to twice.
    ("new=5", "new", 5),
    ("model={}", "model", {}),
    ("model.deep.depth=7", "model", {"width": 8, "deep": {"depth": 7}}),
    ("model.deep.new=x", "model", {"width": 8, "deep": {"depth": 1, "new": "x"}}),
  ],
)
def test_overrides(file, override, key, value):
  before, after = config.load(str(file)), config.load(str(file), [override])
  assert after[key] == value and type(after[key]) is type(value)
  others = {k: v for k, v in after.items() if k not in (key, "folder", "again")}
  assert others == {k: before[k] for k in others}


@pytest.mark.parametrize("section", sorted(config.OPTIONAL))
def test_an_override_begins_a_section_that_the_file_leaves_out(file, section):
  assert config.load(str(file), [f"{section}.a=1", f"{section}.b=c"])[section] == {"a": 1, "b": "c"}


def test_the_sections_that_may_be_left_out_are_those_of_an_experiment():
  parameters = inspect.signature(experiment.Settings).parameters.values()
  sections = {p.name for p in parameters if "Mapping" in str(p.annotation) and p.default is None}
  assert sections == set(config.OPTIONAL)


def test_a_section_with_a_name_that_no_section_can_have_is_an_error(file):
  with pytest.raises(errors.UserError, match=r"--config.model.deep cannot be .*dots"):
    config.load(str(file), ["model.deep={'a.b': 1}"])


def test_a_number_of_microbatches_overrides_auto_and_a_name_a_truth_value(file):
  file.write_text(
    "import ml_collections\ndef get_config(arg=''):\n"
    "  return ml_collections.ConfigDict(dict(accumulate='auto', model=dict(remat=True)))\n"
  )
  assert config.load(str(file), ["accumulate=4"])["accumulate"] == 4
  assert config.load(str(file), ["model.remat=dots"])["model"]["remat"] == "dots"


def test_none_leaves_an_evaluation_out_and_no_other_section(file):
  file.write_text(
    "import ml_collections\ndef get_config(arg=''):\n"
    "  return ml_collections.ConfigDict(dict(evals=dict(a=dict(every=1), b=dict(every=2)), model=dict(x=1)))\n"
  )
  assert config.load(str(file), ["evals.a=None"])["evals"] == {"b": {"every": 2}}
  assert config.load(str(file), ["evals.a=None", "evals.b=None"])["evals"] == {}
  assert config.load(str(file), ["evals.a.every=None"])["evals"]["a"] == {"every": None}
  with pytest.raises(errors.UserError, match="Unknown evaluation 'c'; known: a, b"):
    config.load(str(file), ["evals.c=None"])


def test_the_last_override_wins(file):
  assert config.load(str(file), ["count=4", "count=5"])["count"] == 5


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("count", r"--config.count: expected --config.count=VALUE"),
    ("count=many", r"--config.count is 'many'; expected a int, like 3"),
    ("count=1.5", r"expected a int"),
    ("count=True", r"expected a int"),
    ("on=1", r"expected a bool"),
    ("rate=True", r"expected a float"),
    ("sizes=2", r"expected a tuple, like \(2, 4\)"),
    ("model=2", r"--config.model is 2; expected one of its keys: deep, width"),
    ("modle.width=2", r"Unknown config section 'modle.width'.*known: model"),
    ("model.width.x=2", r"Unknown config section"),
  ],
)
def test_bad_overrides(file, override, message):
  with pytest.raises(errors.UserError, match=message):
    config.load(str(file), [override])


# --- the check against signatures ---


def resize(image, *, size: int, method: str = "linear"):
  return image, size, method


CHECKED = dict(given=("image",), needed={"data": dict}, optional={"every_steps": int})


@pytest.mark.parametrize("more", [{}, {"method": "area"}, {"every_steps": 3}])
def test_check_accepts(more):
  config.check("a", {"size": 1, "data": {}, **more}, resize, **CHECKED)


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"size": 1, "data": {}, "methd": 0}, r"'a.methd'.*Did you mean 'a.method'"),
    ({"size": 1, "data": {}, "image": 0}, r"'a.image'; known: a.data, a.every_steps, a.method"),
    ({"data": {}}, r"The config lacks a.size"),
    ({"size": 1}, r"The config lacks a.data"),
    ({}, r"The config lacks a.data, a.size"),
    ({"size": 1.5, "data": {}}, r"The config's a.size is 1.5; expected an integer"),
    ({"size": True, "data": {}}, r"a.size is True; expected an integer"),
    ({"size": 1, "data": 2}, r"a.data is 2; expected a section of keys and values"),
    ({"size": 1, "data": {}, "every_steps": "x"}, r"a.every_steps is 'x'; expected an integer"),
    (3, r"The config's a is 3; expected a section of keys and values"),
  ],
)
def test_check_refuses(section, message):
  with pytest.raises(errors.UserError, match=message):
    config.check("a", section, resize, **CHECKED)


def test_check_at_the_top_level_names_bare_keys():
  with pytest.raises(errors.UserError, match=r"'sze'.*Did you mean 'size'"):
    config.check("", {"sze": 1}, resize, given=("image",))


PATHED = """
import ml_collections
from flexivit_jax.config import parse_arg
def get_config(arg=""):
  arg = parse_arg(arg, data_dir="photos", epochs=8, debug=False)
  return ml_collections.ConfigDict(dict(input=dict(data_dir=arg.data_dir), epochs=arg.epochs, debug=arg.debug))
"""
FILES = [
  "my:file.py",
  "a:b:c.py",
  "my:folder/c.py",
  "C:\\x.py",
  "a b.py",
  "c=1,2.py",
  "ünï.py",
  "[g].py",
  "%s.py",
]


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_path_may_hold_what_divides_it_from_the_argument(tmp_path, monkeypatch, path, absolute):
  monkeypatch.chdir(tmp_path)
  (tmp_path / path).parent.mkdir(exist_ok=True)
  (tmp_path / path).write_text(PATHED)
  spec = str(tmp_path / path) if absolute else path
  assert config.load(spec)["epochs"] == 8
  assert config.load(f"{spec}:")["epochs"] == 8
  loaded = config.load(f"{spec}:data_dir=/data:x=y/a b,epochs=2,debug")
  assert loaded == {"input": {"data_dir": "/data:x=y/a b"}, "epochs": 2, "debug": True}


VALUES = [
  "a,b",
  "x=y,z=1",
  "/data/a,b",
  "2024",
  "1,2",
  "None",
  "{'a': 1}",
  "[x]",
  "~",
  "back\\slash",
  "C:\\new",
  "%s",
  " a ",
]


@pytest.mark.parametrize("value", VALUES)
def test_any_path_can_be_written_as_an_argument_and_as_an_override(tmp_path, value):
  (tmp_path / "c.py").write_text(PATHED)
  spec = f"{tmp_path / 'c.py'}:"
  quote = '"' if "'" in value else "'"
  loaded = config.load(f"{spec}epochs=3,data_dir={quote}{value}{quote},debug")
  assert loaded == {"input": {"data_dir": value}, "epochs": 3, "debug": True}
  if value != "None":
    assert config.load(spec, [f"input.data_dir={value}"])["input"]["data_dir"] == value
  if "," not in value:
    assert config.load(f"{spec}data_dir={value}")["input"]["data_dir"] == (
      value if value != "None" else None
    )


def test_a_comma_without_quotes_is_an_error_that_says_how_to_write_it(tmp_path):
  (tmp_path / "c.py").write_text(PATHED)
  with pytest.raises(errors.UserError, match=r"'b'; known: .*\"FILE:data_dir='/data/a,...'\""):
    config.load(f"{tmp_path / 'c.py'}:data_dir=/data/a,b")
  with pytest.raises(errors.UserError) as wrong:
    config.load(f"{tmp_path / 'c.py'}:epochs=3,b")
  assert "quotes" not in str(wrong.value)


# --- values and annotations ---

Size = int | tuple[int, int]
A_SIZE = "an integer or (an integer, an integer)"


@pytest.mark.parametrize(
  ("kind", "good", "bad", "text"),
  [
    (int, [3, -1, np.int64(3)], [3.0, True, "3", None, (3,)], "an integer"),
    (float, [3, 3.5, float("nan"), np.float32(1)], [True, "x", None], "a number"),
    (int | float, [3, 3.5], [True, "x", None], "a number"),
    (bool, [True, False], [1, 0, "True", None], "True or False"),
    (str, ["", "x"], [1, None, ("x",)], "a string"),
    (int | None, [3, None], ["x", 3.0], "an integer or None"),
    (Literal["a", 1], ["a", 1], ["b", True, 1.0], "'a' or 1"),
    (tuple[int, int], [(1, 2), [1, 2]], [(1,), (1, 2, 3), (1, 2.5), 1, "ab"], r"(an integer, an integer)"),
    (tuple[float, ...], [(), (1, 2.5)], [("x",), 1, "ab"], "a tuple, each a number"),
    (Sequence[Size], [(3, (4, 5)), [3]], [7, (3, (4,)), ("a",)], f"a tuple, each {A_SIZE}"),
    (Sequence[Sequence[Any]], [((".*", 1.0),), ()], ["x", 3, (3,)], "a tuple, each a tuple"),
    (Mapping[str, Any], [{}, {"a": 1}], [3, "x", ()], "a section of keys and values"),
    (Teacher, [{"checkpoint": "x"}], [3, "x", None], "a section of keys and values"),
    (str | os.PathLike[str], ["x", pathlib.Path("x")], [3], "a string or a path"),
  ],
)  # fmt: skip
def test_a_value_is_compared_with_its_annotation(kind, good, bad, text):
  assert all(config.fits(value, kind) for value in good)
  assert not any(config.fits(value, kind) for value in bad)
  assert config.kind_text(kind) == text
