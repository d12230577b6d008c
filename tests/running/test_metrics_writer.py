"""Metrics files that survive crashes and resumes."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.running.metrics_writer import MetricsWriter, read_rows

pytestmark = pytest.mark.faults


def _strict(path):
  def no_constant(name):
    raise AssertionError(f"{name} is not JSON")

  return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def test_rows_are_strict_json_and_on_disk_at_once(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  values = {"loss": float("nan"), "x": jnp.float32(np.inf), "n": np.int64(3), "seqhw": "12x10"}
  writer.write(1, values)
  want = {"step": 1, "loss": None, "x": None, "n": 3, "seqhw": "12x10"}
  assert _strict(tmp_path / "metrics.jsonl") == [want]
  writer.write(2, {"loss": jnp.bfloat16(0.5)})
  assert _strict(tmp_path / "metrics.jsonl") == [want, {"step": 2, "loss": 0.5}]
  writer.close()


def test_the_same_step_adds_to_its_row(tmp_path):
  with MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"loss": 1})
    writer.write(2, {"loss": 1000.5})
    writer.write(2, {"top1": 0.5})
    writer.write(2, {"loss": 2})
    writer.write(3, {"loss": 3})
  with MetricsWriter(tmp_path, tensorboard=False, restored_step=3) as writer:
    writer.write(3, {"top1": 0.75})
  assert read_rows(tmp_path / "metrics.jsonl") == [
    {"step": 1, "loss": 1},
    {"step": 2, "loss": 2, "top1": 0.5},
    {"step": 3, "loss": 3, "top1": 0.75},
  ]


@pytest.mark.parametrize(("restored", "kept"), [(-1, 0), (0, 0), (15, 1), (20, 2), (99, 3)])
def test_resume_drops_later_rows(tmp_path, restored, kept):
  with MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in (10, 20, 30):
      writer.write(step, {"loss": step / 3})
  before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
  with MetricsWriter(tmp_path, tensorboard=False, restored_step=restored) as writer:
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:kept]
    writer.write(100, {"loss": 0})
  steps = [row["step"] for row in _strict(tmp_path / "metrics.jsonl")]
  assert steps == [*(10, 20, 30)[:kept], 100]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_row_cut_short_by_a_crash_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
  assert [row["step"] for row in read_rows(path)] == [1]
  with MetricsWriter(tmp_path, tensorboard=False, restored_step=5) as writer:
    writer.write(6, {})
  assert _strict(path) == [{"step": 1, "loss": None}, {"step": 6}]
  path.write_text('oops\n{"step": 2}\n')
  with pytest.raises(UserError, match=r"metrics.jsonl:1 is not a row"):
    read_rows(path)


def test_errors_are_warned_of_once_and_stop_nothing(tmp_path, caplog):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {"loss": 1})
  with caplog.at_level(logging.WARNING):
    writer.write(2, {"loss": np.zeros(2)})  # Not a scalar.
    writer.write(0, {"loss": 0})  # Back in time.
    writer.write(3, {"loss": object()})
    writer.write(4, {"loss": 4})
  assert len(caplog.records) == 1
  assert "Training goes on" in caplog.text
  assert [row["step"] for row in _strict(tmp_path / "metrics.jsonl")] == [1, 4]
  writer.close()


class _FullDisk:
  """Writes half of each row while `full`."""

  def __init__(self, file):
    self.file, self.full = file, False

  def __getattr__(self, name):
    return getattr(self.file, name)

  def write(self, line):
    return self.file.write(line[: len(line) // 2] if self.full else line)


def test_a_full_disk_leaves_no_half_rows_once_there_is_space(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {"loss": 1})
  disk = writer._jsonl._file = _FullDisk(writer._jsonl._file)
  disk.full = True
  writer.write(2, {"a_name_longer_than_the_next_row_is": 2})
  disk.full = False
  writer.write(3, {})
  assert _strict(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1}, {"step": 3}]
  writer.close()


def test_an_unwritable_folder_stops_nothing(tmp_path, caplog):
  (tmp_path / "run").write_text("a file is in the way")
  with MetricsWriter(tmp_path / "run") as writer:
    for step in range(3):
      writer.write(step, {"loss": 1})
  assert len(caplog.records) == 2  # One a sink.


def test_tensorboard_files_hold_the_scalars(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(7, {"loss": jnp.float32(0.5), "nan": float("nan"), "seqhw": "5"})
    writer.flush()
  with MetricsWriter(tmp_path, restored_step=7) as writer:
    writer.write(8, {"loss": 0.25})
  scalars = [
    (e.step, v.tag, v.simple_value) for e in _events(tmp_path / "tb") for v in e.summary.value
  ]
  assert scalars[0] == (7, "loss", 0.5)
  assert scalars[1][:2] == (7, "nan")
  assert np.isnan(scalars[1][2])
  assert scalars[2:] == [(8, "loss", 0.25)]
  purged = [e.step for e in _events(tmp_path / "tb") if e.HasField("session_log")]
  assert purged == [0, 8]


def _events(folder):
  """Reads the TFRecord framing by hand: length, its crc, the event, its crc."""
  from tensorboardX.proto.event_pb2 import Event

  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      n = int.from_bytes(data[:8], "little")
      yield Event.FromString(data[12 : 12 + n])
      data = data[12 + n + 4 :]
