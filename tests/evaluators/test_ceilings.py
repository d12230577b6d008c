"""What a grid of patches can say: a mask made by hand, windows as whole images, CamVid's figures."""

import zipfile

import numpy as np
import pytest

from flexivit_jax import data
from flexivit_jax.evaluators import ceilings, overlap
from flexivit_jax.evaluators.windows import View

WHOLE = View(None, None, None, (1.0,), False)


def striped(h=12, w=16):
  mask = np.zeros((h, w), np.int64)
  mask[:, 6:] = 1
  mask[5:, 3:5] = 2
  mask[0, 0] = -1
  return mask


def mean_iou(mask, predicted, k=3):
  counts = overlap.counts(overlap.truth(mask, k, 1), predicted)
  return overlap.mean_iou(counts[None, :, :3] * 1.0)[0]


def test_shares_are_of_all_pixels_of_a_patch_that_are_in_the_image():
  shares = ceilings.shares(striped(), (5, 6), 3)
  assert shares.shape == (3, 3, 3)
  np.testing.assert_allclose(shares[0, 0], [29 / 30, 0, 0])
  np.testing.assert_allclose(shares[1, 0], [20 / 30, 0, 10 / 30], rtol=1e-6)
  np.testing.assert_allclose(shares[2, 2], [0, 1, 0])  # 2 x 4 pixels of it are in the image


def test_one_class_a_patch_counted_by_hand():
  mask = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 0, 1, 1]])
  made = ceilings.predicted(mask, WHOLE, (2, 2), 3)["constant"]
  assert made.tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 1, 1]] * 2
  assert mean_iou(mask, made) == pytest.approx(np.mean([4 / 6, 7 / 8, 3 / 4]))


@pytest.mark.parametrize("patch", [(4, 4), (5, 3)])
def test_shares_between_the_centres_of_patches_are_interpolated(patch):
  """Against `numpy.interp` along one axis after the other."""
  mask = striped()
  scores = ceilings.shares(mask, patch, 3).astype(np.float64)
  for axis in (0, 1):
    centres = (np.arange(mask.shape[axis]) + 0.5) / patch[axis] - 0.5
    along = lambda v, at=centres: np.interp(at, np.arange(len(v)), v)  # noqa: E731
    scores = np.apply_along_axis(along, axis, scores)
  ordered = np.sort(scores, axis=-1)
  sure = ordered[..., -1] - ordered[..., -2] > 1e-6
  made = ceilings.predicted(mask, WHOLE, patch, 3)["bilinear"]
  np.testing.assert_array_equal(made[sure], scores.argmax(-1)[sure])
  assert sure.mean() > 0.9


@pytest.mark.parametrize(
  "view",
  [
    View(None, None, None, (1.0, 1.0), False),  # the same scale twice
    View(12, (20, 24), (3, 3), (1.0,), False),  # an image as small as the window is enlarged
  ],
)
def test_scales_and_windows_answer_as_the_whole_image(view):
  mask = np.kron(striped(5, 6), np.ones((4, 4), int))
  for patch in ((4, 4), (5, 3)):
    whole, made = (ceilings.predicted(mask, v, patch, 3) for v in (WHOLE, view))
    for kind in ceilings.KINDS:
      assert (made[kind] == whole[kind]).mean() > 0.99, (patch, kind)  # ties may fall either way


@pytest.mark.full
@pytest.mark.shared
def test_those_of_camvid(shared, tmp_path):
  """Every seventh photo of its test split by name, 30 in all; the figures were measured by other code."""
  with zipfile.ZipFile(shared / "data" / "camvid_240x320.zip") as archive:
    archive.extractall(tmp_path)
  source = data.make_source(name="masks", split="test", data_dir=tmp_path, ignore=11)
  parse = data.parse("decode|keep('mask')")
  records = sorted((source[i] for i in range(len(source))), key=lambda record: record["id"])
  masks = [parse(record, None)["mask"] for record in records[: 7 * 30 : 7]]
  want = {40: (.448, .499), 20: (.600, .644), 16: (.631, .679), 10: (.705, .755), 8: (.747, .793)}  # fmt: skip
  for patch, figures in want.items():
    counts = np.zeros((2, 11, 3))
    for mask in masks:
      true, made = overlap.truth(mask, 11, 1), ceilings.predicted(mask, WHOLE, (patch, patch), 11)
      counts += [overlap.counts(true, made[kind])[:, :3] for kind in ceilings.KINDS]
    assert overlap.mean_iou(counts).tolist() == pytest.approx(figures, abs=0.002)
