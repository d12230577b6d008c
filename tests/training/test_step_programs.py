"""A step in two programs is the step; a batch in parts is the batch; parts are as few as memory allows."""

import copy
import re

import jax
import numpy as np
import pytest

from flexivit_jax import experiment, train, trees
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.errors import UserError
from flexivit_jax.experiment import preparation
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives import supervised
from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.training import optim, step_programs, steps, token_budget

SIZES = [{"seqhw": 2}, {"seqhw": 4}, {"seqhw": 8}]
MODEL = FlexiViT(
  num_classes=10, width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=(3, 3), posemb_size=(4, 4),
  head_zeroinit=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def given():
  """(state, batch, run, mesh, what else a step takes)."""
  rng, mesh = np.random.default_rng(0), sharding.make_mesh()
  batch = {
    "image": rng.uniform(-1, 1, (16, 24, 24, 3)).astype(np.float32),
    "labels": np.eye(10, dtype=np.float32)[rng.integers(10, size=16)],
  }
  params = jax.jit(lambda: steps.init_params(MODEL, {"image": (24, 24, 3)}, seed=0))()
  tx = optim.make(params, total_steps=10, lr=0.1, name="sgd", clip=1.0).tx
  objective = supervised(mixup_p=0.5)
  run = {"seed": np.uint32(0), "total_steps": np.int32(10)}
  placed = jax.device_put((steps.init_state(params, tx, objective), run), sharding.replicated(mesh))
  fixed = dict(model=MODEL, objective=objective, tx=tx)
  return placed[0], sharding.put_batch(batch, mesh), placed[1], mesh, fixed


def after_each_size(given, **fit):
  """The parameters after one step at each size, and the programs."""
  state, batch, run, mesh, fixed = given
  programs = step_programs.compile_steps(SIZES, state, batch, run, mesh, **fixed, **fit)
  found = []
  for size in SIZES:
    new, measured = programs(size, jax.tree.map(jax.numpy.copy, state), batch, run)
    found.append(jax.device_get((new.params, measured)))
  return found, programs


@pytest.fixture(scope="module")
def whole(given):
  """Without parts."""
  return after_each_size(given)


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7, atol=1e-6), a, b)


def test_two_programs_are_the_step(given, whole):
  state, batch, run, _, fixed = given
  for size, found in zip(SIZES, whole[0], strict=True):
    step = jax.jit(lambda s, b, size=size: steps.step(s, b, **run, **fixed, **size))
    new, measured = step(state, batch)
    close(found, jax.device_get((new.params, measured)))


def test_parts_are_few_where_tokens_are_and_change_nothing(given, whole):
  state = given[0]
  needs = [p.bytes for p in whole[1].gradients.values()]
  assert needs == sorted(needs)
  held = trees.size_in_bytes(state.opt_state)
  memory = held + needs[1]  # what the size in the middle takes without parts
  found, programs = after_each_size(given, microbatches=[1, 2, 4, 8, 16], memory=memory)
  parts = list(programs.microbatches.values())
  assert parts[:2] == [1, 1] and parts[2] >= 4
  assert all(p.bytes + held <= memory for p in programs.gradients.values())
  close(found, whole[0])


def test_what_never_fits_names_the_size(given):
  with pytest.raises(UserError, match=r"step at seqhw=2 needs .* GiB even in 16 parts"):
    after_each_size(given, microbatches=[1, 16], memory=1e4)


def program(temp, arguments=0):
  return compilation.Program(lambda: None, 0.0, temp, arguments)


@pytest.mark.parametrize(
  ("room", "parts", "tried"),
  [(1000, 1, [1]), (999, 2, [1, 2]), (325, 4, [1, 4]), (200, 16, [1, 16]), (130, 32, [1, 32])],
)
def test_the_next_number_of_parts_follows_from_what_the_last_one_took(room, parts, tried):
  """Of 100 bytes that stay and 900 that are divided."""
  seen = []

  def make(n):
    seen.append(n)
    return program(900 // n, 100)

  found, _ = compilation.fewest_microbatches(make, [1, 2, 4, 8, 16, 32], room, "it")
  assert (found, seen) == (parts, tried)


def test_a_compiler_that_runs_out_of_memory_is_asked_for_more_parts():
  def make(n):
    if n < 4:
      raise compilation.OutOfMemory("full")
    return program(1)

  assert compilation.fewest_microbatches(make, [1, 2, 4, 8], 10, "it")[0] == 4
  with pytest.raises(compilation.OutOfMemory, match="it needs full even in 2 parts"):
    compilation.fewest_microbatches(make, [1, 2], 10, "it")


def test_a_guess_saves_trying():
  seen = []
  compilation.fewest_microbatches(
    lambda n: seen.append(n) or program(1), [1, 2, 4, 8], 10, "it", 2.5
  )
  assert seen == [4]


# --- in the trainer ---

DATA = dict(name="synthetic", image_size=24, num_classes=10, num_examples=32)
CONFIG = dict(
  total_steps=4,
  input=dict(
    data=dict(DATA, split="train"),
    pp="decode|value_range(-1, 1)|onehot(10)|keep('image', 'labels')",
    batch_size=16,
    threads=0,
  ),
  model=dict(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=(3, 3), posemb_size=(4, 4)),
  flexi=dict(seqhw=dict(v=(8, 2))),
  optim=dict(lr=1e-2, name="sgd"),
)


@pytest.mark.full
def test_a_run_that_accumulates_by_itself_is_the_run(tmp_path, capsys):
  losses = {}
  for name, changes in {
    "one": {},
    "auto": dict(accumulate="auto", memory_gib=1e-3),
    "device": dict(accumulate="auto"),
  }.items():
    run = train.train({**copy.deepcopy(CONFIG), **changes}, tmp_path / name)
    rows = metrics_writer.read_rows(run / "metrics.jsonl")
    losses[name] = [row["loss"] for row in rows]
    said = capsys.readouterr().err
    parts = re.search(r"compiled train seqhw=8: 64 tokens.*in (\d+) parts", said)
    assert (parts is not None) == (name == "auto"), said
  np.testing.assert_allclose(losses["auto"], losses["one"], rtol=0, atol=1e-6)
  assert losses["device"] == losses["one"]


# --- budgets of tokens ---


@pytest.mark.parametrize(
  ("tokens", "batches"), [(900, 1), (451, 1), (450, 2), (225, 4), (100, 8), (25, 8)]
)
def test_batches_are_in_proportion_to_one_over_the_tokens(tokens, batches):
  budget = token_budget.make(most=8)
  assert budget.batches(tokens, 900) == batches
  assert budget.update_scale(batches) == pytest.approx(batches**0.5)
  assert token_budget.make(lr_power=1).update_scale(3) == 3


def test_a_step_of_two_batches_is_that_of_one_of_twice_the_images(given):
  state, batch, run, mesh, fixed = given
  size = {"seqhw": 2}
  programs = step_programs.compile_steps(
    [size], state, batch, run, mesh, **fixed, batches_of=lambda _: 2, update_scale=lambda _: 3.0
  )
  twice = jax.tree.map(lambda x: jax.numpy.concatenate([x, x[::-1]]), batch)
  found, _ = programs(size, jax.tree.map(jax.numpy.copy, state), twice, run)
  plain, _ = jax.jit(lambda s, b: steps.step(s, b, **run, **fixed, **size))(state, twice)
  wanted = jax.tree.map(lambda old, new: old + 3 * (new - old), state.params, plain.params)
  close(jax.device_get(found.params), jax.device_get(wanted))


@pytest.mark.full
def test_a_run_with_a_budget_reads_as_many_images_and_resumes(tmp_path, train_until, capsys):
  config = {
    **copy.deepcopy(CONFIG),
    "token_budget": dict(most=4),
    "checkpoint": dict(every_steps=2),
  }
  exp = experiment.from_config(config)
  assert [exp.batches_of({"seqhw": n}) for n in (8, 2)] == [1, 4]
  assert exp.images_per_step == pytest.approx(40)
  assert exp.steps_per_epoch == pytest.approx(32 / 40)
  run = train.train(config, tmp_path / "whole")
  rows = metrics_writer.read_rows(run / "metrics.jsonl")
  _, _, record = saved(exp, run)
  assert record["data"]["step"] == sum(1 if row["seqhw"] == 8 else 4 for row in rows)
  train_until(config, tmp_path / "cut", 2)
  images = sum(16 if row["seqhw"] == 8 else 64 for row in rows[:2])
  capsys.readouterr()
  again = metrics_writer.read_rows(train.train(config, tmp_path / "cut") / "metrics.jsonl")
  assert [row["loss"] for row in again] == [row["loss"] for row in rows]
  said = capsys.readouterr().err
  assert re.search(rf"step 2/\d+, epoch {images / 32:.2f}, {images} images seen", said)


def saved(exp, run):
  checkpoints = Checkpoints(run / "checkpoints", keep=None)
  state = preparation.first_state(exp, sharding.make_mesh())
  try:
    return checkpoints.restore(checkpoints.latest_step(), state.params, preparation.rest(state))
  finally:
    checkpoints.close()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(accumulate="auto", model=CONFIG["model"] | dict(dropout=0.1)), "masks would depend"),
    (
      dict(accumulate="auto", model=CONFIG["model"] | dict(stochastic_depth=0.1)),
      "masks would depend",
    ),
    (dict(memory_gib=1.0), "no effect without accumulate='auto'"),
    (dict(accumulate="auto", memory_gib=-1.0), "expected more than 0"),
    (dict(accumulate="all"), "accumulate='all'; expected a number, or 'auto'"),
    (dict(accumulate=3), "expected a divisor of batch_size"),
    (dict(token_budget=dict(most=0)), "expected at least 1"),
    (dict(token_budget=dict(mots=2)), "Did you mean 'token_budget.most'"),
  ],
)
def test_what_cannot_be_accumulated_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    experiment.from_config({**copy.deepcopy(CONFIG), **changes})
