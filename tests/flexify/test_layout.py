"""Folders of images as people have them: what is trained on, what is held out, and what damaged images do."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from flexivit_jax import cli, data, experiment
from flexivit_jax.errors import UserError
from flexivit_jax.flexify import layout
from flexivit_jax.running import run_folder


def fill(root, layout_, number=6):
  """Makes `number` images in each of these folders."""
  rng = np.random.default_rng(0)
  for folder in layout_:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(number):
      pixels = rng.integers(0, 256, (36, 40, 3), np.uint8)
      Image.fromarray(pixels).save(root / folder / f"{i}.png")
  return root


LABELLED = ("cat", "dog")


def classes(*splits):
  return [f"{split}/{name}" for split in splits for name in LABELLED]


def ids(source):
  opened = data.make_source(**source)
  return {r["id"] for r in opened.read(range(len(opened)))}


@pytest.mark.parametrize(
  "folders, train, test, name",
  [
    # As always.
    (["."], 5, 1, "images"),
    (["holiday", "birds/2020"], 11, 1, "images"),
    (classes("."), 11, 1, "images"),
    (classes("train"), 11, 1, "folder"),
    (classes("train", "val"), 12, 12, "folder"),
    # Other names of what is held out.
    (classes("train", "test"), 12, 12, "folder"),
    (classes("train", "valid"), 12, 12, "folder"),
    (classes("train", "validation"), 12, 12, "folder"),
    (classes("train", "val", "test"), 12, 12, "folder"),
    ([*classes("train", "test"), "val/.ipynb_checkpoints"], 12, 12, "folder"),
    # Without classes, in one or in both.
    (["train"], 5, 1, "images"),
    (["train", "val"], 6, 6, "images"),
    (["train", "test"], 6, 6, "images"),
    ([*classes("train"), "val"], 12, 6, "folder"),
    (["train", *classes("val")], 6, 12, "images"),
  ],
)
def test_every_layout_is_divided_without_overlap(tmp_path, folders, train, test, name):
  found = layout.divide(fill(tmp_path, folders))
  sources = found.sources
  read = {key: ids(source) for key, source in sources.items()}
  assert (len(read["train"]), len(read["test"])) == (train, test)
  assert sources["train"]["name"] == name
  paths = [{(sources[k]["data_dir"], i) for i in read[k]} for k in ("train", "test")]
  assert not paths[0] & paths[1]
  assert found.notes[0].startswith(f"training on {train} images of {tmp_path}")
  assert f"measured on {test} images of" in found.notes[0]


def test_what_is_not_used_is_said(tmp_path):
  found = layout.divide(fill(tmp_path, classes("train", "val", "test")))
  assert found.sources["test"]["split"] == "val"
  assert found.notes[1:] == [f"{tmp_path}/test is not used: {tmp_path}/val is held out"]


@pytest.mark.parametrize(
  "folders, number, match",
  [
    (["."], 4, r"has 4 images; at least 5 are needed, of which a tenth is held out"),
    (["."], 6, r"has 5 images to train on, fewer than the 8 of a step; .*--batch_size=5"),
    (["train", "val"], 6, r"has 6 images to train on, fewer than the 8"),
    (["train/.hidden", "val"], 6, r"No images below .*train; put some there"),
    ([".hidden"], 6, r"No images below"),
  ],
)
def test_too_few_images_are_one_clear_line(tmp_path, folders, number, match):
  with pytest.raises(UserError, match=match) as info:
    layout.divide(fill(tmp_path, folders, number), 8)
  assert "\n" not in str(info.value)


def test_classes_without_images_do_not_matter_where_no_label_trains(tmp_path):
  (fill(tmp_path, classes("train", "val")) / "train" / "owl").mkdir()
  found = layout.divide(tmp_path, 8).sources
  assert found["train"]["allow_empty"] and len(ids(found["train"])) == 12


@pytest.mark.parametrize("where", ("val", pytest.param("train", marks=pytest.mark.slow)))
def test_a_damaged_image_is_named_and_left_out_as_asked(
  tmp_path, timm_state_dict, where, capfd, caplog
):
  save_file(timm_state_dict(), tmp_path / "vit.safetensors")
  photos = fill(tmp_path / "photos", ["train", "val"], 12)
  (photos / where / "3.png").write_bytes(b"<html>404</html>")
  epochs = int(where == "train")
  given = [
    "flexify", f"--init={tmp_path / 'vit.safetensors'}", f"--data={photos}", "--num_heads=4",
    f"--out={tmp_path / 'out'}", "--image_size=32", "--seqhw=4", "--batch_size=4", f"--epochs={epochs}", "--moment",
  ]  # fmt: skip
  assert cli.main(given) == 2
  said = capfd.readouterr().err.splitlines()[-1]
  assert f"'3.png' in {photos / where}" in said
  assert said.endswith("give --on_error=skip to leave out what is damaged.")
  assert cli.main([*given, "--on_error=skip"]) == 0
  kept = json.loads((tmp_path / "out" / "retention.json").read_text())
  assert {row["n"] for row in kept["before"]} == {12 - (where == "val")}
  assert f"{photos / where}: left out 1 of 12 images, which cannot be read" in caplog.text


def training(tmp_path):
  """A config, and the path of the example whose shapes are looked at."""
  fill(tmp_path / "photos", classes("train"), 8)
  source = dict(name="folder", split="train", data_dir=str(tmp_path / "photos"))
  settings = dict(
    input=dict(
      data=source,
      pp="decode|resize(12)|value_range|onehot(2)|keep('image', 'labels')",
      batch_size=4,
      keep_mb=0,
    ),
    total_steps=4,
    model=dict(name="flexivit", variant="mu", depth=1, patch_size=(6, 6)),
    checkpoint=dict(every_steps=1),
    optim=dict(lr=1e-3, schedule=dict(warmup_steps=1)),
  )
  return settings, tmp_path / "photos" / data.make_source(**source)[0]["id"]


def test_the_first_example_may_be_damaged_too(tmp_path):
  settings, first = training(tmp_path)
  first.write_bytes(b"")
  with pytest.raises(UserError, match=rf"{first.name}.*--config.input.on_error=skip"):
    experiment.from_config(settings)
  settings["input"]["on_error"] = "skip"
  assert experiment.from_config(settings).image_shape == (12, 12, 3)


def test_a_run_may_go_on_with_another_word_on_damaged_images():
  for key in ("input.on_error", "input.max_errors", "input.data.allow_empty"):
    assert not run_folder.is_identity(key, {})
  assert run_folder.is_identity("input.data.upright", {})


@pytest.mark.slow
def test_what_train_advises_works_for_the_run_that_was_stopped(tmp_path, capfd):
  settings, first = training(tmp_path)
  config = tmp_path / "c.py"
  config.write_text(
    "from ml_collections import ConfigDict\n"
    f"def get_config(arg=None):\n  return ConfigDict({settings})\n"
  )
  given = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  assert cli.main([*given, "--config.total_steps=2"]) == 0
  first.write_bytes(b"")
  assert cli.main(given) == 2
  said = capfd.readouterr().err.splitlines()[-1]
  assert first.name in said and "--config.input.on_error=skip" in said
  assert cli.main([*given, "--config.input.on_error=skip"]) == 0
