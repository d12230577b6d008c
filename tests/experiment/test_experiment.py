"""What a run costs, how long a budget of computation is, and sizes that a model cannot run."""

import copy
import pathlib

import numpy as np
import pytest

from flexivit_jax import config, experiment
from flexivit_jax.errors import UserError
from flexivit_jax.experiment import loaders
from flexivit_jax.models.flops import gmacs
from flexivit_jax.training import patch_schedule

pytestmark = pytest.mark.faults

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def digits(**changes):
  settings = config.load(f"{CONFIGS / 'digits'}.py:debug", [])
  settings["model"]["depth"] = 2
  return settings | copy.deepcopy(changes)


def flops_of(settings, size):
  """Of a step, from the multiply-adds of the models alone."""
  exp = experiment.from_config(settings)
  macs = 3 * gmacs(exp.model, {"image": (24, 24, 3)}, **size)
  for teacher in settings.get("objective", {}).get("teachers", {}).values():
    found = loaders.load_teacher(**teacher)
    macs += gmacs(found.model, {"image": (24, 24, 3)}, **found.size)
  return 2e9 * macs * settings["input"]["batch_size"]


TEACHER = dict(
  model=dict(width=48, depth=3, mlp_dim=96, num_heads=4, patch_size=(4, 4), num_classes=10), seqhw=8
)


@pytest.mark.parametrize(
  "teachers",
  [
    {},
    pytest.param({"one": TEACHER}, marks=pytest.mark.full),
    {"one": TEACHER, "two": TEACHER | {"seqhw": 3}},
  ],
)
def test_equal_shares_of_the_flops_of_a_config_count_its_teachers(teachers):
  objective = dict(name="distill", teachers=teachers) if teachers else {}
  sizes = (2, 3, 4, 6, 8)
  settings = digits(objective=objective, flexi=dict(seqhw=dict(v=sizes, share="flops")))
  exp = experiment.from_config(settings)
  probs = patch_schedule.probabilities(exp.flexi, "seqhw", step=0)
  spent = [p * flops_of(settings, dict(seqhw=s)) for p, s in zip(probs, sizes, strict=True)]
  np.testing.assert_allclose(spent, np.mean(spent), rtol=0.01)
  # A teacher's part is the same at all sizes: the more of it, the less they differ.
  assert probs[0] > probs[-1]


def test_a_teacher_makes_the_sizes_cost_more_alike():
  flexi = dict(seqhw=dict(v=(2, 8), share="flops"))
  plain = experiment.from_config(digits(flexi=flexi))
  taught = experiment.from_config(
    digits(flexi=flexi, objective=dict(name="distill", teachers=dict(one=TEACHER)))
  )
  finest = [patch_schedule.probabilities(e.flexi, "seqhw", step=0)[1] for e in (plain, taught)]
  assert finest[0] < finest[1] < 0.5


@pytest.mark.parametrize(
  "flexi",
  [
    dict(seqhw=dict(v=(2, 8))),
    dict(seqhw=dict(v=(2, 8), share="flops"), depth=dict(v=(1, 2))),
    dict(seqhw=dict(v=(8, 2), stages="coarse_to_fine")),
  ],
)
@pytest.mark.parametrize("budget", [0.6, 7.0, 7.4, 7.6])
def test_a_budget_is_the_number_of_steps_whose_expected_flops_are_nearest(flexi, budget):
  settings = digits(flexi=flexi, total_steps=None)
  settings["optim"]["schedule"]["warmup_steps"] = 0
  exp = experiment.from_config(digits(flexi=flexi))
  mean = patch_schedule.mean_cost(exp.flexi, exp.step_flops)
  flops = budget * mean
  got = experiment.from_config({**settings, "total_flops": flops}).total_steps
  off = [abs(n * mean - flops) for n in (got, got - 1, got + 1)]
  assert off[0] == min(off) and got >= 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(total_flops=1e9), "Got total_flops and total_steps; give one of them"),
    (dict(total_steps=None, total_flops=-1e9), r"Got -?\d+ steps"),
    (dict(total_steps=None, total_flops=1.0), "Got 0 steps"),
    (dict(flexi=dict(depth=dict(v=(1, 3)))), "depth=3: the model has 2 blocks; expected 1 to 2"),
    (
      dict(flexi=dict(stride=dict(v=(5, 7)))),
      r"stride=7: patches of \(4, 4\) pixels do not end at the edge .*do: 1, 2, 4, 5, 10, 20\.",
    ),
    (
      dict(flexi=dict(stride=dict(v=(3, 5), share="flops"))),
      r"stride=3: .*do: 1, 2, 4, 5, 10, 20\.",
    ),
    (
      dict(flexi=dict(seqhw=dict(v=(2,)), stride=dict(v=(4,)))),
      "With stride the grid is what fits",
    ),
    (
      dict(flexi=dict(seqhw=dict(v=(2, 3), share="flops"), depth=dict(v=(1, 2), share="flops"))),
      "flexi.seqhw and flexi.depth both have share='flops'; one can",
    ),
    (dict(flexi=dict(seqwh=dict(v=(2,)))), "'flexi.seqwh'.*Did you mean 'flexi.seqhw'"),
    (
      dict(flexi=dict(seqhw=dict(v=(2, 3), adapt=dict(evry=2)))),
      "adapt.evry'.*Did you mean 'flexi.seqhw.adapt.every'",
    ),
  ],
)
def test_mistakes_are_errors_before_anything_runs(changes, message):
  with pytest.raises(UserError, match=message):
    experiment.from_config(digits(**changes))


@pytest.mark.parametrize(
  ("backend", "given", "dtype"),
  [
    ("cpu", {}, "float32"),
    ("gpu", {}, "bfloat16"),
    ("tpu", {}, "bfloat16"),
    ("tpu", {"dtype": "float32"}, "float32"),
    ("cpu", {"dtype": "bfloat16"}, "bfloat16"),
  ],
)
def test_accelerators_train_in_bfloat16_unless_told(monkeypatch, backend, given, dtype):
  settings = digits()
  settings["model"] |= given
  monkeypatch.setattr(loaders.jax, "default_backend", lambda: backend)
  exp = experiment.from_config(settings)
  assert exp.model.dtype == exp.model_record["dtype"] == dtype  # a checkpoint says which it was


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_no_number_of_32_bits_is_refused(seed):
  with pytest.raises(UserError, match=f"seed={seed}; expected 0 to 4294967295"):
    experiment.from_config(digits(seed=seed))


def test_a_teacher_that_several_sections_name_is_opened_once():
  opened = []

  def teacher(**section):
    opened.append(section)
    return loaders.load_teacher(**section)

  settings = config.load(f"{CONFIGS / 'i21k_distill'}.py:debug", [])
  other = {**settings["evals"]["test"]["teacher"], "seqhw": 14}
  settings["evals"]["other"] = {**settings["evals"]["test"], "teacher": other}
  experiment.from_config(settings, opening=loaders.REAL._replace(teacher=teacher))
  assert [section.get("seqhw") for section in opened] == [None, 14]


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("hang_after=0", "hang_after=0; expected more than 0, or None"),
    ("skip_above=0.0", "skip_above=0.0; expected more than 0, or None"),
    ("skip_limit=0", "skip_limit=0; expected at least 1"),
    ("log_every=0", "log_every=0; expected at least 1"),
    ("checkpoint.keep=0", "checkpoint.keep=0; expected at least 1"),
    ("checkpoint.keep=-1", "checkpoint.keep=-1; expected at least 1"),
    ("init_head_bias=1e999", "init_head_bias=inf; expected a finite number"),
    ("input.batch_size=0", "input: batch_size=0; expected 1 or more"),
    ("input.batch_size=-8", "input: batch_size=-8; expected 1 or more"),
    ("input.batch_size=100", "input: .*has 16 examples, fewer than one batch of 100"),
    ("input.on_error=skp", "input: on_error='skp'; expected 'raise' or 'skip'"),
    ("input.max_errors=-1", "input: max_errors=-1; expected 0 or more"),
    ("input.threads=-1", "input: threads=-1; expected 0 or more"),
    ("input.pp=decode|resize('x')", "input: Bad example 0"),
    ("input.pp=deocde", "input: .*'deocde'.*Did you mean 'decode'"),
    ("model.width=0", "model: width=0: expected 1 or more"),
    ("model.width=-64", "model: width=-64: expected 1 or more"),
    ("model.depth=0", "model: depth=0: expected 1 or more"),
    ("model.num_classes=-1", "model: num_classes=-1: expected 0 or more"),
    ("model.dropout=2.0", "model: dropout=2.0: expected a probability"),
    ("optim.lr=-1", "optim.lr=-1.0; expected a finite number >= 0"),
    ("optim.lr=1e999", "optim.lr=inf; expected a finite number >= 0"),
    ("optim.eps=-1", "optim.eps=-1; expected a finite number >= 0"),
    ("input.data.num_classes=0", "input.data: .*num_classes=0.*expected .*1 or more"),
    ("input.data.image_size=0", "input.data: image_size=0, .*expected one side or two, all 1"),
    ("input.data.seed=-1", "input.data: .*seed=-1; expected .*a seed of 0 or more"),
    ("objective={'name': 'distill', 'teachers': {}}", "objective.teachers is empty"),
    (
      "objective={'name': 'self_distill', 'size': {'seqhw': 7}}",
      "objective.size: seqhw=7 does not divide",
    ),
    ("optim.b2=1.5", "optim.b2=1.5; expected 0 to below 1"),
    ("evals.test.seqhw=(7,)", r"evals.test: seqhw=7 does not divide .*that do: 1, 2, 3, 4, 6,"),
    ("evals.test.depth=(5,)", "evals.test: depth=5: the model has 1 blocks"),
    ("evals.test.stride=(5,)", "evals.test: Got seqhw=.* and stride=.*; give one of them"),
    ("evals.test.pp=deocde", "evals.test: .*'deocde'.*Did you mean 'decode'"),
    ("evals.test.pp=decode|resize(24)", "evals.test: .*lack .*'labels'"),
    ("evals.test.batch_size=0", "evals.test: batch_size=0; expected 1 or more"),
    ("evals.test.prefetch=-1", "evals.test: prefetch=-1; expected 0 or more"),
    ("evals.test.loss=softmx", "evals.test: Unknown loss 'softmx'"),
    ("evals.test.label_map=x", "evals.test: Unknown label map 'x'"),
    ("evals.test.data.num_classes=7", "evals.test: data has 7 classes, the model 10"),
    ("objective={'mixup_p': -1}", "objective: mixup_p=-1; expected a finite number >= 0"),
  ],
)
def test_values_out_of_range_are_refused_with_their_keys(override, message):
  settings = config.load(f"{CONFIGS / 'digits'}.py:debug", [override])
  with pytest.raises(UserError, match=message):
    experiment.from_config(settings)


@pytest.mark.parametrize("changes", [dict(l2=-1.0), dict(type="knn", k=0)])
def test_so_are_those_of_probes(changes):
  settings = digits()
  test = settings["evals"]["test"]
  settings["evals"]["test"] = (
    test | dict(type="fewshot", train_data=test["data"], shots=1) | changes
  )
  with pytest.raises(UserError, match=r"evals.test: .*expected"):
    experiment.from_config(settings)


def test_the_batches_of_an_evaluation_have_to_divide_over_the_devices(on_eight_devices):
  on_eight_devices(refuse_uneven_batches, "evals.test.batch_size=12 must be a multiple of .* 8")


def refuse_uneven_batches(message):
  from flexivit_jax.experiment import preparation

  settings = digits()
  settings["evals"]["test"]["batch_size"] = 12
  with pytest.raises(UserError, match=message):
    preparation.place(experiment.from_config(settings))
