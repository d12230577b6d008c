"""Image, boxes and mask go through the same affine map, whatever the chain of operations."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data import annotations, geometry, images
from flexivit_jax.data.geometry import Affine
from flexivit_jax.data.preprocess import OPS, parse
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

CLASSES = np.arange(
  0, 250, 50
)  # 0 is the ground; a box is drawn in the class of its place in the list.


def png(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(array).save(file, "PNG")
  return file.getvalue()


def scene(rng: np.random.Generator) -> dict:
  """Up to four boxes that do not touch, drawn as a mask, and an image whose grey values are the mask's numbers."""
  h, w = (int(n) * 2 + 1 for n in rng.integers(12, 45, 2))
  mask = np.zeros((h, w), np.uint8)
  boxes = []
  for row, column in np.ndindex(2, 2):
    ys, xs = (
      np.sort(rng.choice(np.arange(1, n // 2), 2, replace=False)) + n // 2 * k
      for n, k in ((h, row), (w, column))
    )
    mask[ys[0] : ys[1], xs[0] : xs[1]] = CLASSES[len(boxes) + 1]
    boxes.append((xs[0], ys[0], xs[1], ys[1]))
  chosen = np.flatnonzero(rng.random(4) < 0.8)
  mask[~np.isin(mask, CLASSES[chosen + 1])] = 0
  return {
    "image": mask[..., None].repeat(3, 2),
    "mask": mask,
    "boxes": np.array(boxes, np.float32)[chosen],
    "box_ids": CLASSES[chosen + 1].astype(np.int64),
    "box_labels": chosen.astype(np.int64),
    "box_crowd": chosen == 2,
    "annotated_hw": (h, w),
    "id": "a scene",
  }


def operation(rng: np.random.Generator) -> str:
  """Draws an operation. It pads the mask with the image's value, and most sides are odd, see `odd`."""
  size = lambda low, high: str(tuple(int(n) * 2 + 1 for n in rng.integers(low, high, 2)))  # noqa: E731
  fit, half = rng.choice(["cover", "contain"]), rng.choice(["down", "even"])
  return rng.choice(
    [
      f"resize({size(8, 50)}, 'pil_nearest', min_area=0)",
      f"resize_small({rng.integers(16, 60)}, 'pil_nearest', min_area=0)",
      f"resize_keep({size(8, 35)}, '{fit}', 'pil_nearest', min_area=0)",
      f"central_crop({size(8, 45)}, '{half}', fill=255, ignore=255, min_area=0)",
      "crop_border(3, min_area=0)",
      f"random_crop(17, padding={rng.integers(9)}, ignore=0, min_area=0)",
      f"inception_crop({size(8, 45)}, area_min=30, method='pil_nearest', min_area=0)",
      "inception_crop(area_min=20, min_area=0)",
      "flip_lr(min_area=0)",
      f"scale_jitter({rng.integers(16, 50)}, long=90, method='pil_nearest', min_area=0)",
      f"balanced_crop({size(8, 25)}, min_area=0)",
      f"pad('square', multiple={rng.integers(1, 20)}, fill=255, ignore=255, min_area=0)",
      "pad(121, fill=0, ignore=0, min_area=0)",
    ]
  )


@pytest.fixture
def maps(monkeypatch) -> list[Affine]:
  """The maps that were applied to images."""
  applied: list[Affine] = []
  look = geometry.look
  monkeypatch.setattr(geometry, "look", lambda image, m: applied.append(m) or look(image, m))
  return applied


def rounding(maps: list[Affine]) -> float:
  """How many pixels an edge of the mask may be away from the exact place.

  Each resize rounds it to whole pixels, so by half a pixel; earlier rounding is resized too.
  """
  error = 0.0
  for window, hw, *_ in maps:
    if hw != window[2:]:
      error = error * max(new / old for new, old in zip(hw, window[2:], strict=True)) + 0.5
  return error


def odd(maps: list[Affine]) -> bool:
  """Whether no centre of a new pixel can lie between two old ones, so that every nearest pixel is the same."""
  return all(m.hw == m.window[2:] or all(side % 2 for side in m.window[2:]) for m in maps)


def check_boxes(record: dict, before: dict, error: float) -> None:
  """Each box is where its class is in the mask, and removed boxes are not there."""
  for key in ("box_ids", "box_labels", "box_crowd"):
    rows = np.searchsorted(before["box_ids"], record["box_ids"])
    np.testing.assert_array_equal(record[key], before[key][rows])
  for number, box in zip(record["box_ids"], record["boxes"], strict=True):
    where = np.nonzero(record["mask"] == number)
    low, high = box[1::-1], box[:1:-1]  # As rows and columns.
    if (high - low >= 2 * error + 1.01).all():
      assert len(where[0])
    for pixels, begin, end in zip(where, low, high, strict=True):
      if len(pixels):  # A pixel is drawn if its centre is in the box.
        assert begin - 0.501 - error < pixels.min() < begin + 0.501 + error
        assert end - 1.501 - error < pixels.max() < end - 0.499 + error
    inside = [math.ceil(n) for n in low + 0.5 + error], [math.floor(n) for n in high - 0.5 - error]
    rows, columns = (slice(a, max(a, b)) for a, b in zip(*inside, strict=True))
    assert (record["mask"][rows, columns] == number).all()
  for number in set(before["box_ids"]) - set(record["box_ids"]):
    where = np.nonzero(record["mask"] == number)
    assert not len(where[0]) or min(np.ptp(pixels) + 1 for pixels in where) <= 2 * error


@pytest.mark.parametrize(
  "seeds", [range(150), pytest.param(range(150, 500), marks=pytest.mark.full)], ids=len
)
def test_boxes_mask_and_image_agree_after_any_chain(maps, seeds):
  """Chains of one to four operations; the image's grey values are the mask's numbers, and stay so."""
  same = lost = kept = 0
  for seed in seeds:
    rng = np.random.default_rng(seed)
    before, maps[:] = scene(rng), []
    pp = "decode|" + "|".join(operation(rng) for _ in range(rng.integers(1, 5)))
    files = {key: png(before[key]) for key in ("image", "mask")} if seed % 5 == 0 else {}
    try:
      record = parse(pp)(before | files, rng)
    except UserError as error:
      assert "Cannot crop" in str(error) or "Cannot pad" in str(error)
      continue
    hw = record["image"].shape[:2]
    assert record["mask"].shape == hw and record["mask"].dtype == np.int32
    assert record["boxes"].dtype == np.float32 and record["boxes"].shape[1:] == (4,)
    assert set(np.unique(record["mask"])) <= {*np.unique(before["mask"]), 255}
    assert (record["boxes"] >= 0).all() and (record["boxes"][:, 2:] <= hw[::-1]).all()
    check_boxes(record, before, rounding(maps))
    if odd(maps):
      np.testing.assert_array_equal(record["image"], record["mask"][..., None].repeat(3, 2))
      same += 1
    kept += len(record["boxes"])
    lost += len(before["boxes"]) - len(record["boxes"])
  # The checks checked something.
  assert same > len(seeds) / 3 and kept > len(seeds) and lost > len(seeds) / 3


# --- the map of each kind ---

FULL = np.array([[0, 0, 30, 20], [4, 5, 10, 15], [28, 18, 30, 20]], np.float32)


def example(**changes) -> dict:
  """A record of 20 x 30 pixels with three boxes and a mask."""
  mask = np.arange(600, dtype=np.uint8).reshape(20, 30) % 7
  record = {"image": mask[..., None].repeat(3, 2), "mask": mask, "boxes": FULL}
  return record | {"box_ids": np.array([7, 8, 9])} | changes


def run(pp: str, record: dict | None = None, seed: int = 0) -> dict:
  return parse(pp)(record or example(), np.random.default_rng(seed))


def test_maps_are_those_of_their_definition():
  boxes = lambda pp, seed=0: run(pp, seed=seed)["boxes"].tolist()  # noqa: E731
  assert boxes("decode") == FULL.tolist()
  assert boxes("resize((40, 15))") == [[0, 0, 15, 40], [2, 10, 5, 30], [14, 36, 15, 40]]
  assert boxes("central_crop(10)") == [[0, 0, 10, 10]]  # of (10, 5, 20, 15); box 8 ends there
  assert boxes("central_crop((24, 30), fill=0)")[1] == [4, 7, 10, 17]
  assert boxes("central_crop((23, 33), 'even', fill=0)")[1] == [5, 6, 11, 16]
  assert boxes("crop_border(5)") == [[0, 0, 20, 10], [0, 0, 5, 10]]
  assert boxes("pad(64, fill=0)") == FULL.tolist()
  flips = {seed: boxes("flip_lr", seed)[1] for seed in range(20)}
  assert sorted(map(tuple, flips.values()))[::19] == [(4, 5, 10, 15), (20, 5, 26, 15)]


def test_padding_has_the_values_that_are_written():
  record = run("pad(multiple=16, fill=[1, 2, 3], ignore=99)")
  assert record["image"].shape == (32, 32, 3) and record["mask"].shape == (32, 32)
  np.testing.assert_array_equal(record["image"][:20, :30], example()["image"])
  np.testing.assert_array_equal(record["mask"][:20, :30], example()["mask"])
  assert (record["image"][20:] == [1, 2, 3]).all() and (record["image"][:, 30:] == [1, 2, 3]).all()
  assert (record["mask"][20:] == 99).all() and (record["mask"][:, 30:] == 99).all()
  record = run("pad('square', fill=0)")
  assert record["mask"].shape == (30, 30) and (record["mask"][20:] == -1).all()
  assert run("pad('square', multiple=8, fill=0)")["mask"].shape == (32, 32)
  assert (run("value_range(0, 1)|pad((20, 31), fill=0.5)")["image"][:, 30] == 0.5).all()
  assert (run("random_crop(40, padding=20, ignore=3)")["mask"] == 3).any()


def test_a_mask_takes_the_nearest_pixel_and_flips_change_places_with_resizes():
  rng = np.random.default_rng(0)
  assert annotations._nearest(np.array([[3, 1]]), 1, 1).tolist() == [[1]]
  for old in range(1, 14):
    mask = rng.integers(0, 256, (old, 3)).astype(np.uint8)
    for new in range(1, 14):
      resized = annotations._nearest(mask, 0, new)
      centres = (np.arange(new) + 0.5) * old / new
      distance = np.abs(centres[:, None] - (np.arange(old) + 0.5))
      near = distance <= distance.min(1, keepdims=True) + 1e-9
      assert all((mask[a] == row).any(0).all() for a, row in zip(near, resized, strict=True))
      np.testing.assert_array_equal(annotations._nearest(mask[::-1], 0, new), resized[::-1])


def test_two_flips_are_none_and_a_flip_changes_places_with_a_resize():
  before = example()
  flip = lambda record: annotations.follow(  # noqa: E731
    record, record["mask"].shape, Affine((0, 0, *(hw := record["mask"].shape)), hw, True), 0
  )
  resize = parse("resize((37, 22), 'area', min_area=0)")
  np.testing.assert_array_equal(flip(flip(before))["boxes"], before["boxes"])
  np.testing.assert_array_equal(flip(flip(before))["mask"], before["mask"])
  first, last = resize(flip(before), None), flip(resize(before, None))
  np.testing.assert_array_equal(first["mask"], last["mask"])
  np.testing.assert_allclose(first["boxes"], last["boxes"], atol=4e-6)


def test_what_is_left_of_a_box_decides():
  """Of the box (4, 5, 10, 15) half is left of x = 7; the share is of the area before the operation."""
  window = Affine((0, 7, 20, 23), (20, 23))
  left = lambda share: annotations.follow(example(), (20, 30), window, share)["box_ids"].tolist()  # noqa: E731
  assert left(0.5) == [7, 8, 9]
  assert left(0.51) == [7, 9]
  assert left(0.77) == [9]  # 23 / 30 of the first
  twice = parse("central_crop((20, 20), min_area=0.6)|central_crop((20, 14), min_area=0.6)")
  assert twice(example(), None)["box_ids"].tolist() == [7]  # 14 / 30 of the box, in two steps
  assert run("central_crop((20, 14), min_area=0.6)")["box_ids"].tolist() == []
  assert run("central_crop((20, 14))")["box_ids"].tolist() == [7, 8]
  for share in ("2", "-0.1", "'half'"):
    with pytest.raises(UserError, match=r"min_area=.*expected a share of a box's area, 0 to 1"):
      parse(f"crop_border(1, min_area={share})")
  with pytest.raises(UserError, match="no argument 'min_area'"):
    parse("decode(min_area=0.5)")


def test_boxes_never_reach_beyond_the_image_into_its_padding():
  out = np.array([[-6, -4, 6, 8], [25, 5, 40, 30], [-9, 2, 0, 9], [5, 5, 5, 9], [5, 5, 9, 5]])
  record = example(boxes=out.astype(np.float32), box_ids=np.arange(5))
  for pp in ("pad(64, fill=0, min_area=0)", "central_crop(60, fill=0, min_area=0)"):
    moved = run(pp, record)
    np.testing.assert_array_equal(
      moved["boxes"] - ([15, 20] * 2 if "crop" in pp else 0), [[0, 0, 6, 8], [25, 5, 30, 20]]
    )
    assert moved["box_ids"].tolist() == [0, 1]  # The others are outside, or have no area.


def test_no_boxes_keep_their_shape():
  empty = example(boxes=np.zeros((0, 4), np.float32), box_ids=np.zeros(0, np.int64))
  for pp in ("decode", "flip_lr", "inception_crop(9)", "pad(64, fill=0)", "relative_boxes('xyxy')"):
    record = run(pp, empty)
    assert record["boxes"].shape == (0, 4) and record["boxes"].dtype == np.float32
    assert record["box_ids"].shape == (0,)
  assert run("inception_crop(9)|pad_boxes(2)", empty)["box_mask"].tolist() == [0, 0]


def test_a_jpeg_that_is_decoded_at_a_reduced_scale_moves_boxes_and_mask():
  whole = np.zeros((400, 600), np.uint8)
  whole[80:240, 300:500] = 200
  file = io.BytesIO()
  Image.fromarray(whole[..., None].repeat(3, 2)).save(file, "JPEG", quality=95)
  record = {"image": file.getvalue(), "mask": png(whole), "annotated_hw": (400, 600)}
  record["boxes"] = np.array([[300, 80, 500, 240]], np.float32)
  for seed in range(5):
    pp = "{}inception_crop((40, 50), area_min=60, min_area=0)"
    fused, plain = run(pp.format("decode_"), record, seed), run(pp.format("decode|"), record, seed)
    np.testing.assert_array_equal(fused["boxes"], plain["boxes"])
    np.testing.assert_array_equal(fused["mask"], plain["mask"])
    agree = (fused["image"][..., 0] > 100) == (fused["mask"] > 0)
    assert agree.mean() > 0.97  # all but the edges of the box


# --- masks and sizes ---


def grey_png(depth: int, numbers: list[int]) -> bytes:
  """A PNG of one row in grey of 1, 2 or 4 bits, which Pillow does not write."""
  chunk = lambda kind, data: (  # noqa: E731
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  )
  bits = "".join(format(n, f"0{depth}b") for n in numbers)
  row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
  header = struct.pack(">IIBBBBB", len(numbers), 1, depth, 0, 0, 0, 0)
  parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16, "palette", "bool", "int64"])
def test_masks_of_all_depths_give_their_numbers(depth):
  most = {1: 1, 2: 3, 4: 15, 16: 40000, "bool": 1, "int64": 70000}.get(depth, 200)
  numbers = np.array([[0, 1, most, 1, 0, 0, most, 1]])
  if depth in (1, 2, 4):
    mask = grey_png(depth, numbers[0].tolist())
  elif depth == "palette":
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(file := io.BytesIO(), "PNG")
    mask = file.getvalue()
  else:
    kind = {8: "uint8", 16: "uint16", "bool": "bool", "int64": "int64"}[depth]
    mask = numbers.astype(kind) if isinstance(depth, str) else png(numbers.astype(kind))
  record = run("decode", {"image": np.zeros((1, 8, 3), np.uint8), "mask": mask})
  assert record["mask"].dtype == np.int32
  np.testing.assert_array_equal(record["mask"], numbers)


def jpeg(array: np.ndarray, orientation: int = 1) -> bytes:
  file, exif = io.BytesIO(), Image.Exif()
  exif[0x0112] = orientation
  Image.fromarray(array).save(file, "JPEG", exif=exif)
  return file.getvalue()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mask": png(np.random.default_rng(0).integers(0, 9, (20, 30), np.uint8))[:200]}, "truncated"),
    ({"mask": b"<html>"}, "no known image format"),
    ({"mask": png(np.zeros((20, 30, 3), np.uint8))}, "PNG of mode RGB; expected a PNG with a pal"),
    ({"mask": jpeg(np.zeros((20, 30), np.uint8))}, "a mask as JPEG of mode L"),
    (
      {"mask": png(np.zeros((20, 29), np.uint8))},
      "mask has 20 x 29 pixels .h x w., the image 20 x",
    ),
    ({"mask": np.zeros((20, 30, 1), np.uint8)}, r"mask is uint8 \[20, 30, 1\]; expected integers"),
    ({"mask": np.zeros((20, 30))}, "mask is float64"),
    ({"mask": np.full((20, 30), 2**40)}, "numbers up to 1099511627776; expected those of int32"),
    ({"boxes": FULL * np.nan}, r"Box 0 is \[nan.*expected finite x0 <= x1"),
    ({"boxes": FULL[:, [2, 1, 0, 3]]}, r"Box 0 is \[30.0, 0.0, 0.0, 20.0\]; expected finite x0"),
    ({"boxes": np.zeros((0,))}, r"boxes are float64 \[0\]; expected numbers \[m, 4\], without bo"),
    ({"box_ids": np.zeros(2, int)}, "'box_ids' has 2 rows for 3 boxes"),
    (
      {"annotated_hw": (30, 20)},
      r"20 x 30 pixels .h x w.; its annotations are for 30 x 20.*exif=Fa",
    ),
    ({"annotated_hw": (40, 60)}, "for 40 x 60.*Take the image that was annotated, or scale"),
  ],
)
def test_annotations_that_do_not_fit_are_errors(changes, message):
  with pytest.raises((ValueError, OSError, SyntaxError), match=message) as info:
    run("decode", example(**changes))
  if "mask" in changes:
    assert "mask" in " ".join([str(info.value), *info.value.__notes__])


def test_exif_data_turn_the_image_and_its_annotations_have_to_be_of_that():
  stored = np.zeros((30, 20, 3), np.uint8)
  record = example(image=jpeg(stored, 6), annotated_hw=(20, 30))
  with images.noticing() as texts:
    assert run("decode(exif=True)", record)["mask"].shape == (20, 30)
  assert texts == []
  with pytest.raises(UserError, match=r"30 x 20 pixels.*annotations are for 20 x 30.*exif=False"):
    run("decode", record)
  del record["annotated_hw"]
  with pytest.raises(UserError, match=r"mask has 20 x 30 pixels .h x w., the image 30 x 20"):
    run("decode", record)
  unsure = (
    {"image": jpeg(stored, 6), "boxes": FULL},  # Nothing states a size.
    {
      "image": jpeg(example()["image"], 3),
      "boxes": FULL,
      "annotated_hw": (20, 30),
    },  # The same size.
  )
  for record in unsure:
    with images.noticing() as texts:
      run("decode(exif=True)", record)
    assert "taken to be of the image after that" in texts[0] and len(texts) == 1


# --- segmentation's own ---


def test_scale_jitter_draws_the_ratio_and_keeps_long_images_short():
  image = {"image": np.zeros((30, 60, 3), np.uint8)}
  sizes = np.array([
    run("scale_jitter(20)", image, seed)["image"].shape[:2] for seed in range(300)
  ])  # fmt: skip
  assert np.abs(sizes[:, 1] - 2 * sizes[:, 0]).max() <= 1
  assert (sizes[:, 0].min(), sizes[:, 0].max()) == (10, 40)
  assert abs(np.mean(sizes[:, 0]) - 25) < 2  # the mean ratio is 1.25
  assert max(run("scale_jitter(20, long=20)", image, k)["image"].shape[1] for k in range(99)) == 40
  for pp in ("scale_jitter(0)", "scale_jitter(20, 2, 1)", "scale_jitter(20, long=10)"):
    with pytest.raises(UserError, match="expected short >= 1, 0 < ratio_min <= ratio_max"):
      run(pp)


def test_a_balanced_crop_shows_several_classes_where_a_random_one_may_not():
  """A class in the corner, a quarter of the pixels without any: the share is of the pixels with a class."""
  mask = np.zeros((40, 60), np.uint8)
  mask[:16, :16], mask[20:, :30] = 1, 255
  record = {"image": mask[..., None].repeat(3, 2), "mask": mask}

  def shares(pp):
    for seed in range(100):
      cut = run(f"decode|{pp}", record, seed)
      assert cut["mask"].shape == cut["image"].shape[:2] == (20, 20)
      counts = np.bincount(cut["mask"][cut["mask"] >= 0], minlength=2)
      yield counts.max() / max(1, counts.sum())

  assert np.mean([s < 0.75 for s in shares("random_crop(20)")]) < 0.3
  assert np.mean([s < 0.75 for s in shares("balanced_crop(20, tries=100)")]) > 0.97
  ten = np.mean([s < 0.75 for s in shares("balanced_crop(20)")])
  assert 0.5 < ten < 1  # after ten tries what comes is taken
  np.testing.assert_array_equal(
    run("balanced_crop(99)", record)["image"], record["image"]
  )  # smaller


def test_what_a_balanced_crop_needs():
  with pytest.raises(UserError, match="the example has no mask; random_crop needs none"):
    run("balanced_crop(9)", {"image": np.zeros((20, 20, 3), np.uint8)})
  for pp in ("balanced_crop(9, 0)", "balanced_crop(9, tries=0)"):
    with pytest.raises(UserError, match="expected a share above 0, at most 1"):
      run(pp)
  with pytest.raises(UserError, match=r"no argument 'mask'; known: \['size', 'cat_max_ratio'"):
    parse("balanced_crop(9, mask=1)")
  empty = {"image": np.zeros((20, 20, 3), np.uint8), "mask": np.full((20, 20), 255, np.uint8)}
  assert (run("decode|balanced_crop(9)", empty)["mask"] == -1).all()


def test_segmenters_chain_pads_what_is_too_small_after_normalisation():
  pp = (
    "decode|scale_jitter(16, long=64)|balanced_crop(24)|flip_lr|photometric_distortion"
    "|value_range(-1, 1)|pad(24, fill=0)"
  )
  assert parse(pp).random
  padded = 0
  for seed in range(20):
    record = run(pp, seed=seed)
    assert record["image"].shape == (24, 24, 3) and record["mask"].shape == (24, 24)
    outside = record["mask"] == -1
    padded += outside.any()
    assert (record["image"][outside] == 0).all() and set(np.unique(record["mask"])) <= {
      *range(-1, 7)
    }
    again = run(pp, seed=seed)
    np.testing.assert_array_equal(record["image"], again["image"])
    np.testing.assert_array_equal(record["mask"], again["mask"])
  assert padded


# --- what does not follow ---


def test_a_second_image_has_a_size_of_its_own_and_moves_no_boxes():
  record = run("copy('image', 'large')|resize(10)|resize(40, key='large')|flip_lr(key='large')")
  assert record["large"].shape == (40, 40, 3) and record["mask"].shape == (10, 10)
  np.testing.assert_array_equal(record["boxes"], run("resize(10)")["boxes"])
  record = run("resize(40, outkey='large')")
  np.testing.assert_array_equal(record["boxes"], FULL)


@pytest.mark.parametrize(
  ("pp", "message"),
  [
    ("copy('image', 'b')|resize(9, inkey='b')", "another image under 'image'.*outkey='b'"),
    ("randaug(2, 10)", "may rotate, shear and shift.*write geometry=False"),
    ("resize(9, key='mask')", "'mask' is no image; boxes and mask follow the key 'image'"),
    ("value_range(outkey='boxes')", "'boxes' is no image"),
    ("relative_boxes('xyxy')|resize(9)", r"relative_boxes\('xyxy'\) stands before resize\(9\)"),
    ("pad_boxes(9)|resize(8, key='b')|flip_lr", "pad_boxes.9. stands before flip_lr"),
    ("relative_boxes('xyxy')|pad_boxes(9)", "before pad_boxes.9., which expects boxes in pixels"),
    ("relative_boxes('xywh')", "Unknown form of boxes 'xywh'; known: cxcywh, xyxy"),
    ("keep('image')|relative_boxes('xyxy')", "Unknown key of an example 'boxes'"),
    ("pad(16, fill=0)", r"Cannot pad \(20, 30\) to \(16, 16\) pixels, which is smaller"),
    ("pad('squares', fill=0)", "Did you mean 'square'"),
    ("pad(64)", "missing a required argument: 'fill'"),
    ("pad(64, fill=0.5)", "fill=0.5 does not fit pixels of uint8"),
    ("pad(64, fill=0, ignore=2199023255552)", "ignore=2199023255552 does not fit pixels of int32"),
    ("pad(64, fill=0, multiple=0)", "multiple=0.; expected 1 or more"),
    ("resize(0)", r"size of \(0, 0\) pixels; expected 1 or more"),
    ("random_crop(9, padding=-1)", "padding=-1; expected 0 or more"),
    ("halve", r"gives \(10, 30\) pixels for \(20, 30\), and does not say where boxes and mask go"),
  ],
)
def test_what_boxes_and_mask_cannot_follow_is_an_error(pp, message, monkeypatch):
  monkeypatch.setitem(OPS, "halve", lambda image: image[::2])
  with pytest.raises(UserError, match=message):
    run(pp)


def test_colours_alone_touch_neither_boxes_nor_mask():
  record = run("randaug(3, 8, geometry=False)|value_range(0, 1)")
  np.testing.assert_array_equal(record["mask"], example()["mask"])
  np.testing.assert_array_equal(record["boxes"], FULL)
  grid = np.indices((20, 30)).sum(0).astype(np.uint8)[..., None].repeat(3, 2) * 4
  rows = {a.tobytes(): i for i, a in enumerate(grid)}  # A row that moves is found elsewhere.
  for seed in range(40):
    out = parse("randaug(1, 10, geometry=False)")({"image": grid}, np.random.default_rng(seed))
    assert all(rows.get(row.tobytes(), i) == i for i, row in enumerate(out["image"]))
  assert run("randaug(2, 10)", {"image": example()["image"]})["image"].shape == (20, 30, 3)


# --- boxes of one number, and relative ones ---


def test_boxes_are_padded_and_every_key_with_them():
  extra = {"box_crowd": np.ones(3, bool), "box_score": np.ones((3, 2), np.float32)}
  record = run("pad_boxes(5)", example(**extra))
  np.testing.assert_array_equal(record["boxes"], [*FULL, [0] * 4, [0] * 4])
  assert record["box_ids"].tolist() == [7, 8, 9, -1, -1]
  assert record["box_crowd"].tolist() == [True, True, True, False, False]
  assert record["box_score"].tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
  assert record["box_mask"].tolist() == [1, 1, 1, 0, 0]
  assert record["boxes"].dtype == record["box_mask"].dtype == np.float32
  with pytest.raises(UserError, match=r"3 boxes are more than pad_boxes\(2\).*overflow='largest'"):
    run("pad_boxes(2)")
  record = run("pad_boxes(2, overflow='largest')", example(boxes=FULL[::-1].copy()))
  assert record["box_ids"].tolist() == [8, 9]  # In their order.
  np.testing.assert_array_equal(record["boxes"], FULL[1::-1])
  with pytest.raises(UserError, match="Unknown overflow 'smallest'; known: largest"):
    run("pad_boxes(9, overflow='smallest')")
  with pytest.raises(UserError, match="'box_names' is <U1; expected signed integers, floats or b"):
    run("pad_boxes(9)", example(box_names=np.array(["a", "b", "c"])))


def test_relative_boxes_are_those_of_their_form():
  xyxy = run("relative_boxes('xyxy')")["boxes"]
  np.testing.assert_allclose(xyxy, FULL / [30, 20, 30, 20], rtol=1e-6)
  centred = run("pad_boxes(4)|relative_boxes('cxcywh')")["boxes"]
  assert centred[3].tolist() == [0, 0, 0, 0]
  np.testing.assert_allclose(centred[1], [7 / 30, 10 / 20, 6 / 30, 10 / 20], rtol=1e-6)
