"""What one check found, and the time limit under which it runs."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from flexivit_jax import errors


class Finding(NamedTuple):
  """The result of one check.

  Attributes:
    check: its name.
    ok: whether nothing has to be done.
    said: what was measured, or what is wrong.
    todo: what to do; "" where `ok`.
    failure: "time", it did not end within its time and its thread still runs; "error", by an error that it does not
      know; else "".
  """

  check: str
  ok: bool
  said: str
  todo: str = ""
  failure: str = ""

  def line(self, width: int = 0, where: str = "") -> str:
    """Returns the finding as one line; `where` names the processes that it is of."""
    text = f"{'ok ' if self.ok else 'BAD'}  {self.check:{width}}  {where}{self.said}"
    return f"{text} -> {self.todo}" if self.todo else text


class NotGreenError(Exception):
  """Raised by a check: what is wrong, and what to do."""

  def __init__(self, said: str, todo: str):
    super().__init__(said, todo)
    self.said, self.todo = said, todo


def wrong(said: str, todo: str) -> NoReturn:
  """Ends a check that is not green."""
  raise NotGreenError(said, todo)


def within(seconds: float, check: str, call: Callable[[], str], todo: str) -> Finding:
  """Runs a check in a thread, and waits for it no longer than `seconds`.

  Args:
    seconds: its time limit.
    check: its name.
    call: returns what it measured; raises what `wrong` does, or any other error.
    todo: what to do about an error that does not say it, or where the time is over.
  """
  found: list[Finding] = []

  def run() -> None:
    try:
      found.append(Finding(check, True, _line(call())))
    except NotGreenError as e:
      found.append(Finding(check, False, _line(e.said), _line(e.todo)))
    except errors.UserError as e:  # it says what to do
      found.append(Finding(check, False, _line(str(e)), "as it says"))
    except Exception as e:
      found.append(
        Finding(check, False, f"{type(e).__name__}: {_line(str(e)):.300}", todo, "error")
      )

  thread = threading.Thread(target=run, name=f"doctor: {check}", daemon=True)
  thread.start()
  thread.join(seconds)
  if found:
    return found[0]
  return Finding(check, False, f"no answer within {seconds:g} s", todo, "time")


def _line(text: str) -> str:
  return " ".join(text.split())


# --- of several processes ---


def merged(of_each: list[list[Finding]]) -> list[tuple[str, Finding]]:
  """Returns (processes, finding) of all processes, each check once where all say the same.

  Of a check that is green everywhere it is the finding of process 0; else those that are not, with their processes.
  """
  names = dict.fromkeys(f.check for findings in of_each for f in findings)
  rows: list[tuple[str, Finding]] = []
  for name in names:
    found = [(i, f) for i, fs in enumerate(of_each) for f in fs if f.check == name]
    bad: dict[Finding, list[int]] = {}
    for i, finding in found:
      if not finding.ok:
        bad.setdefault(finding, []).append(i)
    if not bad:
      rows.append(("", found[0][1]))
    rows += [(_processes(i, len(of_each)), finding) for finding, i in bad.items()]
  return rows


def _processes(indices: list[int], count: int) -> str:
  if count == 1:
    return ""
  if len(indices) == count:
    return "all processes: "
  more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
  named = ", ".join(map(str, indices[:8]))
  return f"process{'es' if len(indices) > 1 else ''} {named}{more}: "


def as_json(rows: list[tuple[str, Finding]], processes: int) -> dict[str, Any]:
  """Returns everything for a program: `ok`, `processes`, and `checks` in their order."""
  checks = [{**f._asdict(), "of": where.removesuffix(": ")} for where, f in rows]
  return {"ok": all(f.ok for _, f in rows), "processes": processes, "checks": checks}


def as_text(rows: list[tuple[str, Finding]]) -> str:
  """Returns a line for each."""
  width = max(len(f.check) for _, f in rows)
  return "\n".join(f.line(width, where) for where, f in rows)
