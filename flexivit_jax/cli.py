"""The command `flexivit`; each subcommand imports what it needs only when it runs."""

import argparse
import errno
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

from flexivit_jax import errors
from flexivit_jax.devices import allocator
from flexivit_jax.running import exit_codes, signals

# Name on the command line -> module of `commands`, in the order of `--help`. A command is such a file, which imports
# what is heavy only when it runs, and its line here.
COMMANDS = {
  "doctor": "doctor",
  "plan": "plan",
  "bench": "bench",
  "train": "train",
  "eval": "evaluate",
  "profile": "profile",
  "cascade": "cascade",
  "predict": "predict",
  "serve": "serve",
  "search": "search",
  "embed": "embed",
  "report": "report",
  "demo": "demo",
  "inspect": "inspect",
  "convert": "convert",
  "export": "export",
  "pack": "pack",
  "tokenizer": "tokenizer",
  "flexify": "flexify",
  "verify": "verify",
  "replay": "replay",
  "reproduce": "reproduce",
}
# What is wrong with a path that the user gave, whichever call it is that meets it first.
_OF_PATHS = {
  *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
}


@runtime_checkable
class Command(Protocol):
  """What a module of `commands` has."""

  HELP: str  # one line

  def add_arguments(self, p: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command to its parser."""

  def run(self, args: argparse.Namespace) -> None:
    """Runs the command; a UserError is its one-line end."""


def command(name: str) -> Command:
  """The module of a name in `COMMANDS`."""
  return cast(Command, importlib.import_module(f"flexivit_jax.commands.{COMMANDS[name]}"))


def parser() -> argparse.ArgumentParser:
  """The parser of the command `flexivit`."""
  top = argparse.ArgumentParser(
    prog="flexivit", description="One Vision Transformer for all patch sizes."
  )
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name in COMMANDS:
    command(name).add_arguments(commands.add_parser(name, help=command(name).HELP))
  return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses a command line; `--config.KEY=VALUE` anywhere in it goes into `overrides`.

  Raises:
    UserError: an argument that no command knows.
  """
  overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
  args, unknown = parser().parse_known_args([a for a in argv if not a.startswith("--config.")])
  if unknown:
    known = ["--help", *(f"--{name}" for name in vars(args))]
    known += ["--no-verify"] if hasattr(args, "verify") else []
    name = unknown[0].removeprefix("--").partition("=")[0]
    if hasattr(args, name):
      raise errors.UserError(f"`flexivit {args.command}` takes {name.upper()} without --{name}.")
    raise errors.UserError(f"Unknown argument {unknown[0]!r}.{errors.nearest(unknown[0], known)}")
  if overrides and not hasattr(args, "overrides"):
    raise errors.UserError(
      f"--config.{overrides[0]} has no effect with `flexivit {args.command}`; remove it."
    )
  args.overrides = overrides
  return args


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code, see `running.exit_codes`."""
  return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv), "flexivit")


def _run(argv: Sequence[str]) -> None:
  args = parse(argv)
  allocator.keep_memory()
  command(args.command).run(args)


def exit_code(run: Callable[[], None], name: str) -> int:
  """Runs, and returns how the program `name` ends: 0, or another code after its line on stderr."""
  try:
    run()
  except errors.UserError as e:
    print(f"{name}: error: {e}", file=sys.stderr)
    return exit_codes.ERROR
  except signals.Stopped as e:
    print(f"{name}: stopped by {e}; the same command goes on", file=sys.stderr)
    return exit_codes.STOPPED
  except BrokenPipeError:  # the reader, `| head`, has seen enough
    # Without this, Python would write the rest at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_codes.BROKEN_PIPE
  except OSError as e:
    if e.filename is None or e.errno not in _OF_PATHS:
      raise
    print(f"{name}: error: {str(e.filename)[:200]}: {e.strerror}", file=sys.stderr)
    return exit_codes.ERROR
  return exit_codes.DONE


def tool(run: Callable[[], None]) -> None:
  """Runs the `main` of a script; what ends a command in one line ends it so too, and a file that is not there."""

  def checked() -> None:
    try:
      run()
    except (FileNotFoundError, NotADirectoryError) as e:
      raise errors.UserError(f"{e.filename}: {e.strerror}") from e

  if code := exit_code(checked, pathlib.Path(sys.argv[0]).name):
    sys.exit(code)


def entry(argv: Sequence[str] | None = None) -> None:
  """The command: `main`, and then the end of the process."""
  argv = sys.argv[1:] if argv is None else argv
  trains = "train" in argv[:1]
  if trains:  # its imports take a second, and a scheduler may take the machine back in it
    signals.leave_at_once()
  code = main(argv)
  # It is loaded only by commands that may run in several processes.
  if "flexivit_jax.running.distributed" in sys.modules:
    importlib.import_module("flexivit_jax.running.distributed").leave(code)
  if code == exit_codes.STOPPED:
    signals.leave()
  if trains:
    signals.leave_at_once(code)
  sys.exit(code)


if __name__ == "__main__":
  entry()
