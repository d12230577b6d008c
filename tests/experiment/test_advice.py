"""What a message advises exists: each option, command and config key that is named in a string of the package."""

import argparse
import ast
import inspect
import pathlib
import re

import pytest

from flexivit_jax import cli, config, experiment

# Options of other programs, commands of tools/ (of which test_reproduce.py knows), and variables of CSS.
OTHERS = re.compile(
  r"--xla_\w+|--file_format|export-credentials --format|s3 cp --recursive|var\(--\w+|--\w+:"
)
ELSEWHERE = ("items.py", "comparing.py")


def options():
  """The options of each command."""
  (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
  found = {}
  for name, parser in commands.choices.items():
    found[name] = {o for action in parser._actions for o in action.option_strings}
  return found


def texts(file):
  """(line, text) of each string but docstrings; a value in an f-string is "{}"."""
  tree = ast.parse(file.read_text())
  docs = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    and node.body
    and isinstance(node.body[0], ast.Expr)
  }
  inside = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in ast.walk(n)}
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
      yield node.lineno, "".join(map(str, parts))
    elif isinstance(node, ast.Constant) and id(node) not in docs | inside:
      yield node.lineno, str(node.value)


@pytest.fixture(scope="module")
def strings():
  files = sorted(pathlib.Path(cli.__file__).parent.rglob("*.py"))
  return [(f"{file.name}:{line}", text) for file in files for line, text in texts(file)]


def test_each_option_that_a_string_names_is_one_of_some_command(strings):
  known = set.union(*options().values())
  wrong, seen = [], set()
  for where, text in (s for s in strings if s[0].partition(":")[0] not in ELSEWHERE):
    for option in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", OTHERS.sub("", text)):
      seen.add(option)
      if option not in known:
        wrong.append((where, option))
  assert not wrong
  assert len(seen) > 20


def test_each_command_that_a_string_names_exists_and_has_the_options_beside_it(strings):
  known, seen = options(), 0
  for where, text in strings:
    for said in re.findall(r"`flexivit ([^`]*)`", text):
      command = said.split()[0]
      if command == "{}":
        continue
      seen += 1
      assert command in cli.COMMANDS, (where, said)
      for option in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*(?![\w.])", said):
        assert option in known[command] or option == "--config", (where, said)
  assert seen > 5


def test_each_config_key_that_a_string_gives_to_a_command_is_one(strings):
  keys, seen = set(inspect.signature(experiment.Settings).parameters), 0
  for where, text in strings:
    for key in re.findall(r"--config\.([a-z]\w*)", text):
      seen += 1
      assert key in keys, (where, key)
  assert seen > 2
  assert "init" in keys and callable(config.load)
