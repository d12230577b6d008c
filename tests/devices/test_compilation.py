"""One trace and one program for each size, before the first step; memory is reused and reported."""

import functools
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.devices import compilation
from flexivit_jax.errors import UserError
from flexivit_jax.sizes import size_key

pytestmark = pytest.mark.faults

X = jnp.arange(6.0)
SIZES = [{"seqhw": 1}, {"seqhw": 2}, {"grid_hw": (2, 3)}]


@pytest.mark.parametrize("spec", [X, jax.ShapeDtypeStruct(X.shape, X.dtype)])
def test_each_size_is_traced_once_and_never_when_it_runs(spec):
  traced, reported = [], []

  def scale(x, *, seqhw=0, grid_hw=(0, 0)):
    traced.append((seqhw, grid_hw))
    return x * (seqhw + 10 * grid_hw[0] + 100 * grid_hw[1])

  programs = compilation.compile_each(
    scale, (spec,), SIZES, report=lambda size, program: reported.append((size, program))
  )
  assert traced == [(1, (0, 0)), (2, (0, 0)), (0, (2, 3))]
  assert [size for size, _ in reported] == SIZES
  assert [program for _, program in reported] == list(programs.values())
  for _ in range(2):
    for size, factor in zip(SIZES, (1, 2, 320), strict=True):
      program = programs[size_key(size)]
      np.testing.assert_array_equal(program.run(X), factor * X)
      assert program.seconds > 0 and program.temp_bytes >= 0
  assert len(traced) == 3
  with pytest.raises(TypeError, match="compiled"):  # another shape is an error, not a new trace
    programs[size_key(SIZES[0])].run(jnp.zeros(7))


def test_temporary_memory_is_that_of_the_intermediates():
  def outer(x, *, n):
    y = jnp.tile(x, (n, 1))
    return jnp.linalg.norm(y @ y.T @ y, axis=0)

  sizes = [{"n": 8}, {"n": 512}]
  small, large = compilation.compile_each(outer, (X,), sizes).values()
  assert large.temp_bytes - small.temp_bytes >= 4 * (512**2 - 8**2)  # one float32 matrix n x n


def test_a_donated_state_is_updated_in_place():
  state = {"w": jnp.zeros((64, 3)), "momentum": jnp.ones((64, 3)), "step": jnp.int32(0)}
  batch, traced = {"image": jnp.ones((4, 64))}, []

  def step(state, batch, *, seqhw):
    traced.append(seqhw)
    gradient = batch["image"].T @ jnp.tanh(batch["image"] @ state["w"] + seqhw)
    momentum = 0.9 * state["momentum"] + gradient
    return {"w": state["w"] - momentum, "momentum": momentum, "step": state["step"] + 1}

  sizes = [{"seqhw": 1}, {"seqhw": 2}]
  programs = compilation.compile_each(step, (state, batch), sizes, donate=(0,))
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  for size in (*sizes, *sizes):
    program = programs[size_key(size)]
    assert program.run.memory_analysis().alias_size_in_bytes >= state_bytes
    before, state = state, program.run(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
  assert not any(x.is_deleted() for x in jax.tree.leaves((state, batch)))
  assert state["step"] == 4 and traced == [1, 2]


def test_what_is_queued_is_not_compiled_after_an_error(monkeypatch):
  """And what is in hand is not waited for."""
  begun, release = [], threading.Event()

  def compile(self):
    begun.append(self.name)
    release.wait(50)

  def fail_at_three(x, *, n):
    if n == 3:
      raise KeyboardInterrupt
    return x

  monkeypatch.setattr(compilation._Lowered, "compile", compile)
  with pytest.raises(KeyboardInterrupt):
    compilation.compile_each(fail_at_three, (X,), [{"n": n} for n in (1, 2, 3)])
  release.set()
  for thread in threading.enumerate():
    if thread.name.startswith("compiler"):
      thread.join()
  assert begun == ["n=1"]


class _Full:
  """Stands for a lowered program that does not fit."""

  def __init__(self, message):
    self._message = message

  def compile(self, **options):
    raise jax.errors.JaxRuntimeError(self._message)


def _compile_failing(monkeypatch, message):
  class FakeJit:
    lower = staticmethod(lambda *args: _Full(message))

  monkeypatch.setattr(compilation.jax, "jit", lambda *args, **kwargs: FakeJit)
  compilation.compile_each(functools.partial(lambda x, seqhw: x), (X,), [{"seqhw": 30}])


def test_out_of_memory_names_the_size_and_what_to_do(monkeypatch):
  with pytest.raises(UserError, match=r"memory while compiling seqhw=30: smaller batch.*80 GiB"):
    _compile_failing(monkeypatch, "RESOURCE_EXHAUSTED: Out of memory allocating 80 GiB")


def test_other_compiler_errors_stay_what_they_are(monkeypatch):
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    _compile_failing(monkeypatch, "INTERNAL: a bug in XLA")


# --- programs on disk ---

COUNT = """
import collections, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
from flexivit_jax import cli
code = cli.main(sys.argv[1:])
print(code, events["cache_misses"], events["cache_hits"])
"""
TRAIN = (
  "train --config=configs/digits.py:debug=True --config.total_epochs=None --config.evals.test.every_steps=2"
  " --config.flexi.seqhw.v=(2,) --config.evals.test.seqhw=(2,)"
)


def started(folder, *arguments):
  """Runs a command that keeps programs in `folder`: its exit code, programs compiled, programs found; its stderr."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
  environment |= {"FLEXIVIT_CACHE": str(folder)}
  command = [sys.executable, "-c", COUNT, *TRAIN.split(), *arguments]
  run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
  assert run.stdout.strip(), run.stderr
  return tuple(map(int, run.stdout.splitlines()[-1].split())), run.stderr


@pytest.mark.full
def test_a_run_of_other_length_seed_and_folder_compiles_nothing(tmp_path):
  first = [
    "--config.total_steps=2",
    f"--workdir={tmp_path / 'a'}",
    "--config.seed=0",
    "--config.log_every=1",
  ]
  (code, missed, _), stderr = started(tmp_path / "cache", *first)
  assert code == 0 and missed > 0, stderr
  second = [
    "--config.total_steps=3",
    f"--workdir={tmp_path / 'b'}",
    "--config.seed=7",
    "--config.log_every=2",
  ]
  (code, missed, found), stderr = started(tmp_path / "cache", *second)
  assert (code, missed) == (0, 0) and found > 0, stderr


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path))
  monkeypatch.setattr(compilation, "_processor", lambda: "mine")
  kept = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    (tmp_path / "programs" / "mine").mkdir(parents=True)
    (tmp_path / "programs").chmod(0o770)
    assert compilation.keep_programs() is None
    assert "others may write to it" in caplog.text and "FLEXIVIT_CACHE" in caplog.text
    (tmp_path / "programs").chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert compilation.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update("jax_compilation_cache_dir", kept)


def test_a_setting_of_jaxs_own_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path))
  assert jax.config.jax_compilation_cache_dir  # the tests'
  assert compilation.keep_programs() is None and not list(tmp_path.iterdir())


def test_on_gpus_programs_take_no_operation_whose_sums_have_no_fixed_order(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  options = compilation._options()
  assert options == {"compiler_options": {"xla_gpu_exclude_nondeterministic_ops": True}}
  lowered = jax.jit(lambda x: x + 1).lower(X)
  lowered.compile(**options)  # XLA knows the name
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false")
  assert compilation._options() == {}
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert compilation._options() == {}


def test_on_a_cpu_what_is_recomputed_is_not_stored_after_all(monkeypatch):
  """XLA's CPU compiler would find that the forward pass computes it, too, and keep that; the bits are the same."""

  def loss(weights, x):
    for weight in weights:
      x = jax.checkpoint(lambda x, weight: jnp.sin(jnp.sin(x) @ weight))(x, weight)
    return x.sum()

  weights, x = [jnp.eye(64)] * 4, jnp.ones((512, 64))
  made = compilation.compile_one(jax.grad(loss), (weights, x), "")
  monkeypatch.setenv(
    "XLA_FLAGS", "--xla_disable_hlo_passes=none"
  )  # the user's own list is left alone
  assert compilation._options() == {}
  stored = compilation.compile_one(jax.grad(loss), (weights, x), "")
  assert made.temp_bytes < 0.7 * stored.temp_bytes
  for a, b in zip(made.run(weights, x), stored.run(weights, x), strict=True):
    np.testing.assert_array_equal(a, b)
