"""docs/troubleshooting.md quotes messages that the code has."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def texts() -> list[str]:
  """The text of each string of the package but docstrings; "..." stands for what an f-string fills in."""
  found = []
  for path in (REPOSITORY / "flexivit_jax").rglob("*.py"):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
      if id(node) in docstrings:
        continue
      if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
        found.append("".join(parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


def is_in(message: str, text: str) -> bool:
  """Whether the fixed words of a message follow each other in a text."""
  words = [re.escape(part.strip()) for part in message.split("...") if part.strip(" .")]
  return re.search(".*".join(words), text, re.DOTALL) is not None


@pytest.mark.full
def test_every_message_of_the_page_is_in_the_code():
  page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
  messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
  assert 15 <= len(messages) <= 40
  known = texts()
  assert not [message for message in messages if not any(is_in(message, text) for text in known)]


def test_a_message_that_was_reworded_is_found():
  assert is_in("... does not fit ... devices", "mesh=... does not fit ... devices: more")
  assert not is_in("... does not fit ... devices", "mesh=... does not suit ... devices")
