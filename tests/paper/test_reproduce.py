"""`flexivit reproduce`: every numbered item has a place, its commands exist, and numbers stand side by side."""

import json
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, config, data, trees, weights
from flexivit_jax.data import label_maps
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import results
from flexivit_jax.experiment import costs
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.models.flops import gmacs
from flexivit_jax.paper import comparing, items, measuring, published, reproduce, test_sets
from flexivit_jax.weights.registry import PUBLISHED


def test_the_list_names_every_item_and_what_it_needs(capsys):
  assert cli.main(["reproduce", "--list"]) == 0
  said = capsys.readouterr().out
  for name in reproduce.ITEMS:
    assert f"{name}: " in said
  assert "    data: imagenet2012; checkpoints: FlexiViT-L i1k\n    here: " in said
  assert "    cost: 28 s to evaluate\nfig2: " in said
  undone = [i for i in reproduce.ITEMS.values() if not i.how and not i.evaluation]
  assert said.count("not in this project yet") == len(undone)


def test_all_that_items_name_exists(repository):
  known = set()
  for item in reproduce.ITEMS.values():
    for given in item.configs:
      assert config.load(given, [])["optim"]
    assert set(item.weights) <= set(PUBLISHED)
    known |= set(item.published)
    if item.evaluation:
      assert set(item.evaluation.sets) <= set(test_sets.SETS)
      assert item.evaluation.protocol in test_sets.PROTOCOLS
      values = [v for p in item.published for v in published.read(p)]
      for subject in item.evaluation.subjects.values() if values else ():
        assert any(
          v.model == subject.model and v.setting.startswith(subject.setting) for v in values
        )
    for command in item.how:
      word, *rest = shlex.split(command, comments=True)
      if word == "flexivit":
        cli.parse(rest)
      if word == "python":
        assert (repository / rest[0]).is_file()
  assert known == set(published.names())


RESULTS = {
  "name": "mine", "dataset": "imagenet2012", "split": "validation", "step": 10, "device": "cpu",
  "rows": [{"seqhw": 5, "patch": 48, "top1": 0.7, "ms": 2.0}, {"seqhw": 30, "patch": 8, "top1": 0.85, "ms": 9.0}],
}  # fmt: skip


def test_ours_stands_beside_the_published(tmp_path, capsys):
  file = tmp_path / "eval.json"
  file.write_text(json.dumps(RESULTS))
  only = ["--model=FlexiViT-L", "--setting=1200"]
  assert cli.main(["reproduce", "fig2", f"--results={file}", *only]) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[0] == "ours: mine on imagenet2012 validation, step 10, cpu"
  start = "FlexiViT-L (i1k, 1200 epochs), imagenet2012/validation, top1 at patch"
  assert f"{start} 48: published 77.75 +- 0.2 %, ours 70, -7.75 [digitised]" in said
  assert f"{start} 8: published 86.1 %, ours 85, -1.1 [third party]" in said
  assert said[-1].startswith("differs: milliseconds")


def test_an_item_says_how_and_what_is_known(capsys):
  assert cli.main(["reproduce", "fig8"]) == 0
  said = capsys.readouterr().out
  assert "configs/transfer.py:data=imagenet2012,fixed=8,res=240" in said
  assert "top1 at patch 10: 85.3 % [third party: docsaid.org" in said


def test_what_cannot_be_compared_is_said(tmp_path):
  with pytest.raises(UserError, match=r"item of the paper 'fig99'"):
    items.find("fig99")
  with pytest.raises(UserError, match="No numbers of fig5 are known"):
    reproduce.compare("fig5", RESULTS)
  with pytest.raises(UserError, match=r"No published number of timm is of a data set.*FlexiViT-S"):
    reproduce.compare("timm", RESULTS)
  with pytest.raises(UserError, match="cannot be read"):
    reproduce._read(tmp_path / "none.json")


@pytest.mark.full
def test_costs_are_those_of_the_plan(monkeypatch):
  monkeypatch.setattr(reproduce, "ITEMS", {"fig5": items.ITEMS["fig5"]})
  lines = reproduce.listing(costs=True)
  each = [costs.costs(config.load(c, []))["hours"]["v3-32"] for c in items.ITEMS["fig5"].configs]
  hours = [found["training"] for found in each]
  assert lines[0] == "Costs are the time of a TPU v3-32 at 40% of its peak."
  assert f"    cost: {sum(hours):.0f} h to train all 2" in lines
  assert f"      configs/i21k_distill.py:init=random: {hours[1]:.0f} h" in lines


def test_every_item_that_can_be_done_has_a_cost():
  costs, time = {}, r"[\d,.]+ (h|min|s)"
  for line in reproduce.listing():
    if not line.startswith(" "):
      name = line.partition(":")[0]
    if line.startswith("    cost: "):
      costs[name] = line.removeprefix("    cost: ")
  assert set(costs) == {n for n, i in reproduce.ITEMS.items() if i.how or i.evaluation}
  for name, cost in costs.items():
    assert (
      re.fullmatch(rf"({time} to train( all \d+)?)?(, )?({time} to evaluate)?", cost) and cost
    ), name
    assert not re.search(r"\b0 |e-", cost), name
  second = 0.4 * 16 * 123e12
  times = {0.72: "0.72 s", 59.6: "60 s", 137: "2.3 min", 3600 * 1.4: "1.4 h", 7.2e6: "2,000 h"}
  assert {s: reproduce._time(second * s) for s in times} == times


def test_a_commands_work_is_counted():
  """Figure 4 resizes kernel and image in four ways to six patch sizes, all of 28 x 28 tokens."""
  model = FlexiViT(variant="B", num_classes=1000)
  one = items.Item("", work=(items.Work("B", 10, (15,), passes=3),))
  assert reproduce.evaluation_flops(one) == pytest.approx(
    2e9 * gmacs(model, {"image": (240, 240, 3)}, seqhw=15) * 10 * 3
  )
  assert reproduce.evaluation_flops(items.find("fig4")) == pytest.approx(
    2e9 * gmacs(model, {"image": (224, 224, 3)}, seqhw=28) * 50_000 * 24
  )


# --- measured on checkpoints ---

# The six test sets as TFDS prepares them, of ten random images each; of ReaL two images have no label.
TEST_SETS = """
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image

LABELS = tfds.features.ClassLabel(num_classes=1000)

def prepare(name, split, classes=range(0, 1000, 100), config=None):
  several = name == "Imagenet2012Real"
  label = "real_label" if several else "label"
  def info(self):
    features = {"file_name": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, 3))}
    features[label] = tfds.features.Sequence(LABELS) if several else LABELS
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
  def examples(self):
    rng = np.random.default_rng(0)
    for i, k in enumerate(classes):
      file = io.BytesIO()
      Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(file, "PNG")
      file.seek(0)
      yield i, {"file_name": f"{i}.png", "image": file, label: [k, k + 1][: i // 2] if several else k}
  made = dict(VERSION=tfds.core.Version("1.0.0"), _info=info, _generate_examples=examples)
  made["_split_generators"] = lambda self, _: {split: examples(self)}
  if config:
    made["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config)]
  made["__module__"] = __name__
  builder = type(name, (tfds.core.GeneratorBasedBuilder,), made)
  builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()

prepare("Imagenet2012", "validation")
prepare("Imagenet2012Real", "validation")
prepare("ImagenetV2", "test", config="matched-frequency")
prepare("ImagenetA", "test", classes=[int(k) for k in sys.argv[2].split(",")])
prepare("ImagenetR", "test", classes=[int(k) for k in sys.argv[3].split(",")])
prepare("ImagenetSketch", "test")
"""


@pytest.fixture(scope="module")
def sets_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sets")
  few = [",".join(map(str, label_maps.label_map(n).columns[:100:10])) for n in ("i1k_a", "i1k_r")]
  subprocess.run(
    [sys.executable, "-c", TEST_SETS, str(folder), *few], check=True, capture_output=True
  )
  return folder


@pytest.fixture
def small(monkeypatch):
  """The published S and B have the shape of the smallest here."""
  for variant in "SB":
    monkeypatch.setitem(vit.VARIANTS, variant, vit.VARIANTS["mu"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Two files in the published format: random, small, of 1000 classes."""
  folder = tmp_path_factory.mktemp("checkpoints")
  for seed, name in enumerate(("one", "other")):
    write_random(folder / f"{name}.npz", FlexiViT(variant="mu", num_classes=1000), seed)
  return folder


def write_random(path, model, seed=0):
  model = model.clone(head_zeroinit=False)
  params = jax.jit(model.init)(jax.random.key(seed), np.zeros((1, 32, 32, 3), np.float32))["params"]
  np.savez(path, **{f"params/{k}": np.asarray(v) for k, v in trees.flatten(params).items()})


@pytest.mark.full
def test_the_table_is_measured_compared_and_gone_on_with(
  sets_dir, checkpoints, small, tmp_path, capsys, monkeypatch
):
  command = [
    "reproduce", "table-i1k", f"--data_dir={sets_dir}", f"--out={tmp_path}", "--seqhw=5,15", "--batch_size=10",
    f"--checkpoint=FlexiViT-S i1k={checkpoints / 'one.npz'}", f"--checkpoint={checkpoints / 'other.npz'}",
  ]  # fmt: skip
  assert cli.main(command) == 0
  said = capsys.readouterr().out
  made = json.loads((tmp_path / "table-i1k.json").read_text())
  rows = {(r["checkpoint"], r["set"], r["patch"], r["metric"]): r for r in made["rows"]}
  names = ("FlexiViT-S i1k", "other")
  sets = ("val", "v2", "a", "r", "sketch", "real")
  assert {k for k in rows if k[3] == "top1"} == {
    (n, s, p, "top1") for n in names for s in sets for p in (48, 16)
  }
  assert rows["other", "real", 48, "top1"]["images"] == 8  # two images have no label
  row = rows["FlexiViT-S i1k", "sketch", 16, "top1"]
  assert (row["published"], row["kind"]) == (32.078, "third party")
  assert row["difference"] == pytest.approx(row["ours"] - 32.078)
  assert rows["FlexiViT-S i1k", "sketch", 48, "top1"]["published"] is None
  assert rows["FlexiViT-S i1k", "val", 48, "latency"]["published"] == 0.089
  assert rows["other", "sketch", 16, "top1"]["published"] is None  # nothing is known of it
  assert "FlexiViT-S i1k, sketch, patch 16, top1: ours 0, published 32.078 %, -32.1" in said
  assert "numbers on other sets are timm's" in said.splitlines()[-1]
  assert {p.name for p in tmp_path.glob("table-i1k.*")} == {
    f"table-i1k.{s}" for s in ("json", "csv", "png", "svg")
  }
  assert (tmp_path / "table-i1k_ms.png").stat().st_size > 10_000
  assert cli.main(["report", *map(str, tmp_path.glob("*/val.json")), f"--out={tmp_path}"]) == 0
  assert "by time" in (tmp_path / "report.html").read_text()
  digest = trees.digest(weights.load(checkpoints / "one.npz")[1])
  assert made["checkpoints"]["FlexiViT-S i1k"] == {
    "checkpoint": str(checkpoints / "one.npz"), "weights": digest
  }  # fmt: skip
  evaluated = json.loads((tmp_path / "other" / "a.json").read_text())
  assert evaluated["checkpoint"] == str(checkpoints / "other.npz")
  assert evaluated["pp"].startswith("decode|resize(272)|central_crop(240)|value_range(-1, 1)")

  monkeypatch.setattr(results, "measure", None)  # nothing is measured again
  assert cli.main(command) == 0
  assert json.loads((tmp_path / "table-i1k.json").read_text()) == made
  swapped = [c.replace("one.npz", "other.npz") for c in command[:-1]]
  assert cli.main(swapped) == 2
  assert "val.json is of weights" in capsys.readouterr().err


def test_a_protocol_and_a_folder_of_images_are_said_to_differ(checkpoints, small, tmp_path, capsys):
  photos, out = tmp_path / "photos", tmp_path / "out"
  for k in range(1000):
    (photos / "val" / f"{k:04}").mkdir(parents=True)
  for i in range(3):
    Image.new("RGB", (300, 260), (80 * i, 0, 0)).save(photos / "val" / "0007" / f"{i}.jpg")
  command = [
    "reproduce", "timm", f"--data_dir={photos}", f"--out={out}", "--sets=val", "--batch_size=4",
    f"--checkpoint=FlexiViT-B i1k={checkpoints / 'one.npz'}",
  ]  # fmt: skip
  assert cli.main(command) == 0
  said = capsys.readouterr().out
  assert "FlexiViT-B i1k, val, patch 16, top1: ours 0, published 84.678 %" in said
  assert "differs: val: 3 images of a folder, where published numbers are of imagenet2012" in said
  assert "method='cubic'" in json.loads((out / "FlexiViT-B i1k" / "val.json").read_text())["pp"]
  assert cli.main([*command, "--protocol=paper"]) == 2
  assert "is of protocol short side" in capsys.readouterr().err
  command[3] = f"--out={tmp_path / 'paper'}"
  assert cli.main([*command, "--protocol=paper"]) == 0
  assert "differs: protocol paper: both sides to 272" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["fig5", "--out=o"], "fig5 is not measured on checkpoints alone.*flexivit train"),
    (["fig19", "--out=o"], "not in this project"),
    (["fig2", "--data_dir=d"], "Give --out"),
    (["fig2", "--protocol=timm"], "Give --out"),
    (["fig2", "--results=r.json", "--sets=val"], "measured before; leave out --sets"),
    (["fig2", "--model=FlexiViT-S"], "give that too"),
    (["fig2", "--batch_size=4"], "Give --out"),
    (["fig2", "--costs"], "--costs is of all items; leave out 'fig2'"),
    (["fig2", "--list", "--data_dir=d"], "--list is of all items; leave out 'fig2'"),
    (["--checkpoint=f.npz", "--out=o"], "--checkpoint is for one item; name it: fig1, fig2"),
    (["--list", "--checkpoint=f.npz"], "--checkpoint is for one item"),
    (["--results=r.json"], "--results is for one item"),
    (["fig2", "--out=o", "--protocol=tim"], "protocol 'tim'.*timm"),
    (["fig2", "--out=o", "--sets=vall"], "test set 'vall'.*val"),
    (["fig2", "--out=o", "--data_dir=d", "--checkpoint=FlexiViT-X=f"], "checkpoint of this item"),
    (["fig2", "--out=o", "--data_dir=d", "--checkpoint=a.npz", "--checkpoint=b/a.npz"], "twice"),
    (["fig2", "--out=o", "--data_dir=d"], r"(?s)cannot be read.*val: .*tfds build imagenet2012"),
    (["bwconrad", "--out=o", "--data_dir=d"], "--checkpoint 'ViT-T/16=FILE'"),
  ],
)
def test_what_cannot_be_measured_is_said_at_once(arguments, words, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["reproduce", *arguments]) == 2
  assert re.search(words, capsys.readouterr().err)
  assert not list(tmp_path.iterdir())


def test_an_evaluation_costs_all_images_at_all_sizes():
  """Figure 1: 50,000 images by an L at 10 and 24 tokens a side; a plain count of its matrix products."""
  per_token, dense = 2 * 24 * 12 * 1024**2, 0.0
  for n in (10, 24):
    tokens, patch = n * n, 240 // n
    dense += (tokens + 1) * per_token + 24 * 4 * (tokens + 1) ** 2 * 1024
    dense += 2 * tokens * patch * patch * 3 * 1024 + 2 * 1024 * 1000
  assert reproduce.evaluation_flops(items.find("fig1")) == pytest.approx(50_000 * dense, rel=1e-6)
  assert reproduce.evaluation_flops(items.find("fig5")) == 0.0
  sizes = {name: protocol.size for name, protocol in test_sets.PROTOCOLS.items()}
  assert sizes == {"paper": 240, "paper_i21k": 240, "timm": 240, "bwconrad": 224}


def test_the_introductions_models_and_the_other_third_partys_are_told_apart():
  """Of two ViT-B/32 each has its own number; FLOPs are compared where they are known."""
  subjects = items.find("bwconrad").evaluation.subjects
  row = {"seqhw": 7, "patch": 32, "top1": 0.8, "gflops": 8.8, "n": 1}
  found = [
    measuring.Measured(measuring.Checkpoint(name, "f", subjects[name]), "val", {"device": "cpu"}, [row])
    for name in ("ViT-B/32", "ViT-B/32 (introduction)")
  ]  # fmt: skip
  rows = comparing.beside(found, items.find("bwconrad").published)
  assert [(r["metric"], r["published"]) for r in rows] == [
    ("top1", 83.30), ("top1", 79.1), ("flops", 8.6)
  ]  # fmt: skip


def test_kernel_and_image_resized_together_stand_beside_the_published():
  rows = [{"seqhw": 14, "patch": 32, "top1": 0.84}]
  lines = reproduce.compare(
    "bwconrad", {"dataset": "folder", "rows": rows}, model="ViT-B/16", setting="448 px"
  )
  assert "at patch 32: published 84.29 %, ours 84" in lines[1] and len(lines) == 4


def test_accuracy_stands_against_milliseconds():
  """Published top-1 is that of the figure, not timm's of the same patch size."""
  subject = items.Subject("FlexiViT-S", "i1k, 1200 epochs")
  rows = [{"seqhw": n, "patch": 240 // n, "top1": n / 20, "ms": n / 10.0, "n": 1} for n in (5, 15)]
  found = measuring.Measured(
    measuring.Checkpoint("S", "f", subject), "val", {"device": "cpu"}, rows
  )
  made = comparing.beside([found], ("fig2", "timm"))
  assert comparing.speeds(made, "ours") == {"S": [(0.5, 25.0), (1.5, 75.0)]}
  assert comparing.speeds(made, "published") == {"S": [(0.089, 69.5), (0.39, 82.5)]}


def test_results_without_times_say_so():
  row = {"seqhw": 5, "patch": 48, "top1": 0.7, "ms": None}
  untimed = {"dataset": "imagenet2012", "rows": [row]}
  lines = reproduce.compare("fig2", untimed, model="FlexiViT-S", setting="1200")
  assert lines[-1] == "differs: ours have no milliseconds"
  assert not any("no milliseconds" in line for line in reproduce.compare("fig2", RESULTS))


def folders(root, names):
  """A file of one pixel in each of the folders root/NAME."""
  for i, name in enumerate(names):
    (root / name).mkdir(parents=True)
    Image.new("RGB", (1, 1), (i, 0, 0)).save(root / name / "1.png")


def test_folders_say_their_classes_in_order(tmp_path):
  folders(tmp_path / "v2", ("0", "1", "10", "2"))
  source, classes = measuring.source_of("v2", tmp_path)
  assert classes == 4 and data.make_source(**source).class_names == ("0", "1", "2", "10")
  (tmp_path / "real").mkdir()
  with pytest.raises(UserError, match="several labels"):
    measuring.source_of("real", tmp_path)
  folders(tmp_path / "a", ("n01", "n02"))
  source, classes = measuring.source_of("a", tmp_path)
  assert (source["split"], classes) == ("a", 2)
  folders(tmp_path / "train", ("n01", "n02", "n03"))  # of a training split the classes are known
  assert measuring.source_of("a", tmp_path)[1] == 3


def test_other_examples_are_told_apart(tmp_path):
  for name, numbers in (("one", ("07", "08")), ("two", ("07", "09")), ("three", ("07", "08"))):
    folders(tmp_path / name / "val", numbers)
  Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "three" / "val" / "08" / "1.png")
  found = [
    measuring.fingerprint(data.make_source(name="folder", split="val", data_dir=tmp_path / name))
    for name in ("one", "two", "three", "one")
  ]
  assert found[0] == found[3] and len(set(found)) == 3


@pytest.mark.parametrize(
  ("item", "name", "lines"),
  [
    ("fig2", "FlexiViT-S i1k", ["width: expected 384, got 32", "depth: expected 12, got 1"]),
    ("fig3", "ViT-B/16 i21k", ["num_heads: expected 12, got 2", "num_classes: expected 21843, got 1000"]),
    ("bwconrad", "ViT-T/16", ["width: expected 192, got 32", "patch_size: expected (16, 16), got (32, 32)"]),
    ("fig8", "fine-tuned", ["width: expected 768, got 32"]),
  ],
)  # fmt: skip
def test_another_model_is_not_put_beside_published_numbers(
  checkpoints, tmp_path, item, name, lines
):
  given = [f"{name}={checkpoints / 'one.npz'}"]
  found = measuring.checkpoints_of(items.find(item).evaluation, given)
  with pytest.raises(
    UserError, match=f"(?s)one.npz is no '{name}'.*beside nothing published"
  ) as said:
    measuring.measure(found, {}, tmp_path)
  assert set(lines) <= {line.strip() for line in str(said.value).splitlines()}
  (free,) = measuring.checkpoints_of(items.find(item).evaluation, [str(checkpoints / "one.npz")])
  assert measuring.load(free)[0].width == 32


def test_what_the_configs_train_may_stand_for_the_published(small, tmp_path):
  """configs/i21k_sup.py stores a kernel of 8x8 pixels, the published baselines have 32x32."""
  trained = FlexiViT(variant="mu", num_classes=21_843, patch_size=(8, 8))
  write_random(tmp_path / "trained.npz", trained)
  fig3 = items.find("fig3").evaluation
  (made,) = measuring.checkpoints_of(fig3, [f"ViT-B/16 i21k={tmp_path / 'trained.npz'}"])
  assert measuring.load(made)[0].patch_size == (8, 8)


def test_only_the_grid_of_positions_tells_a_fixed_model_from_a_published_one(small, tmp_path):
  fixed = FlexiViT(variant="mu", num_classes=1000, posemb_size=(14, 14))
  write_random(tmp_path / "fixed.npz", fixed)
  table = items.find("table-i1k").evaluation
  (made,) = measuring.checkpoints_of(table, [f"FlexiViT-S i1k={tmp_path / 'fixed.npz'}"])
  with pytest.raises(UserError, match=r"posemb_size: expected \(7, 7\), got \(14, 14\)"):
    measuring.load(made)
  timm = fixed.clone(posemb_size=(15, 15))  # of 240 pixels at patch 16, as timm's flexivit files
  write_random(tmp_path / "fixed.npz", timm)
  assert measuring.load(made)[0].posemb_size == (15, 15)


def test_checkpoints_go_by_all_their_names(tmp_path):
  table = items.find("table-i1k").evaluation
  given = [
    "flexivit_s_i1k",
    "flexivit_small.300ep_in1k",
    "FlexiViT-B i1k=b.npz",
    "runs/lr.1",
    "x.y.npz",
  ]
  found = [(c.name, c.path, c.subject) for c in measuring.checkpoints_of(table, given)]
  assert found[0][:2] == ("FlexiViT-S i1k", "flexivit_s_i1k")
  assert found[1][2] == items.Subject("FlexiViT-S", "i1k, 300 epochs")
  assert found[2][:2] == ("FlexiViT-B i1k", "b.npz")
  assert [f[0] for f in found[3:]] == ["lr.1", "x.y"] and found[3][2] is found[4][2] is None
  (tmp_path / "lr=0.1").mkdir()
  (made,) = measuring.checkpoints_of(table, [str(tmp_path / "lr=0.1")])
  assert made.name == "lr=0.1"


def test_rectangles_are_measured_drawn_and_gone_on_with(checkpoints, tmp_path, monkeypatch):
  folders(tmp_path / "in" / "val", [f"{k:04}" for k in range(2)])
  monkeypatch.setattr(
    measuring, "source_of", lambda name, _: (dict(name="folder", split=name, data_dir=str(tmp_path / "in")), 1000)
  )  # fmt: skip
  command = [
    "reproduce", "fig2", "--data_dir=here", f"--out={tmp_path}", f"--checkpoint={checkpoints / 'one.npz'}",
    "--seqhw=5,6x8", "--batch_size=2",
  ]  # fmt: skip
  for _ in range(2):
    assert cli.main(command) == 0
  made = json.loads((tmp_path / "fig2.json").read_text())
  assert [(r["seqhw"], r["patch"]) for r in made["rows"]] == [(5, 48), ("6x8", "40x30")]
  assert comparing.side("40x30") == pytest.approx(1200**0.5)


def test_results_of_other_data_are_not_compared(tmp_path):
  rows = [{"seqhw": 15, "patch": 16, "top1": 0.3}]
  lines = reproduce.compare("timm", {"dataset": "imagenet_a", "rows": rows}, model="FlexiViT-S")
  assert len(lines) == 4 and all("imagenet_a" in line for line in lines)
  lines = reproduce.compare("timm", {"dataset": "folder", "rows": rows}, model="FlexiViT-S")
  assert "ours are of folder, which is none" in lines[-1]


def test_the_list_says_what_can_run_here(sets_dir, monkeypatch, tmp_path):
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path))
  here = {}
  for line in reproduce.listing(data_dir=sets_dir):
    if not line.startswith(" "):
      name = line.partition(":")[0]
    if line.startswith("    here: "):
      here[name] = line.removeprefix("    here: ")
  assert here["fig1"] == "yes; to be fetched: FlexiViT-L i1k"
  assert here["fig2"].startswith("yes; to be fetched: FlexiViT-S i1k, ")
  assert "to be given to its commands: DeiT-III S, B, L" in here["fig2"]
  assert here["fig3"].startswith("no, lacks imagenet21k (not in TFDS: configs/i21k_sup.py); to be")
  assert here["fig4"].startswith("to be given: a ViT-B/8 of ImageNet-1k: CHECKPOINT, ImageNet in f")
  assert here["bwconrad"].startswith("to be given as --checkpoint NAME=FILE: ViT-T/16, ")
  for name in ("fig5", "fig17"):
    assert "to be given: the AugReg ViT-B/8 of ImageNet-21k" in here[name]
  assert here["fig8"].endswith("to be given as --checkpoint NAME=FILE: fine-tuned")
  assert "; to be given: the cue conflicts of Geirhos et al.: IMAGES" in here["fig25"]
  yes = {name for name, said in here.items() if said.startswith("yes")}
  assert yes == {"fig1", "fig2", "table-i1k", "timm", "fig6", "fig13", "ensembles", "fig30"}


def test_what_a_command_takes_is_fetched_or_prepared_or_said():
  """DIR is that of --data_dir in `flexivit reproduce` alone; RUN and OUT are made."""
  for name, item in reproduce.ITEMS.items():
    words = {w for command in item.how for w in command.split() if w.isupper() and w.isalpha()}
    if item.weights:
      words -= {"CHECKPOINT"}
    if item.evaluation and any(s not in PUBLISHED for s in item.evaluation.subjects):
      words -= {"CHECKPOINT"}
    for word in words - {"RUN", "OUT"}:
      assert any(word in what for what in item.given), (name, word)
    if any("distill" in c for c in item.configs):
      assert any("teacher=FILE" in what for what in item.given), name


@pytest.mark.parametrize("text", ["{", "hello", "", "[1,"])
def test_results_that_are_no_json_are_one_line(tmp_path, capsys, text):
  (tmp_path / "eval.json").write_text(text)
  assert cli.main(["reproduce", "fig7", "--results", str(tmp_path / "eval.json")]) == 2
  assert "eval.json is no JSON" in capsys.readouterr().err
