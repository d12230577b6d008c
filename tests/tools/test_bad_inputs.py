"""No command ends in a traceback, whatever is wrong with its files, folders and arguments."""

import csv
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "maintain" / "bad_inputs"


@pytest.mark.slow
def test_no_bad_input_ends_in_a_traceback(tmp_path):
  out = tmp_path / "counts.csv"
  # Another seed than that of the table in docs/reliability.md.
  command = [sys.executable, TOOL, "140", "--seed=1", "--processes=1", f"--out={out}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
  ends = next(csv.reader(out.read_text().splitlines()))[1:]
  assert set(ends) <= {"exit 0", "exit 1", "exit 2"}
  assert "140 inputs of seed 1" in done.stdout


def test_an_input_is_the_same_for_a_seed_and_number_alone(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(str(TOOL))
  import making

  original = tmp_path / "a.npz"
  original.write_bytes(bytes(range(200)))
  made = {kind: [original] for kind in ("weights", "image", "photos", "config", "run")}
  made |= {kind: [original] for kind in ("export", "bad_step", "results")}

  def draw(folder: str) -> list[tuple[str, str]]:
    rows = []
    for number in (3, 7, 11):
      room = tmp_path / folder / str(number)
      room.mkdir(parents=True)
      command, argv, _ = making.bad_input(number, 5, made, room)
      files = sorted(p.read_bytes() for p in room.rglob("*") if p.is_file())
      rows.append((command, " ".join(argv).replace(str(room), "."), files))
    return rows

  assert draw("once") == draw("again")
