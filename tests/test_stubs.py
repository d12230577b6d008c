"""Three tasks, each in one file, are planned, trained and resumed by the trainer as it is."""

import contextlib
import csv
import json
import re

import numpy as np
import pytest

from flexivit_jax import cli, config, data, experiment, train as train_lib, trees
from flexivit_jax.errors import UserError
from flexivit_jax.experiment import preparation
from flexivit_jax.running import checkpoint, metrics_writer

TASKS = ("image_text", "segmentation", "detection")


@pytest.fixture
def load(repository, monkeypatch):
  """Loads a stub's config; what its file registers is gone after the test."""
  from flexivit_jax.data.preprocess import OPS
  from flexivit_jax.models import MODELS
  from flexivit_jax.objectives import OBJECTIVES

  tables = [(table, dict(table)) for table in (MODELS, OBJECTIVES, OPS)]
  yield lambda task, *overrides: config.load(str(repository / f"tests/stubs/{task}.py"), overrides)
  for table, before in tables:
    table.clear()
    table.update(before)


@pytest.mark.parametrize(
  "task", ["detection", *(pytest.param(task, marks=pytest.mark.full) for task in TASKS[:2])]
)
def test_a_task_is_planned(task, load, repository, capsys):
  load(task)  # so that what it registers is taken back
  cli.main(["plan", str(repository / f"tests/stubs/{task}.py"), "--json"])
  plan = json.loads(capsys.readouterr().out)
  assert [row["tokens"] for row in plan["sizes"]] == [4, 9, 16]
  shares = [row["share_of_flops"] for row in plan["sizes"]]
  np.testing.assert_allclose(shares, 1 / 3, rtol=1e-6)
  assert plan["sizes"][0]["gmacs"] < plan["sizes"][2]["gmacs"]
  assert plan["lowered"]["8"] == "3 training steps lowered"
  assert plan["memory"]["1"]["activations"] > 0


@pytest.mark.full
def test_the_step_of_a_task_is_timed(load, repository, tmp_path):
  load("segmentation")  # so that what it registers is taken back
  stub, file = repository / "tests/stubs/segmentation.py", tmp_path / "bench.csv"
  assert cli.main(["bench", f"--step={stub}", "--rounds=2", f"--out={file}"]) == 0
  with file.open() as lines:
    rows = list(csv.DictReader(lines))
  assert [(row["model"], row["tokens"]) for row in rows] == [
    ("Segmenter", n) for n in ("4", "9", "16")
  ]
  plan = experiment.from_config(load("segmentation"))
  for row, size in zip(rows, (2, 3, 4), strict=True):
    flops = float(row["gflops_per_s"]) * 1e6 * float(row["train_step_time"])
    np.testing.assert_allclose(flops, plan.step_flops({"seqhw": size}), rtol=1e-6)
    assert float(row["peak_mib"]) > 0 and row["train_batch_size"] == "8"


@pytest.mark.full
@pytest.mark.parametrize("task", ["image_text", "detection"])  # segmentation's is below
def test_a_task_is_trained_resumed_and_the_same_in_microbatches(task, load, train_until, tmp_path):
  settings = load(task)
  whole = losses(train_lib.train(settings, tmp_path / "whole"))
  assert np.isfinite(whole).all() and len(whole) == 4
  train_until(settings, tmp_path / "stopped", 3)
  assert losses(train_lib.train(settings, tmp_path / "stopped")) == whole
  four = losses(train_lib.train(settings | {"accumulate": 4}, tmp_path / "four"))
  # The first losses: later ones are of parameters that rounding has moved.
  np.testing.assert_allclose(four[0], whole[0], rtol=1e-6)
  np.testing.assert_allclose(four, whole, rtol=1e-3)


def segmenter(load, fields):
  """Our own model and loss on the stub's data; patches of 5 pixels do not divide its 24."""
  return load(
    "segmentation",
    f"model={dict(name='segmenter', **fields)}",
    "objective={'name': 'segmentation', 'loss': {'cross_entropy': 1.0, 'dice': 0.5}}",
    "flexi.seqhw.v=(2, 5)",
  )


@pytest.mark.full
def test_a_segmenter_is_resumed_to_the_bit(load, train_until, tmp_path):
  backbone = dict(
    variant="mu", depth=2, stochastic_depth=0.5
  )  # which is drawn, as its decoder's dropout is
  settings = segmenter(load, dict(backbone=backbone))
  whole = losses(train_lib.train(settings, tmp_path / "whole"))
  assert np.isfinite(whole).all() and len(set(whole)) == 4
  train_until(settings, tmp_path / "stopped", 3)
  assert losses(train_lib.train(settings, tmp_path / "stopped")) == whole
  runs = (tmp_path / "whole", tmp_path / "stopped")
  assert len({trees.digest(checkpoint.load_params(run)[0]) for run in runs}) == 1


@pytest.mark.full
def test_a_segmenter_is_the_same_in_microbatches(load, tmp_path):
  """Images have different numbers of pixels with a class, by which they weigh."""
  settings = segmenter(load, dict(backbone=dict(variant="mu"), decoder_dropout=0.0))
  whole = losses(train_lib.train(settings, tmp_path / "whole"))
  four = losses(train_lib.train(settings | {"accumulate": 4}, tmp_path / "four"))
  np.testing.assert_allclose(four[0], whole[0], rtol=1e-6)
  np.testing.assert_allclose(four, whole, rtol=1e-3)


def detector(load, **fields):
  """Our own model and loss on the stub's data."""
  model = dict(name="owl_vit", backbone=dict(variant="mu", stochastic_depth=0.5), embed_dim=16)
  return load("detection", f"model={model | fields}", "objective={'name': 'detection'}")


@pytest.mark.full
def test_a_detector_is_resumed_to_the_bit(load, train_until, tmp_path):
  settings = detector(load)
  whole = losses(train_lib.train(settings, tmp_path / "whole"))
  assert np.isfinite(whole).all() and len(set(whole)) == 4
  train_until(settings, tmp_path / "stopped", 3)
  assert losses(train_lib.train(settings, tmp_path / "stopped")) == whole
  runs = (tmp_path / "whole", tmp_path / "stopped")
  assert len({trees.digest(checkpoint.load_params(run)[0]) for run in runs}) == 1


@pytest.mark.full
@pytest.mark.parametrize("normalization", ["example", "global"])
def test_a_detector_is_the_same_in_microbatches(load, tmp_path, normalization):
  settings = detector(load, backbone=dict(variant="mu"))
  settings["objective"] = settings["objective"] | {"normalization": normalization}
  whole = losses(train_lib.train(settings, tmp_path / "whole"))
  four = losses(train_lib.train(settings | {"accumulate": 4}, tmp_path / "four"))
  np.testing.assert_allclose(four[0], whole[0], rtol=1e-6)
  np.testing.assert_allclose(four, whole, rtol=1e-3)


@pytest.mark.full
def test_in_as_many_microbatches_as_memory_asks_for_a_loss_over_the_batch_is_the_same(
  load, tmp_path, capsys
):
  settings = load("image_text", "input.batch_size=32", "flexi.seqhw.v=(8,)")
  exp, mesh = preparation.place(experiment.from_config(settings))
  state = preparation.first_state(exp, mesh)
  with contextlib.ExitStack() as stack:
    step = preparation.compile_step(exp, state, mesh, stack.enter_context)
  (program,) = step.programs.gradients.values()
  needed = program.bytes + trees.size_in_bytes(state.opt_state)
  whole = losses(train_lib.train(settings, tmp_path / "whole"))
  auto = settings | {"accumulate": "auto", "memory_gib": (needed - 2**18) / 2**30}
  capsys.readouterr()
  parts = losses(train_lib.train(auto, tmp_path / "auto"))
  assert re.search(r"seqhw=8: .* in \d+ parts", capsys.readouterr().err)
  np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
  np.testing.assert_allclose(parts, whole, rtol=1e-3)


@pytest.mark.full
def test_a_bad_step_of_a_task_is_replayed_by_its_config(load, repository, tmp_path, capsys):
  with pytest.raises(UserError, match="flexivit replay"):
    train_lib.train(load("image_text", "optim.lr=1e38", "accumulate=2"), tmp_path)
  stub, dump = repository / "tests/stubs/image_text.py", str(tmp_path / "bad_step.json")
  assert cli.main(["replay", dump, f"--config={stub}"]) == 0
  assert "as in the dump" in capsys.readouterr().out


def losses(workdir):
  return [row["loss"] for row in metrics_writer.read_rows(workdir / "metrics.jsonl")]


def test_annotated_images_agree_with_their_annotations():
  source = data.make_source(
    name="synthetic", split="train", image_size=40, num_examples=20, annotated=True
  )
  for i in range(20):
    record = source[i]
    mask, image = record["mask"], record["image"]
    inside = np.zeros(mask.shape, bool)
    for (x0, y0, x1, y1), label in zip(
      record["boxes"].astype(int), record["box_labels"], strict=True
    ):
      inside[y0:y1, x0:x1] = True
      assert f"class {label}" in record["captions"][0]
    np.testing.assert_array_equal(mask != 255, inside)
    for label in np.unique(mask[mask != 255]):
      assert len(np.unique(image[mask == label], axis=0)) == 1 and label in record["box_labels"]
    x0, y0, x1, y1 = record["boxes"][-1].astype(int)  # which nothing hides
    assert (mask[y0:y1, x0:x1] == record["box_labels"][-1]).all()
  ids = np.concatenate([source[i]["box_ids"] for i in range(20)])
  assert len(set(ids.tolist())) == len(ids)
