"""A model is one file and one line in MODELS: this one is no Transformer."""

import flax.linen as nn
import pytest

from flexivit_jax import experiment
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import results
from flexivit_jax.experiment import costs
from flexivit_jax.models import MODELS, FlexiViT, Model, flops
from flexivit_jax.models.base import zeros
from flexivit_jax.models.grid import which_grid
from flexivit_jax.specs import image, spec
from flexivit_jax.training import steps


class Patches(nn.Module):
  """Means of seqhw x seqhw patches, a dense layer on each, and the mean of these."""

  num_classes: int = 0
  width: int = 4
  dtype: str = "float32"

  @nn.compact
  def __call__(self, image, *, seqhw, train=False):
    n, h, w, c = image.shape
    x = image.reshape(n, seqhw, h // seqhw, seqhw, w // seqhw, c).mean((2, 4))
    x = nn.tanh(nn.Dense(self.width, name="embedding")(x)).mean((1, 2))
    logits = nn.Dense(self.num_classes, name="head")(x)
    return logits, {"logits": logits, "pre_logits": x}

  @property
  def inputs(self):
    return {"image": image()}

  @property
  def outputs(self):
    return {"logits": spec("classes"), "pre_logits": spec("width")}

  @nn.nowrap
  def example(self, shapes):
    return zeros(self.inputs, shapes), {"seqhw": 1}

  @nn.nowrap
  def grid(self, image_hw, *, seqhw):
    return which_grid(image_hw, (1, 1), seqhw=seqhw)

  @nn.nowrap
  def gmacs(self, shapes, *, seqhw):
    return (seqhw**2 * shapes["image"][-1] + self.num_classes) * self.width / 1e9

  @nn.nowrap
  def activation_bytes(self, shapes, *, seqhw):
    return 4.0 * self.width * seqhw**2


DATA = dict(name="synthetic", image_size=12, num_classes=3, num_examples=16, split="train")
PP = "decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
BATCHES = dict(data=DATA, pp=PP, batch_size=8, threads=0)
SETTINGS = dict(
  total_steps=2,
  input=BATCHES,
  model=dict(name="patches", width=5),
  flexi=dict(seqhw=dict(v=(2, 3), share="flops")),
  optim=dict(lr=0.1),
  evals=dict(test=dict(BATCHES, seqhw=(4,))),
)


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setitem(MODELS, "patches", Patches)


def test_another_model_is_built_evaluated_and_its_training_steps_are_lowered(registered):
  exp = experiment.from_config(SETTINGS)
  assert isinstance(exp.model, Patches) and exp.step_flops({"seqhw": 2}) == 6 * 8 * 5 * 15
  params = steps.init_params(exp.model, exp.shapes, exp.seed)
  evaluator = exp.evaluations["test"].make(exp.model, sharding.make_mesh())
  rows = results.measure(evaluator, params)
  assert [(r["seqhw"], r["tokens"], r["n"]) for r in rows] == [(4, 16, 16)]
  planned = costs.plan(SETTINGS, meshes=(1, 2))
  assert [row["tokens"] for row in planned["sizes"]] == [4, 9]
  assert planned["lowered"] == {"2": "2 training steps lowered"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(flexi=dict(stride=dict(v=(2,)))), "Unknown config key 'flexi.stride'"),
    (dict(flexi=dict(seqhw=dict(v=(5,)))), "seqhw=5 does not divide the image"),
    (dict(init=dict(checkpoint="x.npz")), "holds a FlexiViT, model.name is that of a Patches"),
  ],
)
def test_what_it_cannot_do_is_an_error(changes, message, registered):
  with pytest.raises(UserError, match=message):
    experiment.from_config(SETTINGS | changes)


def test_a_flexivit_is_a_model():
  model = FlexiViT(num_classes=3, variant="mu")
  assert isinstance(model, Model) and isinstance(model, flops.Transformer)
