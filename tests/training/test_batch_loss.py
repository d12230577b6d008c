"""A loss that compares the examples of a batch: exact in any number of microbatches, on any mesh, and on resuming."""

import contextlib
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexivit_jax import errors, experiment, specs, train as train_lib
from flexivit_jax.data.sources import SOURCES, Source
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import preparation
from flexivit_jax.models import MODELS, FlexiViT, counting
from flexivit_jax.models.grid import which_grid
from flexivit_jax.objectives import OBJECTIVES, supervised
from flexivit_jax.objectives.base import BatchLoss, Losses, Objective, keep
from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.training import step_programs, steps

pytestmark = pytest.mark.faults


class Towers(nn.Module, counting.Counted):
  """Two embeddings of unit length, of an image and of words, and a temperature."""

  num_classes: int = 0
  dtype: str = "float32"
  words: int = 20
  dropout: float = 0.0

  @nn.compact
  def __call__(self, image, words, *, seqhw, train=False):
    n, h, w, c = image.shape
    x = image.reshape(n, seqhw, h // seqhw, seqhw, w // seqhw, c).mean((2, 4))
    x = nn.tanh(nn.Dense(8, name="embedding")(x)).mean((1, 2))
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    y = nn.tanh(nn.Embed(self.words, 8, name="words")(words)).mean(1)
    t = self.param("t", nn.initializers.constant(1.0), (1,))
    unit = lambda z: z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)  # noqa: E731
    out = {"image": unit(nn.Dense(6)(x)), "words": unit(nn.Dense(6)(y)), "t": jnp.repeat(t, n)}
    return out["image"], out

  @property
  def inputs(self):
    return {"image": specs.image(), "words": specs.spec("l", "int")}

  @property
  def outputs(self):
    return {"image": specs.spec("e"), "words": specs.spec("e"), "t": specs.spec("")}

  @nn.nowrap
  def grid(self, image_hw, *, seqhw):
    return which_grid(image_hw, (1, 1), seqhw=seqhw)


def contrast():
  """Each image has to find its own words among those of the whole batch, and the other way round."""

  def embed(predict, batch):
    return predict({"image": batch["image"], "words": batch["words"]})

  def loss(embedded, batch):
    logits = embedded["image"] @ embedded["words"].T * jnp.exp(embedded["t"])[:, None]
    own = jnp.diagonal(logits)
    total = jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1) - 2 * own
    return Losses(total / 2)

  inputs = {"image": specs.image(), "words": specs.spec("l", "int")}
  return Objective(inputs, ("image", "words", "t"), keep("image", "words"), BatchLoss(embed, loss))


def pairs(*, split):
  rng = np.random.default_rng(0)
  rows = [
    {
      "image": np.tile(rng.integers(256, size=3, dtype=np.uint8), (12, 12, 1)),
      "words": rng.integers(20, size=5),
      "id": str(i),
    }
    for i in range(32)
  ]
  return Source("pairs", split, 0, None, len(rows), lambda ids: [dict(rows[i]) for i in ids])


SETTINGS = dict(
  total_steps=5,
  input=dict(
    data=dict(name="pairs", split="train"),
    pp="value_range(-1, 1)|keep('image', 'words')",
    batch_size=16,
    threads=0,
  ),
  model=dict(name="towers"),
  objective=dict(name="contrast"),
  flexi=dict(seqhw=dict(v=(2, 3))),
  optim=dict(lr=0.01, clip=1.0),
  checkpoint=dict(every_steps=1, keep=None),
  log_every=1,
)


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setitem(MODELS, "towers", Towers)
  monkeypatch.setitem(OBJECTIVES, "contrast", contrast)
  monkeypatch.setitem(SOURCES, "pairs", pairs)


def batch(n=16):
  rng = np.random.default_rng(1)
  colour = rng.uniform(-1, 1, size=(n, 1, 1, 3))  # else their means are alike
  image = (colour + 0.1 * rng.normal(size=(n, 12, 12, 3))).astype(np.float32)
  return {"image": jnp.asarray(image), "words": jnp.asarray(rng.integers(20, size=(n, 5)))}


def gradients(accumulate, model=None, objective=None):
  """The loss and its gradients at one size; the first state."""
  model, objective = model or Towers(), objective or contrast()
  params = steps.init_params(model, {"image": (12, 12, 3), "words": (5,)}, 0)
  state = steps.init_state(params, optax.sgd(1.0), objective)
  options = dict(model=model, objective=objective, seed=0, accumulate=accumulate, seqhw=3)
  return state, jax.jit(functools.partial(steps.gradients, **options))(state, batch())


def assert_close(a, b, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize(
  "accumulate", [4, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 16))]
)
def test_microbatches_see_the_whole_batch(accumulate):
  _, whole = gradients(1)
  _, parts = gradients(accumulate)
  assert_close(parts, whole)
  # What each would see of itself alone is another loss.
  naive = Objective(
    contrast().inputs,
    (),
    contrast().prepare,
    lambda predict, part: contrast().loss.loss(contrast().loss.embed(predict, part), part),
  )
  _, (smaller, _) = gradients(accumulate, objective=naive)
  assert abs(smaller - whole[0]) > 0.1


def test_the_temperature_has_the_gradient_of_the_whole_batch():
  state, (_, grads) = gradients(4)

  def loss(t):
    params = {**state.params, "t": t}
    out = Towers().apply({"params": params}, **batch(), seqhw=3)[1]
    return contrast().loss.loss(out, None).total.mean()

  step = 1e-2
  t = state.params["t"]
  slope = (loss(t + step) - loss(t - step)) / (2 * step)
  np.testing.assert_allclose(grads["t"][0], slope, rtol=1e-3)
  assert abs(slope) > 1e-2


def test_both_passes_draw_the_same_dropout():
  """The gradients are those of the loss that is reported: by a step against it, with the same draws."""
  model = Towers(dropout=0.5)
  state, (loss, grads) = gradients(4, model)
  tiny = jax.tree.map(lambda p, g: p - 1e-3 * g, state.params, grads)
  options = dict(model=model, objective=contrast(), seed=0, accumulate=4, seqhw=3)
  after, _ = jax.jit(functools.partial(steps.gradients, **options))(
    state._replace(params=tiny), batch()
  )
  norm = float(optax.tree.norm(grads)) ** 2
  np.testing.assert_allclose((loss - after) / 1e-3, norm, rtol=0.02)


def losses_of(devices, fsdp=1, accumulate=1):
  """The losses of three steps on a mesh."""
  mesh = sharding.make_mesh(data=devices, fsdp=fsdp)
  objective, tx = contrast(), optax.sgd(0.5)
  model = Towers()
  params = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3), "words": (5,)}, 0))()
  state = steps.init_state(params, tx, objective)
  state = jax.device_put(state, sharding.divided(state, mesh))
  run = jax.device_put(
    {"seed": np.uint32(0), "total_steps": np.int32(3)}, sharding.replicated(mesh)
  )
  arrays = jax.device_put(batch(), sharding.batch_split(mesh))
  programs = step_programs.compile_steps(
    [{"seqhw": 3}],
    state,
    arrays,
    run,
    mesh,
    model=model,
    objective=objective,
    tx=optax.with_extra_args_support(tx),
    microbatches=(accumulate,),
  )
  found = []
  for _ in range(3):
    state, measured = programs({"seqhw": 3}, state, arrays, run)
    found.append(float(measured["loss"]))
  return found


# Whole batches on one axis, microbatches on two: of the four, those that have all.
MESHES = {"8": (8, 1, 1), "2x4 in 2": (2, 4, 2)}


def clipped_norm(mesh):
  """The norm of a gradient whose examples are each clipped, of a FlexiViT whose blocks are divided by hand."""
  model = FlexiViT(
    num_classes=3,
    patch_size=(4, 4),
    width=16,
    depth=1,
    mlp_dim=16,
    num_heads=2,
    head_zeroinit=False,
  )
  params = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, 0))()
  state = steps.init_state(params, optax.sgd(1.0), supervised())
  arrays = {"image": batch()["image"], "labels": jnp.eye(3)[jnp.arange(16) % 3]}
  if mesh is not None:
    state = jax.device_put(state, sharding.divided(state, mesh))
    arrays, model = jax.device_put(arrays, sharding.batch_split(mesh)), model.clone(fsdp=mesh)
  options = dict(model=model, objective=supervised(), seed=0, seqhw=3, clip_each=0.1)
  _, grads = jax.jit(functools.partial(steps.gradients, **options))(state, arrays)
  return float(optax.tree.norm(grads))


def on_meshes(path):
  """Called in a process that sees eight devices."""
  losses = {name: losses_of(*mesh) for name, mesh in MESHES.items()}
  norm = clipped_norm(sharding.make_mesh(data=2, fsdp=4))
  pathlib.Path(path).write_text(json.dumps({"losses": losses, "norm": norm}))


def test_the_losses_are_equal_on_every_mesh(tmp_path, on_eight_devices):
  on_eight_devices(on_meshes, str(tmp_path / "losses.json"))
  one = losses_of(1)
  assert one[0] - one[-1] > 0.01
  np.testing.assert_allclose(losses_of(1, accumulate=4), one, rtol=0, atol=1e-6)
  found = json.loads((tmp_path / "losses.json").read_text())
  np.testing.assert_allclose(found["norm"], clipped_norm(None), rtol=1e-5)
  for name, losses in found["losses"].items():
    np.testing.assert_allclose(losses, one, rtol=0, atol=1e-6, err_msg=name)


def final(settings, workdir):
  """All arrays of the last checkpoint."""
  exp = experiment.from_config(settings)
  state = preparation.first_state(exp, sharding.make_mesh())
  with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=None)) as checkpoints:
    rest = {"step": state.step, "opt_state": state.opt_state}
    *arrays, _ = checkpoints.restore(settings["total_steps"], state.params, rest)
  return jax.tree.leaves(jax.device_get(arrays))


def history(workdir):
  rows = metrics_writer.read_rows(workdir / "metrics.jsonl")
  return [(r["step"], r["seqhw"], r["loss"], r["grad_norm"]) for r in rows]


@pytest.mark.parametrize(
  ("accumulate", "stops"),
  [(4, (2,)), *((n, (1, 2, 3, 4)) for n in (1, 4, "auto"))],
)
@pytest.mark.full
def test_a_run_resumes_bit_for_bit_after_any_step(
  registered, accumulate, stops, train_until, tmp_path
):
  settings = SETTINGS | dict(accumulate=accumulate)
  if accumulate == "auto":
    settings["memory_gib"] = 1.0
  whole = train_lib.train(settings, tmp_path / "whole")
  for step in stops:
    folder = tmp_path / f"after_{step}"
    train_until(settings, folder, step)
    train_lib.train(settings, folder)
    assert history(folder) == history(whole)
    for a, b in zip(final(settings, folder), final(settings, whole), strict=True):
      np.testing.assert_array_equal(a, b, strict=True)


def test_in_microbatches_a_run_is_the_same(registered, tmp_path):
  runs = [train_lib.train(SETTINGS | dict(accumulate=n), tmp_path / str(n)) for n in (1, 4)]
  one, four = ([row[2] for row in history(run)] for run in runs)
  np.testing.assert_allclose(one, four, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(token_budget=dict(most=2)), "how many an example is compared would depend"),
    (dict(optim=dict(lr=0.1, clip_each=1.0)), "compares the examples of a batch; use optim.clip"),
    (
      dict(model=dict(name="flexivit", variant="mu")),
      "takes .'image', 'words', 't'. from the model, Flexi",
    ),
    (dict(init_head_bias=1.0), "a Towers has no head_bias"),
    (dict(accumulate="auto", model=dict(name="towers", dropout=0.5)), "masks would depend on the"),
  ],
)
def test_what_it_cannot_be_combined_with_is_said(registered, changes, message):
  with pytest.raises(errors.UserError, match=message):
    experiment.from_config(SETTINGS | changes)
