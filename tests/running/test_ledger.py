"""The parts of a run's wall time sum to it, over starts that were cut off too."""

import json
import signal
import subprocess
import sys
import time

import pytest

from flexivit_jax.running import ledger
from flexivit_jax.running.ledger import Ledger

pytestmark = pytest.mark.faults


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until it is moved."""
  now = [100.0]
  monkeypatch.setattr(ledger.time, "perf_counter", lambda: now[0])

  def move(seconds):
    now[0] += seconds

  return move


def begin(file, step):
  book = Ledger(file, ledger.time.perf_counter())
  book.go_on_from(step)
  book.write()
  return book


def start(file, clock, step):
  """A start of 4 s of start-up, 10 s of compilation, and 3 x (1 s of data, 2 s of steps)."""
  book = begin(file, step)
  clock(4)
  with book.of("compilation"):
    clock(10)
  book.steps_begin()
  for i in range(3):
    with book.of("data wait"):
      clock(1)
    clock(2)
    book.write(step + i + 1)
    if i == 0:
      with book.of("checkpoints"):
        clock(0.5)
      book.saved(step + 1)
  return book


def test_each_second_is_in_one_part(tmp_path, clock):
  file = tmp_path / "ledger.json"
  start(file, clock, 0)
  found = ledger.shares(file)
  assert found == pytest.approx(
    {
      "start-up": 4, "compilation": 10, "data wait": 3, "steps": 6, "evaluation": 0,
      "checkpoints": 0.5, "lost work": 0, "wall": 23.5,
    }
  )  # fmt: skip
  assert sum(found[part] for part in ledger.PARTS) == pytest.approx(found["wall"])


def test_what_was_done_after_the_last_save_is_lost(tmp_path, clock):
  file = tmp_path / "ledger.json"
  start(file, clock, 0)  # saved at step 1, cut off after step 3: two times 3 s
  book = start(file, clock, 1)
  assert book.lost == pytest.approx(6)
  found = ledger.shares(file)
  assert found["lost work"] == pytest.approx(6) and found["wall"] == pytest.approx(47)
  assert sum(found[part] for part in ledger.PARTS) == pytest.approx(found["wall"])


def test_nothing_is_lost_where_the_last_step_was_saved(tmp_path, clock):
  file = tmp_path / "ledger.json"
  start(file, clock, 0)
  assert begin(file, 3).lost == 0


def parts(start):
  return {k: v for k, v in start["seconds"].items() if v}


def test_a_save_that_was_begun_and_failed_costs_what_was_done_since_the_one_before(tmp_path, clock):
  file = tmp_path / "ledger.json"
  book = start(file, clock, 0)  # saved at step 1
  book.saved(3)
  clock(2)
  book.write(4)
  assert begin(file, 1).lost == pytest.approx(6 + 2)  # not that of step 3


def test_a_start_that_saved_nothing_loses_its_steps_and_not_its_start_up(tmp_path, clock):
  file = tmp_path / "ledger.json"
  book = begin(file, 0)
  clock(4)
  book.steps_begin()
  clock(5)
  book.write(2)
  assert begin(file, 0).lost == pytest.approx(5)
  assert parts(json.loads(file.read_text())[0]) == pytest.approx({"start-up": 4, "lost work": 5})


def test_a_step_further_back_loses_the_work_of_several_starts_once(tmp_path, clock):
  file = tmp_path / "ledger.json"
  start(file, clock, 0)  # saved at step 1: 3 s of data and steps, 0.5 of saving; then 6 s
  start(file, clock, 1)  # 3 s, saved at step 2, 6 s
  assert begin(file, 2).lost == pytest.approx(6)
  assert begin(file, 1).lost == pytest.approx(3.5)
  assert begin(file, 1).lost == 0
  starts = json.loads(file.read_text())
  assert [s["seconds"].get("lost work", 0) for s in starts] == pytest.approx([6, 9.5, 0, 0, 0])
  for s in starts:
    assert sum(s["seconds"].values()) == pytest.approx(s["wall"])


def test_a_start_that_is_stopped_before_its_first_step_has_its_row(tmp_path, clock):
  file = tmp_path / "ledger.json"
  book = begin(file, 0)
  with book.of("compilation"):
    clock(7)
  book.write()
  assert ledger.shares(file)["wall"] == pytest.approx(7)
  assert begin(file, 0).lost == 0


def test_one_that_is_refused_has_none(tmp_path, clock):
  file = tmp_path / "ledger.json"
  Ledger(file, ledger.time.perf_counter()).write()
  assert not file.exists()


def test_a_part_inside_another_is_counted_once(tmp_path, clock):
  book = begin(tmp_path / "ledger.json", 0)
  with book.of("evaluation"):
    clock(1)
    with book.of("data wait"):
      clock(2)
    clock(4)
  book.write(0)
  found = ledger.shares(tmp_path / "ledger.json")
  assert (found["evaluation"], found["data wait"], found["wall"]) == pytest.approx((5, 2, 7))


def test_it_is_said_in_percent(tmp_path, clock):
  start(tmp_path / "ledger.json", clock, 0)
  said = ledger.text(ledger.shares(tmp_path / "ledger.json"))
  assert said == (
    "0 min 24 s: compilation 42.6%, steps 25.5%, start-up 17.0%, data wait 12.8%, checkpoints 2.1%"
  )


def test_what_was_not_counted_is_missing_from_the_hundred(tmp_path, clock):
  found = ledger.shares(start(tmp_path / "ledger.json", clock, 0) and tmp_path / "ledger.json")
  assert ledger.text(found | {"wall": 2 * found["wall"]}).startswith(
    "0 min 47 s: compilation 21.3%"
  )


TIMED = """
import sys, time
time.sleep(1.0)  # as imports take
from flexivit_jax import cli
from flexivit_jax.running.checkpoint import Checkpoints
close = Checkpoints.close
Checkpoints.close = lambda self: (time.sleep(1.0), close(self))  # as a save of gigabytes takes
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stop", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_run_takes_as_long_as_a_clock_beside_it_says(tmp_path, stop):
  """From the start of the process to its end, waiting for the last save included; stopped while it compiles, too."""
  folder = tmp_path / "run"
  command = [sys.executable, "-c", TIMED, "train", "--config=digits:debug", f"--workdir={folder}"]
  began = time.monotonic()
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
    for line in process.stderr:
      if stop and "parameters on" in line:
        process.send_signal(signal.SIGTERM)
    assert process.wait() == (75 if stop else 0)
  real = time.monotonic() - began
  found = ledger.shares(folder / "ledger.json")
  print(f"{real:.2f} s, of which {found['wall']:.2f} are known")
  assert -0.1 < real - found["wall"] < 0.2 * real + 0.5
  assert found["start-up"] > 1
  assert stop or found["checkpoints"] > 1
  assert sum(found[part] for part in ledger.PARTS) == pytest.approx(found["wall"], rel=0.01)


def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path, clock):
  file = tmp_path / "ledger.json"
  file.write_text("[{")
  start(file, clock, 0)
  assert len(json.loads(file.read_text())) == 1
  assert ledger.shares(tmp_path / "none.json") == {}


@pytest.mark.parametrize("key", ["wall", "seconds", "saves"])
@pytest.mark.parametrize("value", [None, [], "x", {"0": []}])
def test_a_damaged_ledger_counts_as_none_wherever_the_damage_is(tmp_path, clock, key, value):
  file = tmp_path / "ledger.json"
  start(file, clock, 0)
  starts = json.loads(file.read_text())
  assert ledger.shares(file)
  file.write_text(json.dumps([starts[0] | {key: value}]))
  assert ledger.shares(file) == {}
  start(file, clock, 0)  # a run goes on all the same
  assert ledger.shares(file)


def test_one_that_cannot_be_written_is_warned_of_once(tmp_path, clock, caplog):
  file = tmp_path / "no" / "ledger.json"
  start(file, clock, 0)
  assert [r.getMessage() for r in caplog.records] == [
    f"{file} cannot be written: No such file or directory. Training goes on."
  ]
