"""Distillation of embeddings against double loops in float64; exact in microbatches, from a cache, and on resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexivit_jax import errors, experiment, train as train_lib, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives import OBJECTIVES, losses
from flexivit_jax.objectives.base import BatchLoss
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.running import metrics_writer
from flexivit_jax.training import steps

FIELDS = dict(
  num_classes=5, patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=1, mlp_dim=16, num_heads=2
)
make = OBJECTIVES["distill_embeddings"]


def double_loop(ours, theirs, temperature):
  """Returns the mean cosine distance and the mean KL of the neighbours, number by number."""

  def cosine(x, y):
    return sum(x * y) / np.sqrt(sum(x * x) * sum(y * y))

  n, far, kl = len(ours), 0.0, 0.0
  for i in range(n):
    far += 1 - cosine(ours[i], theirs[i])
    others = [j for j in range(n) if j != i]
    p, q = (np.exp([cosine(x[i], x[j]) / temperature for j in others]) for x in (theirs, ours))
    kl += sum(p / sum(p) * np.log(p / sum(p) / (q / sum(q))))
  return far / n, kl / n


@pytest.mark.parametrize("n", [2, 7])
def test_losses_and_gradients_are_those_of_double_loops(n):
  rng = np.random.default_rng(n)
  ours, theirs, along = rng.normal(size=(3, n, 4))
  for which, fn in enumerate(
    (losses.cosine_distance, functools.partial(losses.relation, temperature=0.5))
  ):
    mean = jax.value_and_grad(lambda x, fn=fn: fn(x, jnp.float32(theirs)).mean())
    loss, gradient = mean(jnp.float32(ours))
    assert loss == pytest.approx(double_loop(ours, theirs, 0.5)[which], rel=1e-5, abs=1e-6)
    moved = [double_loop(ours + s * 1e-6 * along, theirs, 0.5)[which] for s in (1, -1)]
    slope = (moved[0] - moved[1]) / 2e-6
    assert np.vdot(gradient, along) == pytest.approx(slope, rel=1e-4, abs=2e-6)


def test_lengths_and_the_order_of_the_images_do_not_matter_and_zeros_have_a_gradient():
  ours, theirs = jnp.float32(np.random.default_rng(0).normal(size=(2, 6, 4)))
  order, relation = (
    jnp.array([3, 1, 0, 5, 2, 4]),
    functools.partial(losses.relation, temperature=0.1),
  )
  for fn in (losses.cosine_distance, relation):
    want = fn(ours, theirs)
    np.testing.assert_allclose(fn(ours[order], theirs[order]), want[order], rtol=1e-5)
    np.testing.assert_allclose(fn(3 * ours, 0.2 * theirs), want, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x, fn=fn: fn(x, theirs).sum())(0 * ours)).all()
  # Another space of another length: turned and with zeros added, the neighbours are the same.
  turned = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0].astype(np.float32)
  wide = jnp.pad(theirs, ((0, 0), (0, 2))) @ turned
  assert np.abs(relation(theirs, wide)).max() < 1e-5


@functools.cache
def made(seed, **fields):
  """Returns (model, parameters), every array random."""
  model = FlexiViT(**FIELDS | fields)
  params = jax.eval_shape(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=seed))
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape) * 0.3), params)


def gradients(objective, accumulate):
  """The loss and the gradients of a step at seqhw=6 on four images, and the targets."""
  model, params = made(0)
  image = jnp.float32(np.random.default_rng(0).uniform(-1, 1, (4, 12, 12, 3)))
  state = steps.init_state(params, optax.sgd(1.0), objective)
  options = dict(seed=0, accumulate=accumulate)
  teach = functools.partial(steps.targets, teaching=objective.teaching, **options)
  targets = jax.jit(teach)(state.step, {"image": image}, objective.teaching.frozen)
  fn = functools.partial(steps.gradients, model=model, objective=objective, seqhw=6, **options)
  return *jax.jit(fn)(state, {"image": image, "targets": targets}), targets


@pytest.mark.parametrize("relational", [pytest.param(0.0, marks=pytest.mark.full), 2.0])
def test_microbatches_change_nothing(relational):
  teachers = {"a": Teacher(*made(1), "image", {"seqhw": 3}), "b": Teacher(*made(2), "image", {})}
  objective = make(teachers=teachers, output="logits", relational=relational, mixup_p=1.0)
  assert objective.separable == (not relational)
  (loss, whole, targets), (split_loss, split, _) = (gradients(objective, n) for n in (1, 2))
  assert targets["a"].shape == (4, 5) and loss > 0.1
  np.testing.assert_allclose(split_loss, loss, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), split, whole)


@pytest.mark.full
def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  itself = {"self": Teacher(*made(0), "image", {"seqhw": 6})}
  loss, grads, _ = gradients(make(teachers=itself), 1)
  assert abs(loss) < 1e-6 and max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-5


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(teachers={}), "teachers is empty"),
    (dict(output="prelogits"), "Did you mean 'pre_logits'"),
    (dict(temperature=0.0), "a temperature > 0"),
    (dict(cosine=0.0, relational=0.0), "one of them > 0"),
  ],
)
def test_mistakes_are_errors(options, message):
  with pytest.raises(errors.UserError, match=message):
    make(**{"teachers": {"t": Teacher(*made(0), "image", {})}, **options})


# --- in a run ---


def config(**values):
  teacher = dict(model=dict(FIELDS, num_classes=0), seqhw=6)
  data = dict(name="synthetic", image_size=12, num_classes=3, num_examples=16, split="train")
  return (
    dict(
      total_steps=4,
      accumulate=2,
      input=dict(data=data, pp="decode|flip_lr|value_range(-1, 1)|keep('image')", batch_size=4, threads=0),
      model=dict(FIELDS, num_classes=0),
      flexi=dict(seqhw=dict(v=(2, 3))),
      objective=dict(name="distill_embeddings", teachers=dict(t=teacher), mixup_p=1.0),
      optim=dict(lr=1e-2),
      checkpoint=dict(every_steps=2, keep=None),
    )
    | values
  )  # fmt: skip


@pytest.mark.full
def test_a_run_that_was_stopped_resumes_to_the_bit_also_from_a_cache(tmp_path, train_until):
  def outcome(run):
    rows = metrics_writer.read_rows(run / "metrics.jsonl")
    return weights.load(run)[1], [(r["seqhw"], r["loss"], r["grad_norm"]) for r in rows]

  plain = outcome(train_lib.train(config(), tmp_path / "plain"))
  cached = config(teacher_cache=str(tmp_path / "cache"))
  train_until(cached, tmp_path / "run", 3)
  jax.tree.map(
    np.testing.assert_array_equal, outcome(train_lib.train(cached, tmp_path / "run")), plain
  )
  other = cached | dict(objective=dict(cached["objective"], output="logits"))
  with pytest.raises(errors.UserError, match=r"takes .* from the model"):
    train_lib.train(other, tmp_path / "other")


def test_the_teacher_has_embeddings_of_the_students_length_and_any_classes():
  exp = experiment.from_config(config())
  assert isinstance(exp.objective.loss, BatchLoss) and exp.objective.outputs == ("pre_logits",)
  assert exp.drawn.keys() == experiment.from_config(config()).drawn.keys()
  fields = dict(FIELDS, num_classes=7)
  goal = dict(name="distill_embeddings", teachers=dict(t=dict(model=fields, seqhw=6)))
  experiment.from_config(config(objective=goal))
  goal["teachers"] = dict(t=dict(model=dict(fields, width=32), seqhw=6))
  with pytest.raises(errors.UserError, match="has pre_logits of length 32, the model of 16"):
    experiment.from_config(config(objective=goal))


@pytest.mark.full
def test_a_run_that_teaches_what_a_head_gives_says_that_the_head_is_no_classifier(tmp_path):
  fields = dict(FIELDS, num_classes=7)
  goal = dict(teachers=dict(t=dict(model=fields, seqhw=6)), output="logits")
  settings = config(model=fields, objective=dict(config()["objective"], **goal), total_steps=2)
  assert experiment.from_config(settings).projection
  assert not experiment.from_config(config()).projection
  run = train_lib.train(settings, tmp_path / "run")
  assert weights.load_with_record(run)[2]["projection"]
