"""Every config of the repository is complete, says what it claims, and runs end to end."""

import copy
import functools
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from flexivit_jax import config, data, errors, experiment, sizes, train
from flexivit_jax.experiment import costs
from flexivit_jax.running import metrics_writer
from flexivit_jax.training import patch_schedule, schedules

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem not in ("__init__", "common"))
TEN = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)


def load(spec: str, *overrides: str) -> dict[str, Any]:
  name, _, arg = spec.partition(":")
  return config.load(f"{FOLDER / name}.py:{arg}", overrides)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"optim.lr": 1e-3, ...}."""
  pairs = {}
  for key, value in tree.items():
    nested = isinstance(value, dict)
    pairs |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
  return pairs


# --- complete ---


@pytest.mark.parametrize("name", NAMES)
def test_header_commands_can_be_loaded_and_the_file_is_one_page(name):
  text = (FOLDER / f"{name}.py").read_text()
  commands = re.findall(r"--config (configs/\S+) --workdir runs/\S+", text)
  assert f"configs/{name}.py" in commands
  for spec in commands:
    config.load(spec)
  assert len(text.splitlines()) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_known(name):
  experiment.check(load(name))


FORMS = [
  *NAMES,
  "miniature:flops=1e15",
  "folder:init=vit.npz",
  "folder:init=vit.npz,freeze=6,layer_decay=0.75",
  "flexilit_emoji:image=vit.npz,text=minilm",
  "segment_folder:init=vit.npz",
  "detect_folder:init=vit.npz",
  "detect_bccd:init=vit.npz",
  "detect_emoji:init=vit.npz",
]


def test_what_configs_share_is_not_offered_as_a_config():
  with pytest.raises(errors.UserError, match="folder") as refused:
    config.load("nonsense")
  assert "common" not in str(refused.value)


@pytest.mark.parametrize("form", FORMS)
def test_debug_form_is_the_same_experiment_on_synthetic_data(form):
  name, _, arg = form.partition(":")
  full, debug = (same_tokenizer(flat(load(spec))) for spec in (form, f"{name}:{arg},debug"))
  changed = {k for k in full.keys() | debug.keys() if full.get(k) != debug.get(k)}
  smaller = r"(input|evals\.\w+)\.(data\.\w+|batch_size)|(\w+\.)*(total|every|warmup)_\w+"
  fewer = r"evals\.(?!test)\w+\..*"
  tiny = r"model(\.image|\.text|\.backbone)?\.(depth|variant|like|width|mlp_dim|num_classes)|optim\.freeze"
  without_files = r"init(\.\w+)*|(objective\.teachers\.\w+|evals\.\w+\.teacher)\..*"
  allowed = f"{smaller}|{fewer}|{tiny}|{without_files}|accumulate"
  assert not [k for k in changed if not re.fullmatch(allowed, k)]


def same_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
  """The same with one tokenizer for all: the debug form has one without a file."""
  tokenizer = r"path='[^']*', pad='[^']*', end='[^']*'"
  return {k: re.sub(tokenizer, "", v) if k.endswith(".pp") else v for k, v in settings.items()}


@pytest.mark.parametrize("form", FORMS)
def test_debug_form_has_two_evaluations_and_two_checkpoints(form):
  name, _, arg = form.partition(":")
  exp = experiment.from_config(load(f"{name}:{arg},debug"))
  assert (exp.total_steps, exp.save_every) == (4, 2)
  assert {e.every for e in exp.evaluations.values()} == {2}
  [drawn] = exp.flexi.values()  # of tokens a side, or rows and columns
  assert drawn.values == load(form)["evals"]["test"]["seqhw"]


@pytest.mark.parametrize("name", NAMES)
def test_every_misspelt_key_is_an_error_that_names_the_right_one(name, tmp_path):
  settings = load(f"{name}:debug")
  names = r"evals\.\w+|objective\.teachers\.\w+"  # free to choose
  keys = [k for k in sections_and_keys(settings) if not re.fullmatch(names, k)]
  assert len(keys) > 30
  for key in keys:
    wrong = copy.deepcopy(settings)
    *sections, leaf = key.split(".")
    node = wrong
    for section in sections:
      node = node[section]
    node[leaf + leaf[-1]] = node.pop(leaf)
    with pytest.raises(errors.UserError, match=rf"{leaf + leaf[-1]}'.*Did you mean '[\w.]*{leaf}'"):
      train.train(wrong, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def sections_and_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
  keys = [f"{prefix}{k}" for k in tree]
  return keys + [
    k for s, v in tree.items() if isinstance(v, dict) for k in sections_and_keys(v, f"{prefix}{s}.")
  ]


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_override_is_an_error_that_names_the_right_one(name, tmp_path):
  wrong = load(f"{name}:debug", "optim.warmup=3")
  with pytest.raises(errors.UserError, match=r"Unknown config key 'optim.warmup'"):
    train.train(wrong, tmp_path / "run")
  with pytest.raises(errors.UserError, match=r"Did you mean 'debug'"):
    load(f"{name}:debugg")


SEGMENTERS = {  # pixels of their patches
  "segment_folder": (48, 32, 24, 16, 12, 8),
  "segmenter_ade20k": (32, 24, 20, 16, 12, 10, 8),
  "segmenter_cityscapes": (48, 32, 24, 20, 16, 12),
}


# Pixels of their patches, and of their images.
DETECTORS = {
  "detect_bccd": ((40, 20, 16, 10), 240),
  "detect_emoji": ((48, 32, 24, 16), 192),
  "detect_folder": ((48, 32, 24, 16, 12), 384),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_draw_patches_of_these_pixels(name):
  patches, pixels = DETECTORS[name]
  c, one = load(name), load(f"{name}:fixed=16")
  [drawn] = c["flexi"].values()
  rows = [size if isinstance(size, int) else size[0] for size in drawn["v"]]
  assert [pixels / n for n in rows] == list(patches) and drawn["v"] == c["evals"]["test"]["seqhw"]
  [fixed] = one["flexi"].values()
  assert fixed["v"] == (drawn["v"][patches.index(16)],)
  assert one["name"].endswith("patch 16 only") and one["evals"] == c["evals"]
  with pytest.raises(errors.UserError, match=r"config argument fixed '7'; known: .*16"):
    load(f"{name}:fixed=7")


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_draw_patches_of_these_pixels(name):
  c = load(name)
  side = c["evals"]["test"]["window"]
  found = [-(-side // n) for n in c["flexi"]["seqhw"]["v"]]
  assert tuple(found) == SEGMENTERS[name]
  one = load(f"{name}:fixed=16")
  assert [-(-side // n) for n in one["flexi"]["seqhw"]["v"]] == [16]
  assert one["name"].endswith("patch 16 only") and one["evals"] == c["evals"]
  assert load(f"{name}:decoder=linear")["model"]["decoder"] == "linear"
  with pytest.raises(errors.UserError, match=r"config argument fixed '7'; known: .*16"):
    load(f"{name}:fixed=7")


@pytest.mark.parametrize(
  ("name", "lr", "length", "crop", "stride"),
  [
    ("segmenter_ade20k", 1e-3, {"total_steps": 160_000}, 512, None),
    ("segmenter_cityscapes", 1e-2, {"total_epochs": 216}, 768, 512),
  ],
)
def test_segmenters_are_trained_as_published(name, lr, length, crop, stride):
  """Segmenter's table of recipes: SGD without decay or clipping, to 1e-5, batches of 8."""
  c = load(name)
  assert {k: c[k] for k in length} == length and c["input"]["batch_size"] == 8
  assert c["optim"]["name"] == "momentum" and not {"wd", "clip"} & c["optim"].keys()
  assert c["optim"]["lr"] == lr
  assert c["optim"]["schedule"]["polynomial_end"] * lr == pytest.approx(1e-5)
  assert c["model"]["backbone"]["stochastic_depth"] == 0.1
  test = c["evals"]["test"]
  assert (test["window"], test.get("window_stride")) == (crop, stride)
  rng, mask = np.random.default_rng(0), np.zeros((600, 900), np.uint8)
  mask[:, 450:] = 1
  image = np.full((600, 900, 3), 128, np.uint8)
  made = data.parse(c["input"]["pp"])({"image": image, "mask": mask}, rng)
  assert made["image"].shape == (crop, crop, 3) and made["mask"].shape == (crop, crop)
  assert load(f"{name}:optim=adamw")["optim"]["layer_decay"] == 0.75


def test_owl_vit_is_trained_as_published():
  """scenic's owl_vit/configs/clip_b16.py, but for the size of the image."""
  c = load("owl_lvis")
  assert (c["total_steps"], c["input"]["batch_size"]) == (140_000, 256)
  [(regex, factor)] = c["optim"]["lr_mults"]
  assert re.fullmatch(regex, "text/embedding/embedding")
  assert factor * c["optim"]["lr"] == pytest.approx(2e-6) and c["optim"]["lr"] == 5e-5
  expected = dict(b2=0.999, clip_each=1.0, schedule=dict(decay_type="cosine", warmup_steps=1000))
  assert {k: c["optim"][k] for k in expected} == expected and "wd" not in c["optim"]
  assert c["input"]["batch_size"] // c["accumulate"] == 32  # of a v3-32
  assert [720 // n for n in c["flexi"]["seqhw"]["v"]] == [48, 40, 36, 30, 24, 20, 16]
  for patch in (16, 30):
    one = load(f"owl_lvis:fixed={patch}")
    assert [720 / n for n in one["flexi"]["seqhw"]["v"]] == [patch]
    assert one["evals"] == c["evals"] and one["name"].endswith(f"patch {patch} only")
  pp = c["input"]["pp"].replace("path='tokenizer.json'", "path='bytes'")
  source = data.planned_source(name="lvis", split="train", data_dir="lvis")
  batch = next(data.train_batches(source, pp, batch_size=2, seed=0, num_steps=1, threads=0))
  shapes = {k: v.shape[1:] for k, v in batch.items() if k not in ("_id", "box_mask")}
  assert shapes == {
    "image": (720, 720, 3), "boxes": (100, 4), "box_targets": (100, 100), "queries": (100, 16)
  }  # fmt: skip
  asked = batch["queries"].any(-1).sum(1)
  assert set(asked.tolist()) <= {50, 51}  # fifty negatives, and its class where crops leave the box


@pytest.mark.parametrize(
  "name",
  [
    n
    for n in NAMES
    if n not in ("lit_coco", "owl_lvis", "segmenter_camvid", *SEGMENTERS, *DETECTORS)
  ],
)
def test_fixed_trains_one_size_and_evaluates_all(name):
  flexible, fixed = load(name), load(f"{name}:fixed=8")
  assert fixed["flexi"]["seqhw"]["v"] == (8,)
  assert fixed["name"] != flexible["name"] and re.search(r"patch \d+ only", fixed["name"])
  for key in ("evals", "optim", "model", "input"):
    assert fixed[key] == flexible[key]


def test_the_demo_gives_both_models_the_same_flops():
  def flops(spec: str) -> tuple[float, float]:
    exp = experiment.from_config(load(spec))
    each = patch_schedule.mean_cost(exp.flexi, exp.step_flops)
    return exp.total_steps * each, each

  flexible, _ = flops("digits")
  fixed, one = flops("digits:fixed=8")
  assert abs(fixed - flexible) < one


# --- arguments ---

FREE = (
  "data_dir",
  "teacher",
  "init",
  "train",
  "val",
  "image",
  "text",
  "tokenizer",
  "end",
  "vectors",
  "photos",
)  # any text may be a file or a split
WRONG = {
  int: ("x", "1.5", "-3", "True", ""),
  float: ("x", "-1", "1e400", "True"),
  bool: ("maybe", "1"),
  str: ("nonsense", "2024", "a=b"),
}


def arguments_of(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
  """The arguments of a config, and their defaults."""
  seen: dict[str, Any] = {}
  parse = config.parse_arg

  def spy(arg: str, **defaults: Any) -> Any:
    seen.update(defaults)
    return parse(arg, **defaults)

  with monkeypatch.context() as patched:
    patched.setattr(config, "parse_arg", spy)
    load(name)
  return seen


@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_value_of_every_argument_is_one_line(name, monkeypatch, photos, scenes, parts):
  teacher = functools.partial(costs._planned_teacher, shapes=False)
  planned = costs.PLANNED._replace(teacher=teacher)
  own = dict(folder=photos, segment_folder=scenes, detect_folder=parts)
  for argument, default in arguments_of(name, monkeypatch).items():
    wrong = () if argument in FREE else WRONG[type(default)]
    for text in (*(f"{argument}={value}" for value in wrong), f"{argument}{argument[-1]}=1"):
      with pytest.raises(errors.UserError) as refused:
        spec = f"data_dir={own[name]},{text}" if name in own else text
        experiment.from_config(load(f"{name}:{spec}"), opening=planned)
      assert "\n" not in str(refused.value) and len(str(refused.value)) < 500, text


@given(st.text("adefinotux=,.-:[%]()'1 ", max_size=20), st.sampled_from(NAMES))
@settings(deadline=None, max_examples=40)
def test_no_text_after_the_colon_is_more_than_one_line(text, name):
  try:
    load(f"{name}:{text}")
  except errors.UserError as e:
    assert "\n" not in str(e)


def test_images_in_folders_are_sent_to_their_config():
  with pytest.raises(errors.UserError, match=r"configs/folder\.py:init=vit,data_dir=mine"):
    load("transfer:data=folder,init=vit,data_dir=mine")


# --- end to end ---


# Cityscapes is as ADE20K, of 768 pixels, and takes two minutes.
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[] if n == "digits" else pytest.mark.full)
    for n in NAMES
    if n != "segmenter_cityscapes"
  ],
)
def test_runs_end_to_end_and_resumes(name, tmp_path, train_until, capsys):
  settings = at_fewer_sizes(load(f"{name}:debug"))
  train_until(settings, tmp_path, 2)
  assert checkpoints(tmp_path) == [2] and not (tmp_path / "eval.json").exists()

  train.train(settings, tmp_path)
  assert (
    f"checkpoints/2: step 2/4, epoch {2 * 8 / examples(settings):.2f}" in capsys.readouterr().err
  )
  assert checkpoints(tmp_path) == [4]
  check_metrics(metrics_writer.read_rows(tmp_path / "metrics.jsonl"), settings)
  for name in settings["evals"]:
    file = tmp_path / ("eval.json" if name == "test" else f"eval_{name}.json")
    check_results(json.loads(file.read_text()), settings, settings["evals"][name])


def at_fewer_sizes(settings: dict[str, Any]) -> dict[str, Any]:
  """The coarsest, a middle and the finest size: ten programs of each kind take minutes to compile.

  Of a Segmenter or a detector the two coarsest: the finest has thousands of tokens.
  """
  [(key, drawn)] = settings["flexi"].items()
  values = drawn["v"]
  chosen = (values[0], values[len(values) // 2], values[-1])
  if settings["model"].get("name") in ("segmenter", "owl_vit"):
    chosen = values[:2]
  fewer = tuple(dict.fromkeys(chosen))
  evals = {k: {**v, "seqhw": fewer} for k, v in settings["evals"].items()}
  return {**settings, "flexi": {key: {"v": fewer}}, "evals": evals}


def drawn_sizes(settings: dict[str, Any]) -> tuple[str, list[int | str]]:
  """The argument of the model that is drawn, and its values as rows name them."""
  [(key, drawn)] = settings["flexi"].items()
  return key, [sizes.size_text(size) for size in drawn["v"]]


def checkpoints(run: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in (run / "checkpoints").glob("[0-9]*"))


def examples(settings: dict[str, Any]) -> int:
  return {"train[:16]": 16}[settings["input"]["data"]["split"]]


def check_metrics(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
  key, drawn = drawn_sizes(settings)
  assert [r["step"] for r in rows] == [1, 2, 3, 4]
  assert all(np.isfinite([r["loss"], r["grad_norm"], r["schedule"]]).all() for r in rows)
  assert all(r[key] in drawn for r in rows)
  for name, section in settings["evals"].items():
    keys = {f"{name}/{k}/seqhw={s}" for k in measured(section) for s in drawn}
    assert [keys <= r.keys() for r in rows] == [False, True, False, True]


def measured(section: dict[str, Any]) -> tuple[str, ...]:
  if section.get("type") == "retrieval":
    return tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
  if section.get("type") == "segmentation":
    return ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou")
  if section.get("type") == "detection":
    return ("ap", "ap50", "ap75")
  labelled = section.get("type", "classification") == "classification" or section.get("labels")
  near = ("kl", "agree1", "agree5", "logsoftmax_euclidean")
  return (("top1", "top5", "loss") if labelled else ()) + (near if "type" in section else ())


def check_results(
  results: dict[str, Any], settings: dict[str, Any], section: dict[str, Any]
) -> None:
  assert (results["dataset"], results["step"]) == ("synthetic", 4)
  assert results["split"] == section["data"]["split"]
  _, drawn = drawn_sizes(settings)
  assert results["trained_seqhw"] == drawn
  assert [r["seqhw"] for r in results["rows"]] == drawn
  for row, size in zip(results["rows"], section["seqhw"], strict=True):
    assert row["tokens"] == (size**2 if isinstance(size, int) else size[0] * size[1])
    assert row["n"] == 20  # The last of three batches of 8 is filled up.
    named = ("top1", "top5", "ap", "ap50", "agree1", "agree5", "i2t_r1", "i2t_r5")
    ordered = [row[k] for k in named if k in measured(section)][:2] or [row["miou"]]
    assert ordered == sorted(ordered) and 0 <= ordered[0] <= ordered[-1] <= 1
    assert row["gflops"] > 0 and row["ms"] > 0


# --- what the papers' configs say ---


def test_imagenet21k_is_the_reference_recipe():
  """big_vision configs/proj/flexivit/i21k_sup.py."""
  c = flat(load("i21k_sup"))
  expected = {
    "seed": 0,
    "init_head_bias": -10.0,
    "input.data.split": "full[51200:]",
    "input.batch_size": 4096,
    "objective.loss": "sigmoid_xent",
    "objective.mixup_p": 0.2,
    "model.variant": "B",
    "model.pool_type": "tok",
    "model.patch_size": (8, 8),
    "model.posemb_size": (7, 7),
    "flexi.seqhw.v": TEN,
    "optim.lr": 1e-3,
    "optim.wd": 1e-4,
    "optim.clip": 1.0,
    "optim.mu_dtype": "bfloat16",
    "optim.schedule.decay_type": "cosine",
    "optim.schedule.warmup_steps": 10_000,
    "checkpoint.every_steps": 1000,
    "evals.test.data.split": "full[:25600]",
    "evals.val.data.split": "full[25600:51200]",
    "evals.train.data.split": "full[51200:76800]",
  }
  assert {k: c[k] for k in expected} == expected
  assert "onehot(21843)" in c["input.pp"] and "randaug(2, 10)" in c["input.pp"]
  assert c["optim.wd"] / c["optim.lr"] == pytest.approx(0.1)  # the weight_decay of AdamW


@pytest.mark.parametrize(
  ("spec", "images", "steps"),
  [
    ("i21k_sup:epochs=90", 14_145_922, 310_823),
    ("i21k_sup:epochs=300", 14_145_922, 1_036_078),
    ("i21k_sup:epochs=1000", 14_145_922, 3_453_594),
    ("i1k_sup:epochs=90", 1_268_355, 111_477),
    ("i1k_sup:epochs=300", 1_268_355, 371_588),
  ],
)
def test_lengths_of_the_imagenet_runs(spec, images, steps):
  c = load(spec)
  sizes = dict(batch_size=c["input"]["batch_size"], dataset_size=images)
  assert schedules.to_steps("total", epochs=c["total_epochs"], **sizes) == steps


def test_imagenet1k_is_the_plain_vit_recipe_at_ten_sizes():
  """big_vision configs/vit_s16_i1k.py, with the image and the grids of FlexiViT."""
  c = flat(load("i1k_sup"))
  expected = {
    "total_epochs": 90,
    "input.data.split": "train[:99%]",
    "input.batch_size": 1024,
    "objective.loss": "softmax_xent",
    "objective.mixup_p": 0.2,
    "model.variant": "S",
    "model.pool_type": "gap",
    "flexi.seqhw.v": TEN,
    "optim.lr": 1e-3,
    "optim.wd": 1e-4,
    "optim.clip": 1.0,
    "optim.schedule.warmup_steps": 10_000,
    "evals.test.data.split": "validation",
    "evals.val.data.split": "train[99%:]",
  }
  assert {k: c[k] for k in expected} == expected
  assert "inception_crop(240)|flip_lr|randaug(2, 10)" in c["input.pp"]
  assert "resize_small(272)|central_crop(240)" in c["evals.test.pp"]


def test_imagenet1k_distillation_is_the_papers():
  """big_vision configs/proj/flexivit/i1k_deit3_distill.py."""
  c = flat(load("i1k_distill"))
  expected = {
    "total_epochs": 90,
    "input.data.split": "train[:99%]",
    "input.batch_size": 1024,
    "objective.name": "distill",
    "objective.mixup_p": 1.0,
    "objective.teachers.deit3.model.variant": "S/16",
    "objective.teachers.deit3.model.posemb_size": (24, 24),
    "init.checkpoint": c["objective.teachers.deit3.checkpoint"],
    "model.variant": "S",
    "model.pool_type": "tok",
    "model.patch_size": (16, 16),
    "model.posemb_size": (7, 7),
    "flexi.seqhw.v": TEN,
    "optim.lr": 1e-4,
    "optim.wd": 1e-5,
    "optim.clip": 1.0,
    "optim.schedule.warmup_steps": 5000,
    "evals.test.data.split": "validation",
    "evals.val.data.split": "train[99%:]",
    "evals.train.data.split": "train[:2%]",
    "evals.v2.data.name": "imagenet_v2/matched-frequency",
    "evals.a.label_map": "i1k_a",
    "evals.r.label_map": "i1k_r",
    "evals.real.data.label_key": "real_label",
  }
  assert {k: c[k] for k in expected} == expected
  assert c["optim.wd"] / c["optim.lr"] == pytest.approx(0.1)  # the weight_decay of AdamW
  assert "resize(240)|value_range" in c["input.pp"] and "resize(384, key=" in c["input.pp"]
  assert "resize(272)|central_crop(240)" in c["evals.test.pp"]
  assert "resize(432, key='teacher_image')|central_crop(384, key=" in c["evals.far_test.pp"]


def test_imagenet21k_distillation_is_the_papers_with_its_preprocessing_mended():
  """big_vision configs/proj/flexivit/i21k_distill.py; there the teacher sees an almost constant picture."""
  settings = load("i21k_distill")
  c = flat(settings)
  expected = {
    "total_epochs": 90,
    "input.batch_size": 4096,
    "objective.mixup_p": 1.0,
    "model.patch_size": (8, 8),
    "model.posemb_size": (7, 7),
    "flexi.seqhw.v": TEN,
    "optim.lr": 1e-4,
    "optim.wd": 1e-5,
    "optim.schedule.warmup_steps": 5000,
    "objective.teachers.b8.model.variant": "B/8",
  }
  assert {k: c[k] for k in expected} == expected
  image = np.random.default_rng(0).integers(0, 255, (260, 300, 3), np.uint8)
  made = data.parse(c["input.pp"])({"image": image}, np.random.default_rng(1))
  student, teacher = made["image"], made["teacher_image"]
  assert (student.shape, teacher.shape) == ((240, 240, 3), (224, 224, 3))
  for x in (student, teacher):
    assert x.min() < -0.5 and x.max() > 0.5 and x.std() > 0.1
  small = [data.parse("resize(8)|keep('image')")({"image": x}, None)["image"] for x in (student, teacher)]  # fmt: skip
  assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.1  # of the same crop


@pytest.mark.parametrize(
  ("spec", "changed"),
  [
    ("i1k_distill:init=random", {"init"}),
    ("i1k_distill:kernel=48,grid=15", {"model.patch_size", "model.posemb_size"}),
    ("i21k_distill:resize=area", {"model.kernel_resize"}),
    ("i21k_distill:sizes=flops", {"flexi.seqhw.share"}),
    ("i21k_sup:sizes=coarse_to_fine", {"flexi.seqhw.stages"}),
    ("i21k_sup:finest=15", {"flexi.seqhw.v"}),
    ("miniature:sizes=adaptive", {"flexi.seqhw.adapt"}),
  ],
)
def test_an_ablation_changes_one_thing(spec, changed):
  a, b = flat(load(spec.partition(":")[0])), flat(load(spec))
  found = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
  assert {re.sub(r"^(init|flexi.seqhw.adapt)\..*", r"\1", k) for k in found} == changed


@pytest.mark.parametrize("variant", ["S", "B", "L"])
def test_the_distilled_variants_have_their_own_teacher(variant):
  c = load(f"i1k_distill:variant={variant}")
  teacher = c["objective"]["teachers"]["deit3"]
  assert teacher["model"]["variant"] == f"{variant}/16"
  assert {"S": "small", "B": "base", "L": "large"}[variant] in teacher["checkpoint"]
  assert c["model"]["variant"] == variant


@pytest.mark.parametrize(
  ("spec", "classes", "grids"),
  [
    ("transfer:data=food101,res=480", 101, (10, 12, 15, 16, 20, 24, 30, 32, 40, 48, 60)),
    ("transfer:data=imagenet2012,fixed=8,res=240", 1000, TEN),
    ("transfer:data=cifar10,res=224", 10, (7, 8, 14, 16, 28)),
  ],
)
def test_transfer_evaluates_all_patches_of_8_to_48_pixels(spec, classes, grids):
  c = load(spec)
  assert c["evals"]["test"]["seqhw"] == grids
  assert f"onehot({classes})" in c["input"]["pp"]


@pytest.mark.parametrize("name", ["i1k_sup", "i21k_sup"])
@pytest.mark.parametrize("variant", ["S", "B", "L"])
def test_imagenet_variants(name, variant):
  c = load(f"{name}:variant={variant}")
  assert (c["model"]["variant"], c["name"]) == (variant, f"FlexiViT-{variant}")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "digits"])
def test_one_override_moves_the_data_of_training_and_evaluation(name):
  c = load(name, "input.data.data_dir=/elsewhere")
  sections = [c["input"], *c["evals"].values()]
  assert {s["data"]["data_dir"] for s in sections} == {"/elsewhere"}


def test_camvid_trains_at_some_patch_sizes_and_evaluates_all():
  for argument, grids in (("fixed=16", ((15, 20),)), ("coarse=True", ((6, 8), (12, 16)))):
    c = load(f"segmenter_camvid:{argument}")
    assert c["flexi"]["grid_hw"]["v"] == grids and "only" in c["name"]
    assert c["evals"] == load("segmenter_camvid")["evals"]


# --- own images ---


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for name in ("cat", "dog", "fox"):
      folder = tmp_path / split / name
      folder.mkdir(parents=True)
      for i in range(8):
        Image.fromarray(rng.integers(0, 255, (90, 130, 3), np.uint8)).save(folder / f"{i}.jpg")
  return tmp_path


@pytest.fixture
def scenes(tmp_path) -> pathlib.Path:
  """Images with a grey square, and their masks, in colours and in numbers; void is no class."""
  for split in ("train", "val"):
    for i in range(9):
      image = np.random.default_rng(i).integers(0, 99, (60, 90, 3), np.uint8)
      mask = np.zeros((60, 90), np.uint8)
      image[10:40, 10 + i : 60], mask[10:40, 10 + i : 60], mask[50:] = 200, 1, 255
      colors = np.array([[0, 0, 0], [9, 8, 7]], np.uint8)[np.minimum(mask, 2) % 2]
      for folder, pixels in (("images", image), ("masks", mask), ("colors", colors)):
        path = tmp_path / "scenes" / folder / split / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
  (tmp_path / "scenes" / "classes.txt").write_text("ground\nsquare")
  return tmp_path / "scenes"


@pytest.fixture
def parts(tmp_path) -> pathlib.Path:
  """Images with a grey square, as boxes of COCO, with ids with a gap and one crowd, and of YOLO."""
  root, images = tmp_path / "parts", {}
  for split in ("train", "val"):
    rows = []
    for i in range(9):
      image = np.random.default_rng(i).integers(0, 99, (60, 90, 3), np.uint8)
      image[10:40, 10 + i : 60] = 200
      for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(root / f"images/{split}/{i}.png")
      cx, w = (70 + i) / 2 / 90, (50 - i) / 90
      (root / f"labels/{split}/{i}.txt").write_text(f"1 {cx} {25 / 60} {w} {30 / 60}\n")
      rows.append({"id": i, "image_id": i, "category_id": 7, "bbox": [10 + i, 10, 50 - i, 30]})
    rows.append({"id": 9, "image_id": 0, "category_id": 2, "bbox": [0, 0, 90, 60], "iscrowd": 1})
    images["images"] = [
      {"id": i, "file_name": f"{i}.png", "height": 60, "width": 90} for i in range(9)
    ]
    images["categories"] = [{"id": 2, "name": "ground"}, {"id": 7, "name": "square"}]
    (root / f"{split}.json").write_text(json.dumps({**images, "annotations": rows}))
  (root / "classes.txt").write_text("ground\nsquare")
  return root


@pytest.mark.parametrize("layout", ["coco", "yolo"])
def test_detect_folder_reads_own_boxes_and_pads_photos(parts, layout):
  overrides = ("input.batch_size=9", "evals.test.seqhw=(2,)", "flexi.seqhw.v=(2,)")
  spec = f"detect_folder:data={layout},data_dir={parts},crop=96"
  exp = experiment.from_config(load(spec, *overrides))
  assert exp.model.num_classes == 2 and exp.total_steps == 300
  assert exp.evaluations["test"].source.class_names == ("ground", "square")
  with exp.batches(0) as batches:
    batch = next(batches)
  assert batch["image"].shape == (9, 96, 96, 3) and batch["box_mask"].sum() == 9
  assert set(batch["box_labels"][batch["box_mask"] > 0]) == {1}
  evaluated = exp.evaluations["test"]
  examples = map(data.parse(evaluated.pp), evaluated.source.read(range(9)), [None] * 9)
  assert sum(made["box_crowd"].sum() for made in examples) == (1 if layout == "coco" else 0)
  record = evaluated.source[1]
  left = 10 + int(pathlib.Path(record["id"]).stem)
  made = data.parse(evaluated.pp)(record, np.random.default_rng(0))
  np.testing.assert_allclose(
    made["boxes"][0], [left / 90 * 96, 10 / 60 * 64, 60 / 90 * 96, 40 / 60 * 64], rtol=1e-5
  )
  assert (made["image"][64:] == 0).all() and made["image"][:64].any()


def test_segment_folder_reads_own_masks_and_names_their_classes(scenes):
  overrides: tuple[str, ...] = ("input.batch_size=9", "evals.test.seqhw=(2,)", "flexi.seqhw.v=(2,)")
  exp = experiment.from_config(load(f"segment_folder:data_dir={scenes},crop=96", *overrides))
  assert exp.model.num_classes == 2 and exp.total_steps == 200
  assert exp.evaluations["test"].source.class_names == ("ground", "square")
  with exp.batches(0) as batches:
    batch = next(batches)
  assert batch["image"].shape == (9, 96, 96, 3) and set(np.unique(batch["mask"])) == {-1, 0, 1}
  colors = "{'ground': [0, 0, 0], 'square': [9, 8, 7]}"
  overrides += (f"input.data.colors={colors}", f"evals.test.data.colors={colors}")
  overrides += ("input.data.images=images/{split}", "evals.test.data.images=images/{split}")
  overrides += ("input.data.masks=colors/{split}", "evals.test.data.masks=colors/{split}")
  exp = experiment.from_config(load(f"segment_folder:data_dir={scenes},crop=96", *overrides))
  with exp.batches(0) as batches:
    assert set(np.unique(next(batches)["mask"])) <= {-1, 0, 1}


@pytest.mark.parametrize("classes", ["", ",num_classes=3"])
def test_folder_reads_own_images_and_counts_their_classes(photos, classes):
  exp = experiment.from_config(load(f"folder:data_dir={photos}{classes}", "input.batch_size=12"))
  assert (exp.total_steps, exp.save_every, exp.model.num_classes) == (200, 20, 3)
  test = exp.evaluations["test"].source
  assert (len(test), test.class_names) == (24, ("cat", "dog", "fox"))
  with exp.batches(0) as batches:
    batch = next(batches)
  assert batch["image"].shape == (12, 120, 120, 3) and batch["labels"].shape == (12, 3)


def test_folder_divides_one_folder(photos):
  spec = f"folder:data_dir={photos},train=train[:75%],val=train[75%:]"
  exp = experiment.from_config(load(spec, "input.batch_size=6"))
  assert len(exp.evaluations["test"].source) == 6 and exp.steps_per_epoch == 3


@pytest.mark.parametrize("number", [2, 10])
def test_folder_with_another_number_of_classes_is_an_error(photos, number):
  spec = f"folder:data_dir={photos},num_classes={number}"
  with pytest.raises(errors.UserError, match=rf"\b{number}\b.*onehot\(3\).*num_classes out"):
    experiment.from_config(load(spec, "input.batch_size=6"))
