"""Counts how the package is built: modules, rooms, imports between rooms, the longest functions, `Any`.

    python tools/maintain/structure.py [CHECKOUT ...]

Each CHECKOUT is a folder with `flexivit_jax/` in it; default: this one. To compare with an older commit, check it out
first: `git worktree add ../before COMMIT`. Prints a Markdown table with one column for each checkout. Sources are only
parsed, never imported, so an older commit needs no environment.
"""

import argparse
import ast
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from flexivit_jax import cli, errors
from flexivit_jax.errors import UserError

PACKAGE = "flexivit_jax"
LONG = 80


class Function(NamedTuple):
  """A function or method, and how many lines it takes with its docstring."""

  lines: int
  name: str


def measure(checkout: pathlib.Path) -> dict[str, str]:
  """Returns what the table says of a checkout, a line for each count.

  Raises:
    UserError: there is no package in it.
  """
  root = checkout / PACKAGE
  top = sorted(root.glob("*.py"))
  if not top:
    raise UserError(f"{root} has no modules; give folders that have {PACKAGE}/ in them.")
  sources = {path: path.read_text() for path in sorted(root.rglob("*.py"))}
  trees = {path: ast.parse(text) for path, text in sources.items()}
  arrows = {
    (_room(path, root), target.split(".")[0])
    for path, tree in trees.items()
    for target in imports(tree, path, root)
  }
  arrows = {(a, b) for a, b in arrows if a != b and PACKAGE not in (a, b)}
  functions = sorted(
    (f for path, tree in trees.items() for f in _functions(tree, path)), reverse=True
  )
  train = root / "train.py"
  rooms = {path.relative_to(root).parts[0] for path in trees if path.parent != root}
  return {
    "modules at the top of the package": str(len(top)),
    "rooms (folders there)": str(len(rooms)),
    "imports between these": str(len(arrows)),
    "of these, part of a circle": str(len(circles(arrows))),
    "lines of the package": f"{sum(text.count(chr(10)) for text in sources.values()):,}",
    "lines of train.py": str(sources[train].count("\n")),
    "modules of ours that train.py imports": str(len(imports(trees[train], train, root))),
    "longest function": f"{functions[0].lines} lines ({functions[0].name})",
    f"functions of more than {LONG} lines": str(sum(f.lines > LONG for f in functions)),
    "`Any`": str(sum(len(re.findall(r"\bAny\b", text)) for text in sources.values())),
  }


def imports(tree: ast.Module, path: pathlib.Path, root: pathlib.Path) -> set[str]:
  """Returns the modules of the package that one imports, also inside functions, as "data.stream"."""
  found = set()
  for node in ast.walk(tree):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    ours = [name.split(".")[1:] for name in names if name.split(".")[0] == PACKAGE]
    found |= {_module(parts, root) for parts in ours}
  return found - {"", _module(list(path.relative_to(root).with_suffix("").parts), root)}


def circles(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
  """Returns the arrows from whose end a way leads back to their beginning."""
  reached = set(arrows)
  while more := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
    reached |= more
  return {(a, b) for a, b in arrows if (b, a) in reached}


def _module(parts: list[str], root: pathlib.Path) -> str:
  """The longest part of a dotted name that is a module or a folder; the rest is a name in it."""
  for end in range(len(parts), 0, -1):
    path = root.joinpath(*parts[:end])
    if path.with_suffix(".py").is_file() or path.is_dir():
      return ".".join(parts[:end])
  return ""


def _room(path: pathlib.Path, root: pathlib.Path) -> str:
  first = path.relative_to(root).parts[0].removesuffix(".py")
  return PACKAGE if first == "__init__" else first


def _functions(tree: ast.Module, path: pathlib.Path) -> Iterator[Function]:
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      assert node.end_lineno is not None
      yield Function(node.end_lineno - node.lineno + 1, f"{path.stem}.{node.name}")


def table(columns: dict[str, dict[str, str]]) -> str:
  """Returns a Markdown table of what was measured, a column for each checkout."""
  names = next(iter(columns.values()))
  rows = [["", *columns], ["---", *["---:"] * len(columns)]]
  rows += [[name, *(column[name] for column in columns.values())] for name in names]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  here = pathlib.Path(__file__).resolve().parents[2]
  parser.add_argument("checkout", type=pathlib.Path, nargs="*", default=[here])
  checkouts = parser.parse_args().checkout
  for path in checkouts:
    if not (path / "flexivit_jax").is_dir():
      raise errors.UserError(f"{path} has no flexivit_jax/; give the top folder of a checkout.")
  print(table({path.resolve().name: measure(path) for path in checkouts}))


if __name__ == "__main__":
  cli.tool(main)
