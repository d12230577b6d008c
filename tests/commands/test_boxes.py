"""`flexivit predict` with a detector: boxes in pixels of the files, names, vectors, pictures."""

import csv
import functools
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, weights
from flexivit_jax.budget import profile
from flexivit_jax.data import class_colours, text
from flexivit_jax.inference import boxes, predictor, queries, whole_images
from flexivit_jax.models import OwlViT
from flexivit_jax.weights import model_records

NAMES = ["cat", "Straße", "remote control"]
PP = (
  "decode|resize_small(30)|central_crop(24)|value_range|pad_boxes(9)|relative_boxes('xyxy')"
  "|keep('image', 'boxes', 'box_mask', 'box_labels')"
)
TEXT = dict(width=8, depth=1, mlp_dim=8, num_heads=1, vocab_size=258, max_length=12)


@pytest.fixture(scope="module")
def save(tmp_path_factory):
  """Saves a small detector of one kind: "closed", "text" or "vectors"; each box is its patch, and returns the file."""

  @functools.cache
  def made(kind, pp=PP):
    backbone = dict(patch_size=(8, 8), posemb_size=(3, 3), width=8, depth=1, mlp_dim=8, num_heads=1)
    fields = {"closed": {}, "text": dict(text=TEXT), "vectors": dict(query_length=5)}[kind]
    model = OwlViT(num_classes=3, backbone=backbone, embed_dim=8, **fields)
    inputs = {"closed": None, "text": np.ones((1, 1, 4), int), "vectors": np.ones((1, 1, 5), "f")}
    init = lambda: model.init(  # noqa: E731
      jax.random.key(0), np.zeros((1, 24, 24, 3), "f"), inputs[kind], seqhw=3
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda s: rng.normal(0, 0.6, s.shape).astype(np.float32), jax.eval_shape(init)["params"]
    )
    for name in ("kernel", "bias"):
      params["box_2"][name] *= 0
    record = {
      "model": model_records.record_of(model), "class_names": NAMES, "pp": pp,
      "source": {"file": "owl.npz", "format": "ours"}, "trained": {"seqhw": [3, 6]},
    }  # fmt: skip
    if kind == "text":
      record["text"] = text.load("bytes", length=12, pad="[PAD]", end="[END]").record()
    file = tmp_path_factory.mktemp("model") / f"{kind}.npz"
    weights.save_npz(file, model, params, record)
    return file

  return made


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """Photos of two shapes, one turned by its EXIF data."""
  monkeypatch.chdir(tmp_path)
  for i, (name, hw) in enumerate({"a/1.png": (30, 40), "a/2.jpg": (50, 40)}.items()):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    low = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(low).resize(hw[::-1], Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, **({"exif": exif} if name.endswith("jpg") else {}))
  return tmp_path


def run(capsys, *args):
  """Returns (exit code, stdout, stderr) of `flexivit predict`."""
  code = cli.main(["predict", *map(str, args)])
  return (code, *capsys.readouterr())


def rows_of(out):
  return [json.loads(line) for line in out.splitlines()]


def test_a_box_is_in_pixels_of_the_upright_file_and_nothing_is_cut(save, photos, capsys):
  args = ["a", "--checkpoint", save("closed"), "--seqhw=3", "--threshold=0", "--top_k=99", "--json"]
  code, out, err = run(capsys, *args)
  assert code == 0
  assert "central_crop(24) of its preprocessing is left out" in err
  assert "prepared by resize_keep(24, 'contain')|pad(24, fill=0)" in err
  for row, hw in zip(rows_of(out), ((30, 40), (40, 50)), strict=True):
    assert row["hw"] == [*hw]
    side = max(hw) / 3  # of a patch: the longer side has three
    inside = round(24 * hw[0] / hw[1]) / 24  # of a square, of which 24 pixels are shown
    high = hw[0] / inside / 3
    want = {
      (round(x * side, 1), round(y * high, 1), round((x + 1) * side, 1), round(min(hw[0], (y + 1) * high), 1))
      for x in range(3) for y in range(3)
    }  # fmt: skip
    got = np.array([sorted({tuple(one["box"]) for one in row["detections"]})])
    # A patch's side is held off its value by the 1e-4 of the logit.
    np.testing.assert_allclose(got[0], sorted(want), atol=0.1)
    assert len(row["detections"]) == 27  # every pair of a box and a class


def test_scores_are_those_of_the_model_and_the_best_come_first(save, photos, capsys):
  file = save("closed")
  args = ["a/1.png", "--checkpoint", file, "--seqhw=3", "--threshold=0.2", "--top_k=7", "--json"]
  code, out, _ = run(capsys, *args)
  loaded = predictor.load(file, whole=True)
  image = loaded.prepare("a/1.png")[None]
  logits = jax.jit(lambda p, x: loaded.model.apply({"params": p}, x, seqhw=3)[1])(
    loaded.params, image
  )["class_logits"][0]
  scores = 1 / (1 + np.exp(-np.float64(logits)))
  want = np.sort(scores[scores >= 0.2])[::-1][:7]
  (row,) = rows_of(out)
  got = [one["score"] for one in row["detections"]]
  assert code == 0 and 0 < len(got) <= 7
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert {one["name"] for one in row["detections"]} <= {*NAMES}


def test_forms_and_pictures_at_two_sizes(save, photos, capsys):
  common = ["a", "--checkpoint", save("closed"), "--seqhw=3,6", "--top_k=2", "--threshold=0.01"]
  code, out, _ = run(capsys, *common, "--out=d.csv", "--overlay=over")
  assert code == 0 and out == "d.csv: detections of 2 images\nover: overlays of 2 images\n"
  rows = [*csv.DictReader((photos / "d.csv").read_text().splitlines())]
  assert [(r["file"], r["seqhw"]) for r in rows[::2]] == [
    (f, s) for f in ("a/1.png", "a/2.jpg") for s in ("3", "6")
  ]
  code, out, _ = run(capsys, *common, "--out=d.jsonl", "--overwrite", "--overlay=over", "--json")
  assert code == 0 and (photos / "d.jsonl").read_text() == out
  first = rows_of(out)[0]
  assert first["overlay"] == "over/3/1.png"
  best = first["detections"][0]
  assert [float(rows[0][k]) for k in ("x0", "y0", "x1", "y1")] == best["box"]
  assert float(rows[0]["score"]) == best["score"] and rows[0]["name"] == best["name"]
  picture = np.asarray(Image.open(photos / "over/3/1.png"))
  assert picture.shape[:2] == (640, 853)  # enlarged, as the photo is small
  assert (picture == class_colours.colour(best["class"])).all(-1).sum() > 200
  code, out, _ = run(capsys, *common)
  lines = out.splitlines()
  assert code == 0 and re.fullmatch(r"a/1.png  \(seqhw=3\)  2 at x0 y0 x1 y1", lines[0])
  assert re.fullmatch(rf"  +\d+\.\d%  {best['name']} +( +\d+\.\d){{4}}", lines[1])
  code, out, _ = run(capsys, *common[:-1], "--threshold=1")
  assert out.splitlines()[0].endswith("nothing found")


def test_names_are_looked_for_by_the_mean_of_the_scores_of_their_sentences(save, photos, capsys):
  file = save("text")
  (photos / "templates.txt").write_text("a {}\nmy {}.\n")
  common = ["a/1.png", "--checkpoint", file, "--seqhw=3", "--threshold=0", "--json"]
  code, out, _ = run(capsys, *common, "--names=Cat, dog!", "--templates=templates.txt")
  loaded = predictor.load(file, whole=True)
  tokens = text.of_record(loaded.record["text"])
  image = loaded.prepare("a/1.png")[None]
  apply = jax.jit(lambda p, x, q: loaded.model.apply({"params": p}, x, q, seqhw=3)[1])
  logits = [
    apply(loaded.params, image, tokens.encode([f"{a} cat{b}", f"{a} dog{b}"])[None])["class_logits"]
    for a, b in (("a", ""), ("my", ""))  # as in training, without punctuation and capital letters
  ]
  scores = 1 / (1 + np.exp(-np.mean(np.float64(logits), axis=0)[0]))
  (row,) = rows_of(out)
  assert code == 0
  for k, name in enumerate(("Cat", "dog!")):
    got = [one["score"] for one in row["detections"] if one["name"] == name]
    np.testing.assert_allclose(got, np.sort(scores[:, k])[::-1], atol=1e-5)


def test_names_are_put_as_in_training_or_as_they_are_typed(save, monkeypatch):
  given = []
  monkeypatch.setattr(queries, "_of_sentences", lambda *a: given.append(a[1:]) or np.ones((1, 8)))
  loaded = predictor.load(save("text"), whole=True)
  for as_typed in (False, True):
    asked = queries.Asked(["T. V."], "A {}!", as_typed=as_typed)
    assert queries.closed(loaded, asked).record["class_names"] == ["T. V."]
  assert given == [(("t v",), ("a {}",)), (("T. V.",), ("A {}!",))]


def test_vectors_of_names_are_matched_by_name(save, photos, capsys):
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(3, 5)).astype("f")
  np.savez(photos / "n.npz", names=["dog", "cat", "bird"], vectors=vectors)
  np.savez(photos / "m.npz", names=["cat", "dog"], vectors=vectors[[1, 0]])
  common = ["a/1.png", "--checkpoint", save("vectors"), "--seqhw=3", "--names=cat,dog", "--json"]
  both = [run(capsys, *common, f"--vectors={name}")[:2] for name in ("n.npz", "m.npz")]
  assert both[0] == both[1] and both[0][0] == 0
  for given, message in (
    ("--names=cat,fish", "no vector of 1 of the 2 classes: 'fish'"),
    ("--vectors=a/1.png", "cannot be read as an .npz with 'names'"),
    ("--templates=one", "leave --templates out"),
  ):
    code, _, err = run(capsys, *common, "--vectors=n.npz", given)
    assert code == 2 and message in err, err
  np.savez(photos / "zero.npz", names=["cat", "dog"], vectors=vectors[:2] * [[1], [0]])
  assert "vector of 'dog' in zero.npz is zero" in run(capsys, *common, "--vectors=zero.npz")[2]
  np.savez(photos / "long.npz", names=["cat", "dog"], vectors=np.ones((2, 6)))
  assert "has vectors of 6 numbers" in run(capsys, *common, "--vectors=long.npz")[2]


def test_what_shares_a_batch_changes_nothing_and_bad_files_are_named(save, photos, capsys):
  (photos / "a/0.jpg").write_bytes(b"no image")
  common = ["--checkpoint", save("closed"), "--seqhw=3", "--threshold=0", "--json"]
  code, out, err = run(capsys, "a", "a/1.png", *common, "--on_error=skip")
  rows = rows_of(out)
  assert code == 0 and rows[0]["file"] == "a/0.jpg" and "error" in rows[0] and "a/0.jpg: " in err
  assert rows[1] == rows[3]
  for row in rows[1:3]:
    assert rows_of(run(capsys, row["file"], *common)[1]) == [row]
  assert run(capsys, "a", *common)[0] == 2


@pytest.mark.parametrize(
  ("kind", "given", "message"),
  [
    ("closed", ["--names=cat"], "detects its own 3 classes and compares no texts; leave --names"),
    ("closed", ["--as_typed"], "compares no texts; leave --as_typed out"),
    ("closed", ["--threshold=2"], "--threshold=2.0; expected a score, 0 to 1"),
    ("closed", ["--seqhw=5"], "does not divide the image"),
    ("closed", ["--out=x.png"], "expected a file that ends in .csv or .jsonl"),
    ("closed", ["--overlay=x.png"], "--overlay=x.png is one file, and there are 2 images"),
    ("text", [], r"finds what it is asked for; give --names.* It was trained on 'cat', 'Straße'"),
    ("text", ["--names=cat,,dog"], "Name 1 of 3, '', is empty"),
    ("text", ["--names=cat,cat"], "Names 0 and 1 are the same text"),
    ("text", ["--names=cat", "--vectors=v.npz"], "leave --vectors out"),
    ("vectors", ["--names=cat", "--vectors=v.npz", "--as_typed"], "leave --as_typed out"),
    ("vectors", ["--names=cats.txt", "--vectors=v.npz"], "--names=cats.txt: no such file"),
    ("vectors", ["--names=cat"], "has no text tower: .* vectors of 5 numbers; give --vectors"),
  ],
)
def test_what_cannot_be_asked_is_refused(kind, given, message, save, photos, capsys):
  code, out, err = run(capsys, "a", "--checkpoint", save(kind), "--seqhw=3", *given)
  assert code == 2 and out == "" and re.search(message, err), err


def test_sentences_are_cut_as_in_an_evaluation_with_a_note(save, capsys):
  found = queries.closed(
    predictor.load(save("text"), whole=True), queries.Asked(["a cat on a mat", "dog"])
  )
  assert found.record["class_names"] == ["a cat on a mat", "dog"]
  assert "1 of 2 texts are longer than 12 tokens and are cut" in capsys.readouterr().err


def test_its_flexivit_alone_takes_images_without_boxes(save, photos):
  loaded = predictor.load(save("closed"))
  assert loaded.record["notes"][-1] == "The backbone of an owl_vit alone."
  assert loaded.prepare("a/1.png").shape == (24, 24, 3)  # as its run cuts them


def test_its_flexivit_alone_takes_all_of_photos_where_its_run_resizes_none(save, photos, tmp_path):
  """A run records the shape of its training; its evaluation takes images as they are, or has none."""
  for pp in ("decode|value_range(-1, 1)|pad_boxes(9)", None):
    model, params, record = weights.tasks.load(save("closed"))
    record |= {"pp": pp, "image_shape": [24, 32, 3], "trained": {"grid_hw": [[3, 4]]}}
    file = tmp_path / "rectangular.npz"
    weights.save_npz(file, model, params, record)
    loaded, whole = predictor.load(file), predictor.load(file, whole=True)
    assert loaded.prepare("a/1.png").shape == (24, 32, 3)
    np.testing.assert_array_equal(loaded.prepare("a/2.jpg"), whole.prepare("a/2.jpg"))
    file.unlink()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["closed", "vectors"])
def test_a_profile_has_the_precision_of_the_evaluation(kind, save, photos, capsys):
  """At the sizes that are asked for, whichever the config has; names are its classes where it takes queries."""
  pytest.importorskip("pycocotools")
  annotations = [
    {
      "id": i + 1,
      "image_id": i,
      "category_id": i,
      "bbox": [1, 2, 20, 20],
      "area": 400,
      "iscrowd": 0,
    }
    for i in range(2)
  ]
  sizes = {"a/1.png": (40, 30), "a/2.jpg": (50, 40)}
  images = [
    {"id": i, "file_name": name, "width": w, "height": h}
    for i, (name, (w, h)) in enumerate(sizes.items())
  ]
  categories = [{"id": k, "name": name} for k, name in enumerate(NAMES)]
  whole = {"images": images, "annotations": annotations, "categories": categories}
  (photos / "val.json").write_text(json.dumps(whole))
  np.savez("v.npz", names=NAMES, vectors=np.eye(3, 5, dtype=np.float32))
  kept = "keep('image', 'origin', 'boxes', 'box_labels', 'box_mask')"
  section = {
    "type": "detection", "batch_size": 2, "threads": 0, "seqhw": [6],
    "data": {"name": "coco", "data_dir": str(photos), "split": "val", "annotations": "{split}.json", "images": "."},
    "pp": f"decode|origin|resize(24)|value_range|pad_boxes(3)|{kept}",
  }  # fmt: skip
  given = []
  if kind == "vectors":
    section["vectors"] = "v.npz"
    given = ["--vectors=v.npz", f"--names={','.join(NAMES)}"]
  (photos / "c.py").write_text(
    "import ml_collections\ndef get_config(arg=''):\n"
    f"  return ml_collections.ConfigDict(dict(evals=dict(test={section!r})))\n"
  )
  common = ["--config=c.py", f"--checkpoint={save(kind)}", "--seqhw=3"]
  assert cli.main(["eval", *common, "--out=e.json"]) == 0, capsys.readouterr().err
  common = ["--config=c.py", str(save(kind)), "--seqhw=3", "--batch_sizes=1", *given]
  assert cli.main(["profile", *common, "--out=p.json"]) == 0, capsys.readouterr().err
  (measured,) = profile.read(photos / "p.json")
  (row,) = json.loads((photos / "e.json").read_text())["rows"]
  assert [(one.size, one.value, one.n) for one in measured.rows] == [(3, row["ap"], 2)]


def test_another_framework_has_no_detector(save, tmp_path, capsys):
  out = str(tmp_path / "out")
  assert cli.main(["convert", str(save("closed")), out, "--to=transformers"]) == 2
  assert "holds a detector, which is written as an .npz" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("kind", ["closed", "text", "vectors"])
def test_a_detector_is_converted_and_compared(kind, save, tmp_path, capsys):
  out = tmp_path / "out.npz"
  assert cli.main(["convert", str(save(kind)), str(out), "--image_size=24"]) == 0
  assert "largest difference of the boxes 0.0e+00 of the image" in capsys.readouterr().out
  assert ("tokenizer" in str(weights.tasks.load(out)[2].get("text"))) == (kind == "text")


def test_inspect_tells_of_its_text_tower(save, capsys):
  assert cli.main(["inspect", str(save("text"))]) == 0
  out = capsys.readouterr().out
  assert "text tower    kind big_vision, width 8" in out and "12 tokens a text" in out


def test_inspect_tells_how_predict_prepares_images_where_no_file_says_it(save, capsys):
  assert cli.main(["inspect", str(save("closed", None))]) == 0
  out = capsys.readouterr().out
  assert "'contain')|pad((240, 240), fill=0)|value_range(-1, 1) (assumed: no file says it)" in out


def test_a_classifier_has_no_boxes(save, photos, capsys):
  vit = weights.load_with_record(save("closed"))
  weights.save_npz(photos / "vit.npz", *vit)
  for given in ("--threshold=0", "--vectors=v.npz", "--as_typed"):
    code, _, err = run(capsys, "a", "--checkpoint=vit.npz", "--seqhw=3", given)
    assert code == 2 and "is for detectors" in err


@pytest.mark.parametrize(
  ("record", "size", "expected"),
  [
    ({"pp": "decode(exif=False)|origin()|resize((24, 32))|value_range(-1,1)|keep('image')"}, None,
     "decode(exif=False)|resize((24,32))|value_range(-1,1)"),
    ({"pp": "decode|resize_small(30)|crop_border(2)|value_range"}, None, "decode|resize_small(30)|value_range"),
    ({"pp": "decode_inception_crop(24)|flip_lr|value_range"}, None,
     "decode|resize_keep(24,'contain')|pad(24,fill=0)|value_range"),
    ({"pp": "decode|resize(30)|random_crop((24, 32))|pad(32, fill=0)|value_range"}, None,
     "decode|resize_keep((24,32),'contain')|pad((24,32),fill=0)|pad(32,fill=0)|value_range"),
    ({}, 48, "decode|resize_keep((48,48),'contain')|pad((48,48),fill=0)|value_range(-1,1)"),
    ({"image_size": [32, 64]}, None, "decode|resize_keep((32,64),'contain')|pad((32,64),fill=0)|value_range(-1,1)"),
    ({"pp": "decode|origin|value_range", "image_shape": [24, 32, 3]}, None,
     "decode|resize_keep((24,32),'contain')|pad((24,32),fill=0)|value_range"),
    ({"pp": "decode|value_range"}, 48, "decode|resize_keep((48,48),'contain')|pad((48,48),fill=0)|value_range"),
    ({"pp": "decode|value_range"}, None, "decode|value_range"),
  ],
)  # fmt: skip
def test_no_image_is_cut(record, size, expected):
  pp, notes = whole_images.uncut(record, size)
  assert pp.replace(" ", "") == expected
  sized = "resize" in str(record) or not record.get("pp") or "resize" not in pp
  assert bool(notes) == ("crop" in str(record) or not sized)


def test_the_origin_of_a_header_is_that_of_the_operations(photos):
  pp = "resize_keep(24, 'contain')|pad((24, 32), fill=0)|resize((48, 32))"
  for path in ("a/1.png", "a/2.jpg"):
    record = {"image": (photos / path).read_bytes()}
    want = predictor.data.parse(f"decode(exif=True)|origin()|{pp}")(record, None)["origin"]
    np.testing.assert_array_equal(whole_images.origin(f"decode|{pp}|value_range", path), want)


def test_boxes_in_the_padding_are_left_out_and_ties_keep_their_order():
  origin = np.array([30, 40, 0, 0, 40, 40], "f")  # a quarter is padding
  centres = np.array([[0.5, 0.9, 0.1, 0.1], [0.5, 0.7, 0.2, 0.3], [0.1, 0.1, 0.4, 0.1]], "f")
  logits = np.array([[9.0, 9.0], [1.0, 2.0], [2.0, -9.0]], "f")
  found = boxes.detections(centres, logits, origin, ["a", "b"])
  assert [(one.number, round(one.score, 3)) for one in found] == [
    (1, 0.881),
    (0, 0.881),
    (0, 0.731),
  ]
  np.testing.assert_allclose(found[0].box, [16, 22, 24, 30], atol=1e-5)
  np.testing.assert_allclose(found[1].box, [0, 2, 12, 6], atol=1e-5)
  assert len(boxes.detections(centres, logits, origin, ["a", "b"], top_k=1)) == 1
  assert boxes.detections(centres, logits, origin, ["a", "b"], threshold=0.9) == []
