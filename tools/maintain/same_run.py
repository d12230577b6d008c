"""Compares two run folders bit for bit: is the code after a change the same code?

    python tools/maintain/same_run.py RUN_A RUN_B

Compared are the drawn sizes, every row of metrics.jsonl, every eval*.json, and of the newest checkpoint its record and
each array of the parameters and of the optimizer state, by name, shape, dtype and the sha256 of its bytes. Prints one
line that says what is equal and exits with 0, or prints the first difference and exits with 1.

Ignored are only measured times, which differ between two runs of the same code: TIMES in the rows of metrics.jsonl,
TIMES in the rows of eval*.json. Nothing else is ignored, and numbers are compared as they are written, without
tolerance. Run both on the same machine with the same JAX: other processors compute other last bits.
"""

import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flexivit_jax import trees

# Of metrics.jsonl: seconds a step, images/s, the share of time spent waiting for data. Of eval.json: milliseconds.
TIMES = ("step_s", "images_per_s", "data_wait", "ms")


class DifferentError(Exception):
  """The first difference between two runs."""


def compare(a: pathlib.Path, b: pathlib.Path) -> str:
  """Returns a line that says what is equal.

  Raises:
    DifferentError: the runs differ; the first difference.
    FileNotFoundError: one of them lacks its config.json, metrics.jsonl or checkpoints.
  """
  rows = [_rows(run) for run in (a, b)]
  axes = json.loads((a / "config.json").read_text())["flexi"]
  sizes = [[{k: row.get(k) for k in ("step", *axes)} for row in run] for run in rows]
  _equal("the drawn sizes", *sizes)
  _equal("metrics.jsonl", *rows)
  evals = [_evaluations(run) for run in (a, b)]
  _equal("", *evals)
  steps = [_newest(run) for run in (a, b)]
  _equal("the newest checkpoint", *(step.name for step in steps))
  _equal("its record", *(json.loads((s / "record" / "metadata").read_text()) for s in steps))
  counts = []
  for item in ("params", "state"):
    sums = [_sums(step / item) for step in steps]
    _equal(item, *sums)
    counts.append(len(sums[0]))
  return (
    f"equal: {len(rows[0])} drawn sizes and rows of metrics.jsonl, {', '.join(evals[0]) or 'no eval.json'}, and of"
    f" checkpoint {steps[0].name} its record, {counts[0]} arrays of parameters and {counts[1]} of the optimizer state"
  )


def _equal(where: str, a: Any, b: Any) -> None:
  """Raises `DifferentError` at the first place where two values of JSON differ; also 1 and 1.0 differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in [*a, *(k for k in b if k not in a)]:
      if key not in a or key not in b:
        raise DifferentError(f"{where} {key}: only in {'the first' if key in a else 'the second'}")
      _equal(f"{where} {key}".strip(), a[key], b[key])
  elif isinstance(a, list) and isinstance(b, list):
    if len(a) != len(b):
      raise DifferentError(f"{where}: {len(a)} and {len(b)} entries")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
      _equal(f"{where}[{i}]", x, y)
  elif repr(a) != repr(b):
    raise DifferentError(f"{where}: {a!r} and {b!r}")


def _rows(run: pathlib.Path) -> list[dict[str, Any]]:
  lines = (run / "metrics.jsonl").read_text().splitlines()
  return [_without_times(json.loads(line)) for line in lines]


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in row.items() if k not in TIMES}


def _evaluations(run: pathlib.Path) -> dict[str, Any]:
  found = {path.name: json.loads(path.read_text()) for path in sorted(run.glob("eval*.json"))}
  return {
    name: e | {"rows": [_without_times(row) for row in e["rows"]]} for name, e in found.items()
  }


def _newest(run: pathlib.Path) -> pathlib.Path:
  steps = [p for p in (run / "checkpoints").glob("*") if p.name.isdigit()]
  if not steps:
    raise FileNotFoundError(f"no checkpoint in {run}")
  return max(steps, key=lambda p: int(p.name)).absolute()


def _sums(folder: pathlib.Path) -> dict[str, str]:
  """The dtype, shape and sha256 of each array, by name."""
  return {
    name: f"{x.dtype}{list(x.shape)} {hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()}"
    for name, x in trees.flatten(read_arrays(folder)).items()
  }


def read_arrays(folder: pathlib.Path) -> dict[str, Any]:
  """The tree of NumPy arrays of one item of a checkpoint, RUN/checkpoints/STEP/params or /state.

  Read with Orbax alone and not with our code for checkpoints, which may be what has changed.
  """
  stored = dict(ocp.StandardCheckpointHandler().metadata(epath.Path(folder)).items())
  numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
  args = ocp.args.PyTreeRestore(restore_args=numpy)
  tree = ocp.PyTreeCheckpointHandler().restore(epath.Path(folder), args=args)
  return jax.tree.map(np.asarray, tree)


def command(argv: list[str]) -> int:
  """Returns the exit code."""
  if len(argv) != 2:
    print(f"usage: same_run.py RUN_A RUN_B, got {len(argv)} arguments", file=sys.stderr)
    return 2
  try:
    print(compare(*(pathlib.Path(arg) for arg in argv)))
  except FileNotFoundError as e:
    print(f"same_run.py: error: {e}", file=sys.stderr)
    return 2
  except DifferentError as e:
    print(f"different: {e}")
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(command(sys.argv[1:]))
