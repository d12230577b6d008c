"""Trees of folders as people have them: which images are read, each of them once, and what is said of the rest."""

import os
import pathlib
import random
import tempfile
import time

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from flexivit_jax import data
from flexivit_jax.data import images
from flexivit_jax.data.sources import folder as folder_module, make_source
from flexivit_jax.data.walking import Tree
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

HIDDEN = (
  ".ipynb_checkpoints", ".Trash-1000", ".thumbnails", "@eaDir", "#recycle", "$RECYCLE.BIN",
  "System Volume Information", "__MACOSX", "lost+found", "__pycache__",
)  # fmt: skip
HIDDEN_FILES = (".DS_Store", "._0.jpg", "Thumbs.db", "desktop.ini", ".hidden.png")


@pytest.fixture(autouse=True)
def every_warning_anew():
  folder_module._warn.cache_clear()


def put(path: pathlib.Path, data: bytes = b"") -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


def counts(source) -> tuple[int, ...]:
  labels = source.labels()
  assert labels == [record["label"] for record in source.read(range(len(source)))]
  return tuple(map(labels.count, range(source.num_classes)))


# --- an independent walk, by real folders ---


def expected(root: pathlib.Path) -> list[tuple[str, str]]:
  """(real folder, name) of each image that can be reached, once."""
  top = os.path.realpath(root)
  todo, found = [top], {}
  while todo:
    here = todo.pop()
    if here in found:
      continue
    found[here] = []
    for name in os.listdir(here):
      path = os.path.join(here, name)
      if name.startswith(".") or name in HIDDEN or name in HIDDEN_FILES:
        continue
      if os.path.isdir(path):
        target = os.path.realpath(path)
        back = os.path.islink(path) and any(
          os.path.commonpath([target, inside]) == target for inside in (here, top)
        )
        todo += [] if back else [target]
      elif os.path.isfile(path) and name.endswith((".jpg", ".PNG")):
        found[here].append((here, name))
  return sorted(item for items in found.values() for item in items)


ENTRY = st.tuples(
  st.integers(0, 30),  # the folder that it is put into
  st.sampled_from(("folder", "image", "other", "link", "up", "broken", "loop", "system", "hidden")),
  st.integers(0, 30),  # where a link leads
)


def grow(root: pathlib.Path, entries: list) -> None:
  folders = [root]
  for i, (where, kind, target) in enumerate(entries):
    above = folders[where % len(folders)]
    if kind in ("folder", "system"):
      name = f"d{i}" if kind == "folder" else HIDDEN[target % len(HIDDEN)]
      (above / name).mkdir(exist_ok=True)
      folders.append(above / name)
    elif kind == "image":
      put(above / f"{i}.{('jpg', 'PNG')[i % 2]}")
    elif kind == "other":
      put(above / f"{i}.txt")
    elif kind == "hidden":
      put(above / HIDDEN_FILES[target % len(HIDDEN_FILES)])
    else:
      to = {
        "link": folders[target % len(folders)],
        "up": pathlib.Path("../" * (target % 3 + 1)),
        "broken": pathlib.Path("nothing"),
        "loop": pathlib.Path(f"l{i}"),
      }[kind]
      (above / f"l{i}").symlink_to(to)


def growing(check):
  """Runs a check on trees of all shapes."""

  @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
  @given(st.lists(ENTRY, max_size=25))
  @example([(0, "folder", 0), (1, "image", 0), (1, "up", 0), (1, "link", 0), (0, "link", 1)])
  def wrapper(entries):
    with tempfile.TemporaryDirectory() as name:
      root = pathlib.Path(name) / ".cache" / "photos"  # a hidden folder above is no matter
      root.mkdir(parents=True)
      grow(root, entries)
      check(root)

  wrapper.__name__ = check.__name__
  return wrapper


@growing
def test_every_image_that_can_be_reached_is_read_once(root):
  found = [os.path.split(root / path) for path in Tree(root).images]
  assert sorted((os.path.realpath(f), name) for f, name in found) == expected(root)


@growing
def test_an_image_that_needs_no_link_is_read_by_its_own_path(root):
  found = set(Tree(root).images)
  for here, name in expected(root):
    parts = os.path.relpath(os.path.join(here, name), os.path.realpath(root))
    hidden = any(p.startswith(".") or p in HIDDEN for p in parts.split(os.sep))
    assert hidden or parts in found


@growing
def test_what_is_read_does_not_depend_on_the_order_of_the_drive(root):
  class Shuffled(list):
    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

  scandir, rng = os.scandir, random.Random(0)

  def shuffled(path):
    with scandir(path) as entries:
      found = list(entries)
    rng.shuffle(found)
    return Shuffled(found)

  before = Tree(root)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "scandir", shuffled)
    after = Tree(root)
  assert sorted(before.images) == sorted(after.images)
  assert before.left_out() == after.left_out()


# --- what is said ---


def test_ordinary_trees_have_nothing_to_say_and_keep_their_order(tmp_path, caplog):
  for name in ("cat/1.jpg", "cat/more/2.JPG", "dog/ä b.png", "dog/[1].webp"):
    put(tmp_path / "train" / name)
  source = make_source(name="folder", split="train", data_dir=tmp_path)
  # The order is that of the sha256 of the paths; runs that are resumed depend on it.
  assert [r["id"] for r in source.read(range(4))] == [
    "train/dog/ä b.png", "train/cat/more/2.JPG", "train/cat/1.jpg", "train/dog/[1].webp",
  ]  # fmt: skip
  assert not caplog.text and Tree(tmp_path).left_out() == []


@pytest.mark.parametrize("where", ("", "cat", "cat/deep", "new"))
def test_system_folders_are_left_out_at_every_depth(tmp_path, where, caplog):
  put(tmp_path / "train" / "cat" / "0.jpg")
  for name in (*HIDDEN, "__macosx", "$Recycle.Bin"):
    put(tmp_path / "train" / where / name / "cat" / "copy.jpg")
  if where == "new":
    put(tmp_path / "train" / "new" / "0.jpg")
  source = make_source(name="folder", split="train", data_dir=tmp_path)
  assert len(source) == len(source.class_names) == 1 + (where == "new")
  assert caplog.messages == [f"{tmp_path}/train: left out 12 hidden or system folders"]


def test_each_reason_is_counted_in_one_line(tmp_path, caplog):
  train = tmp_path / "train"
  for name in ("cat/0.jpg", "cat/a.txt", "cat/b.heic", "cat/c", "cat/._0.jpg", "loose.jpg"):
    put(train / name)
  put(train / "cat" / "@eaDir" / "0.jpg")
  (train / "cat" / "again").symlink_to("../cat")
  (train / "gone").symlink_to("nothing")
  os.mkfifo(train / "cat" / "pipe.jpg")
  assert len(make_source(name="folder", split="train", data_dir=tmp_path)) == 1
  heic = (
    "" if ".heic" in images.suffixes() else "; HEIC files are read where pillow-heif is installed"
  )
  assert caplog.messages == [
    f"{train}: left out 1 hidden or system folder, 1 hidden or system file,"
    f" 1 entry that is neither a file nor a folder, 3 files that are no images (.heic 1, .txt 1, no suffix 1{heic}),"
    " 1 folder reached twice ('cat/again' is 'cat'), 1 broken link ('gone'), 1 image that is in no class folder"
  ]  # fmt: skip
  make_source(name="folder", split="train", data_dir=tmp_path)
  assert len(caplog.messages) == 1  # a command opens the same folder several times


def test_a_folder_that_cannot_be_read_is_named(tmp_path, caplog, monkeypatch):
  put(tmp_path / "train" / "cat" / "0.jpg")
  put(tmp_path / "train" / "cat" / "locked" / "1.jpg")
  scandir = os.scandir

  def refusing(path):
    if str(path).endswith("locked"):
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refusing)
  assert len(make_source(name="folder", split="train", data_dir=tmp_path)) == 1
  assert "1 unreadable folder ('cat/locked')" in caplog.text


def test_loops_of_links_end_at_once(tmp_path, caplog):
  for name in "abcdefgh":
    put(tmp_path / "train" / name / "0.jpg")
  for name in "abcdefgh":
    for other in "abcdefgh":
      (tmp_path / "train" / name / f"to_{other}").symlink_to(tmp_path / "train" / other)
    for k in range(4):
      (tmp_path / "train" / name / f"up{k}").symlink_to("../" * (k + 1))
  begun = time.process_time()
  source = make_source(name="folder", split="train", data_dir=tmp_path)
  assert len(make_source(name="images", split="all", data_dir=tmp_path)) == len(source) == 8
  assert time.process_time() - begun < 1
  assert counts(source) == (1,) * 8
  assert (
    "96 folders reached twice ('a/to_a' is 'a', 'a/to_b' is 'b', 'a/to_c' is 'c'" in caplog.text
  )


def test_links_to_class_folders_elsewhere_are_followed(tmp_path):
  for name in ("cat", "dog"):
    put(tmp_path / "store" / name / "0.jpg")
    (tmp_path / "photos" / "train").mkdir(parents=True, exist_ok=True)
    (tmp_path / "photos" / "train" / name).symlink_to(tmp_path / "store" / name)
  (tmp_path / "store" / "cat" / "up").symlink_to("..")  # would make cats of dogs
  source = make_source(name="folder", split="train", data_dir=tmp_path / "photos")
  assert (source.class_names, counts(source)) == (("cat", "dog"), (1, 1))


def test_a_link_into_another_split_is_said(tmp_path, caplog):
  for split in ("train", "val"):
    put(tmp_path / split / "cat" / f"{split}.jpg")
  (tmp_path / "train" / "cat" / "more").symlink_to("../../val/cat")
  assert len(make_source(name="folder", split="train", data_dir=tmp_path)) == 2
  assert "the link 'cat/more' leads to" in caplog.text and "another split" in caplog.text


def test_images_linked_several_times_are_kept_and_said(tmp_path, caplog):
  first = put(tmp_path / "train" / "cat" / "0.jpg", b"x")
  put(tmp_path / "train" / "dog" / "0.jpg", b"x")  # a copy is another file
  assert len(make_source(name="folder", split="train", data_dir=tmp_path)) == 2
  assert not caplog.text
  os.link(first, tmp_path / "train" / "cat" / "1.jpg")
  (tmp_path / "train" / "cat" / "2.jpg").symlink_to("0.jpg")
  assert len(make_source(name="folder", split="train", data_dir=tmp_path)) == 4
  assert "2 images are links to others of their class; all are kept" in caplog.text
  (tmp_path / "train" / "dog" / "3.jpg").symlink_to(first)
  assert len(make_source(name="folder", split="train", data_dir=tmp_path)) == 5
  assert "1 images are linked in several classes" in caplog.text
  assert "'cat/0.jpg' and 'cat/1.jpg'" in caplog.text or "'dog/3.jpg'" in caplog.text


# --- classes without images ---


@pytest.fixture
def owls(tmp_path):
  for split in ("train", "val"):
    put(tmp_path / split / "cat" / "0.jpg")
    put(tmp_path / split / "owl" / "0.jpg")
  return tmp_path


@pytest.mark.parametrize(
  "kind, why",
  [
    ("nothing", "an empty folder"),
    ("heic", r"2 files that are no images \(.xyz 2\)"),
    ("hidden", "1 hidden or system folder"),
    ("link", "the same folder as 'cat'"),
    ("broken", "broken link"),
  ],
)
def test_a_class_without_images_is_an_error_of_train(owls, kind, why):
  owl = owls / "train" / "owl"
  (owl / "0.jpg").unlink()
  if kind == "heic":
    put(owl / "1.xyz")
    put(owl / "2.xyz")
  if kind == "hidden":
    put(owl / "@eaDir" / "0.jpg")
  if kind == "broken":
    (owl / "0.jpg").symlink_to("nothing")
  if kind == "link":
    owl.rmdir()
    owl.symlink_to("cat")
  with pytest.raises(UserError, match=rf"1 of 2 classes without images: 'owl' \(.*{why}") as info:
    make_source(name="folder", split="train[:50%]", data_dir=owls)
  assert "\n" not in str(info.value) and ".jpg" in str(info.value)
  source = make_source(name="folder", split="train", data_dir=owls, allow_empty=True)
  assert counts(source) == (1, 0)


def test_a_class_without_images_is_a_warning_of_other_splits(owls, caplog):
  (owls / "val" / "owl" / "0.jpg").unlink()
  assert counts(make_source(name="folder", split="val", data_dir=owls)) == (1, 0)
  assert "val: 1 of 2 classes without images: 'owl' (an empty folder)" in caplog.text
  (owls / "val" / "owl").rmdir()
  make_source(name="folder", split="val", data_dir=owls)
  assert "'owl' (no such folder)" in caplog.text


def test_images_without_class_folders_are_one_clear_line(tmp_path):
  put(tmp_path / "train" / "0.jpg")
  put(tmp_path / "train" / "1.png")
  with pytest.raises(
    UserError, match=r"train has 2 images and no class folders; expected .*CLASS"
  ) as info:
    make_source(name="folder", split="train", data_dir=tmp_path)
  assert f"data_dir={str(tmp_path / 'train')!r}" in str(info.value)
  make_source(name="images", split="all", data_dir=tmp_path / "train")  # what it advises
  put(tmp_path / "0.jpg")
  (tmp_path / "train" / "cat").mkdir()
  put(tmp_path / "train" / "cat" / "0.jpg")
  assert len(make_source(name="folder", split="train", data_dir=tmp_path)) == 1


@pytest.mark.parametrize("files", ([], ["cat/1.txt"], ["__MACOSX/cat/1.jpg"], ["cat/@eaDir/1.jpg"]))
def test_a_split_without_images_says_what_is_there(tmp_path, files):
  (tmp_path / "train" / "cat").mkdir(parents=True)
  for file in files:
    put(tmp_path / "train" / file)
  with pytest.raises(UserError, match="train is empty") as info:
    make_source(name="folder", split="train", data_dir=tmp_path)
  reason = {"": "", "t": ".txt 1", "g": "1 hidden or system folder"}[files[0][-1] if files else ""]
  assert reason in str(info.value) and "\n" not in str(info.value)


def test_class_folders_where_splits_are_expected_are_one_clear_line(tmp_path):
  put(tmp_path / "cat" / "0.jpg")
  with pytest.raises(UserError, match=r"'train'; known: cat\. Expected .*train/CLASS/"):
    make_source(name="folder", split="train", data_dir=tmp_path)


@pytest.mark.parametrize(
  "name", ("line\nbreak", "tab\t", "[a]*?", "ä ü", "\udcff", "%s", "{x}", "-", "~")
)
def test_odd_names_are_read_and_every_message_is_one_line(tmp_path, name, caplog, capfd):
  for i in range(2):
    put(tmp_path / "train" / name / f"{i}{name}.jpg", b"x")
  put(tmp_path / "train" / name / f"a.{name}")
  (tmp_path / "train" / name / f"{name}up").symlink_to("..")
  (tmp_path / "train" / name / f"{name}gone").symlink_to("nothing")
  (tmp_path / "train" / "copy").mkdir()
  (tmp_path / "train" / "copy" / "0.jpg").symlink_to(f"../{name}/0{name}.jpg")
  source = make_source(name="folder", split="train", data_dir=tmp_path)
  assert len(source) == 3 and {r["image"] for r in source.read(range(3))} == {b"x"}
  messages = [*caplog.messages, data.class_sizes(source)]
  with pytest.raises(UserError) as info:
    list(data.eval_batches(source, "decode", batch_size=1, threads=0))
  for message in (*messages, str(info.value)):
    assert "\n" not in message
    print(message.encode(errors="backslashreplace"))


def test_class_sizes_are_of_the_examples_that_are_selected(tmp_path):
  for k in range(12):
    for i in range(k + 1):
      put(tmp_path / "train" / f"c{k:02}" / f"{i}.jpg")
  source = make_source(name="folder", split="train", data_dir=tmp_path)
  assert data.class_sizes(source) == (
    "12 classes of 1 to 12 examples, median 6.5; fewest: c00 1, c01 2, c02 3"
  )
  half = make_source(name="folder", split="train[:50%]", data_dir=tmp_path)
  labels = [record["label"] for record in half.read(range(len(half)))]
  assert data.class_sizes(half).startswith(
    f"12 classes of {min(map(labels.count, range(12)))} to {max(map(labels.count, range(12)))} "
  )
  for k in range(3, 12):
    for path in (tmp_path / "train" / f"c{k:02}").iterdir():
      path.unlink()
    (tmp_path / "train" / f"c{k:02}").rmdir()
  few = make_source(name="folder", split="train", data_dir=tmp_path)
  assert data.class_sizes(few) == "3 classes: c00 1, c01 2, c02 3"
  assert data.class_sizes(data.renumber(few, (2, 0, 1), 3, "xyz")) == "3 classes: x 2, y 3, z 1"
  assert data.class_sizes(data.subset(few, [0, 1])) is None
  synthetic = make_source(name="synthetic", split="train", num_classes=3, num_examples=7)
  assert data.class_sizes(synthetic) == "3 classes: 0 3, 1 2, 2 2"


def test_suffixes_are_those_of_pictures():
  known = images.suffixes()
  assert {
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
  } <= known
  assert {".jfif", ".jp2", ".avif", ".ico", ".tga", ".mpo", ".qoi"} <= known
  assert not {".pdf", ".eps", ".mpeg", ".h5", ".wmf", ".txt", ".pfm", ""} & known
