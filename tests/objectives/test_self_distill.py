"""Self-distillation against its formula; the EMA of the weights against a loop, in a step and in a run."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from flexivit_jax import errors, experiment, train as train_lib, weights
from flexivit_jax.devices import sharding
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives import self_distill, supervised
from flexivit_jax.objectives.base import Losses
from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.training import steps

FIELDS = dict(
  num_classes=3, patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=1, mlp_dim=16, num_heads=2
)


@functools.cache
def made(seed=0):
  """Returns (model, parameters), every array random."""
  model = FlexiViT(**FIELDS)
  params = jax.eval_shape(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=seed))
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape) * 0.3), params)


def batch(n=4):
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (n, 12, 12, 3)).astype(np.float32)
  return {"image": image, "labels": np.eye(3, dtype=np.float32)[rng.integers(3, size=n)]}


def step_and_gradient(objective, ema=None, **options):
  """Returns the loss, the gradient of all parameters and the next state of one step at seqhw=3."""
  (model, params), tx = made(), optax.sgd(1.0)
  step = functools.partial(
    steps.step, model=model, objective=objective, tx=tx, seed=0, seqhw=3, **options
  )
  state = steps.init_state(params, tx, objective)
  state = state if ema is None else state._replace(ema=ema)
  new, measured = jax.jit(step)(state, batch())
  return measured["loss"], jax.tree.map(jnp.subtract, params, new.params), new


def predict(params, **size):
  """Returns the logits [n, k], and what pulls a gradient at them back to the parameters."""
  model, image = made()[0], batch()["image"]
  run = jax.jit(lambda p: model.apply({"params": p}, image, **size)[0])
  logits, pull = jax.vjp(run, params)
  return np.asarray(logits, np.float64), lambda gradient: pull(jnp.float32(gradient))[0]


def assert_close(got, want, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), got, want)


def largest(tree):
  return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def test_where_it_teaches_only_the_labels_count():
  plain, mine = (
    step_and_gradient(objective)
    for objective in (supervised(), self_distill(size={"seqhw": 3}, weight=10.0))
  )
  np.testing.assert_allclose(mine[0], plain[0], rtol=1e-6)
  assert_close(mine[1], plain[1])
  elsewhere = step_and_gradient(self_distill(size={"seqhw": 6}, weight=10.0))
  assert elsewhere[0] > plain[0] + 1e-3  # so that it could have failed


@pytest.mark.parametrize(("ema", "accumulate"), [(None, 1), (None, 2), (0.9, 1)])
def test_elsewhere_it_is_the_formula_with_a_target_without_gradient(ema, accumulate):
  objective = self_distill(size={"seqhw": 6}, weight=0.7, temperature=2.0, ema=ema)
  assert list(objective.inputs) == ["image", "labels"] and objective.also == ({"seqhw": 6},)
  params, labels = made()[1], batch()["labels"]
  teacher = params if ema is None else made(1)[1]
  loss, gradients, _ = step_and_gradient(
    objective, ema=None if ema is None else teacher, accumulate=accumulate
  )
  (student, pull), (target, pull_target) = predict(params, seqhw=3), predict(teacher, seqhw=6)
  log_p, log_q = (scipy.special.log_softmax(x / 2.0, axis=-1) for x in (target, student))
  p, q = np.exp(log_p), np.exp(log_q)
  kl = (p * (log_p - log_q)).sum(-1)
  xent = -(labels * scipy.special.log_softmax(student, axis=-1)).sum(-1)
  np.testing.assert_allclose(loss, (xent + 0.7 * 4 * kl).mean(), rtol=1e-6)
  at_logits = scipy.special.softmax(student, axis=-1) - labels + 0.7 * 2.0 * (q - p)
  assert_close(gradients, pull(at_logits / 4))
  # What would have come through the target: large enough to be seen.
  through = 0.7 * 2.0 * p * (log_p - log_q - kl[:, None])
  assert largest(pull_target(through / 4)) > 1e-3


def test_the_fixed_pass_has_no_dropout():
  model, params = made()
  weights_of = np.float32(np.random.default_rng(3).normal(size=(4, 3)))

  def fixed_alone(predict, part):
    logits = predict({"image": part["image"]}, fixed=True, seqhw=6)["logits"]
    return Losses((logits * weights_of).sum(-1))

  objective, tx = self_distill(size={"seqhw": 6})._replace(loss=fixed_alone), optax.sgd(1.0)
  step = functools.partial(
    steps.step, model=model.clone(dropout=0.5), objective=objective, tx=tx, seed=0, seqhw=3
  )
  new, measured = jax.jit(step)(steps.init_state(params, tx, objective), batch())
  want = (predict(params, seqhw=6)[0] * weights_of).sum(-1).mean()
  np.testing.assert_allclose(measured["loss"], want, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, new.params, params)  # and gives no gradient


def mean_of(trees, decay):
  """The EMA in float64 of the parameters before the first and after each further step."""
  mean = [np.float64(leaf) for leaf in jax.tree.leaves(trees[0])]
  for step, params in enumerate(trees[1:]):
    kept = min(decay, (1 + step) / (10 + step))
    mean = [
      kept * m + (1 - kept) * np.float64(p)
      for m, p in zip(mean, jax.tree.leaves(params), strict=True)
    ]
  return mean


def test_the_ema_is_that_of_a_loop():
  decay = 0.4  # from the sixth step on; before, it forgets faster
  model, params = made()
  objective, tx = self_distill(size={"seqhw": 6}, ema=decay), optax.sgd(0.3)
  step = jax.jit(
    functools.partial(steps.step, model=model, objective=objective, tx=tx, seed=0, seqhw=3)
  )
  state = steps.init_state(params, tx, objective)
  jax.tree.map(np.testing.assert_array_equal, state.ema, params)
  seen = [params]
  for _ in range(9):
    state, _ = step(state, batch())
    seen.append(state.params)
  assert_close(jax.tree.leaves(state.ema), mean_of(seen, decay))
  assert largest(jax.tree.map(jnp.subtract, state.ema, state.params)) > 1e-3


def test_without_a_decay_there_is_no_mean():
  _, _, state = step_and_gradient(self_distill(size={"seqhw": 6}))
  assert state.ema is None


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(loss="softmax"), "Did you mean 'softmax_xent'"),
    (dict(distance="kll"), "Did you mean 'kl'"),
    (dict(temperature=0.0), "temperature=0.0, weight=1.0; expected both > 0"),
    (dict(weight=0.0), "temperature=1.0, weight=0.0; expected both > 0"),
    (dict(ema=1.0), "ema=1.0; expected a decay between 0 and 1"),
    (dict(ema=0.0), "ema=0.0; expected a decay between 0 and 1"),
    (dict(size={}), "size is empty; give where"),
  ],
)
def test_mistakes_are_errors(options, message):
  with pytest.raises(errors.UserError, match=message):
    self_distill(**{"size": {"seqhw": 6}, **options})


# --- in a run ---

CONFIG = dict(
  total_steps=4,
  log_every=2,
  input=dict(
    data=dict(name="synthetic", image_size=12, num_classes=3, num_examples=16, split="train"),
    pp="decode|flip_lr|value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
    batch_size=4,
    threads=0,
  ),
  model=dict({k: v for k, v in FIELDS.items() if k != "num_classes"}, dropout=0.1),
  flexi=dict(seqhw=dict(v=(3,))),
  objective=dict(name="self_distill", size=dict(seqhw=6), ema=0.5, mixup_p=0.5),
  optim=dict(lr=1e-2),
  checkpoint=dict(every_steps=1, keep=None),
)


def saved(run, step):
  """(parameters, the rest of the state) of a checkpoint, as NumPy arrays."""
  exp = experiment.from_config(CONFIG)
  state = train_lib.preparation.first_state(exp, sharding.make_mesh())
  checkpoints = Checkpoints(run / "checkpoints", keep=None)
  params, rest, _ = checkpoints.restore(step, state.params, train_lib.preparation.rest(state))
  checkpoints.close()
  return jax.device_get((params, rest))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run."""
  return train_lib.train(CONFIG, tmp_path_factory.mktemp("whole"))


def test_a_checkpoint_holds_the_mean_of_the_weights_until_then(whole):
  exp = experiment.from_config(CONFIG)
  first = train_lib.preparation.first_state(exp, sharding.make_mesh()).params
  states = [saved(whole, step) for step in range(1, 5)]
  for n, (_, rest) in enumerate(states, start=1):
    want = mean_of([first, *(params for params, _ in states[:n])], decay=0.5)
    assert_close(jax.tree.leaves(rest["ema"]), want)
  _, params = weights.load(whole)  # what predicts are the weights, not their mean
  jax.tree.map(np.testing.assert_array_equal, params, states[-1][0])
  assert largest(jax.tree.map(np.subtract, params, states[-1][1]["ema"])) > 1e-4


@pytest.mark.full
def test_a_run_with_a_mean_resumes_bit_for_bit(whole, tmp_path, train_until):
  train_until(CONFIG, tmp_path, 2)
  train_lib.train(CONFIG, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, saved(tmp_path, 4), saved(whole, 4))
  losses = [
    [row["loss"] for row in metrics_writer.read_rows(r / "metrics.jsonl")]
    for r in (tmp_path, whole)
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_size_that_the_model_cannot_run_is_an_error_and_its_pass_is_counted():
  config = copy.deepcopy(CONFIG)
  exp = experiment.from_config(config)
  config["objective"] = {"loss": "softmax_xent"}
  plain = experiment.from_config(config)
  forward = plain.step_flops({"seqhw": 6}) / 3
  assert exp.step_flops({"seqhw": 3}) == pytest.approx(plain.step_flops({"seqhw": 3}) + forward)
  config["objective"] = dict(name="self_distill", size=dict(seqhw=5))
  with pytest.raises(errors.UserError, match="seqhw=5 does not divide the image"):
    experiment.from_config(config)
