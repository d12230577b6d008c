"""A signal, wherever it comes, costs nothing: what is done is saved, and the same command ends where it would have."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from flexivit_jax import cli, experiment, heartbeat, train as train_lib
from flexivit_jax.data import loader
from flexivit_jax.data.loader import TrainBatches
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators.per_size import PerSize
from flexivit_jax.running import exit_codes, ledger, metrics_writer, signals
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.training.step_programs import StepPrograms

pytestmark = pytest.mark.faults

DATA = dict(name="synthetic", image_size=12, num_classes=3, num_examples=40)
PP = "value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
TIMES = ("step_s", "images_per_s", "data_wait")
CONFIG = dict(
  total_steps=12,
  log_every=4,
  accumulate=2,
  input=dict(
    data=dict(DATA, split="train"),
    pp=f"decode|flip_lr|randaug(2, 10)|{PP}",
    batch_size=8,  # five steps an epoch
    threads=0,
  ),
  model=dict(variant="mu", patch_size=(4, 4), posemb_size=(3, 3), dropout=0.1),
  flexi=dict(seqhw=dict(v=(2, 3))),
  objective=dict(name="self_distill", ema=0.9, mixup_p=0.5, size=dict(seqhw=3)),
  optim=dict(lr=1e-2, wd=1e-3, clip=1.0, schedule=dict(warmup_steps=2)),
  evals=dict(
    test=dict(
      data=dict(DATA, split="test"), pp=PP, batch_size=20, seqhw=(2, 3), every_steps=5, threads=0
    )
  ),
  checkpoint=dict(every_steps=3, keep=None),
)


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def final(workdir):
  """The bytes of all arrays of the last checkpoint, and all rows but for the times."""
  exp = experiment.from_config(CONFIG)
  checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
  state = train_lib.preparation.first_state(exp, sharding.make_mesh())
  restored = checkpoints.restore(12, state.params, train_lib.preparation.rest(state))
  checkpoints.close()
  arrays = [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(restored[:2]))]
  rows = metrics_writer.read_rows(workdir / "metrics.jsonl")
  return arrays, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run, with everything random on."""
  return final(train_lib.train(CONFIG, tmp_path_factory.mktemp("whole")))


@contextlib.contextmanager
def stopped_after(monkeypatch, step):
  """A signal comes while this step is made."""
  make = StepPrograms.__call__

  def making(self, size, state, *args):
    if int(state.step) == step - 1:
      terminate()
    return make(self, size, state, *args)

  with monkeypatch.context() as patch:
    patch.setattr(StepPrograms, "__call__", making)
    yield


def check_resumed(whole, workdir):
  train_lib.train(CONFIG, workdir)
  arrays, rows = final(workdir)
  assert arrays == whole[0]
  assert rows == whole[1]


@pytest.mark.slow
def test_a_run_that_is_stopped_after_each_of_its_steps_is_the_run(whole, tmp_path, monkeypatch):
  """In the middle of an epoch, at an evaluation, at a save, at a log."""
  for step in range(1, 12):
    with stopped_after(monkeypatch, step), pytest.raises(signals.Stopped):
      train_lib.train(CONFIG, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints", keep=None).latest_step() == step
  check_resumed(whole, tmp_path)


def test_a_step_in_hand_is_finished_and_saved(whole, tmp_path, monkeypatch, capsys):
  step = 5
  with stopped_after(monkeypatch, step), pytest.raises(signals.Stopped, match="SIGTERM"):
    train_lib.train(CONFIG, tmp_path)
  assert Checkpoints(tmp_path / "checkpoints", keep=None).latest_step() == step
  assert f"stopped after step {step}, which is saved" in capsys.readouterr().err
  check_resumed(whole, tmp_path)
  said = capsys.readouterr().err
  assert f"step {step}/12, epoch {step / 5:.2f}, {8 * step} images seen; 0 s of work lost" in said


@pytest.mark.full
def test_an_evaluation_is_left_at_once_and_made_again(whole, tmp_path, monkeypatch):
  def evaluating(self, params):
    terminate()
    time.sleep(60)

  with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
    patch.setattr(PerSize, "run", evaluating)
    begun = time.monotonic()
    train_lib.train(CONFIG, tmp_path)
  assert time.monotonic() - begun < 50
  rows = metrics_writer.read_rows(tmp_path / "metrics.jsonl")
  assert rows[-1]["step"] == 5 and not any("test/" in key for row in rows for key in row)
  check_resumed(whole, tmp_path)


@pytest.mark.full
def test_the_rows_of_an_evaluation_are_written_all_or_none(whole, tmp_path, monkeypatch):
  """A kill, and then a signal, right after the first write with results."""
  write = metrics_writer.MetricsWriter.write

  def stopping_at(first, end):
    def writing(self, step, values):
      write(self, step, values)
      if step == first and any(key.startswith("test/") for key in values):
        end()

    with monkeypatch.context() as patch:
      patch.setattr(metrics_writer.MetricsWriter, "write", writing)
      train_lib.train(CONFIG, tmp_path)

  def kill():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stopping_at(5, kill)
  # From the checkpoint of step 3: the evaluation of 5 is made once more.
  with pytest.raises(signals.Stopped):
    stopping_at(5, terminate)
  assert Checkpoints(tmp_path / "checkpoints", keep=None).latest_step() == 5
  check_resumed(whole, tmp_path)


@pytest.mark.full
def test_what_a_kill_costs_is_counted(whole, tmp_path, train_until, capsys):
  """Steps were logged after the last save: their time is lost, and the run says so."""
  train_until(CONFIG, tmp_path, 5)  # saved at 3, logged at 4 and 5
  check_resumed(whole, tmp_path)
  assert "step 3/12" in capsys.readouterr().err
  found = ledger.shares(tmp_path / "ledger.json")
  assert found["lost work"] > 0
  assert sum(found[part] for part in ledger.PARTS) == pytest.approx(found["wall"], rel=0.01)


@pytest.mark.full
def test_a_wait_for_data_is_left_at_once(whole, tmp_path, monkeypatch):
  following = TrainBatches.__next__

  def waiting(self):
    if self.get_state()["step"] == 7:
      terminate()
      time.sleep(60)
    return following(self)

  with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
    patch.setattr(TrainBatches, "__next__", waiting)
    train_lib.train(CONFIG, tmp_path)
  assert Checkpoints(tmp_path / "checkpoints", keep=None).latest_step() == 7
  check_resumed(whole, tmp_path)


@pytest.mark.parametrize("where", ["build", "compile"])
def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch, where):
  def ending(*args, **kwargs):
    terminate()
    time.sleep(60)

  owner, name = {
    "build": (train_lib, "report_costs"),
    "compile": (compilation._Lowered, "compile"),
  }[where]
  with pytest.raises(signals.Stopped):
    monkeypatch.setattr(owner, name, ending if where == "build" else lambda self: terminate())
    train_lib.train(CONFIG, tmp_path / "run")
  assert not list((tmp_path / "run").glob("checkpoints/*"))


class Ends:
  """What is garbage here gets a signal."""

  def __del__(self):
    terminate()


def collecting():
  """A signal comes in a callback of the garbage collector."""

  def once(phase, info):
    gc.callbacks.remove(once)
    terminate()

  gc.callbacks.append(once)
  gc.collect()


@pytest.mark.parametrize("where", [Ends, collecting])
def test_a_signal_that_python_swallows_is_obeyed_all_the_same(monkeypatch, where):
  swallowed = []
  monkeypatch.setattr(sys, "unraisablehook", lambda found: swallowed.append(found.exc_type))
  begun = time.monotonic()
  with (
    signals.catch() as stop,
    pytest.raises(signals.Stopped, match="SIGTERM"),
    stop.interruptible(),
  ):
    where()
    assert set(swallowed) == {signals.Stopped}  # once, or again where collecting takes long
    time.sleep(60)
  # Not the 60 s of sleep; collecting takes long on a busy machine.
  assert time.monotonic() - begun < 50
  assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("error", [ImportError, UserError])
def test_a_library_that_makes_an_error_of_a_signal_does_not_hide_it(error):
  """As an extension module that is initialized: one of seventy signals to a run in a bucket ended it with code 2."""
  with signals.catch() as stop:
    with pytest.raises(error), stop.interruptible():
      raise error("no signal has come")
    with pytest.raises(signals.Stopped, match="SIGTERM"), stop.interruptible():
      try:
        terminate()
        time.sleep(60)
      except BaseException as e:
        raise error("initialization failed") from e


def test_a_signal_between_the_lines_that_count_is_obeyed_after_them():
  """Raised before the count is back at none, it would come again while the step in hand is being saved."""
  there = eval(compile("sys._getframe()", contextlib.__file__, "eval"))
  later = False
  with signals.catch() as stop:
    with pytest.raises(signals.Stopped), stop.interruptible():
      stop._handle(signal.SIGTERM, there)
      later = True
      time.sleep(60)
    assert later and stop._at_once == 0


def test_a_signal_is_not_obeyed_again_where_it_may_not_be(monkeypatch):
  """Where it has been, the step in hand is being saved."""
  monkeypatch.setattr(signals, "_AGAIN_S", 0.05)
  with signals.catch() as stop:
    with pytest.raises(signals.Stopped), stop.interruptible():
      terminate()
      time.sleep(60)
    time.sleep(0.3)


COMPILING = """
import os, signal, sys, threading, time
from flexivit_jax import cli
from flexivit_jax.devices import compilation
def compile(self):  # as XLA: nothing interrupts it
  threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
  time.sleep(60)
compilation._Lowered.compile = compile
cli.entry(sys.argv[1:])
"""


def test_a_program_that_is_being_compiled_is_not_waited_for(tmp_path):
  """Nor are those that wait for their turn; the process ends."""
  command = [sys.executable, "-c", COMPILING, "train", "--config=configs/digits.py:debug"]
  command.append(f"--workdir={tmp_path / 'run'}")
  run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
  assert run.returncode == exit_codes.STOPPED, run.stderr
  assert "stopped by SIGTERM; the same command goes on" in run.stderr


def test_the_command_ends_with_75(monkeypatch, capsys, tmp_path):
  def ending(*_, **__):
    terminate()

  monkeypatch.setattr(train_lib, "report_costs", ending)
  code = cli.main(["train", "--config=configs/digits.py:debug", f"--workdir={tmp_path / 'run'}"])
  assert code == exit_codes.STOPPED == 75
  assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().err


IMPORTING = """
import os, signal, sys
class Import:
  def find_spec(name, *_):
    if name == "flexivit_jax.train":
      os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Import)
from flexivit_jax import cli
cli.entry(["train", "--config=none", "--workdir=none"])
"""


def test_a_signal_while_the_command_imports_ends_with_75():
  run = python(IMPORTING)
  assert run.returncode == exit_codes.STOPPED
  assert run.stderr == "flexivit: stopped by SIGTERM; the same command goes on\n"


SECOND = """
import os, signal, time
from flexivit_jax.running import signals
with signals.catch():
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
  time.sleep(60)
"""
HANG = """
import time
from flexivit_jax.running import signals
signals.DATA_NOTE_S = 0.3
signals._WORD_S = 0.5
def leave(reason):
  print("word:", reason, flush=True)
  time.sleep(60)
dog = signals.Watchdog(1.0, lambda line: print(line, flush=True), blame=lambda: "a", leave_word=leave)
with dog.data():
  time.sleep(60)
"""


HANG_AT_THE_START = """
import sys, time
from flexivit_jax import cli
from flexivit_jax.experiment import build
build.REAL = build.REAL._replace(source=lambda **_: time.sleep(60))
sys.exit(cli.main(["train", "--config=digits:debug", "--workdir=none", "--config.hang_after=1"]))
"""


def python(code, **options):
  return subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False, **options
  )


def test_a_second_signal_ends_it_at_once():
  run = python(SECOND)
  assert run.returncode == 128 + signal.SIGTERM
  assert run.stderr == "second signal, SIGTERM: ended at once\n"


def test_a_run_that_stands_still_says_where_and_ends():
  run = python(HANG)
  assert run.returncode == exit_codes.HUNG
  reason = "nothing has gone on for 1 s (waiting for data), more than hang_after=1; a"
  assert re.fullmatch(rf"waiting for data for \d s\nword: {re.escape(reason)}\n", run.stdout)
  assert reason in run.stderr
  assert 'File "<string>", line 11' in run.stderr  # where it stood


def test_so_does_one_whose_data_cannot_be_opened(tmp_path):
  run = python(HANG_AT_THE_START, cwd=tmp_path)
  assert run.returncode == exit_codes.HUNG
  assert "more than hang_after=1" in run.stderr and "build.py" in run.stderr
  assert not (tmp_path / "none").exists()


def test_the_watchdog_is_quiet_while_something_goes_on():
  said: list[str] = []
  dog = signals.Watchdog(1.0, said.append)
  for _ in range(8):
    time.sleep(0.25)
    heartbeat.beat()
  dog.close()
  assert not said


def test_a_wait_for_the_data_of_an_evaluation_is_said(tmp_path, monkeypatch, capsys):
  run = loader._run

  def slow(plan, options, start, stop):
    if plan.seed is None and plan.batch_size == 20:
      time.sleep(1)
    yield from run(plan, options, start, stop)

  monkeypatch.setattr(loader, "_run", slow)
  monkeypatch.setattr(signals, "DATA_NOTE_S", 0.3)
  train_lib.train(CONFIG | dict(total_steps=3), tmp_path)
  said = capsys.readouterr().err
  assert said.count("waiting for data for") == 2, said  # of the first batch, and of the evaluation
