"""What numbers and colours of masks stand for: by a convention's name, by a file of colours, or an error that helps."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data import eval_batches, make_source, mask_labels, pixel_shares, record_bytes
from flexivit_jax.data.sources import class_files
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

RNG = np.random.default_rng(0)
PALETTE = {"sky": (128, 128, 128), "road": (128, 64, 128), "car": (64, 0, 128), "void": (0, 0, 0)}


@pytest.fixture
def write(tmp_path):
  """Writes images of 6 x 8 pixels, and masks, as `images/train` and `masks/train`."""

  def write(
    *masks, mode=None, folder="masks/train", end=".png", images="images/train", tail=".png"
  ):
    for i, mask in enumerate(masks):
      for place, picture in (
        (f"{images}/{i}{tail}", Image.new("RGB", (8, 6), (i, 0, 0))),
        (f"{folder}/{i}{end}", mask if isinstance(mask, Image.Image) else Image.fromarray(mask, mode)),
      ):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / place)
    return tmp_path

  return write


def opened(root, **options):
  return make_source(**{"name": "masks", "split": "train", "data_dir": root, **options})


def read(source):
  """The masks of a source in the order of their names, decoded."""
  batch = next(iter(eval_batches(source, "decode|keep('mask')", batch_size=len(source), threads=0)))
  names = [source[i]["id"] for i in batch["_id"].tolist()]
  return [batch["mask"][i] for i in np.argsort(names)]


def painted(numbers, names=tuple(PALETTE)):
  colors = np.array([PALETTE[name] for name in names], np.uint8)
  return colors[numbers]


NUMBERS = RNG.integers(0, 4, (6, 8))


def test_zero_is_no_class_and_the_others_are_one_less(write):
  mask = RNG.integers(0, 151, (6, 8)).astype(np.uint8)
  mask[0, :3] = 0, 255, 150
  (got,) = read(opened(write(mask), num_classes=150, labels="zero_is_ignore"))
  want = np.where(mask == 255, -1, mask.astype(int) - 1)
  np.testing.assert_array_equal(got, want)
  assert got[0, :3].tolist() == [-1, -1, 149]
  with pytest.raises(
    UserError, match=r"number 149, .*% of its pixels; expected 0\.\.148.*`labels`"
  ):
    read(opened(write(mask), num_classes=149, labels="zero_is_ignore"))


def test_label_ids_of_cityscapes_become_training_ids(write):
  """By the values that everyone knows: road 7, car 26, bicycle 33; the ground, 6, is of no class."""
  mask = np.zeros((6, 8), np.uint8)
  mask[0, :6] = 7, 26, 33, 6, 0, 255
  mask[1, :4] = 17, 28, 29, 31  # pole, bus, caravan, train
  source = opened(write(mask), labels="train_ids")
  assert source.num_classes == 19 and source.class_names[13] == "car"
  (got,) = read(source)
  assert got[0, :6].tolist() == [0, 13, 18, -1, -1, -1]
  assert got[1, :4].tolist() == [5, 15, -1, 16]
  table = mask_labels.LABELS["train_ids"].table
  assert sorted(k for k in table if k >= 0) == list(range(19)) and len(table) == 34
  with pytest.raises(UserError, match=r"number 34; labels='train_ids' expects 0\.\.33, or 255"):
    read(opened(write(np.full((6, 8), 34, np.uint8)), labels="train_ids"))


def test_the_folders_of_cityscapes_and_ade20k(write):
  options = dict(images="leftImg8bit/train/a", tail="_leftImg8bit.png")
  options["folder"], grey = "gtFine/train/a", np.zeros((6, 8), np.uint8)
  root = write(grey + 7, end="_gtFine_labelIds.png", **options)
  write(grey, end="_gtFine_labelTrainIds.png", **options)
  source = opened(root, name="cityscapes")
  assert (source.name, source.num_classes, source.upright) == ("cityscapes", 19, False)
  assert (read(source)[0] == 0).all()
  ids = dict(images="leftImg8bit/{split}/*_leftImg8bit.png")
  ids["masks"] = "gtFine/{split}/*_gtFine_labelTrainIds.png"
  assert (read(opened(root, num_classes=19, **ids))[0] == 0).all()
  with pytest.raises(UserError, match=r"labelTrainIds.png has training ids: without labels="):
    opened(root, labels="train_ids", **ids)
  write(np.eye(6, 8, dtype=np.uint8), folder="annotations/training", images="images/training")
  source = opened(root, name="ade20k", split="training")
  assert (source.name, source.num_classes, source.class_names) == ("ade20k", 150, None)
  assert (read(source)[0] == np.eye(6, 8) - 1).all()
  rows = [f"{k}\t0.1\t9\t1\t0\tname {k}" for k in range(1, 151)]
  (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
  assert opened(root, name="ade20k", split="training").class_names[-1] == "name 150"
  (root / "objectInfo150.txt").write_text("Idx\tName\n1\twall")
  with pytest.raises(UserError, match="has 1 names; expected 150"):
    opened(root, name="ade20k", split="training")


@pytest.mark.parametrize("form", ["rgb", "rgba", "palette"])
@pytest.mark.parametrize("said", ["mapping", "camvid", "csv", "cvat", "json"])
def test_colours_become_the_classes_that_they_are_named(write, tmp_path, form, said):
  picture = Image.fromarray(painted(NUMBERS))
  if form == "rgba":
    picture.putalpha(7)
  if form == "palette":
    picture = Image.fromarray(NUMBERS.astype(np.uint8), "P")
    picture.putpalette([channel for color in PALETTE.values() for channel in color])
  root = write(picture)
  lines = {
    "camvid": [f"{r} {g} {b}\t\t{name}" for name, (r, g, b) in PALETTE.items()],
    "csv": ["name,r,g,b", *(f"{name},{r},{g},{b}" for name, (r, g, b) in PALETTE.items())],
    "cvat": [f"{name}:{r},{g},{b}::" for name, (r, g, b) in PALETTE.items()],
    "json": [str({n: list(c) for n, c in PALETTE.items()}).replace("'", '"')],
  }
  colors = PALETTE
  if said != "mapping":
    colors = f"colors.{'json' if said == 'json' else 'txt'}"
    (root / colors).write_text("\n".join(lines[said]))
  source = opened(root, colors=colors)
  assert source.class_names == tuple(PALETTE)
  np.testing.assert_array_equal(read(source)[0], NUMBERS)
  record = source[0]
  again = record_bytes.decode(record_bytes.encode(record))  # as packed data have it
  np.testing.assert_array_equal(again["mask_colors"], record["mask_colors"])


def test_colours_of_other_names_than_the_classes_are_of_no_class(write, caplog):
  root = write(painted(NUMBERS))
  (root / "classes.txt").write_text("car\nsky")
  colors = {**PALETTE, "car": [(64, 0, 128), (128, 64, 128)]}
  del colors["road"]
  with caplog.at_level(logging.WARNING):
    (got,) = read(opened(root, colors=colors))
  assert "of no class are the pixels in the colours of void" in caplog.text
  np.testing.assert_array_equal(got, np.array([1, 0, 0, -1])[NUMBERS])
  with pytest.raises(UserError, match="colors name no colour of the class car; they name sky"):
    opened(root, colors={"sky": (128, 128, 128)})


def test_unknown_colours_are_shown(write):
  root = write(painted(NUMBERS))
  two = {name: PALETTE[name] for name in ("sky", "road")}
  with pytest.raises(UserError, match=r"colours that colors= does not name: .*\(64, 0, 128\) \d"):
    read(opened(root, colors=two))
  with pytest.raises(UserError, match=r"0: the mask has colours; .*\(64, 0, 128\) .*%.*Give col"):
    opened(root, num_classes=4)
  many = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)
  with pytest.raises(UserError, match=r"and 36 more\. Give colors=FILE"):
    opened(write(many), num_classes=4)


def test_a_palette_without_colours_has_its_indices_and_shows_those_that_are_no_class(write):
  picture = Image.fromarray(NUMBERS.astype(np.uint8), "P")
  picture.putpalette(RNG.bytes(768))
  np.testing.assert_array_equal(read(opened(write(picture), num_classes=4))[0], NUMBERS)
  with pytest.raises(UserError, match=r"the mask has the numbers 2, 3, \d.*% of its pixels"):
    read(opened(write(picture), num_classes=2))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("1 2 sky", "colors.txt line 1: '1 2 sky'; expected 'R G B name' or 'name,R,G,B'"),
    ("1 2 300 sky", r"colour of 'sky' is \[1, 2, 300\]; expected \[r, g, b\] of 0 to 255"),
    ("1 2 3 sky\n1 2 3 road", r"\(1, 2, 3\) is both 'sky' and 'road'"),
    ("name,r,g,b", "is {}; expected names with colours"),
  ],
)
def test_files_of_colours_are_checked(write, text, message):
  root = write(painted(NUMBERS))
  (root / "colors.txt").write_text(text)
  with pytest.raises(UserError, match=message):
    opened(root, colors="colors.txt")


def test_files_of_colours_have_names_with_spaces_and_numbers(tmp_path):
  path = tmp_path / "colors.txt"
  path.write_text("# label:color_rgb\n1 2 3  two words\n4,5,6,lane 2\n")
  found = class_files.read_colors("colors.txt", tmp_path)
  assert found == {"two words": ((1, 2, 3),), "lane 2": ((4, 5, 6),)}
  path.write_text("two words 1 2 3\nlane 2, 4, 5, 6\n1 2 3 two words\n7 8 9 two words")
  assert class_files.read_colors("colors.txt", tmp_path) == {
    "two words": ((1, 2, 3), (1, 2, 3), (7, 8, 9)),
    "lane 2": ((4, 5, 6),),
  }


def test_what_does_not_go_together(write):
  root = write(painted(NUMBERS))
  refused = {
    "are about numbers": dict(colors=PALETTE, labels="train_ids"),
    "with labels= or ignore=": dict(colors=PALETTE, ignore=3),
    "Unknown labels 'train_id'.*Did you mean 'train_ids'": dict(labels="train_id"),
    "No file .*nothing.txt": dict(colors="nothing.txt"),
    "num_classes=3; .* has 4 names": dict(colors=PALETTE, num_classes=3),
    "num_classes=20; the masks has 19 names": dict(labels="train_ids", num_classes=20),
  }
  for message, options in refused.items():
    with pytest.raises(UserError, match=message):
      opened(root, **options)


def test_images_without_any_class_are_counted_and_kept(write, caplog):
  none, some = np.full((6, 8), 255, np.uint8), np.zeros((6, 8), np.uint8)
  source = opened(write(none, some, none), num_classes=2)
  with caplog.at_level(logging.WARNING):
    masks = read(source)
  assert [(mask == -1).all() for mask in masks] == [True, False, True]
  assert "no pixel of the mask has a class" in caplog.text


def test_shares_of_pixels_are_counted_before_training(write):
  half = np.zeros((6, 8), np.uint8)
  half[3:] = 255
  root = write(half, np.full((6, 8), 2, np.uint8), half, half)
  assert pixel_shares(opened(root, num_classes=4)) == (
    "pixels in 4 of 4 masks: 0 37.50%, 2 25.00%, no class 37.50%; of 1, 3 there is none, so they are not learned"
  )
  assert pixel_shares(opened(root, num_classes=4), 1).endswith("; of 1, 2, 3 there is none")
  assert pixel_shares(opened(root, num_classes=1), 2).startswith("pixels in 2 of 4")
  many = write(*RNG.integers(0, 40, (3, 6, 8)).astype(np.uint8))
  text = pixel_shares(opened(many, num_classes=44))
  assert text.count("%") == 13 and "..." in text and "40, 41, 42, 43 there is none" in text
  (root / "masks/train/0.png").write_bytes(b"")
  assert pixel_shares(opened(root, num_classes=44, on_bad="skip")).startswith("pixels in 3 of 3")


def test_damaged_masks_of_colours_are_bad_examples(write):
  root = write(painted(NUMBERS))
  path = root / "masks/train/0.png"
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(UserError, match="in the mask"):
    read(opened(root, colors=PALETTE))
  file = io.BytesIO()
  Image.new("RGB", (8, 6)).save(file, "BMP")
  with pytest.raises(UserError, match="a mask as BMP; expected a PNG, which keeps colours"):
    from flexivit_jax.data.annotations import read_mask

    read_mask({"mask": file.getvalue(), "mask_colors": mask_labels.color_table({"a": [(0, 0, 0)]}, ["a"])})  # fmt: skip
