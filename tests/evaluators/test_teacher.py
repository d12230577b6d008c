"""The teacher's own accuracy: that of `classification`, computed once, in a run too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors, experiment, train as train_lib
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.teacher import teacher
from flexivit_jax.experiment import sections
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.running import metrics_writer
from flexivit_jax.training import steps

FIELDS = dict(
  num_classes=7, patch_size=(6, 6), posemb_size=(2, 2), width=8, depth=1, mlp_dim=8, num_heads=2
)


@functools.cache
def made(seed):
  model = FlexiViT(**FIELDS)
  params = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=seed))()
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), params)


class Batches:
  """Two batches of images of two resolutions, the last example masked; counts how often it is read."""

  def __init__(self, large_hw=(18, 18)):
    rng = np.random.default_rng(0)
    self.read = 0
    shapes = {"image": (12, 12, 3), "large": (*large_hw, 3)}
    self.batches = [
      {k: np.float32(rng.uniform(-1, 1, (6, *s))) for k, s in shapes.items()}
      | {"labels": np.float32(np.eye(7)[rng.integers(7, size=6)])}
      | {"_mask": np.float32([1, 1, 1, 1, 1, 1 - i])}
      for i in range(2)
    ]

  def __iter__(self):
    self.read += 1
    return iter(self.batches)


@pytest.mark.parametrize(
  ("image", "large_hw", "size", "want"),
  [
    ("large", (18, 18), {"seqhw": 2}, 2),
    ("large", (18, 18), {}, 3),
    ("image", (18, 18), {}, 2),
    ("large", (12, 18), {}, (2, 3)),
  ],
)
def test_it_is_the_classification_of_the_teacher_at_its_own_size(image, large_hw, size, want):
  (model, params), (network, frozen) = made(0), made(1)
  mesh, batches = sharding.make_mesh(), Batches(large_hw)
  evaluator = teacher(model, batches, mesh, teacher=Teacher(network, frozen, image, size))
  rows = evaluator.run(params)
  renamed = [{**b, "image": b[image]} for b in batches.batches]
  plain = classification(network, renamed, mesh, seqhw=[want])
  assert rows == plain.run(frozen)
  assert rows[0]["n"] == 11
  for got, expected in zip(
    evaluator.costs(params, repeats=1), plain.costs(frozen, repeats=1), strict=True
  ):
    assert {**got, "ms": 0} == {**expected, "ms": 0} and got["ms"] > 0


def test_it_runs_once_whatever_the_students_parameters_are():
  (model, params), (network, frozen) = made(0), made(1)
  batches = Batches()
  mesh, professor = sharding.make_mesh(), Teacher(network, frozen, "large", {"seqhw": 3})
  evaluator = teacher(model, batches, mesh, teacher=professor)
  compiled = []
  evaluator.compile(params, lambda size, program: compiled.append(size))
  first, read = evaluator.run(params), batches.read
  assert evaluator.run(jax.tree.map(lambda x: x * jnp.nan, params)) == first
  evaluator.compile(params, lambda size, program: compiled.append(size))
  assert batches.read == read and compiled == [{"seqhw": 3}]
  assert np.isfinite(first[0]["loss"])


def test_a_wrong_section_is_an_error():
  section = dict(
    type="teacher",
    data=dict(name="digits", split="test"),
    pp="resize(12)|value_range(-1, 1)|onehot(10)|keep('image', 'labels')",
    batch_size=8,
    teacher=dict(model=FIELDS),
  )
  sections.check_evaluation("evals.t", section)
  with pytest.raises(errors.UserError, match=r"Unknown config key 'evals.t.seqhw'"):
    sections.check_evaluation("evals.t", section | {"seqhw": (2,)})
  with pytest.raises(errors.UserError, match=r"Unknown config key 'evals.t.teacher.modle'"):
    sections.check_evaluation("evals.t", section | {"teacher": dict(modle=FIELDS)})
  evaluation = experiment.build_evaluation(
    "evals.test", section, every=1
  )  # of 7 classes, not digits' 10
  model, params = made(0)
  with pytest.raises(errors.UserError, match="labels have 10 classes, expected 7"):
    evaluation.make(model, sharding.make_mesh()).run(params)


def test_in_a_run_it_is_one_number_at_every_evaluation(tmp_path):
  data = dict(name="synthetic", image_size=12, num_classes=7, num_examples=16)
  pp = "decode|value_range(-1, 1)|onehot(7)|keep('image', 'labels')"
  section = dict(data=data | dict(split="test"), pp=pp, batch_size=8, threads=0, every_steps=1)
  settings = dict(
    total_steps=3,
    input=dict(data=data | dict(split="train"), pp=pp, batch_size=8, threads=0),
    model={k: v for k, v in FIELDS.items() if k != "num_classes"},
    flexi=dict(seqhw=dict(v=(2,))),
    optim=dict(lr=0.1),
    evals=dict(
      student=section | dict(seqhw=(2,)),
      prof=section | dict(type="teacher", teacher=dict(model=FIELDS, seqhw=2)),
    ),
  )
  run = train_lib.train(settings, tmp_path / "run")
  rows = metrics_writer.read_rows(run / "metrics.jsonl")
  professors, students = (
    [row[f"{name}/loss/seqhw=2"] for row in rows] for name in ("prof", "student")
  )
  assert len(professors) == 3 and len(set(professors)) == 1 and len(set(students)) == 3
