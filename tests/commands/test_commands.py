"""What all commands have, and that command lines written before `commands/` still parse as they did."""

import importlib
import json
import pathlib
import shlex
import subprocess
import sys

import pytest

from flexivit_jax import cli, sizes

# Written by the parser of 2026-11-27, when it was one function: command line -> its arguments.
OLD = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "command_lines.json").read_text())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_a_file_with_help_arguments_and_run(name):
  command = importlib.import_module(f"flexivit_jax.commands.{cli.COMMANDS[name]}")
  assert command.HELP and "\n" not in command.HELP
  assert callable(command.add_arguments) and callable(command.run)


def test_each_file_of_commands_is_a_command():
  folder = pathlib.Path(cli.__file__).parent / "commands"
  files = {file.stem for file in folder.glob("*.py")} - {"__init__", "labelled", "options"}
  assert files == set(cli.COMMANDS.values())
  assert (folder / "__init__.py").read_text() == ""


@pytest.mark.parametrize("line", OLD)
def test_an_old_command_line_parses_as_it_did(line):
  args = json.loads(json.dumps(vars(cli.parse(shlex.split(line)[1:])), default=str))
  newer = args.keys() - OLD[line].keys()
  waits = {100, 300}  # seconds, of several processes, which there are none of
  off = {None, False}
  assert {args.pop(key) for key in newer} <= off | waits  # options that came later are off
  # The default of eval's sizes is no longer the parser's, --budget may stand in its place; nor is that of classes, 5.
  if args["command"] == "eval" and args["seqhw"] is None:
    args["seqhw"] = "all"
  if args.get("top_k", 5) is None:
    args["top_k"] = 5
  assert {k: seqhw(v) if k == "seqhw" else v for k, v in args.items()} == {
    k: seqhw(v) if k == "seqhw" else v for k, v in OLD[line].items()
  }


def seqhw(value):
  """The sizes of `--seqhw`, which was text, a number or numbers; now all commands give its text to `sizes.parse`."""
  if isinstance(value, list):
    return tuple(value)
  return value if value in (None, "all") else sizes.parse(str(value))


def test_old_command_lines_are_of_every_command_of_then():
  assert {args["command"] for args in OLD.values()} <= set(cli.COMMANDS)


def test_help_and_parsing_import_nothing_heavy():
  code = (
    "import sys\n"
    "from flexivit_jax import cli\n"
    "cli.parser().format_help()\n"
    "cli.parse(['convert', 'a.npz', 'b.npz'])\n"
    "print(*sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'flax', 'numpy', 'PIL', 'scipy'}))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == []
