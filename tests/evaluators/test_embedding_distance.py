"""Cosines and neighbours against NumPy, padding not counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators.embedding_distance import embedding_distance, in_common, neighbours
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.training import steps

FIELDS = dict(patch_size=(6, 6), posemb_size=(2, 2), width=8, depth=1, mlp_dim=8, num_heads=2)


def made(seed, **fields):
  model = FlexiViT(**FIELDS | fields)
  params = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=seed))()
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), params)


def batches():
  """13 images in batches of 6, the last padded with NaN."""
  image = np.random.default_rng(0).uniform(-1, 1, (13, 12, 12, 3))
  image = np.float32(np.concatenate([image, np.full((5, 12, 12, 3), np.nan)]))
  mask = np.float32([1] * 13 + [0] * 5)
  return [{"image": image[i : i + 6], "_mask": mask[i : i + 6]} for i in (0, 6, 12)]


def of(model, params, **size):
  image = np.concatenate([b["image"] for b in batches()])[:13]
  x = np.float64(model.apply({"params": params}, image, **size)[0])
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.full
def test_rows_are_the_cosines_and_neighbours_of_the_real_images():
  (model, params), (teacher, frozen) = made(0), made(4)
  professor = Teacher(teacher, frozen, "image", {"seqhw": 3})
  mesh = sharding.make_mesh()
  anchors = np.random.default_rng(0).normal(size=(3, 8)).tolist()
  rows = embedding_distance(
    model, batches(), mesh, seqhw=[2], teacher=professor, k=3, anchors=anchors
  ).run(params)
  target = of(teacher, frozen, seqhw=3)
  for row in rows:
    ours = of(model, params, seqhw=row["seqhw"])
    cosine = (ours * target).sum(-1)
    same = []
    for i in range(13):
      near = [
        sorted(set(range(13)) - {i}, key=lambda j, x=x, i=i: -x[i] @ x[j])[:3]
        for x in (ours, target)
      ]
      same.append(len(set(near[0]) & set(near[1])) / 3)
    want = [cosine.mean(), np.percentile(cosine, 5), np.mean(same)]
    got = [row[k] for k in ("cosine", "cosine_p5", "neighbours")]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    chosen = [
      (x @ (anchors / np.linalg.norm(anchors, axis=1)[:, None]).T).argmax(1) for x in (ours, target)
    ]
    assert row["zero_shot"] == np.mean(chosen[0] == chosen[1])
    assert row["n"] == 13


@pytest.mark.full
def test_of_spaces_of_other_lengths_only_neighbours_are_compared():
  professor = Teacher(*made(1, width=16), "image", {})
  model, params = made(0)
  (row,) = embedding_distance(
    model, batches(), sharding.make_mesh(), seqhw=[2], teacher=professor
  ).run(params)
  assert row.keys() == {"seqhw", "neighbours", "n"} and 0 <= row["neighbours"] <= 1


def test_of_equal_neighbours_the_first_count():
  x = np.float32([[1, 0], [1, 0], [1, 0], [0, 1]])
  assert neighbours(x, 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
  assert in_common(np.array([[1, 2]]), np.array([[2, 3]])).tolist() == [0.5]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(k=0), "k=0; expected at least 1"),
    (dict(output="logits"), "The teacher gives .*, no 'logits'"),
    (dict(anchors=[[1.0, 2.0]]), r"anchors of shape \[1, 2\]; expected vectors of 8"),
    (dict(k=13), "13 images have no 13 neighbours each"),
  ],
)
def test_mistakes_are_errors(options, message):
  model, params = made(0)
  with pytest.raises(errors.UserError, match=message):
    embedding_distance(
      model,
      batches(),
      sharding.make_mesh(),
      seqhw=[2],
      teacher=Teacher(model, params, "image", {}),
      **options,
    ).run(params)
