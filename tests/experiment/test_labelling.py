"""Class names against class names: every way in which those of data and model can differ, in every command."""

import copy
import json
import pathlib
import unicodedata

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, data, experiment, weights
from flexivit_jax.analyses import opening
from flexivit_jax.data import class_names
from flexivit_jax.data.class_names import Classes, Trained
from flexivit_jax.errors import UserError
from flexivit_jax.experiment import labelling, restoring
from flexivit_jax.flexify import layout, recipe, retention
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives.distill import Teacher

FIELDS = dict(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=(4, 4), posemb_size=(2, 2))
MODEL = ("zebra", "café", "ant")  # no order of text, and not one form of Unicode
NFD = tuple(unicodedata.normalize("NFD", name) for name in MODEL)

# The data's classes -> what is wrong with them; None: they are mapped by name.
KINDS = {
  "same": (MODEL, None),
  "permuted": (MODEL[::-1], None),
  "NFD": (NFD, None),
  "subset": (("ant", "zebra"), None),
  "one class": (("ant",), None),
  "superset": ((*MODEL, "bee"), r"does not have 1 of the 4 classes of .*: 'bee'"),
  "renamed": (("zebra", "café", "ants"), r"does not have 1 of .*: 'ants' \(nearest: 'ant'\)"),
  "other case": (("Zebra", "café", "ant"), r"does not have 1 of .*'Zebra' \(nearest: 'zebra'\)"),
  "disjoint": (("dog", "cat", "fox"), "does not have 3 of the 3 .*'dog'.* It has 'zebra', 'café'"),
  "WordNet ids": (("n01440764", "n01443537"), "does not have 2 of the 2"),
}
kinds = pytest.mark.parametrize(("names", "wrong"), KINDS.values(), ids=KINDS)


def draw(root: pathlib.Path, names, splits=("train", "val"), n=1) -> pathlib.Path:
  for split in splits:
    for name in names:
      (root / split / name).mkdir(parents=True, exist_ok=True)
      for i in range(n):
        image = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(image).save(root / split / name / f"{i}.png")
  return root


def make(record=None, names=MODEL, classes=3):
  """A model that answers with the class number that its head's bias says, and its record."""
  model = FlexiViT(num_classes=classes, **FIELDS)
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
  params["head"]["bias"] = np.arange(classes, dtype=np.float32)
  return (
    model,
    params,
    {"model": {**FIELDS, "num_classes": classes}, "class_names": names, **(record or {})},
  )


def write(path: pathlib.Path, **given) -> pathlib.Path:
  model, params, record = make(**given)
  if record["class_names"] is not None:
    record["class_names"] = list(record["class_names"])
  weights.save_npz(path, model, params, record)
  return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write(tmp_path_factory.mktemp("weights") / "named.npz")


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory):
  return write(tmp_path_factory.mktemp("weights") / "unnamed.npz", names=None)


def section(root, split, onehot=3, **given):
  pp = f"decode|value_range(-1, 1)|onehot({onehot})|keep('image', 'labels')"
  return dict(
    data=dict(name="folder", split=split, data_dir=str(root), **given), pp=pp, batch_size=1
  )


def config(root, **changes):
  made = dict(
    total_steps=2,
    input=section(root, "train") | dict(threads=0),
    model=dict(FIELDS, num_classes=3),
    optim=dict(lr=1e-3),
    flexi=dict(seqhw=dict(v=(2,))),
    evals=dict(test=section(root, "val") | dict(seqhw=(2,))),
  )
  return copy.deepcopy({**made, **changes})


def labels_by_name(source):
  """What class each example is of, by the folder it lies in -> the name of its label."""
  records = source.read(range(len(source)))
  return {class_names.plain(r["id"].split("/")[1]): source.class_names[r["label"]] for r in records}


def expect_identity(source, names):
  assert source.class_names == MODEL and source.num_classes == 3
  assert labels_by_name(source) == {class_names.plain(n): class_names.plain(n) for n in names}


@kinds
def test_a_start_from_a_head_maps_labels_to_its_classes_or_refuses(
  checkpoint, tmp_path, names, wrong
):
  settings = config(draw(tmp_path, names), init=dict(checkpoint=str(checkpoint)))
  if wrong:
    with pytest.raises(UserError, match=f"(?i){wrong}.*init.new_head=True"):
      experiment.from_config(settings)
    return
  exp = experiment.from_config(settings)
  assert exp.class_names == MODEL and set(exp.data_classes) == set(map(class_names.plain, names))
  batches = exp.batches(0)
  expect_identity(batches._plan.source, names)
  expect_identity(exp.evaluations["test"].source, names)
  assert exp.notes == []


def test_a_new_head_or_a_start_by_number_is_of_the_datas_classes(checkpoint, tmp_path):
  settings = config(draw(tmp_path, ("dog", "cat", "fox")))
  for given in (dict(new_head=True), dict(by_number=True)):
    exp = experiment.from_config({**settings, "init": dict(checkpoint=str(checkpoint), **given)})
    assert exp.class_names == ("cat", "dog", "fox")


@kinds
def test_a_run_goes_on_with_the_same_classes_in_its_own_order_or_not_at_all(tmp_path, names, wrong):
  trained = Trained(Classes(MODEL, 3, "runs/x"), MODEL, "runs/x")
  settings = config(draw(tmp_path, names))
  if set(map(class_names.plain, names)) == set(MODEL):
    exp = experiment.from_config(settings, trained=trained)
    expect_identity(exp.batches(0)._plan.source, names)
    assert exp.class_names == MODEL
    return
  with pytest.raises(UserError, match="are not those that runs/x was trained on") as said:
    experiment.from_config(settings, trained=trained)
  for name in set(MODEL) ^ set(map(class_names.plain, names)):
    assert f"{name!r} is {'gone' if name in MODEL else 'new'}" in str(said.value)


def test_a_run_from_before_names_were_recorded_goes_on_as_it_ordered_them(tmp_path):
  numbers = [str(k) for k in range(11)]
  settings = config(draw(tmp_path, numbers))
  for part in (settings["input"], settings["evals"]["test"]):
    part["pp"] = part["pp"].replace("onehot(3)", "onehot(11)")
  settings["model"]["num_classes"] = 11
  by_text = tuple(sorted(numbers))
  old = {"step": 3, "class_names": None}
  for record in (old, old | {"class_names": list(by_text)}):
    exp = experiment.from_config(settings, trained=class_names.trained(record, "runs/x"))
    for source in (exp.batches(0)._plan.source, exp.evaluations["test"].source):
      assert source.class_names == by_text
      assert labels_by_name(source) == {n: n for n in numbers}
    classes = class_names.of_record(record, 11, "runs/x")
    evaluation = experiment.build_evaluation(
      "evals.test", settings["evals"]["test"], 1, classes=(classes,)
    )
    assert evaluation.source.class_names == by_text
  begun = experiment.from_config(settings)
  assert begun.class_names == tuple(numbers)
  file = write(tmp_path / "old.npz", names=None, classes=11, record={"step": 3})
  started = experiment.from_config({**settings, "init": dict(checkpoint=str(file))})
  assert started.class_names == by_text


def test_more_logits_than_classes_keep_the_order_of_the_data(tmp_path):
  settings = config(draw(tmp_path, ("a", "b")), model=dict(FIELDS, num_classes=3))
  exp = experiment.from_config(settings)
  assert exp.class_names is None and exp.data_classes == ("a", "b")
  trained = Trained(Classes(None, 0, "runs/x"), ("b", "a"), "runs/x")
  exp = experiment.from_config(settings, trained=trained)
  for source in (exp.batches(0)._plan.source, exp.evaluations["test"].source):
    assert source.class_names == ("b", "a") and labels_by_name(source) == {"a": "a", "b": "b"}


@kinds
def test_an_evaluation_is_of_the_models_classes_or_refused(tmp_path, names, wrong):
  given = section(draw(tmp_path, names, splits=("val",)), "val")
  classes = (Classes(MODEL, 3, "the checkpoint x"),)
  if wrong:
    with pytest.raises(UserError, match=f"The checkpoint x {wrong}"):
      experiment.build_evaluation("evals.test", given, 1, classes=classes)
    return
  evaluation = experiment.build_evaluation("evals.test", given, 1, classes=classes)
  expect_identity(evaluation.source, names)
  assert evaluation.notes == ()


def test_preprocessing_has_room_for_the_models_classes(checkpoint, tmp_path):
  root = draw(tmp_path, ("ant",))
  given, classes = section(root, "val", onehot=1), (Classes(MODEL, 3, "x"),)
  with pytest.raises(UserError, match=r"pp has onehot\(1\).* the 3 classes .*give onehot\(3\)"):
    experiment.build_evaluation("evals.test", given, 1, classes=classes)
  settings = config(root, init=dict(checkpoint=str(checkpoint)))
  settings["input"]["pp"] = settings["input"]["pp"].replace("onehot(3)", "onehot(depth=1)")
  with pytest.raises(UserError, match=r"^input: pp has onehot\(depth=1\).*give onehot\(3\)"):
    experiment.from_config(settings)


def test_label_maps_take_labels_as_they_are_and_are_named_where_they_fit(tmp_path):
  given = section(draw(tmp_path, ("a", "b"), splits=("val",)), "val", onehot=1000)
  classes = Classes(tuple(f"class {k}" for k in range(1000)), 1000, "x")
  mapped = experiment.build_evaluation(
    "evals.test", given | dict(label_map="i1k_a"), 1, classes=(classes,)
  )
  assert mapped.source.class_names == ("a", "b")
  many = data.Source("folder", "val", 200, tuple(f"n{k:08}" for k in range(200)), 1, lambda i: [])
  with pytest.raises(UserError, match="evaluate with label_map='i1k_a' or label_map='i1k_r'"):
    labelling.fit(many, classes, "data")
  with pytest.raises(UserError) as said:
    labelling.fit(data.Source("x", "val", 2, ("a", "b"), 1, lambda i: []), classes, "data")
  assert "label_map" not in str(said.value)


def test_train_data_and_data_of_a_probe_are_of_the_same_classes(tmp_path):
  test = section(draw(tmp_path / "a", ("b", "a"), splits=("val",)), "val", onehot=2)
  wide = draw(tmp_path / "b", ("a", "b", "c"), splits=("train",))
  other = dict(name="folder", split="train", data_dir=str(wide))
  probe = test | dict(type="knn", train_data=other, seqhw=(2,))
  evaluation = experiment.build_evaluation("evals.test", probe, 1)
  assert evaluation.source.class_names == ("a", "b", "c")
  (wide / "train" / "b").rename(wide / "train" / "B")
  with pytest.raises(UserError, match=r"train_data .* does not have 1 of the 2 .*'b'"):
    experiment.build_evaluation("evals.test", probe, 1)


def teacher_of(names):
  model, params, _ = make()
  return Teacher(model, params, "image", {}, names)


def test_a_teachers_logits_are_in_the_order_of_the_models():
  model = Classes(MODEL, 3, "the model")
  same, note = labelling.teacher_in_order(teacher_of(NFD), model, "t")
  assert note is None and same.params["head"]["bias"].tolist() == [0, 1, 2]
  turned, note = labelling.teacher_in_order(teacher_of(MODEL[::-1]), model, "t")
  assert note is None and turned.class_names == MODEL
  assert turned.params["head"]["bias"].tolist() == [2, 1, 0]
  assert turned.params["head"]["kernel"].shape == (8, 3)
  _, note = labelling.teacher_in_order(teacher_of(None), model, "t")
  assert note.startswith("The teacher of t names no classes")
  with pytest.raises(UserError, match=r"teacher of t does not have 1 of .*'ant' \(nearest: 'ants'"):
    labelling.teacher_in_order(teacher_of(("zebra", "café", "ants")), model, "t")


def test_a_run_without_labels_is_of_its_teachers_classes(checkpoint, tmp_path):
  teacher = dict(checkpoint=str(checkpoint))
  root = draw(tmp_path, ("dog", "ant", "café"))
  settings = config(root, objective=dict(name="distill", teachers=dict(t=teacher)), evals={})
  exp = experiment.from_config(settings)
  assert exp.class_names == MODEL and exp.data_classes == ("ant", "café", "dog") and not exp.notes
  settings["objective"] |= dict(label_weight=1.0)
  with pytest.raises(UserError, match=r"does not have 1 of .*'dog'.*by_number=True to the teacher"):
    experiment.from_config(settings)


def test_what_has_no_names_is_taken_by_number_and_that_is_said(unnamed, tmp_path):
  root = draw(tmp_path, MODEL)
  exp = experiment.from_config(config(root, init=dict(checkpoint=str(unnamed))))
  assert exp.class_names == ("ant", "café", "zebra")  # "é" is one character
  (note,) = exp.notes
  assert note.startswith(f"init ({unnamed}) names no classes: its 3") and "'ant'" in note
  classes = (Classes(None, 3, "the checkpoint x"),)
  evaluation = experiment.build_evaluation("evals.test", section(root, "val"), 1, classes=classes)
  assert evaluation.notes[0].startswith("The checkpoint x names no classes")
  few = draw(tmp_path / "few", MODEL[1:], splits=("val",))
  with pytest.raises(
    UserError, match=r"names no classes.* it has 3, and data.* 2 .*by_number=True"
  ):
    experiment.build_evaluation("evals.test", section(few, "val"), 1, classes=classes)
  given = section(few, "val", by_number=True)
  assert (
    experiment.build_evaluation("evals.test", given, 1, classes=classes).source.num_classes == 2
  )


CONFIG = """
import ml_collections

def get_config(arg=""):
  return ml_collections.ConfigDict({config!r})
"""


@pytest.fixture
def command(tmp_path):
  """Writes a config file for a folder of images."""

  def write_config(root, **changes):
    (tmp_path / "config.py").write_text(CONFIG.format(config=config(root, **changes)))
    return f"--config={tmp_path / 'config.py'}"

  return write_config


def test_eval_counts_the_images_of_the_models_class(checkpoint, unnamed, tmp_path, command, capsys):
  root = draw(tmp_path / "a", ("ant",), splits=("val",), n=3)  # what the model always answers
  draw(root, ("zebra",), splits=("val",))
  given = ["eval", command(root), f"--checkpoint={checkpoint}", f"--out={tmp_path / 'eval.json'}"]
  assert cli.main(given) == 0
  (row,) = json.loads((tmp_path / "eval.json").read_text())["rows"]
  assert (row["top1"], row["n"]) == (0.75, 4)
  (root / "val" / "zebra").rename(root / "val" / "Zebra")
  capsys.readouterr()
  assert cli.main(given) == 2
  said = capsys.readouterr().err
  assert f"evals.test: The checkpoint {checkpoint} does not have 1 of" in said
  assert said.count("\n") == 1


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.full
def test_a_refused_continuation_changes_nothing_and_its_advice_works(tmp_path, command, capsys):
  root, run = draw(tmp_path / "photos", MODEL), tmp_path / "run"
  given = ["train", command(root, checkpoint=dict(every_steps=1)), f"--workdir={run}"]
  assert cli.main(given) == 0
  _, _, record = weights.load_with_record(run)
  assert record["class_names"] == record["data_classes"] == ["ant", "café", "zebra"]
  before = contents(run)
  for split in ("train", "val"):
    (root / split / "ant").rename(root / split / "emmet")
  capsys.readouterr()
  assert cli.main([*given, "--config.total_steps=3"]) == 2
  said = capsys.readouterr().err.splitlines()[-1]
  assert "'ant' is gone; 'emmet' is new" in said and contents(run) == before
  advice = said.partition("--config.init=")[2].rstrip(".").strip('"')
  assert (
    cli.main(["train", given[1], f"--workdir={tmp_path / 'new'}", f"--config.init={advice}"]) == 0
  )
  for split in ("train", "val"):
    (root / split / "emmet").rename(root / split / "ant")
  assert cli.main([*given, "--config.total_steps=3"]) == 0
  assert weights.load_with_record(run)[2]["step"] == 3


@kinds
def test_flexify_measures_labels_that_are_the_models_classes(tmp_path, names, wrong):
  sources = layout.divide(draw(tmp_path, names)).sources
  plan = recipe.FlexifyRecipe({}, sources, 3, (8, 8), (2,), 1, Classes(MODEL, 3, "the model"))
  labelled, note = recipe.labels_of(plan)
  assert labelled is plan.labelled is (wrong is None)
  assert ("labels" in recipe.evaluation(plan)["pp"]) is labelled
  if wrong:
    assert note.startswith("Top-1 is left out. The model does not have")
    assert "top-1" not in retention.table(kept_of(note)) and note in retention.table(kept_of(note))
  else:
    assert note is None


def kept_of(note):
  row = dict(patch=4, seqhw=2, agree1=1.0, n=3)
  return {"original": dict(patch=4, image_size=8), "before": [row], "note": note}


def test_flexify_of_classes_without_names_is_by_number_or_not_at_all(tmp_path):
  plan = recipe.FlexifyRecipe({}, layout.divide(draw(tmp_path, MODEL)).sources, 3, (8, 8), (2,), 1)
  labelled, note = recipe.labels_of(plan)
  assert labelled and note.startswith("The model names no classes: its 3")
  labelled, note = recipe.labels_of(plan._replace(num_classes=1000))
  assert (labelled, note) == (
    False,
    "Top-1 is left out: the model has 1000 classes, the folders 3.",
  )


def test_flexify_writes_the_accuracy_of_the_class_that_the_model_names(checkpoint, tmp_path):
  root = draw(tmp_path / "photos", ("ant",), n=3)  # what the model always answers
  draw(root, ("zebra",))
  given = ["flexify", f"--init={checkpoint}", f"--data={root}", f"--out={tmp_path / 'out'}"]
  assert cli.main([*given, "--epochs=0", "--image_size=8", "--seqhw=2", "--batch_size=2"]) == 0
  kept = json.loads((tmp_path / "out" / "retention.json").read_text())
  assert kept["original"]["top1"] == kept["before"][0]["top1"] == 0.75
  assert "top-1 75.0." in (tmp_path / "out" / "README.md").read_text()
  assert weights.load_with_record(tmp_path / "out" / "model.npz")[2]["class_names"] == list(MODEL)


@pytest.mark.parametrize("to", ["npz", "timm", "transformers"])
@pytest.mark.parametrize("names", [MODEL, MODEL[::-1], NFD, None])
def test_names_travel_with_converted_weights_and_map_labels(tmp_path, to, names):
  model, params, record = make(names=None if names is None else list(names))
  out = tmp_path / "out.npz" if to == "npz" else tmp_path / "out"
  if to == "npz":
    weights.save_npz(out, model, params, record)
  else:
    save = {"timm": weights.save_timm, "transformers": weights.save_transformers}[to]
    save(out, model, params, record, image_hw=(8, 8))
  read, _, again = weights.load_with_record(out)
  classes = class_names.of_record(again, read.num_classes, "x")
  assert classes.names == names
  photos = draw(tmp_path / "photos", ("ant", "zebra"), splits=("val",))
  if names is None:
    draw(photos, ("bee",), splits=("val",))
  given = section(photos, "val", onehot=3)
  evaluation = experiment.build_evaluation("evals.test", given, 1, classes=(classes,))
  found = labels_by_name(evaluation.source)
  assert {"ant", "zebra"} <= {class_names.plain(n) for n in found.values()}
  assert all(class_names.plain(found[name]) == name for name in found)


def test_analyses_map_labels_too(checkpoint, tmp_path, command, monkeypatch):
  root = draw(tmp_path / "photos", MODEL[::-1], splits=("val",))
  given = ["x", str(checkpoint), command(root), f"--out={tmp_path / 'out'}"]
  monkeypatch.setattr("sys.argv", given)
  _, opened = opening.open_checkpoint(opening.parser("x"))
  expect_identity(opened.data._plan.source, MODEL)


def test_a_probes_classes_are_not_the_models_though_as_many(tmp_path):
  root = draw(tmp_path, MODEL)
  wave = dict(name="synthetic", split="train", image_size=8, num_classes=3, num_examples=8)
  unnamed_data = section(root, "train") | dict(data=wave, threads=0)
  unnamed_data["pp"] = unnamed_data["pp"].removeprefix("decode|")
  own = section(root, "val") | dict(seqhw=(2,))
  probe = own | dict(type="knn", train_data=section(root, "train")["data"], k=1)
  for evaluation, names in ((probe, None), (own, ["ant", "café", "zebra"])):
    exp = experiment.from_config(config(root, input=unnamed_data, evals=dict(test=evaluation)))
    with exp.batches(0) as batches:
      record = restoring.record(exp, 0, {}, batches)
    assert record["class_names"] == names and record["data_classes"] is None
