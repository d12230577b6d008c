"""The parts of a run's wall time sum to it, over starts that were cut off too."""

import json

import pytest

from flexivit_jax import ledger
from flexivit_jax.ledger import Ledger


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until it is moved."""
  now = [100.0]
  monkeypatch.setattr(ledger.time, "perf_counter", lambda: now[0])

  def move(seconds):
    now[0] += seconds

  return move


def start(file, clock, step):
  """A start of 4 s of start-up, 10 s of compilation, and 3 x (1 s of data, 2 s of steps)."""
  book = Ledger(file, ledger.time.perf_counter(), step)
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
  assert Ledger(file, ledger.time.perf_counter(), 3).lost == 0


def test_a_part_inside_another_is_counted_once(tmp_path, clock):
  book = Ledger(tmp_path / "ledger.json", ledger.time.perf_counter(), 0)
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


def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path, clock):
  file = tmp_path / "ledger.json"
  file.write_text("[{")
  start(file, clock, 0)
  assert len(json.loads(file.read_text())) == 1
  assert ledger.shares(tmp_path / "none.json") == {}


def test_one_that_cannot_be_written_is_warned_of_once(tmp_path, clock, caplog):
  file = tmp_path / "no" / "ledger.json"
  start(file, clock, 0)
  assert [r.getMessage() for r in caplog.records] == [
    f"{file} cannot be written: No such file or directory. Training goes on."
  ]
