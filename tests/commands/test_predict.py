"""`flexivit predict` on the files that people have: any number, any kind, some of them damaged."""

import csv
import io
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from flexivit_jax import cli, weights
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import outputs, predictions, predictor
from flexivit_jax.models import FlexiViT

NAMES = ["cat", 'a "quoted", name', "two\nlines", "Löwe", "=1+1"]


@pytest.fixture(scope="module")
def save(tmp_path_factory, random_params):
  """Saves a small model for images of 24 pixels and returns its file."""

  def save(channels=3, classes=5, record=(), **fields):
    model = FlexiViT(
      num_classes=classes, width=32, depth=2, mlp_dim=48, num_heads=2, patch_size=(8, 8),
      posemb_size=(3, 3), head_zeroinit=False, **fields,
    )  # fmt: skip
    params = random_params(model, (24, 24, channels))
    file = tmp_path_factory.mktemp("model") / "model.npz"
    known = {
      "model": {"num_classes": classes, "width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2,
                "patch_size": [8, 8], "posemb_size": [3, 3], **fields},
      "source": {"file": "model.npz", "format": "ours"}, "image_size": [24, 24],
    }  # fmt: skip
    weights.save_npz(file, model, params, known | dict(record))
    return file

  return save


@pytest.fixture(scope="module")
def model(save):
  return save(record={"class_names": NAMES, "trained": {"seqhw": [2, 4, [2, 3]]}})


@pytest.fixture(scope="module")
def loaded(model):
  return predictor.load(model)


def picture(seed=0, mode="RGB", size=(30, 26)):
  rng = np.random.default_rng(seed)
  image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
  if mode.startswith("I;16") or mode == "I":
    values = rng.integers(0, 2**16, size[::-1])
    return Image.fromarray(values.astype(np.uint16 if mode != "I" else np.int32))
  if mode in ("PA", "La", "RGBa"):
    return image.convert("RGBA").convert({"PA": "LA", "La": "LA"}.get(mode, "RGBA")).convert(mode)
  return image.convert(mode)


def encoded(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """A folder of five images, which is the current one."""
  monkeypatch.chdir(tmp_path)
  for i in range(5):
    picture(i).save(f"{i}.png")
  return tmp_path


def run(capsys, *args):
  """Returns (exit code, stdout, stderr) of `flexivit predict`."""
  code = cli.main(["predict", *map(str, args)])
  return (code, *capsys.readouterr())


def answers(loaded, files, sizes=(4,), **options):
  inputs = [Input(os.fspath(f)) for f in files]
  return [
    row for _, rows in predictions.predictions(loaded, inputs, sizes, **options) for row in rows
  ]


@pytest.fixture(scope="module")
def ask(loaded):
  """`answers` of the model; a function, since Hypothesis prints what a test takes."""
  return lambda files, **options: answers(loaded, files, **options)


# --- batches ---


@settings(max_examples=6)
@given(data=st.data())
def test_an_answer_does_not_depend_on_what_else_is_asked(data, ask, tmp_path_factory):
  """To the bit: an image alone, and at any place among others, good and bad."""
  folder = tmp_path_factory.mktemp("images")
  kinds = data.draw(st.lists(st.sampled_from("gggb"), min_size=1, max_size=9))
  files = [folder / f"{i}.png" for i in range(len(kinds))]
  for i, (file, kind) in enumerate(zip(files, kinds, strict=True)):
    file.write_bytes(encoded(picture(i), "PNG") if kind == "g" else b"damaged")
  n = data.draw(st.integers(1, 4))
  together = ask(files, batch_size=n)
  assert [(a.file, a.error is None) for a in together] == [
    (str(f), kind == "g") for f, kind in zip(files, kinds, strict=True)
  ]
  chosen = data.draw(st.sampled_from(together))
  assert ask([chosen.file], batch_size=n) == [chosen]


def test_answers_are_those_of_the_model_called_on_each_image(loaded, photos):
  files = sorted(photos.glob("*.png"))
  for i, row in enumerate(answers(loaded, files, (4, (2, 3)))):
    image = loaded.prepare(str(files[i // 2]))[None]
    size = {"seqhw": 4} if i % 2 == 0 else {"grid_hw": (2, 3)}
    want = jax.nn.softmax(loaded.model.apply({"params": loaded.params}, image, **size)[0])[0]
    assert row.seqhw == (4 if i % 2 == 0 else (2, 3))
    assert [k for k, _, _ in row.top] == np.argsort(-want).tolist()
    assert [name for _, name, _ in row.top] == [NAMES[k] for k, _, _ in row.top]
    np.testing.assert_allclose([p for _, _, p in row.top], np.sort(want)[::-1], atol=1e-6)


def test_images_are_read_only_a_little_ahead(loaded):
  """Of a hundred thousand files no more than some batches are in memory."""
  asked = []
  image = np.zeros((24, 24, 3), np.float32)
  slow = loaded._replace(prepare=lambda path: asked.append(path) or image)
  stream = predictions.predictions(slow, [Input(str(i)) for i in range(10**5)], [2], batch_size=4)
  for _ in range(9):
    next(stream)
  stream.close()
  assert 9 <= len(asked) < 50


def test_images_of_several_shapes_are_answered_in_order(save, photos):
  """A preprocessing that keeps the aspect ratio gives a shape for each image."""
  whole = predictor.load(save(record={"pp": "decode|resize_small(8)|value_range(-1, 1)"}))
  sizes = [(16, 16), (16, 16), (32, 16), (16, 16), (16, 64)]
  for i, size in enumerate(sizes):
    picture(i, size=size).save(f"{i}.png")
  files = [f"{i}.png" for i in range(5)]
  assert answers(whole, files, (2,)) == [row for f in files for row in answers(whole, [f], (2,))]


# --- damaged files and odd ones ---

MODES = {
  "jpg": ("L", "RGB", "CMYK", "YCbCr"),
  "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
  "webp": ("RGB", "RGBA"),
  "bmp": ("1", "L", "P", "RGB"),
  "gif": ("1", "L", "P", "RGB"),
  "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"),
  "ppm": ("1", "L", "RGB", "I;16"),
}
KINDS = {"jpg": "JPEG", "tif": "TIFF", "ppm": "PPM"}


def test_every_mode_of_every_format_is_answered_or_named(save, loaded, tmp_path):
  grey = predictor.load(save(channels=1))
  files = []
  for suffix, modes in MODES.items():
    for mode in modes:
      files.append(tmp_path / f"{mode.replace(';', '')}.{suffix}")
      picture(mode=mode).save(files[-1], KINDS.get(suffix, suffix.upper()))
  for which in (loaded, grey):
    found = answers(which, files)
    named = {pathlib.Path(a.file).name for a in found if a.error is not None}
    assert len(found) == len(files) and named <= {"F.tif", "LAB.tif"}, found


@settings(max_examples=15)
@given(data=st.data())
def test_a_damaged_file_is_named_and_takes_no_other_with_it(data, ask, tmp_path_factory):
  suffix = data.draw(st.sampled_from(sorted(MODES)))
  mode = data.draw(st.sampled_from([m for m in MODES[suffix] if m != "F"]))
  whole = encoded(picture(mode=mode), KINDS.get(suffix, suffix.upper()))
  damage = data.draw(st.sampled_from(("cut", "bytes", "empty", "text")))
  if damage == "cut":
    whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
  elif damage == "bytes":
    at = data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=9))
    whole = bytes(255 - b if i in at else b for i, b in enumerate(whole))
  else:
    whole = b"" if damage == "empty" else b"<html>not found</html>"
  folder = tmp_path_factory.mktemp("damaged")
  (folder / f"bad.{suffix}").write_bytes(whole)
  (folder / "good.png").write_bytes(encoded(picture(), "PNG"))
  good, bad, again = ask([folder / n for n in ("good.png", f"bad.{suffix}", "good.png")])
  assert good == again and good.error is None
  assert (bad.error is None) == bool(bad.top) and bad.error != ""
  if damage in ("empty", "text"):
    assert "no known image format" in bad.error


def bad_files(folder):
  """File names and the reason that is expected."""
  (folder / "text.jpg").write_text("hello")
  (folder / "half.jpg").write_bytes(encoded(picture(), "JPEG")[:500])
  (folder / "empty.jpg").write_bytes(b"")
  (folder / "dir.jpg").mkdir()
  (folder / "link.jpg").symlink_to("nowhere")
  os.mkfifo(folder / "pipe.jpg")
  return {
    "text.jpg": "no known image format: 5 bytes",
    "half.jpg": "runcated",
    "empty.jpg": "no known image format: 0 bytes",
    "dir.jpg": "no images below this folder",
    "link.jpg": "no such file",
    "pipe.jpg": "neither a file nor a folder",
    "missing.jpg": "no such file",
    "no*.jpg": "no file matches this pattern",
  }


def test_bad_files_are_named_with_their_reasons_and_the_others_are_answered(model, photos, capsys):
  bad = bad_files(photos)
  names = [name for pair in zip(bad, ["0.png"] * len(bad), strict=True) for name in pair]
  args = [*names, f"--checkpoint={model}", "--seqhw=4"]
  code, out, err = run(capsys, *args)
  lines = err.splitlines()
  assert code == 2 and out.count("0.png  (seqhw=4)") == len(bad)
  assert len(lines) == len(bad) + 1
  for line, (name, reason) in zip(lines, bad.items(), strict=False):
    assert line.startswith(f"{name}: ") and reason in line
  assert lines[-1].startswith(
    f"flexivit: error: {len(bad)} of {2 * len(bad)} images cannot be read"
  )
  assert "--on_error=skip" in lines[-1]
  assert run(capsys, *args, "--on_error=skip") == (0, out, "\n".join(lines[:-1]) + "\n")


@pytest.mark.parametrize("skip", [[], ["--on_error=skip"]])
def test_a_single_bad_file_is_one_line_and_none_good_is_an_error(model, photos, capsys, skip):
  args = [f"--checkpoint={model}", "--seqhw=4", "--out=p.csv", *skip]
  code, out, err = run(capsys, "missing.jpg", *args)
  assert (code, out) == (2, "")
  assert err == "flexivit: error: missing.jpg: no such file or directory\n"
  code, out, err = run(capsys, "missing.jpg", "gone.jpg", *args)
  assert code == 2 and "none of the 2 images can be read" in err and err.count("\n") == 3
  assert not list(photos.glob("*p.csv*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_named(loaded, photos):
  (photos / "0.png").chmod(0)
  first, second = answers(loaded, ["0.png", "1.png"])
  assert first.error == "permission denied" and second.error is None


def test_an_output_that_is_not_finite_is_no_answer(loaded, photos):
  head = loaded.params["head"] | {"bias": loaded.params["head"]["bias"] * np.nan}
  (row,) = answers(loaded._replace(params=loaded.params | {"head": head}), ["0.png"])
  assert "not finite" in row.error


# --- names and forms ---

NAME = st.text("ab,;\"'\n\r\t =é猫\udcff[]*?\\", min_size=1, max_size=9).map(lambda s: f"{s}.png")


@settings(max_examples=10)
@given(names=st.lists(NAME, min_size=1, max_size=3, unique=True))
def test_every_name_survives_csv_and_json(names, ask, tmp_path_factory):
  folder = tmp_path_factory.mktemp("names")
  files = [os.path.join(folder, name) for name in names]
  for i, file in enumerate(files):
    with open(file, "wb") as f:
      f.write(encoded(picture(i), "PNG") if i != 1 else b"")
  rows = ask(files)
  lines = [predictions.as_json(row) for row in rows]
  assert all(line.isascii() and "\n" not in line for line in lines)
  assert [json.loads(line)["file"] for line in lines] == files
  table = folder / "table.csv"
  with table.open("x", encoding="utf-8", errors="backslashreplace", newline="") as f:
    write = predictions.WRITERS[".csv"](f, 2, False)
    for row in rows:
      write(row)
  with table.open(encoding="utf-8", newline="") as f:
    found = list(csv.DictReader(f))
  assert [row["file"] for row in found] == [f.replace("\udcff", "\\udcff") for f in files]
  for row, answer in zip(found, rows, strict=True):
    assert row["error"] == (answer.error or "")
    if answer.top:
      assert [row["name_1"], row["name_2"]] == [name for _, name, _ in answer.top[:2]]
      assert np.float32(row["probability_1"]) == np.float32(answer.top[0][2])  # every bit


def test_every_name_is_printed_on_one_line():
  assert outputs.shown("a\nb\udcff\x1b[31m é") == "a\\nb\\udcff\\x1b[31m é"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_of_answers_has_a_row_for_each_image_and_size(model, photos, capsys, suffix):
  (photos / "1.png").write_bytes(b"")
  args = [".", f"--checkpoint={model}", "--seqhw=4,2x3", "--top_k=2", f"--out=p.{suffix}"]
  code, out, err = run(capsys, *args, "--on_error=skip")
  assert (code, out) == (0, f"p.{suffix}: 4 images\n") and err.startswith("./1.png: no known")
  text = (photos / f"p.{suffix}").read_text()
  if suffix == "csv":
    assert text.startswith(
      "file,seqhw,class_1,name_1,probability_1,class_2,name_2,probability_2,error\n"
    )
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    sizes = [row["seqhw"] for row in rows]
    assert sizes == ["4", "2x3", "", "4", "2x3", "4", "2x3", "4", "2x3"]
    assert [bool(row["error"]) for row in rows] == [not size for size in sizes]
  else:
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row.get("seqhw") for row in rows] == [4, [2, 3], None, 4, [2, 3], 4, [2, 3], 4, [2, 3]]
    assert [len(row.get("top", ())) for row in rows] == [2, 2, 0, 2, 2, 2, 2, 2, 2]
    assert rows[2].keys() == {"file", "error"}
    assert run(capsys, *args[:-1], "--json")[1] == text
  assert [row["file"] for row in rows][::2] == [
    "./0.png",
    "./1.png",
    "./2.png",
    "./3.png",
    "./4.png",
  ]
  assert sorted(os.listdir()) == sorted([*(f"{i}.png" for i in range(5)), f"p.{suffix}"])


def test_a_file_that_exists_is_replaced_only_when_asked(model, photos, capsys):
  out = photos / "p.csv"
  out.write_text("mine")
  args = ["0.png", f"--checkpoint={model}", f"--out={out}"]
  code, _, err = run(capsys, *args, "--seqhw=4")
  assert code == 2 and "exists" in err and "--overwrite" in err and out.read_text() == "mine"
  code, _, err = run(capsys, *args, "--seqhw=5", "--overwrite")  # 5 does not divide 24
  assert code == 2 and "does not divide" in err and out.read_text() == "mine"
  assert sorted(os.listdir()) == [*(f"{i}.png" for i in range(5)), "p.csv"]
  assert run(capsys, *args, "--seqhw=4", "--overwrite")[0] == 0
  assert out.read_text().startswith("file,seqhw,")


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--seqhw=4", "--out=p.txt"], "expected a file that ends in .csv or .jsonl"),
    (["--seqhw=4", "--out=folder.csv"], "is a folder"),
    (["--seqhw=4", "--out=no/p.csv"], "there is no folder no"),
    (["--seqhw=4", "--top_k=0"], "expected 1 or more"),
    (["--seqhw=4", "--batch_size=0"], "expected 1 or more"),
    (["--seqhw=4x"], "'4x' is no size"),
    (["--seqhw=4,5"], "seqhw=5 does not divide the image (24, 24)"),
    ([], "was trained at 2,4,2x3"),
    (["--seqhw=4", "--topk=2"], "Did you mean '--top_k'?"),
    (["--seqhw=4", "--mean=0.5,0.5,0.5", "--std=0.5,0.5,0.5"], "mean and std are for files"),
  ],
)
def test_a_mistake_is_one_line_and_changes_nothing(model, photos, capsys, args, message):
  (photos / "folder.csv").mkdir()
  before = sorted(os.listdir())
  code, out, err = run(capsys, "0.png", f"--checkpoint={model}", *args)
  assert (code, out, err.count("\n")) == (2, "", 1) and message in err
  assert sorted(os.listdir()) == before


def test_all_sizes_are_those_of_the_training_and_top_k_ends_with_the_classes(
  model, save, photos, capsys
):
  code, out, _ = run(capsys, "0.png", f"--checkpoint={model}", "--seqhw=all", "--top_k=99")
  lines = out.splitlines()
  assert code == 0 and [x for x in lines if "(" in x] == [
    f"0.png  (seqhw={size})" for size in ("2", "4", "2x3")
  ]
  assert len(lines) == 3 * 6 and "two\\nlines" in out
  code, _, err = run(capsys, "0.png", f"--checkpoint={save()}", "--seqhw=all")
  assert code == 2 and "does not say at which sizes it was trained" in err


def test_milliseconds_are_measured_when_asked(model, photos, capsys):
  code, out, _ = run(capsys, ".", f"--checkpoint={model}", "--seqhw=2", "--time", "--json")
  assert code == 0 and {json.loads(line)["ms"] > 0 for line in out.splitlines()} == {True}
  code, out, _ = run(capsys, "0.png", f"--checkpoint={model}", "--seqhw=2", "--time")
  assert code == 0 and out.splitlines()[0].endswith(" ms)")
  assert "ms" not in run(capsys, "0.png", f"--checkpoint={model}", "--seqhw=2")[1]


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
  for terminal in (False, True):
    monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
    tally = outputs.Tally(3, progress=True)
    for error in (None, "bad", None):
      tally.add("x", error)
    tally.check_any()
    err = capsys.readouterr().err
    assert ("3 of 3 images" in err) == terminal and "x: bad\n" in err
    assert err.endswith("\r\x1b[K" if terminal else "\n")


# --- models ---


def test_a_model_without_classes_is_one_line_whose_advice_works(save, photos, capsys):
  headless = save(classes=0)
  code, out, err = run(capsys, "0.png", f"--checkpoint={headless}", "--seqhw=4")
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert "has no classes" in err and "`flexivit embed`" in err
  assert cli.main(["embed", "0.png", f"--checkpoint={headless}", "--seqhw=4", "--out=f.npz"]) == 0


def test_a_model_of_one_channel_sees_images_in_grey(save, tmp_path):
  grey = predictor.load(save(channels=1))
  colour = picture(1)
  colour.save(tmp_path / "colour.png")
  colour.convert("L").save(tmp_path / "grey.png")  # ITU-R 601, as timm does
  first, second = answers(grey, [tmp_path / "colour.png", tmp_path / "grey.png"])
  assert first.top == second.top and grey.prepare(str(tmp_path / "grey.png")).shape == (24, 24, 1)


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_a_model_of_other_channels_is_one_line(save, photos, capsys, channels):
  code, out, err = run(capsys, "0.png", f"--checkpoint={save(channels=channels)}", "--seqhw=4")
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert f"takes images of {channels} channels" in err


@pytest.mark.parametrize("pp", ["", "decode|", "decode(exif=True)|"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_upright_however_the_phone_was_held(save, tmp_path, pp, orientation):
  turns = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
  }  # fmt: skip
  upright = picture()
  stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
  exif = Image.Exif()
  exif[0x0112] = orientation
  (tmp_path / "phone.png").write_bytes(encoded(stored, "PNG", exif=exif))
  (tmp_path / "scan.png").write_bytes(encoded(upright, "PNG"))
  prepare = predictor.preparer(f"{pp}resize(24)|value_range(-1, 1)", 3)
  np.testing.assert_array_equal(*(prepare(str(tmp_path / f"{n}.png")) for n in ("phone", "scan")))
  as_stored = predictor.preparer("decode(exif=False)|value_range(-1, 1)", 3)
  assert as_stored(str(tmp_path / "phone.png")).shape[:2] == stored.size[::-1]


def test_bytes_are_prepared_as_their_file(loaded, photos):
  exif = Image.Exif()
  exif[0x0112] = 6
  path = photos / "turned.jpg"
  picture().save(path, exif=exif)
  assert (loaded.prepare(path.read_bytes()) == loaded.prepare(str(path))).all()
  assert "no known image format" in predictor.attempt(loaded.prepare, b"text")
