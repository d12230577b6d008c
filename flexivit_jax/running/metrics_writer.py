"""The metrics files of a run: metrics.jsonl, TensorBoard's event files, and other places for numbers."""

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from flexivit_jax import files
from flexivit_jax.errors import UserError

Row = dict[str, Any]  # of metrics.jsonl: "step", and numbers or text by name


class MetricsWriter:
  """Writes RUN/metrics.jsonl and TensorBoard event files in RUN/tb.

  metrics.jsonl is strict JSON, one object a line: `{"step": int, name: number or string, ...}`. NaN
  and infinities, which JSON does not have, become null (TensorBoard shows them as they are). Steps
  increase and are unique: writing at the last step again adds to its row. Each row reaches the
  file at once. Whatever goes wrong in here is logged once a sink and never stops a training.

  """

  def __init__(
    self,
    run_dir: str | os.PathLike[str],
    *,
    restored_step: int = -1,
    tensorboard: bool = True,
    writing: bool = True,
    others: Mapping[str, Callable[[], Any]] = {},
  ):
    """Opens the files.

    Args:
      run_dir: folder of the run; made if absent.
      restored_step: of the checkpoint that the run resumes from. Rows of later steps, which the run
        is about to repeat, are dropped; -1, a fresh run, drops all.
      tensorboard: whether to write event files.
      writing: False on all processes but one, where nothing is opened or written.
      others: name -> opens another place for numbers, of the methods `write(step, numbers)`, `flush` and `close`.
    """
    self._warned: set[str] = set()
    self._jsonl: _Jsonl | None = None
    self._tb: Any = None
    self._others: dict[str, Any] = {}
    if not writing:
      return
    run_dir = pathlib.Path(run_dir)
    with self._guard("metrics.jsonl"):
      run_dir.mkdir(parents=True, exist_ok=True)
      self._jsonl = _Jsonl(run_dir / "metrics.jsonl", restored_step)
    with self._guard("TensorBoard"):
      self._tb = _open_tensorboard(run_dir / "tb", restored_step) if tensorboard else None
    for name, opening in others.items():
      with self._guard(name):
        self._others[name] = opening()

  def write(self, step: int, values: Mapping[str, object]) -> None:
    """Writes scalars (numbers, 0-d arrays; strings go to metrics.jsonl only) at a step."""
    if self._jsonl is not None:
      with self._guard("metrics.jsonl"):
        self._jsonl.write(int(step), {name: _scalar(v) for name, v in values.items()})
    for name, other in self._others.items():
      with self._guard(name):
        other.write(int(step), _numbers(values))
    if self._tb is not None:
      with self._guard("TensorBoard"):
        self._tb.file_writer.add_summary(_summary(_numbers(values)), int(step))

  def flush(self) -> None:
    """Makes TensorBoard's files complete (metrics.jsonl always is)."""
    if self._tb is not None:
      with self._guard("TensorBoard"):
        self._tb.flush()
    for name, other in self._others.items():
      with self._guard(name):
        other.flush()

  def close(self) -> None:
    """Closes the files; writing afterwards does nothing."""
    jsonl, tb, self._jsonl, self._tb = self._jsonl, self._tb, None, None
    if jsonl is not None:
      with self._guard("metrics.jsonl"):
        jsonl.close()
    if tb is not None:
      with self._guard("TensorBoard"):
        tb.close()
    others, self._others = self._others, {}
    for name, other in others.items():
      with self._guard(name):
        other.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @contextlib.contextmanager
  def _guard(self, sink: str) -> Iterator[None]:
    try:
      yield
    except Exception as e:  # Any logger's fault: a full disk, a lost mount, a bad value.
      if sink not in self._warned:
        self._warned.add(sink)
        logging.getLogger(__name__).warning(
          "%s: %s: %s. Training goes on; further errors of %s are not shown.",
          *(sink, type(e).__name__, e, sink),
        )


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
  """Returns the rows of a metrics.jsonl; a last line cut short by a crash is left out.

  Raises:
    UserError: a line other than the last is no JSON object.
  """
  lines = pathlib.Path(path).read_bytes().split(b"\n")
  rows = []
  for i, line in enumerate(lines[:-1]):  # What follows the last newline is incomplete, or empty.
    try:
      rows.append(_parse_row(line))
    except ValueError as e:
      raise UserError(f"{path}:{i + 1} is not a row of metrics: {e}. Repair or remove it.") from e
  return rows


class _Jsonl:
  """An append-only file whose last row can be added to."""

  def __init__(self, path: pathlib.Path, restored_step: int):
    rows = [r for r in _valid_rows(path) if r["step"] <= restored_step]
    rows = list({row["step"]: row for row in rows}.values())
    files.write_atomically(path, b"".join(map(_line, rows)), durable=True)
    # Unbuffered, so that a failed write leaves nothing behind that a later one would repeat.
    self._file = path.open("r+b", buffering=0)
    self._row: Row = rows[-1] if rows else {"step": -1}
    self._end = path.stat().st_size
    self._start = self._end - len(_line(self._row)) if rows else self._end
    self._failed = False  # a write, of which something may be left behind the end

  def write(self, step: int, values: Mapping[str, object]) -> None:
    if step < self._row["step"]:
      raise ValueError(f"step {step} after step {self._row['step']}")
    again = step == self._row["step"]
    row = (self._row if again else {}) | {"step": step} | dict(values, step=step)
    start, line = self._start if again else self._end, _line(row)
    cut, self._failed = again or self._failed, True
    self._file.seek(start)
    if self._file.write(line) != len(line):
      raise OSError("disk full")
    if cut:  # not always: it costs more than all the rest of a row
      self._file.truncate()
    self._failed = False
    self._row, self._start, self._end = row, start, start + len(line)

  def close(self) -> None:
    self._file.close()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
  return {k: float(v) for k, v in values.items() if not isinstance(v, str)}


def _summary(values: Mapping[str, float]) -> Any:
  """One event for all numbers of a row: each costs the writer's thread as much."""
  from tensorboardX.proto.summary_pb2 import Summary

  return Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])


def _valid_rows(path: pathlib.Path) -> list[Row]:
  """Returns the rows that can be read: a crash may have cut one short."""
  rows = []
  for line in path.read_bytes().split(b"\n") if path.exists() else []:
    with contextlib.suppress(ValueError):
      rows.append(_parse_row(line))
  return sorted(rows, key=lambda row: row["step"])


def _parse_row(line: bytes) -> Row:
  row = json.loads(line, parse_constant=lambda _: None)
  if not isinstance(row, dict) or not isinstance(row.get("step"), int):
    raise ValueError("no object with an integer 'step'")
  return row


def _line(row: Row) -> bytes:
  return (json.dumps(row, allow_nan=False) + "\n").encode()


def _scalar(value: Any) -> int | float | str | None:
  if isinstance(value, str):
    return value
  value = np.asarray(value).item()  # Raises for arrays of more than one number.
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(path: pathlib.Path, restored_step: int) -> Any:
  import tensorboardX  # Here, as it takes a third of a second and pulls in protobuf.

  # TensorBoard forgets the earlier events from purge_step on, which the run is about to repeat.
  # Its file names count whole seconds: a run resumed within one would overwrite, hence the suffix.
  return tensorboardX.SummaryWriter(
    str(path), purge_step=restored_step + 1, filename_suffix=f".{time.time_ns()}"
  )
