"""Metrics that are no means of one value per image, their intervals, and models that are no classifiers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import intervals, resampling
from flexivit_jax.evaluators.per_size import PerSize
from flexivit_jax.evaluators.sums import masked_sums
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.grid import Grid

SIZE = (("seqhw", 2),)


def iou(means):
  """Mean over the classes of intersection by union; [r, (intersection, union), k] -> [r]."""
  return (means[:, 0] / means[:, 1]).mean(axis=-1)


def test_a_ratio_of_sums_is_resampled_by_images():
  rng = np.random.default_rng(0)
  union = rng.integers(1, 50, (120, 3))
  pixels = np.stack([rng.binomial(union, 0.6), union], axis=1)
  found = resampling.rows({SIZE: {"miou": pixels}}, {"miou": iou})[SIZE]
  assert found["miou"] == pytest.approx((pixels[:, 0].sum(0) / pixels[:, 1].sum(0)).mean())
  draws = rng.integers(120, size=(4000, 120))
  totals = pixels[draws].sum(axis=1)
  want = np.quantile((totals[:, 0] / totals[:, 1]).mean(axis=-1), [0.025, 0.975])
  low, high = found["intervals"]["miou"]
  assert (low, high) == pytest.approx(want, abs=0.1 * (want[1] - want[0]))
  other = resampling.rows({SIZE: {"miou": pixels[::-1]}}, {"miou": iou})[SIZE]
  assert other == found  # whatever the order of the images


def test_a_0_1_metric_has_the_interval_of_the_binomial_at_each_size():
  right = np.float32(np.arange(200) < 150)
  sizes = {SIZE: {"hit": right}, (("seqhw", 4),): {"hit": 1 - right}}
  found = resampling.rows(sizes, {"hit": intervals.mean})
  for size, p in zip(sizes, (0.75, 0.25), strict=True):
    ends = found[size]["intervals"]["hit"]
    assert ends == pytest.approx(intervals.binomial(p, 200), abs=2.5 / 200)


class Segmenter(FlexiViT):
  """A model without classes, as an evaluator sees it."""

  num_classes: int = 0

  def grid(self, image_hw, *, seqhw):
    return Grid((image_hw[0] // seqhw,) * 2, (0, 0), (seqhw, seqhw))


def test_an_evaluator_of_a_model_without_classes_gets_all_of_its_inputs():
  rng = np.random.default_rng(0)
  whole = {
    "image": np.zeros((10, 8, 8, 3), np.float32),
    "mask": rng.integers(0, 2, (10, 8, 8)),
    "guess": rng.integers(0, 2, (10, 8, 8)),
    "_mask": np.float32(np.arange(10) < 7),
  }

  def fn(params, batch, *, seqhw):
    truth, guess = (jax.nn.one_hot(batch[k], 2, dtype=bool) for k in ("mask", "guess"))
    both = [(truth & guess).sum((1, 2)), (truth | guess).sum((1, 2))]
    sums = masked_sums({}, batch["_mask"])
    return sums._replace(per_image={"miou": jnp.stack(both, axis=1)})

  def rows(size):
    batches = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 10, size)]
    keys = ("image", "mask", "guess")
    sizes = [{"seqhw": 2}, {"seqhw": 4}]
    mesh = sharding.make_mesh()
    return PerSize(
      fn, Segmenter(), batches, mesh, sizes=sizes, inputs=keys, resampled={"miou": iou}
    ).run({"w": jnp.zeros(3)})

  found = rows(5)
  real = whole["mask"][:7, ..., None] == np.arange(2), whole["guess"][:7, ..., None] == np.arange(2)
  want = [(real[0] & real[1]).sum((0, 1, 2)), (real[0] | real[1]).sum((0, 1, 2))]
  for row, seqhw in zip(found, (2, 4), strict=True):
    assert list(row) == ["seqhw", "n", "intervals", "miou"] and (row["seqhw"], row["n"]) == (
      seqhw,
      7,
    )
    assert row["miou"] == pytest.approx((want[0] / want[1]).mean())
    low, high = row["intervals"]["miou"]
    assert low < row["miou"] < high
  assert rows(2) == found
