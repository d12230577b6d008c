"""Distillation against its definition; the teacher is neither trained nor stored, and a run keeps its teacher."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from flexivit_jax import errors, experiment, train as train_lib, trees, weights
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import loaders
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives import distill, losses
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.running import checkpoint, metrics_writer
from flexivit_jax.training import steps

FIELDS = dict(
  num_classes=3, patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=1, mlp_dim=16, num_heads=2
)


@functools.cache
def made(seed, **fields):
  """Returns (model, parameters), every array random."""
  model = FlexiViT(**FIELDS | fields)
  params = jax.eval_shape(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=seed))
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


def kl(student, teacher, t):
  """The distance [n] and its gradient at the student's logits [n, k]."""
  log_p, log_q = (scipy.special.log_softmax(x / t, axis=-1) for x in (teacher, student))
  far = t**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
  return far, t * (np.exp(log_q) - np.exp(log_p))


def euclidean(student, teacher, t):
  """As `kl`, of the distance "logsoftmax_euclidean"."""
  log_p, log_q = (scipy.special.log_softmax(x / t, axis=-1) for x in (teacher, student))
  far, total = log_q - log_p, (log_q - log_p).sum(-1, keepdims=True)
  norm = np.sqrt((far**2).sum(-1, keepdims=True))
  return t**2 * norm[:, 0], t * (far - np.exp(log_q) * total) / norm


def step_and_gradient(objective, model, params, data, accumulate=1, **options):
  """Returns the loss, the gradient of all parameters, and the targets of one step at seqhw=6."""
  options = dict(seed=0, accumulate=accumulate) | options
  tx, teaching = optax.sgd(1.0), objective.teaching
  state = steps.init_state(params, tx, objective)
  targets = jax.jit(functools.partial(steps.targets, teaching=teaching, **options))(
    state.step, {k: data[k] for k in teaching.inputs}, teaching.frozen
  )
  step = functools.partial(steps.step, model=model, objective=objective, tx=tx, seqhw=6, **options)
  taken = {k: data[k] for k in objective.inputs} | {"targets": targets}
  new, measured = jax.jit(step)(state, taken)
  return measured["loss"], jax.tree.map(jnp.subtract, params, new.params), targets


def pulled_back(model, params, image, at_logits, **size):
  """The gradient of all parameters from that at the logits [n, k] of each example, of the mean over examples."""
  predict = jax.jit(lambda p: model.apply({"params": p}, image, **size)[0])
  _, pull = jax.vjp(predict, params)
  return pull(jnp.float32(at_logits / len(at_logits)))[0]


def assert_close(got, want, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), got, want)


@pytest.mark.parametrize(
  ("names", "options", "formula", "accumulate"),
  [
    (("fine",), {}, kl, 1),
    (("fine", "self"), dict(temperature=2.0, label_weight=0.5), kl, 1),
    (("fine", "self"), dict(temperature=2.0, label_weight=0.5), kl, 2),
    (("fine",), dict(distance="logsoftmax_euclidean", temperature=1.5), euclidean, 1),
  ],
)
def test_loss_and_gradients_are_the_formulas_of_each_teacher_at_its_own_size_and_resolution(
  names, options, formula, accumulate
):
  (model, params), (other, other_params) = made(0), made(1, width=32)
  known = {
    "fine": Teacher(other, other_params, "large", {"seqhw": 8}),
    "self": Teacher(model, params, "image", {}),
  }
  objective = distill(teachers={name: known[name] for name in names}, **options)
  weight, t = options.get("label_weight", 0.0), options.get("temperature", 1.0)
  assert list(objective.inputs) == (["image", "labels"] if weight else ["image"])
  assert list(objective.teaching.inputs) == ["large", "image"][: len(names)]
  data = batch()
  student = logits(model, params, data["image"], seqhw=6)
  log_q = scipy.special.log_softmax(student, axis=-1)
  want = -weight * (data["labels"] * log_q).sum(-1)
  at_logits = weight * (np.exp(log_q) - data["labels"])
  targets = {
    "fine": logits(other, other_params, data["large"], seqhw=8),
    "self": logits(model, params, data["image"]),
  }
  for name in names:
    far, gradient = formula(student, targets[name], t)
    want, at_logits = want + far, at_logits + gradient
  loss, gradients, _ = step_and_gradient(objective, model, params, data, accumulate)
  np.testing.assert_allclose(loss, want.mean(), rtol=1e-6)
  expected = pulled_back(model, params, data["image"], at_logits, seqhw=6)
  assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected["head"])) > 0.01
  assert_close(gradients, expected)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  model, params = made(0)
  objective = distill(teachers={"self": Teacher(model, params, "image", {"seqhw": 6})})
  loss, gradients, _ = step_and_gradient(objective, model, params, batch())
  assert abs(loss) < 1e-6 and max(np.abs(g).max() for g in jax.tree.leaves(gradients)) < 1e-6


def test_the_images_of_students_and_teachers_are_mixed_alike_as_the_steps_key_says():
  model, params = made(0)
  objective = distill(
    teachers={"t": Teacher(model, params, "large", {})}, mixup_p=1.0, label_weight=1.0
  )
  data = batch()
  key = jax.random.key(3)
  mixed = jax.jit(objective.prepare)(data | {"targets": jnp.float32(7)}, key)
  assert mixed.pop("targets") == 7
  mixed |= jax.jit(objective.teaching.prepare)({"large": data["large"]}, key)
  shares = []
  for name in ("image", "labels", "large"):
    x, rolled = data[name], np.roll(data[name], 1, axis=0)
    shares.append(np.vdot(mixed[name] - rolled, x - rolled) / np.vdot(x - rolled, x - rolled))
  assert 0.5 <= shares[0] < 0.99 and shares[1:] == pytest.approx([shares[0]] * 2, abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_targets_are_the_logits_of_the_images_mixed_as_the_step_mixes_them(accumulate):
  (model, params), data = made(1, width=32), batch()
  objective = distill(teachers={"t": Teacher(model, params, "image", {"seqhw": 4})}, mixup_p=1.0)
  fn = functools.partial(steps.targets, teaching=objective.teaching, seed=5, accumulate=accumulate)
  got = jax.jit(fn)(jnp.int32(8), {"image": data["image"]}, objective.teaching.frozen)["t"]
  key, _ = jax.random.split(jax.random.fold_in(jax.random.key(5), 1 + 8))
  (image,) = losses.mixup(key, jnp.asarray(data["image"]), p=1.0)
  assert np.abs(image - data["image"]).max() > 0.1
  np.testing.assert_allclose(got, logits(model, params, image, seqhw=4), rtol=0, atol=2e-6)


def test_all_logits_kept_one_by_one_are_all_logits():
  model, params = made(0)
  teachers = {"t": Teacher(*made(1, width=32), "large", {"seqhw": 8})}
  dense, *sparse = (
    step_and_gradient(distill(teachers=teachers, top_k=k), model, params, batch())
    for k in (None, 3, 1000)
  )
  for loss, gradients, targets in sparse:
    assert targets["t"].values.shape == targets["t"].indices.shape == (4, 3)
    assert loss == dense[0]
    jax.tree.map(np.testing.assert_array_equal, gradients, dense[1])


def test_top_k_is_distillation_from_the_kept_probabilities_and_an_even_rest():
  (model, params), (other, other_params) = made(0), made(1, width=32)
  objective = distill(teachers={"t": Teacher(other, other_params, "large", {})}, top_k=1)
  data = batch()
  loss, gradients, _ = step_and_gradient(objective, model, params, data)
  p = scipy.special.softmax(logits(other, other_params, data["large"]), axis=-1)
  first = p == p.max(-1, keepdims=True)
  flat = np.where(first, p, (1 - p.max(-1, keepdims=True)) / 2)
  far, gradient = kl(logits(model, params, data["image"], seqhw=6), np.log(flat), 1.0)
  np.testing.assert_allclose(loss, far.mean(), rtol=2e-6)
  assert_close(gradients, pulled_back(model, params, data["image"], gradient, seqhw=6))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(teachers={}), "teachers is empty"),
    (dict(distance="kll"), "Did you mean 'kl'"),
    (dict(label_loss="softmax"), "Did you mean 'softmax_xent'"),
    (dict(temperature=0.0), "expected > 0"),
    (dict(label_weight=-1.0), "label_weight=-1.0, .*expected > 0, >= 0"),
    (dict(top_k=0), "top_k=0; expected .* None or >= 1"),
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


def test_a_run_changes_no_bit_of_its_teacher_saves_none_and_goes_on_with_no_other(
  teacher, tmp_path, monkeypatch
):
  made_targets = []
  targets = train_lib.preparation.teacher_logits

  def observed(*args, **fit):
    made_targets.append(targets(*args, **fit))
    return made_targets[0]

  with monkeypatch.context() as patch:
    patch.setattr(train_lib.preparation, "teacher_logits", observed)
    run = train_lib.train(config(teacher), tmp_path / "run")
  rows = metrics_writer.read_rows(run / "metrics.jsonl")
  assert {"test/agree1/seqhw=6", "test/kl/seqhw=2"} <= rows[-1].keys()
  before = trees.digest(weights.load(teacher)[1])
  (used,) = made_targets
  assert trees.digest(used._frozen["prof"]) == trees.digest(used._teaching.frozen["prof"]) == before
  with contextlib.closing(checkpoint.Checkpoints(run / "checkpoints", keep=None)) as manager:
    stored = manager._manager.item_metadata(4)
    shapes = [
      leaf.shape
      for item in (stored.params, stored.state)
      for leaf in jax.tree.leaves(dict(item.items()))
    ]
  assert (4, 4, 3, 16) in shapes and not any(32 in shape for shape in shapes)  # 32: its width
  _, params = weights.load(run)
  assert params["embedding"]["kernel"].shape[-1] == 16  # the student's alone
  other = save(tmp_path / "other.npz", *made(2, width=32))
  with pytest.raises(errors.UserError, match="trained with other teachers"):
    train_lib.train(config(other, total_steps=6), run)
  (folder, step) = checkpoint.find(run)
  assert step == 4 and folder.name == "checkpoints"


@pytest.mark.full
def test_training_brings_the_student_nearer(teacher, tmp_path):
  longer = config(teacher, total_steps=40, evals={})
  longer["objective"] = longer["objective"] | {"mixup_p": 0.0}
  run = train_lib.train(longer, tmp_path / "run")
  loss = [row["loss"] for row in metrics_writer.read_rows(run / "metrics.jsonl")]
  assert np.mean(loss[-5:]) < 0.7 * np.mean(loss[:5])


def test_a_teacher_that_does_not_fit_is_an_error(teacher, tmp_path):
  with pytest.raises(errors.UserError, match="seqhw=5 does not divide the image"):
    wrong = dict(checkpoint=teacher, image="large", seqhw=5)
    experiment.from_config(config(teacher, objective=dict(name="distill", teachers=dict(t=wrong))))
  with pytest.raises(errors.UserError, match=r"Unknown config key 'objective.teachers.t.seqwh'"):
    wrong = dict(checkpoint=teacher, seqwh=5)
    experiment.from_config(config(teacher, objective=dict(name="distill", teachers=dict(t=wrong))))
  with pytest.raises(errors.UserError, match="has 3 classes, the model 4"):
    experiment.from_config(config(teacher, model=FIELDS | {"num_classes": 4}))
  with pytest.raises(errors.UserError, match="no 'big'; expected"):
    wrong = dict(checkpoint=teacher, image="big")
    experiment.from_config(config(teacher, objective=dict(name="distill", teachers=dict(t=wrong))))


# --- teachers ---


def test_a_teacher_is_a_checkpoint_or_a_model(teacher):
  fields = FIELDS | {"width": 32}
  with pytest.raises(errors.UserError, match="neither checkpoint nor model"):
    loaders.load_teacher()
  with pytest.raises(errors.UserError, match="width: 32 in the file, 48 in the config"):
    loaders.load_teacher(checkpoint=teacher, model=fields | {"width": 48})
  same = fields | {"gelu": loaders.load_teacher(checkpoint=teacher).model.gelu}
  loaded = loaders.load_teacher(checkpoint=teacher, model=same, image="large", seqhw=8)
  assert (loaded.image, loaded.size) == ("large", {"seqhw": 8})
  jax.tree.map(np.testing.assert_array_equal, loaded.params, made(1, width=32)[1])


def test_a_teacher_of_random_weights_is_the_same_each_time_and_says_something():
  a, b = (loaders.load_teacher(model=FIELDS | {"width": 32}) for _ in range(2))
  assert trees.digest(a.params) == trees.digest(b.params)
  said = logits(a.model, a.params, batch()["image"], seqhw=3)
  assert said.shape == (4, 3) and said.std(axis=0).min() > 1e-3


@pytest.mark.parametrize("where", ["objective", "evaluation"])
def test_a_misspelt_field_of_a_teachers_model_is_an_error(teacher, where):
  section = dict(model=dict(FIELDS, widht=32), image="large", seqhw=8)
  wrong = config(teacher)
  (wrong["objective"]["teachers"] if where == "objective" else wrong["evals"]["test"])[
    "prof" if where == "objective" else "teacher"
  ] = section
  with pytest.raises(errors.UserError, match=r"model.widht'.*Did you mean .*model.width"):
    experiment.from_config(wrong)


# --- where a run starts ---


def test_init_starts_from_weights_whose_buffers_are_resized(teacher):
  model = FIELDS | {"width": 32, "patch_size": (6, 6), "posemb_size": (2, 2)}
  exp = experiment.from_config(config(teacher, model=model, init=dict(checkpoint=teacher)))
  _, want = weights.load(teacher, flexify=((6, 6), (2, 2)))
  state = train_lib.preparation.first_state(exp, sharding.make_mesh())
  jax.tree.map(np.testing.assert_array_equal, state.params, want)
  same = experiment.from_config(
    config(teacher, model=FIELDS | {"width": 32}, init=dict(checkpoint=teacher))
  )
  jax.tree.map(np.testing.assert_array_equal, same.init, made(1, width=32)[1])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(width=32, gelu="exact"), "gelu: 'tanh' in the file, 'exact' in the model"),
    (dict(width=32, num_heads=4), "num_heads: 2 in the file, 4 in the model"),
    (dict(width=16), "width: 32 in the file, 16 in the model"),
  ],
)
def test_weights_of_another_model_are_refused(teacher, fields, message):
  with pytest.raises(errors.UserError, match=message):
    experiment.from_config(config(teacher, model=FIELDS | fields, init=dict(checkpoint=teacher)))
