"""What the training loop itself costs: little, and no word with the device between two logs."""

import contextlib
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import experiment, train
from flexivit_jax.data import TrainBatches
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.experiment import preparation
from flexivit_jax.experiment.evaluating import Evaluating
from flexivit_jax.experiment.recording import Recorder
from flexivit_jax.running import metrics_writer, session, signals
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.running.ledger import Ledger
from flexivit_jax.sizes import size_key
from flexivit_jax.training import patch_schedule, step_programs, steps

CONFIG = dict(
  name="loop",
  total_steps=400,
  log_every=100,
  input=dict(
    data=dict(name="synthetic", split="train", image_size=24, num_classes=10, num_examples=64),
    pp="decode|value_range(-1, 1)|onehot(10)|keep('image', 'labels')",
    batch_size=8,
    threads=0,
  ),
  model=dict(width=64, depth=4, mlp_dim=64, num_heads=4, patch_size=(6, 6), posemb_size=(4, 4)),
  flexi=dict(seqhw=dict(v=(2, 3, 4, 6, 8))),
  optim=dict(lr=1e-3, schedule=dict(warmup_steps=10)),
  checkpoint=dict(every_steps=400),
)


class Data(TrainBatches):
  """Stands for the batches: gives the same one at once."""

  def __init__(self, exp):
    self.errors: dict = {}
    self.batch = {k: np.zeros((8, *s), np.float32) for k, s in exp.shapes.items()}

  def __next__(self):
    return self.batch

  def get_state(self):
    return {}


def programs(exp, seen):
  """Compiled steps that compute nothing, and note the size that was drawn."""
  loss = jnp.zeros(())
  measured = dict.fromkeys(("loss", "grad_norm", "param_norm"), loss)

  def gradients(key):
    def run(state, batch, seed):
      seen.append(key)
      return loss, None

    return compilation.Program(run, 0.0, 0)

  keys = [size_key(size) for size in patch_schedule.all_static(exp.flexi)]
  update = compilation.Program(lambda state, *_: (state, measured), 0.0, 0)
  return step_programs.StepPrograms({k: gradients(k) for k in keys}, update, dict.fromkeys(keys, 1))


class Unsaved(Checkpoints):
  """Saves nothing."""

  def __init__(self):
    pass

  def check(self):
    pass

  def save(self, *_):
    pass


def run_loop(tmp_path, inside=contextlib.nullcontext):
  """400 steps that compute nothing; `inside` is entered for them. Returns the CPU seconds, and the sizes drawn."""
  exp = experiment.from_config(CONFIG)
  mesh, seen = sharding.make_mesh(), []
  made = programs(exp, seen)
  state = jax.device_put(
    steps.TrainState(jnp.int32(0), {"w": jnp.zeros(3)}, {}), sharding.replicated(mesh)
  )
  with metrics_writer.MetricsWriter(tmp_path, restored_step=0) as writer, inside():
    begin = time.process_time()
    schedule = patch_schedule.init_state(exp.flexi)
    ledger = Ledger(tmp_path / "ledger.json", time.perf_counter())
    ledger.go_on_from(0)
    with contextlib.ExitStack() as stack:
      run = session.Session(tmp_path, stack, signals.Stop(), begin, 60.0)
      run.ledger, run.writer, run.checkpoints = ledger, writer, Unsaved()
      batches, inputs = Data(exp), tuple(exp.objective.inputs)
      step_fn = preparation.Step(made, None, preparation.constants(exp, mesh), mesh, inputs)
      evaluating = Evaluating(run, exp, mesh, lambda *_: {}, {})
      train._loop(run, exp, step_fn, evaluating, batches, state, schedule)
    return time.process_time() - begin, seen


MEASURE = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import test_loop
print(min(test_loop.run_loop(pathlib.Path(sys.argv[2]) / str(i))[0] for i in range(5)) / 400)
"""


def test_a_step_costs_the_host_less_than_a_millisecond(tmp_path):
  """Draws, batches to the device, dispatch, logs: all that is not computing; the best of five, in a process without
  the tests' checks of types."""
  here = pathlib.Path(__file__).parent
  command = [sys.executable, "-c", MEASURE, str(here), str(tmp_path)]
  run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=here.parent)
  print(f"{float(run.stdout) * 1e3:.2f} ms of CPU time a step")
  assert float(run.stdout) < 1e-3


def test_the_device_is_asked_for_nothing_between_two_logs(tmp_path, monkeypatch):
  """No number is read but by the four logs, nothing is sent but the batches."""
  read = []
  array = type(jnp.zeros(()))
  value, flush = array._value, Recorder._flush

  def reading(self):
    read.append(len(written))
    return value.fget(self)

  written = []

  def flushing(recorder, *args):
    written.append(len(recorder._pending))
    monkeypatch.setattr(array, "_value", value)
    try:
      return flush(recorder, *args)
    finally:
      monkeypatch.setattr(array, "_value", property(reading))

  @contextlib.contextmanager
  def watched():
    monkeypatch.setattr(Recorder, "_flush", flushing)
    monkeypatch.setattr(array, "_value", property(reading))
    with jax.transfer_guard("disallow"):  # of what nobody asked for; a batch is sent explicitly
      float(jnp.copy(started))
      assert read == [0]  # so that it could have failed
      yield

  started = jnp.ones(())
  _, seen = run_loop(tmp_path, watched)
  assert written == [100] * 4 and len(seen) == 400
  assert len(read) <= 2, read  # the one above, and the step that the run starts from
