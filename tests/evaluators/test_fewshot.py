"""Ridge against least squares and refitting; the evaluator against NumPy, on one device, on eight, from a config."""

import functools
import json
import socket
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import cli, data, experiment, train, weights
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators.fewshot import decompose, fewshot, fit, left_out, ridge, scores
from flexivit_jax.evaluators.probing import hits
from flexivit_jax.experiment import sections
from flexivit_jax.models import FlexiViT
from flexivit_jax.training import steps

PP = "resize(12)|value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
DIGITS = dict(name="digits", split="test")
SECTION = dict(
  type="fewshot",
  data=DIGITS,
  train_data=DIGITS | dict(split="train"),
  pp=PP,
  batch_size=64,
  seqhw=(2, 4),
  threads=0,
)

# --- ridge ---


def problem(n, d, k=3, seed=0):
  """Features of different means and scales, and targets of -1 and 1 of which every class has one."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d)[None] + rng.normal(size=(1, d))
  labels = np.eye(k, dtype=bool)[np.arange(n) % k]
  return features, labels, np.where(labels, 1.0, -1.0)


def least_squares(z, targets, l2):
  """Kernel and unpenalised bias from `lstsq` of the system with a column for the bias and rows for l2."""
  d = z.shape[1]
  left = np.block([[z, np.ones((len(z), 1))], [np.sqrt(l2) * np.eye(d), np.zeros((d, 1))]])
  right = np.concatenate([targets, np.zeros((d, targets.shape[1]))])
  solution = np.linalg.lstsq(left, right, rcond=None)[0]
  return solution[:-1], solution[-1]


shapes = st.sampled_from([(30, 7), (12, 12), (9, 40), (2, 5), (8, 1)])
powers = st.sampled_from([2.0**i for i in (-10, -3, 0, 5, 10)])


@hypothesis.given(shapes, powers, st.integers(0, 5))
def test_ridge_is_least_squares_of_the_augmented_system_primal_and_dual(shape, l2, seed):
  features, _, targets = problem(*shape, k=2, seed=seed)
  mean, std = features.mean(0, keepdims=True), features.std(0, keepdims=True)
  z = (features - mean) / std
  kernel, bias = least_squares(z, targets, l2)
  probe = ridge(decompose(features), targets, l2)
  np.testing.assert_allclose(probe.kernel * std.T, kernel, rtol=0, atol=1e-9)
  scores = z @ kernel + bias[None]
  np.testing.assert_allclose(features @ probe.kernel + probe.bias[None], scores, rtol=0, atol=1e-9)

  centred = targets - targets.mean(0, keepdims=True)
  primal = np.linalg.solve(z.T @ z + l2 * np.eye(z.shape[1]), z.T @ centred)
  dual = z.T @ np.linalg.solve(z @ z.T + l2 * np.eye(len(z)), centred)
  for other in (primal, dual):
    np.testing.assert_allclose(probe.kernel * std.T, other, rtol=0, atol=1e-9)


@hypothesis.given(shapes, powers, st.integers(0, 5))
def test_left_out_scores_are_those_of_refitting_without_the_example(shape, l2, seed):
  features, _, targets = problem(*shape, k=2, seed=seed)
  z = (features - features.mean(0, keepdims=True)) / features.std(0, keepdims=True)
  found = left_out(decompose(features), targets, l2)
  for i in range(len(z)):
    others = np.arange(len(z)) != i
    kernel, bias = least_squares(z[others], targets[others], l2)
    np.testing.assert_allclose(found[i], z[i] @ kernel + bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 6), (20, 60)])
def test_the_l2_chosen_has_the_least_error_of_refitting(shape):
  features, labels, targets = problem(*shape)
  rng = np.random.default_rng(1)
  features[:, 0] += labels[:, 0] * 2 + rng.normal(size=len(labels))
  z = (features - features.mean(0, keepdims=True)) / features.std(0, keepdims=True)
  l2s = [2.0**i for i in range(-4, 12, 3)]

  def error(l2):
    total = 0.0
    for i in range(len(z)):
      others = np.arange(len(z)) != i
      kernel, bias = least_squares(z[others], targets[others], l2)
      total += ((z[i] @ kernel + bias - targets[i]) ** 2).sum()
    return total

  errors = [error(l2) for l2 in l2s]
  assert fit(features, labels, l2s).l2 == l2s[int(np.argmin(errors))]
  assert fit(features, labels, l2s[1:2]).l2 == l2s[1]


@pytest.mark.parametrize("shape", [(40, 6), (20, 60)])
def test_order_and_units_of_the_features_do_not_matter(shape):
  features, labels, _ = problem(*shape)
  order = np.random.default_rng(2).permutation(len(labels))
  units = np.random.default_rng(3).uniform(0.5, 2.0, shape[1])
  l2s = [2.0**i for i in range(-10, 11)]
  probe, shuffled = fit(features, labels, l2s), fit(features[order], labels[order], l2s)
  assert probe.l2 == shuffled.l2
  np.testing.assert_allclose(probe.kernel, shuffled.kernel, rtol=0, atol=1e-10)
  other = fit(features * units[None] + 5, labels, l2s)
  assert probe.l2 == other.l2
  np.testing.assert_allclose(probe.kernel, other.kernel * units[:, None], rtol=0, atol=1e-10)


def test_a_feature_that_does_not_vary_changes_nothing():
  features, labels, _ = problem(20, 6)
  noise = 1e-9 * np.random.default_rng(0).normal(size=20)
  dead = np.stack([np.full(20, 3.0), np.zeros(20), 1 + noise], axis=1)
  probe = fit(features, labels, [1.0])
  other = fit(np.concatenate([features, dead], axis=1), labels, [1.0])
  np.testing.assert_allclose(other.kernel[:6], probe.kernel, rtol=0, atol=1e-6)
  assert np.isfinite(fit(dead[:, :2], labels, [1.0]).kernel).all()


def test_a_hit_is_any_of_the_labels():
  probe = ridge(decompose(np.eye(3)), 2 * np.eye(3) - 1, 1e-3)
  labels = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
  assert hits(scores(probe, np.eye(3)).argmax(-1), labels).tolist() == [True, False, False]


# --- the evaluator ---


@functools.cache
def make_model(num_classes=7):
  model = FlexiViT(
    num_classes=num_classes, patch_size=(6, 6), posemb_size=(2, 2), width=48, depth=1, mlp_dim=32,
    num_heads=2, head_zeroinit=False, pool_type="gap",
  )  # fmt: skip
  return model, jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=0))()


def probed(num_classes=7, mesh=None, **changes):
  """The rows of the probe of digits, from the same sections as in a config."""
  model, params = make_model(num_classes)
  section = SECTION | changes
  sections.check_evaluation("evals.probe", section)
  evaluation = experiment.build_evaluation("evals.test", section, every=1)
  return evaluation.make(model, mesh or sharding.make_mesh()).run(params)


@functools.cache
def features_of(size, split, shots=None):
  """Features and labels of digits, from `model.apply` and the source itself."""
  model, params = make_model()
  source = data.make_source(name="digits", split=split)
  source = data.few_shots(source, shots=shots) if shots else source
  (batch,) = data.eval_batches(source, PP, batch_size=len(source), threads=0)
  kwargs = {"grid_hw": size} if isinstance(size, tuple) else {"seqhw": size}
  forward = jax.jit(lambda p, x: model.apply({"params": p}, x, **kwargs)[1]["pre_logits"])
  found = forward(params, jnp.asarray(batch["image"]))
  return np.asarray(found, np.float64), batch["labels"].argmax(-1)


def test_rows_are_those_of_numpy_and_far_above_chance():
  sizes = (2, (3, 4))
  rows = probed(seqhw=sizes, shots=20, l2=8.0)
  assert [row["seqhw"] for row in rows] == [2, "3x4"]
  for row, size in zip(rows, sizes, strict=True):
    features, labels = features_of(size, "train", 20)
    test, expected = features_of(size, "test")
    mean, std = features.mean(0, keepdims=True), features.std(0, keepdims=True)
    kernel, bias = least_squares((features - mean) / std, 2 * np.eye(10)[labels] - 1, 8.0)
    right = (((test - mean) / std) @ kernel + bias[None]).argmax(-1) == expected
    assert row == {"seqhw": row["seqhw"], "top1": right.mean(), "n": 360, "l2": 8.0}
    assert row["top1"] > 0.5


def test_l2_is_chosen_on_the_training_images_alone():
  changes = dict(shots=5, seqhw=(4,))
  whole, half = probed(**changes), probed(**changes, data=DIGITS | dict(split="test[:50%]"))
  features, labels = features_of(4, "train", 5)
  want = fit(features, np.eye(10, dtype=bool)[labels], [2.0**i for i in range(-10, 11)]).l2
  assert whole[0]["l2"] == half[0]["l2"] == want and (whole[0]["n"], half[0]["n"]) == (360, 180)


def test_batch_size_and_padding_change_nothing():
  small, large = probed(shots=3, batch_size=7), probed(shots=3, batch_size=360)
  assert small == large


def test_what_is_masked_is_not_seen():
  """Padding with NaN in the images and labels, in the training data and in what is scored."""
  model, params = make_model()
  rng, mesh = np.random.default_rng(0), sharding.make_mesh()

  def batch(padding):
    image, labels = rng.uniform(-1, 1, (12, 12, 12, 3)), np.eye(3)[np.arange(12) % 3]
    whole = {"image": image, "labels": labels, "_mask": np.ones(12)}
    padded = {k: np.concatenate([v[:9], padding * np.ones_like(v[9:])]) for k, v in whole.items()}
    padded["_mask"][9:] = 0
    return [{k: np.float32(v) for k, v in padded.items()}]

  rows = []
  for padding in (1.0, np.nan):
    rng = np.random.default_rng(0)
    known, asked = batch(padding), batch(padding)
    evaluator = fewshot(
      model, asked, mesh, seqhw=[2, 3], train_batches=known, num_classes=3, l2=[1.0, 4.0]
    )
    rows.append(evaluator.run(params))
  assert rows[0] == rows[1] and {row["n"] for row in rows[0]} == {9}


def test_the_models_head_plays_no_part():
  model, params = make_model()
  with_head = probed(num_classes=7, shots=3)
  headless = model.clone(num_classes=0)
  body = {k: v for k, v in params.items() if k != "head"}
  evaluation = experiment.build_evaluation("evals.test", SECTION | dict(shots=3), every=1)
  evaluator = evaluation.make(headless, sharding.make_mesh())
  assert evaluator.run(body) == with_head
  for cost, size in zip(evaluator.costs(body, repeats=1), (2, 4), strict=True):
    assert cost["gflops"] == 2 * headless.gmacs({"image": (12, 12, 3)}, seqhw=size)
    assert cost["tokens"] == size**2


def test_shots_help_and_the_seed_chooses_them():
  few, more = (probed(shots=n, seqhw=(4,))[0]["top1"] for n in (1, 50))
  assert few < more
  by_seed = {probed(shots=1, seqhw=(4,), seed=seed)[0]["top1"] for seed in range(3)}
  assert len(by_seed) > 1


def test_each_size_is_compiled_once_for_training_and_test_images():
  model, params = make_model()
  evaluator = experiment.build_evaluation("evals.test", SECTION, every=1).make(
    model, sharding.make_mesh()
  )
  compiled = []
  evaluator.compile(params, lambda size, program: compiled.append(size))
  first = evaluator.run(params)
  assert compiled == [{"seqhw": 2}, {"seqhw": 4}]
  other = evaluator.run(jax.tree.map(lambda x: x + 0.3, params))
  assert evaluator.run(params) == first != other


def test_what_cannot_be_is_an_error():
  with pytest.raises(UserError, match=r"l2=\(1.0, 0.0\); expected one or more numbers, all great"):
    probed(l2=(1.0, 0.0))
  with pytest.raises(UserError, match=r"l2=\(\); expected"):
    probed(l2=())
  with pytest.raises(UserError, match="labels have 12 classes, expected 10; mend onehot"):
    probed(pp=PP.replace("onehot(10)", "onehot(12)"))
  with pytest.raises(UserError, match=r"batches lack \['labels'\]"):
    probed(pp="resize(12)|value_range(-1, 1)|keep('image')")
  with pytest.raises(UserError, match="digits 'train' has fewer than 1000 examples of 10 classes"):
    probed(shots=1000)
  with pytest.raises(UserError, match=r"seqhw=5 does not divide the image \(12, 12\)"):
    probed(seqhw=(5,))
  synthetic = dict(name="synthetic", split="train", image_size=8, num_classes=3)
  with pytest.raises(UserError, match="synthetic 'train' with 3 classes, data digits 'test' with"):
    probed(train_data=synthetic)


def test_features_that_are_not_finite_and_classes_without_images_are_errors():
  model, params = make_model()
  evaluation = experiment.build_evaluation("evals.test", SECTION, every=1)
  broken = jax.tree.map(lambda x: x * jnp.nan, params)
  with pytest.raises(UserError, match="Features at seqhw=2 are not finite"):
    evaluation.make(model, sharding.make_mesh()).run(broken)
  image, labels = np.zeros((4, 12, 12, 3), np.float32), np.float32(np.eye(3)[[0, 0, 1, 1]])
  batches = [{"image": image, "labels": labels, "_mask": np.ones(4, np.float32)}]
  evaluator = fewshot(
    model, batches, sharding.make_mesh(), seqhw=[2], train_batches=batches, num_classes=3
  )
  with pytest.raises(UserError, match=r"4 training images and none of the classes \[2\]"):
    evaluator.run(params)


# --- configs ---


@pytest.mark.parametrize("key", ["train_data", "shots", "seed", "l2", "seqhw"])
def test_a_misspelt_key_is_an_error_that_names_the_right_one(key):
  section = SECTION | dict(shots=3, seed=0, l2=(1.0,))
  section[key + "s"] = section.pop(key)
  with pytest.raises(UserError, match=rf"'evals.probe.{key}s'.*Did you mean 'evals.probe.{key}'"):
    sections.check_evaluation("evals.probe", section)


def test_wrong_sections_are_errors():
  wrong = SECTION | dict(train_data=dict(name="digits", spilt="train"))
  with pytest.raises(UserError, match=r"'evals.probe.train_data.spilt'.*Did you mean .*\.split'"):
    sections.check_evaluation("evals.probe", wrong)
  lacking = {k: v for k, v in SECTION.items() if k != "train_data"}
  with pytest.raises(UserError, match=r"lacks evals.probe.train_data"):
    sections.check_evaluation("evals.probe", lacking)
  with pytest.raises(UserError, match=r"Unknown config key 'evals.probe.train_data'"):
    sections.check_evaluation("evals.probe", SECTION | dict(type="classification"))


@pytest.mark.full
def test_training_and_flexivit_eval_run_it_beside_the_models_own_classes(tmp_path, capsys):
  """The model has 3 classes, the probe's data 10; the probe makes the run's main results."""
  synthetic = dict(name="synthetic", image_size=12, num_classes=3, num_examples=16)
  settings = dict(
    total_steps=2,
    input=dict(
      data=synthetic | dict(split="train"),
      pp="value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
      batch_size=8,
      threads=0,
    ),
    flexi=dict(seqhw=dict(v=(2, 4))),
    model=dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(6, 6), posemb_size=(2, 2)),
    optim=dict(lr=1e-3, schedule=dict(decay_type="cosine", warmup_steps=1)),
    evals=dict(probe=SECTION | dict(every_steps=1, shots=3)),
  )
  run = train.train(settings, tmp_path / "run")
  written = json.loads((run / "eval.json").read_text())
  assert (written["dataset"], written["split"]) == ("digits", "test")
  assert [row["seqhw"] for row in written["rows"]] == [2, 4]
  assert weights.load_with_record(run)[2]["class_names"] is None  # not the probe's ten
  logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in logged if "probe/top1/seqhw=4" in row] == [1, 2]

  config = tmp_path / "probe.py"
  config.write_text(
    "import ml_collections\n"
    f"def get_config(arg=''): return ml_collections.ConfigDict(dict(evals={settings['evals']!r}))\n"
  )
  capsys.readouterr()
  out = tmp_path / "again.json"
  command = ["eval", "--config", str(config), "--checkpoint", str(run), "--out", str(out)]
  assert not cli.main(command)
  table = capsys.readouterr().out.splitlines()
  assert table[0] == "probe: digits test"
  assert table[1].split() == ["seqhw", "patch", "tokens", "GFLOPs", "ms", "top-1", "l2", "n"]
  again = json.loads(out.read_text())["rows"]
  keys = ("seqhw", "top1", "l2", "n")
  for old, new in zip(written["rows"], again, strict=True):
    assert [new[k] for k in keys] == [old[k] for k in keys]


# --- many devices ---


def probe_on_all_devices(path: str) -> None:
  """Writes the rows on all devices that there are, and how many these are."""
  rows = probed(shots=5, batch_size=64)
  written = {"rows": rows, "devices": jax.device_count(), "processes": jax.process_count()}
  with open(path, "w") as file:
    json.dump(written, file)


_RUN = "import runpy, sys; runpy.run_path(sys.argv[1])['probe_on_all_devices'](sys.argv[2])"


@pytest.mark.full
def test_eight_devices_probe_as_one(tmp_path, on_eight_devices):
  path = tmp_path / "eight.json"
  on_eight_devices(probe_on_all_devices, str(path))
  eight = json.loads(path.read_text())
  assert (eight["devices"], jax.device_count()) == (8, 1)
  assert eight["rows"] == probed(shots=5, batch_size=64)


@pytest.mark.slow
def test_two_processes_probe_as_one(tmp_path, environment_of):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  join = (
    "import jax, sys; jax.config.update('jax_cpu_collectives_implementation', 'gloo');"
    f"jax.distributed.initialize('{address}', 2, int(sys.argv[3]));"
  )
  paths = [str(tmp_path / f"{i}.json") for i in range(2)]
  commands = [[sys.executable, "-c", join + _RUN, __file__, p, str(i)] for i, p in enumerate(paths)]
  processes = [subprocess.Popen(command, env=environment_of(2)) for command in commands]
  assert [process.wait(timeout=300) for process in processes] == [0, 0]
  for path in paths:
    with open(path) as file:
      found = json.load(file)
    assert (found["devices"], found["processes"]) == (4, 2)
    assert found["rows"] == probed(shots=5, batch_size=64)
