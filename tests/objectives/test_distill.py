"""Distillation against its definition; the teacher is neither trained nor stored, and a run keeps its teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from flexivit_jax import checkpoint, errors, experiment, metrics, steps, train as train_lib, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives import distill
from flexivit_jax.objectives.distill import Teacher

FIELDS = dict(
  num_classes=3, patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=1, mlp_dim=16, num_heads=2
)


@functools.cache
def made(seed, **fields):
  """Returns (model, parameters), every array random."""
  model = FlexiViT(**FIELDS | fields)
  params = steps.init_params(model, (12, 12, 3), seed=seed)
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape) * 0.3), params)


def batch(n=4):
  rng = np.random.default_rng(0)
  image, large = (rng.uniform(-1, 1, (n, s, s, 3)).astype(np.float32) for s in (12, 16))
  labels = np.eye(3, dtype=np.float32)[rng.integers(3, size=n)]
  return {"image": image, "large": large, "labels": labels}


def logits(model, params, image, **size):
  out = jax.jit(functools.partial(model.apply, **size))({"params": params}, image)[0]
  return np.asarray(out, np.float64)


def kl(student, teacher, t=1.0):
  log_p, log_q = (scipy.special.log_softmax(x / t, axis=-1) for x in (teacher, student))
  return t**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def step_of(objective, model, **options):
  tx = optax.sgd(0.1)
  fn = functools.partial(steps.step, model=model, objective=objective, tx=tx, seed=0, seqhw=6)
  return tx, jax.jit(functools.partial(fn, **options))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_is_the_kl_of_each_teacher_at_its_own_size_and_resolution(accumulate):
  (model, params), (other, other_params) = made(0), made(1, width=32)
  teachers = {
    "fine": Teacher(other, other_params, "large", {"seqhw": 8}),
    "self": Teacher(model, params, "image", {}),
  }
  objective = distill(teachers=teachers, temperature=2.0, label_weight=0.5)
  assert objective.inputs == ("image", "large", "labels")
  tx, step = step_of(objective, model, accumulate=accumulate)
  data = batch()
  state = steps.TrainState(jnp.int32(0), params, tx.init(params))
  new, measured = step(state, data, objective.frozen)
  student = logits(model, params, data["image"], seqhw=6)
  want = kl(student, logits(other, other_params, data["large"], seqhw=8), 2.0)
  want += kl(student, logits(model, params, data["image"]), 2.0)
  want -= 0.5 * (data["labels"] * scipy.special.log_softmax(student, axis=-1)).sum(-1)
  np.testing.assert_allclose(measured["loss"], want.mean(), rtol=1e-5)
  assert measured["grad_norm"] > 0.01
  assert jax.tree.structure(new.params) == jax.tree.structure(params)  # and nothing of a teacher


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  model, params = made(0)
  objective = distill(teachers={"self": Teacher(model, params, "image", {"seqhw": 6})})
  assert objective.inputs == ("image",)
  tx, step = step_of(objective, model)
  state = steps.TrainState(jnp.int32(0), params, tx.init(params))
  _, measured = step(state, batch(), objective.frozen)
  assert abs(measured["loss"]) < 1e-6 and measured["grad_norm"] < 1e-6


def test_mixup_mixes_both_images_alike():
  model, params = made(0)
  objective = distill(teachers={"t": Teacher(model, params, "large", {})}, mixup_p=1.0)
  data = batch()
  mixed = jax.jit(objective.prepare)(data, jax.random.key(3))
  shares = []
  for name in ("image", "large"):
    x, rolled = data[name], np.roll(data[name], 1, axis=0)
    shares.append(np.vdot(mixed[name] - rolled, x - rolled) / np.vdot(x - rolled, x - rolled))
  assert 0.5 <= shares[0] < 1 and shares[0] == pytest.approx(shares[1], abs=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(teachers={}), "teachers is empty"),
    (dict(distance="kll"), "Did you mean 'kl'"),
    (dict(label_loss="softmax"), "Did you mean 'softmax_xent'"),
    (dict(temperature=0.0), "expected > 0"),
    (dict(label_weight=-1.0), "expected > 0 and >= 0"),
  ],
)
def test_mistakes_are_errors(options, message):
  teachers = {"t": Teacher(*made(0), "image", {})}
  with pytest.raises(errors.UserError, match=message):
    distill(**{"teachers": teachers, **options})


# --- in a run ---

PP = "decode|copy('image', 'large')|resize(12)|value_range(-1, 1)|value_range(-1, 1, key='large')"
KEEP = "keep('image', 'large')"


def save(path, model, params):
  record = {"model": experiment_fields(model)}
  weights.save_npz(path, model, params, record)
  return str(path)


def experiment_fields(model):
  return FIELDS | {"width": model.width, "gelu": model.gelu}


def config(teacher, **values):
  data = dict(name="synthetic", image_size=16, num_classes=3, num_examples=16)
  section = dict(checkpoint=teacher, image="large", seqhw=8)
  evaluation = dict(type="distance", pp=f"{PP}|{KEEP}", batch_size=8, seqhw=(2, 6), threads=0)
  return (
    dict(
      total_steps=4,
      input=dict(data=data | dict(split="train"), pp=f"{PP}|{KEEP}", batch_size=8, threads=0),
      model=dict(FIELDS),
      flexi=dict(seqhw=dict(v=(3, 6))),
      objective=dict(name="distill", teachers=dict(prof=section), mixup_p=0.5),
      optim=dict(lr=1e-2),
      evals=dict(test=dict(evaluation, data=data | dict(split="test"), teacher=section)),
      checkpoint=dict(every_steps=2, keep=None),
    )
    | values
  )


@pytest.fixture
def teacher(tmp_path):
  return save(tmp_path / "teacher.npz", *made(1, width=32))


def test_a_run_keeps_its_teacher_out_of_its_checkpoints_and_itself_to_its_teacher(
  teacher, tmp_path
):
  run = train_lib.train(config(teacher), tmp_path / "run")
  rows = metrics.read_rows(run / "metrics.jsonl")
  assert {"test/agree1/seqhw=6", "test/kl/seqhw=2"} <= rows[-1].keys()
  _, params = weights.load(run)
  assert params["embedding"]["kernel"].shape[-1] == 16  # the student's alone
  other = save(tmp_path / "other.npz", *made(2, width=32))
  with pytest.raises(errors.UserError, match="trained with other teachers"):
    train_lib.train(config(other, total_steps=6), run)
  (folder, step) = checkpoint.find(run)
  assert step == 4 and folder.name == "checkpoints"
  again = train_lib.train(config(teacher, total_steps=4), tmp_path / "again")
  assert metrics.read_rows(again / "metrics.jsonl")[3]["loss"] == rows[3]["loss"]


def test_training_brings_the_student_nearer(teacher, tmp_path):
  longer = config(teacher, total_steps=40, evals={})
  longer["objective"] = longer["objective"] | {"mixup_p": 0.0}
  run = train_lib.train(longer, tmp_path / "run")
  losses = [row["loss"] for row in metrics.read_rows(run / "metrics.jsonl")]
  assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_teacher_that_does_not_fit_is_an_error(teacher, tmp_path):
  with pytest.raises(errors.UserError, match="seqhw=5 does not divide the image"):
    wrong = dict(checkpoint=teacher, image="large", seqhw=5)
    experiment.build(**config(teacher, objective=dict(name="distill", teachers=dict(t=wrong))))
  with pytest.raises(errors.UserError, match=r"Unknown config key 'objective.teachers.t.seqwh'"):
    wrong = dict(checkpoint=teacher, seqwh=5)
    experiment.build(**config(teacher, objective=dict(name="distill", teachers=dict(t=wrong))))
  with pytest.raises(errors.UserError, match="has 3 classes, the model 4"):
    experiment.build(**config(teacher, model=FIELDS | {"num_classes": 4}))
  with pytest.raises(errors.UserError, match="no 'big'; expected"):
    wrong = dict(checkpoint=teacher, image="big")
    experiment.build(**config(teacher, objective=dict(name="distill", teachers=dict(t=wrong))))


# --- where a run starts ---


def test_init_starts_from_weights_whose_buffers_are_resized(teacher):
  model = FIELDS | {"width": 32, "patch_size": (6, 6), "posemb_size": (2, 2)}
  exp = experiment.build(**config(teacher, model=model, init=dict(checkpoint=teacher)))
  _, want = weights.load(teacher, flexify=((6, 6), (2, 2)))
  state = train_lib._init(exp, train_lib.sharding.make_mesh())
  jax.tree.map(np.testing.assert_array_equal, state.params, want)
  same = experiment.build(
    **config(teacher, model=FIELDS | {"width": 32}, init=dict(checkpoint=teacher))
  )
  jax.tree.map(np.testing.assert_array_equal, same.init, made(1, width=32)[1])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(width=32, gelu="exact"), "gelu: 'tanh' in the file, 'exact' in the model"),
    (dict(width=32, num_heads=4), "num_heads: 2 in the file, 4 in the model"),
    (dict(width=16), r"expected float32\[4,4,3,16\], got float32\[4,4,3,32\]"),
  ],
)
def test_weights_of_another_model_are_refused(teacher, fields, message):
  with pytest.raises(errors.UserError, match=message):
    experiment.build(**config(teacher, model=FIELDS | fields, init=dict(checkpoint=teacher)))
