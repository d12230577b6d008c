"""The evaluator of segmentation: windows give the image back, whole images, scales, sizes, one device and eight."""

import functools
import itertools
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import experiment
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import overlap, results, windows
from flexivit_jax.evaluators.segmentation import METRICS, segmentation
from flexivit_jax.models import FlexiViT, Segmenter
from flexivit_jax.models.counting import Counted
from flexivit_jax.models.grid import padded_grid
from flexivit_jax.specs import image as image_spec, spec
from flexivit_jax.training import steps

NAMES = [metric.name for metric in METRICS if metric.trained]


class Pointwise(nn.Module, Counted):
  """Says of each pixel its three channels: what is decided of it depends on nothing around it."""

  num_classes: int = 3
  dtype: str = "float32"
  inputs: ClassVar = {"image": image_spec()}
  outputs: ClassVar = {"pixel_logits": spec("h w classes")}

  @nn.compact
  def __call__(self, image, *, train=False, **size):
    logits = image * self.param("scale", nn.initializers.ones, ())
    return logits, {"pixel_logits": logits}

  @nn.nowrap
  def grid(self, image_hw, *, seqhw=None, grid_hw=None, patch_hw=None):
    return padded_grid(image_hw, (4, 4), seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw)

  def gmacs(self, shapes, **size):
    return float(np.prod(shapes["image"]))


PARAMS = {"scale": np.float32(1.0)}


def example(*hw, seed=0):
  """Smooth pictures of three channels, and the largest channel with some pixels of no class and some wrong."""
  rng = np.random.default_rng(seed)
  coarse = np.float32(rng.normal(size=(3, 3, 3)))
  image = np.asarray(windows.jax.image.resize(coarse, (*hw, 3), "linear"))
  mask = image.argmax(-1)
  wrong = rng.random(hw)
  mask = np.where(wrong < 0.1, rng.integers(3, size=hw), np.where(wrong > 0.9, -1, mask))
  return {"image": image, "mask": mask.astype(np.int32)}


def batches(*sizes):
  """One image each, but for the same size twice in a row."""
  made = [example(*hw, seed=i) for i, hw in enumerate(sizes)]
  return [{k: v[None] for k, v in one.items()} | {"_mask": np.ones(1, np.float32)} for one in made]


def together(many, padding=0):
  joined = {k: np.concatenate([b[k] for b in many]) for k in many[0]}
  for key, array in joined.items():
    filler = np.zeros((padding, *array.shape[1:]), array.dtype)
    joined[key] = np.concatenate([array, filler])
  return [joined]


def rows_of(data, model=None, params=None, **options):
  evaluator = segmentation(
    model or Pointwise(), data, sharding.make_mesh(), **{"seqhw": (4,), **options}
  )
  return evaluator.run(PARAMS if params is None else params)


# --- windows ---


@pytest.mark.parametrize("length", range(5, 20))
@pytest.mark.parametrize("stride", [1, 3, 5])
def test_windows_cover_a_side_and_the_last_is_flush(length, stride):
  begins = windows.anchors(length, 5, stride)
  assert begins[0] == 0 and begins[-1] == length - 5
  assert all(0 < b - a <= stride for a, b in itertools.pairwise(begins))
  assert begins[:-1] == [b for b in range(0, length, stride) if b < length - 5]


@pytest.mark.parametrize("hw", [(30, 41), (16, 24), (33, 24)])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_of_an_image_put_together_are_the_image(hw, flip):
  """Of the size of the image, and, resized, as OpenCV resizes it."""
  from flexivit_jax.data import images

  image = np.float32(np.random.default_rng(0).normal(size=(*hw, 3)))
  seen = image[:, ::-1] if flip else image
  canvas = windows.Canvas(hw, (16, 24), (7, 10), 3, flip)
  for y, x in canvas.places:
    assert not canvas.is_full
    canvas.add(jnp.asarray(seen[None, y : y + 16, x : x + 24]), 0, (y, x))
  assert canvas.is_full
  for new in (hw, (47, 50), (20, 13)):
    got = windows._resized(*canvas.sampled(new))
    np.testing.assert_allclose(got, images.resize_image(image, new), atol=1e-5)


def test_an_image_is_resized_by_its_short_side_and_enlarged_to_the_window():
  assert windows.scaled((480, 640), 240) == (240, 320)
  assert windows.scaled((480, 640), 240, (256, 256)) == (256, 341)
  assert windows.scaled((100, 300), 50, (64, 64)) == (64, 192)


# --- the evaluator ---


@pytest.mark.parametrize("options", [{}, dict(scales=(1, 0.75), flip=True), dict(short_side=20)])
def test_windows_of_a_pointwise_model_give_the_rows_of_whole_images(options):
  data = batches(*[(30, 41)] * 3)
  (whole,) = rows_of(together(data, padding=1), **options)
  (seen,) = rows_of(data, window=(16, 20), window_stride=(7, 20), windows_at_once=5, **options)
  for name in (*NAMES, "n", "absent", "class_pixels"):
    assert seen[name] == pytest.approx(whole[name], abs=2e-3), name
  assert 0.7 < whole["miou"] < 0.95 and whole["n"] == 3


def test_images_of_several_sizes_count_in_one_table_at_the_size_of_their_masks():
  data = batches((30, 41), (12, 50), (64, 33))
  (row,) = rows_of(data, window=16, windows_at_once=3)
  counts = []
  for batch in data:
    image, mask = batch["image"][0], batch["mask"][0]
    counts.append(overlap.counts(overlap.truth(mask, 3, 0.02), image.argmax(-1)))
  total = np.sum(counts, axis=0)[None, :, :3].astype(float)
  assert row["miou"] == pytest.approx(overlap.mean_iou(total)[0], abs=0.01)  # one was enlarged
  assert row["class_pixels"] == total[0, :, 1].tolist() and row["n"] == 3
  low, high = row["intervals"]["miou"]
  assert low <= row["miou"] <= high


def test_an_absent_class_is_left_out_counted_and_named(caplog):
  (data,) = together(batches(*[(12, 12)] * 2))
  data["mask"][data["mask"] == 1] = -1
  (row,) = rows_of([data], class_names=("sky", "road", "car"))
  assert row["absent"] == 1 and row["class_iou"][1] is None
  assert row["miou"] == pytest.approx(np.mean([row["class_iou"][0], row["class_iou"][2]]))
  assert "1 of 3 classes have no pixel" in caplog.text and "road" in caplog.text


def test_a_number_that_is_none_is_of_no_class():
  (data,) = together(batches((12, 12)))
  (row,) = rows_of([data], params={"scale": np.float32(np.nan)})
  assert row["miou"] == row["pixel_accuracy"] == 0.0


@pytest.mark.parametrize(
  ("data", "options", "expected"),
  [
    (
      [{"image": np.zeros((1, 8, 8, 3)), "_mask": np.ones(1)}],
      {},
      r"needs \['mask'\].*keep\('image', 'mask'\)",
    ),
    (batches((8, 8), (8, 9)), {}, "An image of 8 x 9 pixels.* after others of 8 x 8.*Give window="),
    ([batches((8, 8))[0] | {"mask": np.full((1, 8, 8), 7)}], {}, "numbers 7; expected classes 0 t"),
    ([batches((8, 8))[0] | {"mask": np.full((1, 8, 8), -1)}], {}, "No pixel of the 1 masks counts"),
    ([batches((8, 8))[0] | {"mask": np.zeros((1, 4, 8), int)}], {}, r"Masks of shape \(1, 4, 8\)"),
    ([], dict(window=0), "window=0; expected pixels"),
    ([], dict(window_stride=3), "window_stride=3 without a window"),
    ([], dict(window=8, window_stride=9), "pixels between them would not be seen"),
    ([], dict(scales=()), r"scales=\(\); expected numbers above 0"),
    ([], dict(boundary=0), "boundary=0.*above 0"),
    ([], dict(short_side=0), "short_side=0; expected pixels"),
    ([], dict(model=FlexiViT(variant="mu")), "A FlexiViT gives no class to pixels"),
  ],
)
def test_what_cannot_be_measured_is_refused(data, options, expected):
  with pytest.raises(UserError, match=expected):
    rows_of(data, **options)


BACKBONE = dict(width=8, depth=1, mlp_dim=8, num_heads=1, patch_size=(6, 6), posemb_size=(4, 4))


@functools.cache
def segmenter():
  model = Segmenter(num_classes=3, backbone=BACKBONE, decoder="linear")
  params = jax.eval_shape(lambda: steps.init_params(model, {"image": (24, 24, 3)}, 0))
  rng = np.random.default_rng(1)
  return model, jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), params)


@pytest.mark.parametrize("options", [{}, dict(window=(16, 24))])
def test_a_fixed_model_is_measured_at_sizes_it_was_not_trained_at(options):
  """Rows are those of the model called on everything, at sizes that divide the image and that do not."""
  model, params = segmenter()
  (data,) = together(batches((16, 24), (16, 24)))
  rows = rows_of([data], model, params, seqhw=((2, 3), (3, 5)), **options)
  assert [row["seqhw"] for row in rows] == ["2x3", "3x5"]
  for row, size in zip(rows, ((2, 3), (3, 5)), strict=True):
    logits = jax.jit(lambda x, s=size: model.apply({"params": params}, x, grid_hw=s)[0])(
      data["image"]
    )
    pairs = zip(data["mask"], np.asarray(logits).argmax(-1), strict=True)
    counts = sum(overlap.counts(overlap.truth(m, 3, 0.02), p) for m, p in pairs)
    assert row["miou"] == pytest.approx(overlap.mean_iou(counts[None, :, :3] * 1.0)[0], abs=2e-3)


@pytest.mark.parametrize("options", [{}, dict(window=8)])
def test_the_first_images_are_kept_to_look_at(options, tmp_path):
  data = batches((8, 900), (8, 900))
  data[0]["mask"][:, :, 450:] = -1
  evaluator = segmentation(
    Pointwise(), data, sharding.make_mesh(), seqhw=(4,), samples=1, **options
  )
  (row,) = evaluator.run(PARAMS)
  results.write(tmp_path / "eval_x.json", {}, [row], evaluator)
  folder = tmp_path / "eval_x_samples"
  size = row["seqhw"]
  names = ["0_image.jpg", "0_true.png", f"0_{size}.png"]
  assert sorted(path.name for path in folder.iterdir()) == sorted(names)
  assert row["samples"] == names[2:]
  image, true, predicted = (np.asarray(Image.open(folder / name)) for name in names)
  assert image.shape == (4, 400, 3) and true.shape == predicted.shape == (4, 400)
  shown = data[0]["mask"][0][(np.arange(4) * 2)[:, None], (np.arange(400) * 900 // 400)[None]]
  np.testing.assert_array_equal(true, np.where(shown < 0, 255, shown))
  assert set(np.unique(predicted)) <= {0, 1, 2}
  assert Image.open(folder / names[1]).convert("RGB").getpixel((300, 1)) == (0, 0, 0)


def test_costs_are_those_of_all_scales():
  data = together(batches((8, 8)))
  gflops = []
  for options in ({}, dict(scales=(1, 2), flip=True)):
    evaluator = segmentation(Pointwise(), data, sharding.make_mesh(), seqhw=(4,), **options)
    evaluator.run(PARAMS)
    (cost,) = evaluator.costs(PARAMS, 1)
    gflops.append(cost["gflops"])
  assert gflops[1] == gflops[0] * (1 + 4) * 2 and cost["patch"] == 2


def on_all_devices(path: str) -> None:
  """Writes the rows on all devices that there are, of whole images and of windows."""
  model, params = segmenter()
  data = batches(*[(16, 24)] * 5, (20, 24))
  whole = rows_of(together(data[:5], padding=3), model, params, seqhw=(2, (3, 5)))
  seen = rows_of(data, model, params, seqhw=(2,), window=(16, 16), windows_at_once=3)
  with open(path, "w") as file:
    json.dump({"rows": [*whole, *seen], "devices": jax.device_count()}, file)


@pytest.mark.full
def test_eight_devices_measure_as_one(tmp_path, on_eight_devices):
  on_all_devices(str(tmp_path / "one.json"))
  on_eight_devices(on_all_devices, str(tmp_path / "eight.json"))
  one, eight = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "eight"))
  assert eight["devices"] == 8 and eight["rows"] == one["rows"]


def test_a_config_asks_for_it():
  data = dict(
    name="synthetic",
    split="test",
    image_size=(16, 24),
    num_classes=3,
    num_examples=4,
    annotated=True,
  )
  pp = "decode|value_range|keep('image', 'mask')"
  section = dict(type="segmentation", data=data, pp=pp, batch_size=2, seqhw=(2,), threads=0)
  model, params = segmenter()
  evaluation = experiment.build_evaluation("evals.test", section, every=1)
  evaluation.check(model)
  rows = evaluation.make(model, sharding.make_mesh()).run(params)
  assert rows[0]["n"] == 4 and 0 <= rows[0]["miou"] <= 1
  assert experiment.classes_of_tables(evaluation, rows) == ["0", "1", "2"]
