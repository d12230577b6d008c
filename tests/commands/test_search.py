"""`flexivit search`: what it finds, what it keeps, and what becomes of a kept index that is damaged or another's."""

import json
import os
import pathlib
import shutil
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, weights
from flexivit_jax.data import text
from flexivit_jax.errors import UserError
from flexivit_jax.inference import index, predictor, search

KEY = index.Key("0" * 64, "decode", "8", ("/photos",))


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """A folder of five images in the current one, which has a cache folder of its own."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "cache"))
  rng = np.random.default_rng(0)
  (tmp_path / "photos").mkdir()
  for i in range(5):
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(f"photos/{i}.png")
  return tmp_path / "photos"


def run(capsys, *args):
  """Returns (exit code, stdout, stderr) of `flexivit search`."""
  code = cli.main(["search", *map(str, args)])
  return (code, *capsys.readouterr())


# --- the index ---


class Embedding:
  """Stands for a model: the vector of a file is its length and its first byte; counts what it is asked for."""

  def __init__(self, stop=None):
    self.asked, self.stop = [], stop

  def __call__(self, files):
    for file in files:
      if len(self.asked) == self.stop:
        raise KeyboardInterrupt
      self.asked.append(os.path.basename(file))
      content = index.content(file)
      data = pathlib.Path(file).read_bytes() if content else b""
      vector = np.float32([len(data), data[0]]) if data else None
      yield index.Made(file, content, vector)


@pytest.fixture
def files(tmp_path):
  folder = tmp_path / "files"
  folder.mkdir()
  for name in "abcd":
    (folder / name).write_text(name * 3)
  return folder


def update(folder, embed, store=None, names=None, **options):
  listed = sorted(map(str, folder.iterdir()))
  wanted = [str(folder / n) for n in names] if names else listed
  notes = []
  store = store or folder.parent / "index.npz"
  vectors, changes = index.update(store, KEY, listed, wanted, embed, note=notes.append, **options)
  named = {os.path.basename(name): v.tolist() for name, v in vectors.items()}
  return named, tuple(changes), notes


def test_only_what_is_new_or_changed_is_embedded_and_what_is_gone_is_dropped(files):
  first = Embedding()
  assert update(files, first)[1] == (4, 0, 0) and first.asked == [*"abcd"]
  stored = (files.parent / "index.npz").stat().st_mtime_ns
  second = Embedding()
  named, changes, _ = update(files, second)
  assert changes == (0, 4, 0) and second.asked == [] and named["c"] == [3, ord("c")]
  assert (files.parent / "index.npz").stat().st_mtime_ns == stored  # nothing to write
  (files / "a").write_text("xx")  # other content
  os.utime(files / "b")  # the same, at another time
  (files / "c").rename(files / "moved")
  (files / "d").unlink()
  (files / "new").write_text("new")
  third = Embedding()
  named, changes, _ = update(files, third)
  assert third.asked == ["a", "new"] and changes == (2, 2, 2)
  assert named == {
    "a": [2, ord("x")], "b": [3, ord("b")], "moved": [3, ord("c")], "new": [3, ord("n")]
  }  # fmt: skip
  assert update(files, Embedding())[1] == (0, 4, 0)


def test_a_new_time_of_the_same_content_is_kept(files, monkeypatch):
  update(files, Embedding())
  os.utime(files / "b")
  assert update(files, Embedding())[1] == (0, 4, 0)
  monkeypatch.setattr(index, "content", lambda name: pytest.fail("is read again"))
  assert update(files, Embedding())[1] == (0, 4, 0)


def test_content_that_changed_at_the_same_size_and_time_is_seen_where_that_is_asked(files):
  update(files, Embedding())
  state = os.stat(files / "a")
  (files / "a").write_text("zzz")
  os.utime(files / "a", ns=(state.st_atime_ns, state.st_mtime_ns))
  assert update(files, Embedding())[0]["a"] == [3, ord("a")]
  embed = Embedding()
  assert update(files, embed, by_content=True)[0]["a"] == [3, ord("z")] and embed.asked == ["a"]


def test_a_file_that_cannot_be_read_is_tried_again_and_leaves_the_index(files):
  update(files, Embedding())
  (files / "b").write_text("")
  named, changes, _ = update(files, Embedding())
  assert sorted(named) == ["a", "c", "d"] and changes == (0, 3, 0)
  embed = Embedding()
  update(files, embed)
  assert embed.asked == ["b"]


def test_an_update_that_was_ended_goes_on(files, monkeypatch):
  monkeypatch.setattr(index, "SAVE_EVERY", -1.0)
  with pytest.raises(KeyboardInterrupt):
    update(files, Embedding(stop=3))
  embed = Embedding()
  assert update(files, embed)[1] == (1, 3, 0) and embed.asked == ["d"]


def test_of_no_files_nothing_is_written(files):
  for file in files.iterdir():
    file.unlink()
  assert update(files, Embedding()) == ({}, (0, 0, 0), [])
  assert not (files.parent / "index.npz").exists()


def test_only_what_is_wanted_is_embedded(files):
  embed = Embedding()
  assert update(files, embed, names="bd")[0].keys() == {"b", "d"} and embed.asked == ["b", "d"]
  assert update(files, embed, names="ab")[1] == (1, 1, 0)
  assert update(files, Embedding())[1] == (1, 3, 0)


def test_a_crash_while_it_is_written_leaves_the_old_one(files, monkeypatch):
  update(files, Embedding())
  old = (files.parent / "index.npz").read_bytes()
  (files / "a").write_text("xx")

  def crash(*args, **options):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np.lib.format, "write_array", crash)
  with pytest.raises(UserError, match=r"index\.npz cannot be written: No space left"):
    update(files, Embedding())
  assert (files.parent / "index.npz").read_bytes() == old
  assert sorted(p.name for p in files.parent.iterdir()) == ["files", "index.npz"]


def test_a_damaged_index_is_made_anew(files):
  store = files.parent / "index.npz"
  update(files, Embedding())
  whole = store.read_bytes()
  rng = np.random.default_rng(0)
  damaged = [whole[:n] for n in (0, 4, 100, len(whole) - 1)]
  for at in rng.integers(40, 200, 5):  # inside of what it says
    damaged.append(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
  for content in damaged:
    store.write_bytes(content)
    named, changes, notes = update(files, Embedding())
    assert changes == (4, 0, 0) and len(named) == 4
    assert len(notes) == 1 and "is damaged" in notes[0] and "made anew" in notes[0]
    assert update(files, Embedding())[1] == (0, 4, 0)


def test_a_file_that_is_something_else_stays_as_it_is(files):
  store = files.parent / "index.npz"
  np.savez(files.parent / "other.npz", x=np.arange(3))
  other = (files.parent / "other.npz").read_bytes()
  update(files, Embedding())
  with zipfile.ZipFile(store) as archive:
    about = json.loads(archive.read("about.json"))
    vectors = archive.read("vectors.npy")
  with zipfile.ZipFile(files.parent / "of.zip", "w") as archive:
    about["key"]["weights"] = "1" * 64
    archive.writestr("about.json", json.dumps(about))
    archive.writestr("vectors.npy", vectors)
  for content, message in (
    (b"hello", "is no index of `flexivit search`; it stays"),
    (other, "is no index of `flexivit search`; it stays"),
    ((files.parent / "of.zip").read_bytes(), "is an index of other weights, images or sizes"),
  ):
    store.write_bytes(content)
    with pytest.raises(UserError, match=message):
      update(files, Embedding())
    assert store.read_bytes() == content


def test_the_name_of_an_index_goes_by_all_that_it_is_of():
  others = [KEY._replace(**{field: "x" if field != "roots" else ("x",)}) for field in KEY._fields]
  assert len({key.file for key in (KEY, *others)}) == 5


def test_equal_ones_come_in_the_order_of_the_files():
  vectors = {"b": np.float32([1, 0]), "a": np.float32([1, 0]), "c": np.float32([0, 1])}
  found = search.best(np.float32([0.6, 0.8]), vectors, 5)
  assert [(row.rank, row.file) for row in found] == [(1, "c"), (2, "b"), (3, "a")]
  assert found[0].similarity == pytest.approx(0.8)


# --- the command ---


@pytest.mark.full
def test_the_images_found_are_those_whose_vectors_are_most_alike(photos, save_towers, capsys):
  file = save_towers()
  ask = ("red car", "--data", "photos", f"--checkpoint={file}", "--seqhw=4")
  code, out, err = run(capsys, *ask, "--top_k=3", "--json")
  assert code == 0 and "5 images embedded, 0 known, 0 gone" in err
  model, params, record = weights.towers.load(file)
  prepare = predictor.load(file).prepare
  images = np.stack([prepare(f"photos/{i}.png") for i in range(5)])
  tokens = text.of_record(record["text"]).encode(["red car"])
  embed = jax.jit(lambda **given: model.apply({"params": params}, seqhw=4, **given)[1])
  found = embed(image=images, tokens=tokens)
  alike = np.float64(found["image"]) @ np.float64(found["text"][0])
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["file"] for row in rows] == [f"photos/{i}.png" for i in np.argsort(-alike)[:3]]
  np.testing.assert_allclose(
    [row["similarity"] for row in rows], np.sort(-alike)[:3] * -1, atol=1e-5
  )
  # Once more, by an image; nothing is embedded but the query.
  code, out, err = run(capsys, "--like=photos/2.png", *ask[1:])
  assert code == 0 and "0 images embedded, 5 known, 0 gone" in err
  assert out.splitlines()[0] == " 1.0000  photos/2.png"
  # Coarse for all, fine for two.
  code, out, err = run(capsys, *ask[:-1], "--seqhw=4", "--coarse=2", "--shortlist=2")
  assert code == 0 and len(out.splitlines()) == 2
  assert "seqhw=2: 5 images embedded" in err and "seqhw=4: 0 images embedded, 2 known" in err
  # A file that is no image is named; the others are found.
  (photos / "bad.png").write_bytes(b"damaged")
  code, out, err = run(capsys, *ask)
  assert code == 0 and "photos/bad.png" in err and len(out.splitlines()) == 5
  code, _, err = run(capsys, *ask, "--on_error=raise")
  assert code == 2 and "1 images cannot be read; each is named above" in err
  shutil.rmtree(photos)
  (photos.parent / "photos").mkdir()
  code, out, err = run(capsys, *ask)
  assert code == 2 and "there is no image to search in" in err


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--seqhw=4",), "Give a text to look for, or an image with --like"),
    (("cat", "--like=photos/1.png", "--seqhw=4"), "Give a text to look for, or an image"),
    ((" ", "--seqhw=4"), "The text to look for is empty"),
    (("cat", "--seqhw=4", "--shortlist=3"), "--shortlist without --coarse"),
    (("cat", "--seqhw=4", "--coarse=4"), "--coarse=4 is --seqhw"),
    (("cat", "--seqhw=2,4"), "images are ranked at one size"),
    (("cat", "--seqhw=4", "--top_k=0"), "--top_k=0; expected 1 or more"),
    (("cat",), "Give --seqhw"),
    (("cat", "--seqhw=4", "--index=photos/1.png"), "--index=photos/1.png can be no folder"),
    (("--like=no.png", "--seqhw=4"), "--like=no.png: no such file"),
  ],
)
def test_what_cannot_be_asked_is_refused(photos, save_towers, capsys, args, message):
  code, out, err = run(capsys, *args, "--data", "photos", f"--checkpoint={save_towers()}")
  assert (code, out) == (2, "") and message in err


def test_weights_without_texts_are_refused(photos, save_towers, capsys):
  ask = ("--data", "photos", "--seqhw=4")
  code, _, err = run(capsys, "cat", *ask, f"--checkpoint={save_towers(tokenizer=False)}")
  assert code == 2 and "has no tokenizer beside its text tower" in err
