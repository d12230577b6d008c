"""Counts of pixels and their metrics against float64 loops; the band along contours against its definition."""

import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import overlap
from flexivit_jax.evaluators.overlap import BANDS, REGIONS


def by_loops(trues, predictions, k):
  """mIoU, pixel accuracy, mean accuracy by one loop over all pixels."""
  both, true, here = ([0.0] * k for _ in range(3))
  right = counted = 0
  for t, p in zip(np.ravel(trues).tolist(), np.ravel(predictions).tolist(), strict=True):
    if t == -1:
      continue
    counted += 1
    right += t == p
    true[t] += 1
    if 0 <= p < k:
      here[p] += 1
    if t == p:
      both[t] += 1
  there = [c for c in range(k) if true[c]]
  iou = [both[c] / (true[c] + here[c] - both[c]) for c in there]
  return np.mean(iou), right / counted, np.mean([both[c] / true[c] for c in there])


def total(trues, predictions, k, band=0.02):
  pairs = zip(trues, predictions, strict=True)
  made = [overlap.counts(overlap.truth(t, k, band), p) for t, p in pairs]
  return np.sum(made, axis=0)[None].astype(np.float64)


def test_metrics_are_those_of_a_float64_loop_over_200_sets_with_ignored_pixels_and_absent_classes():
  rng = np.random.default_rng(0)
  for _ in range(200):
    n, h, w, k = (int(rng.integers(1, high)) for high in (4, 9, 9, 8))
    trues = rng.integers(-1, max(1, k - int(rng.integers(3))), (n, h, w))
    trues[0, 0, 0] = 0
    near = rng.random((n, h, w)) < rng.random()
    predictions = np.where(near, trues, rng.integers(0, k + 1, (n, h, w)))  # k: of no class
    predictions = np.where(predictions < 0, k, predictions)
    got = total(trues, predictions, k)[..., REGIONS]
    metrics = (overlap.mean_iou, overlap.pixel_accuracy, overlap.mean_accuracy)
    assert [m(got)[0] for m in metrics] == pytest.approx(by_loops(trues, predictions, k), abs=1e-12)


def test_what_is_predicted_where_nothing_counts_changes_nothing():
  rng = np.random.default_rng(1)
  true, predicted = rng.integers(-1, 3, (1, 12, 9)), rng.integers(0, 3, (1, 12, 9))
  other = np.where(true == -1, rng.integers(0, 3, true.shape), predicted)
  np.testing.assert_array_equal(total(true, predicted, 3), total(true, other, 3))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 20])
def test_the_band_is_the_mask_without_itself_eroded(width):
  """Of each class by itself, from the definition: another class, or the edge, within a square."""
  rng = np.random.default_rng(width)
  mask = np.kron(rng.integers(-1, 3, (4, 5)), np.ones((6, 5), int))
  padded, got = np.pad(mask, width, constant_values=99), overlap.contour_band(mask, width)
  for (y, x), own in np.ndenumerate(mask):
    around = padded[y : y + 2 * width + 1, x : x + 2 * width + 1]
    want = own != -1 and bool(((around != own) & (around != -1)).any())
    assert got[y, x] == want


def test_boundary_iou_of_a_square_counted_by_hand():
  """A square of 6 x 6 pixels, one column to the right: bands one pixel wide."""
  true, predicted = np.zeros((12, 12), int), np.zeros((12, 12), int)
  true[3:9, 3:9], predicted[3:9, 4:10] = 1, 1
  both, of_true, here = total(true[None], predicted[None], 2, band=1)[0, 1, BANDS]
  # Each band has 20 pixels; they share the rows at the top and at the bottom, 5 pixels each.
  assert (both, of_true, here) == (10, 20, 20)
  assert total(true[None], true[None], 2)[0, 1, BANDS].tolist() == [20, 20, 20]


def test_the_width_is_pixels_or_a_share_of_the_diagonal():
  mask = np.zeros((240, 320), np.int32)
  assert overlap.truth(mask, 1, 0.02).width == 8
  assert overlap.truth(mask, 1, 3).width == 3
  assert overlap.truth(mask[:3, :3], 1, 0.02).width == 1


def test_numbers_that_are_no_class_are_named():
  mask = np.array([[0, 1], [11, -2]])
  with pytest.raises(UserError, match=r"numbers -2, 11; expected classes 0 to 10, or -1"):
    overlap.truth(mask, 11, 0.02)
