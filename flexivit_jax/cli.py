"""The command `flexivit`; each subcommand imports what it needs only when it runs."""

import errno
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from flexivit_jax import errors
from flexivit_jax.commands import options
from flexivit_jax.devices import allocator
from flexivit_jax.running import signals

USAGE_ERROR = 2
# What is wrong with a path that the user gave, whichever call it is that meets it first.
_OF_PATHS = {
  *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
}
BROKEN_PIPE = 128 + 13  # as a shell counts SIGPIPE
MODULES = {
  "plan": "commands.plan",
  "bench": "commands.bench",
  "train": "train",
  "eval": "commands.evaluate",
  "predict": "commands.predict",
  "embed": "commands.embed",
  "report": "report",
  "inspect": "commands.inspect",
  "convert": "commands.convert",
  "export": "commands.export",
  "flexify": "commands.flexify",
  "verify": "commands.verify",
  "replay": "commands.replay",
  "reproduce": "paper.reproduce",
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; a user's mistake is one line on stderr and exit code 2, a signal that was obeyed 75."""
  return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv), "flexivit")


def _run(argv: Sequence[str]) -> None:
  args = options.parse(argv)
  module = MODULES[args.command]
  allocator.keep_memory()
  importlib.import_module(f"flexivit_jax.{module}").run(args)


def exit_code(run: Callable[[], None], name: str) -> int:
  """Runs, and returns how the program `name` ends: 0, or another code after its line on stderr."""
  try:
    run()
  except errors.UserError as e:
    print(f"{name}: error: {e}", file=sys.stderr)
    return USAGE_ERROR
  except signals.Stopped as e:
    print(f"{name}: stopped by {e}; the same command goes on", file=sys.stderr)
    return signals.STOPPED
  except BrokenPipeError:  # the reader, `| head`, has seen enough
    os.dup2(
      os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    )  # or Python would write the rest at exit
    return BROKEN_PIPE
  except OSError as e:
    if e.filename is None or e.errno not in _OF_PATHS:
      raise
    print(f"{name}: error: {str(e.filename)[:200]}: {e.strerror}", file=sys.stderr)
    return USAGE_ERROR
  return 0


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
  code = main(argv)
  if (
    "flexivit_jax.running.distributed" in sys.modules
  ):  # loaded only by what may be several processes
    importlib.import_module("flexivit_jax.running.distributed").leave(code)
  if code == signals.STOPPED:
    signals.leave()
  sys.exit(code)


if __name__ == "__main__":
  entry()
