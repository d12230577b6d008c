"""Every command that reads weights takes the options of reading them, and prints what a user should know of them."""

import pytest

from flexivit_jax import arguments, opening, weights

COMMANDS = {
  "eval": ["--config=c.py", "--checkpoint=w"],
  "inspect": ["w"],
  "convert": ["w", "out.npz"],
  "export": ["w", "out.zip", "--seqhw=4"],
  "flexify": ["--init=w", "--data=d", "--out=o"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_takes_the_options_of_reading(command):
  given = ["--num_heads=4", "--mean=0.4,0.5,0.6", "--std=0.2,0.2,0.3"]
  args = arguments.parse([command, *COMMANDS[command], *given])
  want = {"num_heads": 4, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)}
  assert arguments.loading(args) == want
  assert arguments.loading(arguments.parse([command, *COMMANDS[command]])) == {}


def test_notes_of_teachers_and_init_are_printed_once_in_a_process(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(opening, "_printed", set())
  record = {"notes": ["Heads are assumed."]}
  opening._print_notes(record)
  opening._print_notes(record)
  assert capsys.readouterr().err == "note: Heads are assumed.\n"
  weights.print_notes(record)
  assert capsys.readouterr().err == "note: Heads are assumed.\n"
