"""The progress line: its numbers, on a terminal and elsewhere."""

import io

from flexivit_jax.running.progress import Progress


class _Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _progress(stream, clock, **kw):
  return Progress(total_steps=100, batch_size=64, stream=stream, clock=clock, **kw)


def test_progress_prints_plain_lines_with_the_right_numbers():
  clock, stream = _Clock(), io.StringIO()
  progress = _progress(stream, clock, start_step=10, every_s=10)
  with progress.paused():
    clock.now += 1000
  for step in range(11, 31):
    clock.now += 1.0
    progress.update(step, data_wait=0.25, note="loss 0.5")
  assert progress.stats() == {"step_s": 1.0, "images_per_s": 64.0, "data_wait": 0.25, "eta_s": 70.0}
  lines = stream.getvalue().splitlines()
  want = "step 20/100 | 1000.0 ms/step | 64 images/s | data wait 25% | ETA 1:20 | loss 0.5"
  assert lines == [want, want.replace("20/100", "30/100").replace("1:20", "1:10")]


def test_progress_redraws_one_line_on_a_terminal_and_ends_it():
  clock, stream = _Clock(), io.StringIO()
  stream.isatty = lambda: True
  progress = _progress(stream, clock)
  for step in (98, 99, 100):
    clock.now += 3600
    progress.update(step)
  assert stream.getvalue().count("\r") == 3
  assert stream.getvalue().count("\n") == 1
  assert stream.getvalue().endswith("ETA 0:00\n")


def test_progress_survives_a_closed_terminal():
  stream = io.StringIO()
  progress = _progress(stream, _Clock(), every_s=0)
  stream.close()
  progress.update(1)
