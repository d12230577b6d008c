"""Every config of the repository is complete, says what it claims, and runs end to end."""

import copy
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import config, errors, experiment, metrics, patch_schedule, schedules, train

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem != "__init__")
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
  full = load(name)
  config.check("", full, experiment.build)
  optional = {k: full.get(k, {}) for k in ("objective", "evals", "checkpoint")}
  required = {k: full[k] for k in ("input", "model", "optim")}
  experiment.check_sections(**required, **optional)
  patch_schedule.parse(full["flexi"])


@pytest.mark.parametrize("name", NAMES)
def test_debug_form_is_the_same_experiment_on_synthetic_data(name):
  full, debug = flat(load(name)), flat(load(f"{name}:debug"))
  changed = {k for k in full.keys() | debug.keys() if full.get(k) != debug.get(k)}
  smaller = r"(input|evals\.\w+)\.(data\.\w+|batch_size)|(\w+\.)*(total|every|warmup)_\w+"
  fewer = r"evals\.(?!test)\w+\..*"
  tiny = r"model\.(depth|variant)"
  assert not [k for k in changed if not re.fullmatch(f"{smaller}|{fewer}|{tiny}", k)]


@pytest.mark.parametrize("name", NAMES)
def test_debug_form_has_two_evaluations_and_two_checkpoints(name):
  exp = experiment.build(**load(f"{name}:debug"))
  assert (exp.total_steps, exp.save_every) == (4, 2)
  assert {e.every for e in exp.evaluations.values()} == {2}
  assert exp.flexi["seqhw"].values == load(name)["evals"]["test"]["seqhw"]


@pytest.mark.parametrize("name", NAMES)
def test_every_misspelt_key_is_an_error_that_names_the_right_one(name, tmp_path):
  settings = load(f"{name}:debug")
  keys = [k for k in sections_and_keys(settings) if not re.fullmatch(r"evals\.\w+", k)]
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


@pytest.mark.parametrize("name", NAMES)
def test_fixed_trains_one_size_and_evaluates_all(name):
  flexible, fixed = load(name), load(f"{name}:fixed=8")
  assert fixed["flexi"]["seqhw"]["v"] == (8,)
  assert fixed["name"] != flexible["name"] and re.search(r"patch \d+ only", fixed["name"])
  for key in ("evals", "optim", "model", "input"):
    assert fixed[key] == flexible[key]


# --- end to end ---


class KilledError(Exception):
  pass


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[] if n in ("digits", "cifar10") else pytest.mark.slow) for n in NAMES],
)
def test_runs_end_to_end_and_resumes(name, tmp_path, monkeypatch, capsys):
  settings = load(f"{name}:debug")
  draw = patch_schedule.draw

  def draw_or_die(flexi, *, seed, step):
    if step == 2:
      raise KilledError
    return draw(flexi, seed=seed, step=step)

  with monkeypatch.context() as patch, pytest.raises(KilledError):
    patch.setattr(patch_schedule, "draw", draw_or_die)
    train.train(settings, tmp_path)
  assert checkpoints(tmp_path) == [2] and not (tmp_path / "eval.json").exists()

  train.train(settings, tmp_path)
  assert (
    f"checkpoints/2: step 2/4, epoch {2 * 8 / examples(settings):.2f}" in capsys.readouterr().err
  )
  assert checkpoints(tmp_path) == [4]
  check_metrics(metrics.read_rows(tmp_path / "metrics.jsonl"), settings)
  for i, name in enumerate(settings["evals"]):
    file = tmp_path / ("eval.json" if i == 0 else f"eval_{name}.json")
    check_results(json.loads(file.read_text()), settings, settings["evals"][name])


def checkpoints(run: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in (run / "checkpoints").glob("[0-9]*"))


def examples(settings: dict[str, Any]) -> int:
  return {"train[:16]": 16}[settings["input"]["data"]["split"]]


def check_metrics(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
  grids = settings["flexi"]["seqhw"]["v"]
  assert [r["step"] for r in rows] == [1, 2, 3, 4]
  assert all(np.isfinite([r["loss"], r["grad_norm"], r["schedule"]]).all() for r in rows)
  assert all(r["seqhw"] in grids for r in rows)
  for name, section in settings["evals"].items():
    keys = {f"{name}/{k}/seqhw={s}" for k in ("top1", "top5", "loss") for s in section["seqhw"]}
    assert [keys <= r.keys() for r in rows] == [False, True, False, True]


def check_results(
  results: dict[str, Any], settings: dict[str, Any], section: dict[str, Any]
) -> None:
  assert (results["dataset"], results["step"]) == ("synthetic", 4)
  assert results["split"] == section["data"]["split"]
  assert results["trained_seqhw"] == list(settings["flexi"]["seqhw"]["v"])
  assert [r["seqhw"] for r in results["rows"]] == list(section["seqhw"])
  for row in results["rows"]:
    assert row["tokens"] == row["seqhw"] ** 2
    assert row["n"] == 20  # The last of three batches of 8 is filled up.
    assert 0 <= row["top1"] <= row["top5"] <= 1 and row["gflops"] > 0 and row["ms"] > 0


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


@pytest.mark.parametrize("name", ["i1k_sup", "i21k_sup"])
@pytest.mark.parametrize("variant", ["S", "B", "L"])
def test_imagenet_variants(name, variant):
  c = load(f"{name}:variant={variant}")
  assert (c["model"]["variant"], c["name"]) == (variant, f"FlexiViT-{variant}")


@pytest.mark.parametrize("name", ["cifar10", "i1k_sup", "i21k_sup", "folder"])
def test_one_override_moves_the_data_of_training_and_evaluation(name):
  c = load(name, "input.data.data_dir=/elsewhere")
  sections = [c["input"], *c["evals"].values()]
  assert {s["data"]["data_dir"] for s in sections} == {"/elsewhere"}


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


def test_folder_reads_own_images(photos):
  exp = experiment.build(**load(f"folder:data_dir={photos},num_classes=3", "input.batch_size=12"))
  assert (exp.total_steps, exp.save_every, exp.model.num_classes) == (200, 20, 3)
  test = exp.evaluations["test"].source
  assert (len(test), test.class_names) == (24, ("cat", "dog", "fox"))
  with exp.batches(0) as batches:
    batch = next(batches)
  assert batch["image"].shape == (12, 120, 120, 3) and batch["labels"].shape == (12, 3)


def test_folder_divides_one_folder(photos):
  parts = ["input.data.split=train[:75%]", "evals.test.data.split=train[75%:]"]
  spec = f"folder:data_dir={photos},num_classes=3"
  exp = experiment.build(**load(spec, "input.batch_size=6", *parts))
  assert len(exp.evaluations["test"].source) == 6 and exp.steps_per_epoch == 3


def test_folder_with_another_number_of_classes_is_an_error(photos):
  with pytest.raises(errors.UserError, match=r"labels of shape \(10,\).*use onehot\(3\)"):
    experiment.build(**load(f"folder:data_dir={photos}", "input.batch_size=6"))
