"""`flexivit bench`: what it prints is what it measured, for the sizes that were asked for."""

import csv
import itertools
import re

import pytest

from flexivit_jax import cli, errors, trees
from flexivit_jax.commands import bench as command
from flexivit_jax.devices import compilation
from flexivit_jax.experiment import benchmarks as bench
from flexivit_jax.models import FlexiViT, grid
from flexivit_jax.models.flops import gmacs

SMALL = ["--variant=mu", "--batch_size=2", "--image_size=48", "--seqhw=2,4x2", "--rounds=2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """Of one call with everything that is quick."""
  file = tmp_path_factory.mktemp("bench") / "bench.csv"
  assert cli.main(["bench", "--forward", "--train", "--compile", *SMALL, f"--out={file}"]) == 0
  with file.open() as opened:
    return list(csv.DictReader(opened))


@pytest.mark.parametrize("name", ["forward", "train", "compile"])
def test_each_size_has_a_row(rows, name):
  made = [row for row in rows if row["bench"] == name and row["tokens"] != "all"]
  assert [(row["patch_size"], row["tokens"]) for row in made] == [("24", "4"), ("12x24", "8")]


@pytest.mark.parametrize(
  ("name", "kind", "passes"), [("forward", "infer", 1), ("train", "train", 3)]
)
def test_rates_follow_from_the_time_and_the_gmacs(rows, name, kind, passes):
  model = FlexiViT(num_classes=1000, variant="mu")
  for row in (row for row in rows if row["bench"] == name):
    seconds = float(row[f"{kind}_step_time"]) / 1e3
    grid_hw = (2, 2) if row["patch_size"] == "24" else (4, 2)
    macs = gmacs(model, {"image": (48, 48, 3)}, grid_hw=grid_hw)
    assert float(row[f"{kind}_samples_per_sec"]) == pytest.approx(2 / seconds)
    assert float(row["gflops_per_s"]) == pytest.approx(2 * passes * macs * 2 / seconds)
    assert float(row["of_peak"]) > 0 and float(row["peak_mib"]) > 0


@pytest.mark.full
def test_every_form_of_attention_that_can_run_here_is_measured_and_the_others_say_why(capsys):
  assert (
    cli.main(["bench", "--attention=all", "--forward", *SMALL[:-2], "--seqhw=2", "--rounds=1"]) == 0
  )
  printed = capsys.readouterr().out
  for form, star in (("einsum", " "), ("heads_first", " *"), ("one_by_one", " ")):
    assert re.search(rf"^ *{form}{re.escape(star)} +FlexiViT-mu", printed, re.MULTILINE)
  assert "attention=splash is not measured: its kernel is for TPUs" in printed
  assert "attention=cudnn is not measured: its kernel is for NVIDIA's GPUs" in printed


def test_forms_that_cannot_run_here_are_named_with_the_reason(capsys):
  assert bench.forms(FlexiViT(variant="mu")) == ["einsum", "heads_first", "one_by_one"]
  printed = capsys.readouterr().out
  assert "attention=splash is not measured: its kernel is for TPUs" in printed
  assert "attention=cudnn is not measured: its kernel is for NVIDIA's GPUs" in printed


def test_a_form_that_does_not_fit_into_memory_does_not_end_the_others(capsys):
  model = FlexiViT(num_classes=2, variant="mu")

  def measure(model):
    if model.attention == "einsum":
      raise compilation.OutOfMemory("8 GiB")
    return [{"tokens": 300}, {"tokens": 4}]

  rows = bench.each_form(measure, model, ["einsum", "heads_first", "one_by_one"])
  assert [(r["tokens"], r["attention"]) for r in rows] == [
    (4, "heads_first *"), (4, "one_by_one"), (300, "heads_first"), (300, "one_by_one *"),
  ]  # fmt: skip
  assert (
    "attention=einsum is not measured; give fewer tokens or images. 8 GiB"
    in capsys.readouterr().out
  )


def test_functions_take_turns_and_short_ones_are_called_more_often():
  called = []
  clock = itertools.count()

  def make(name, ticks):
    def once():
      called.append(name)
      for _ in range(ticks):
        next(clock)

    return once

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bench.time, "perf_counter", lambda: next(clock) / 1000)
    times = bench.alternate({"short": make("short", 4), "long": make("long", 99)}, rounds=3)
  assert [name for name, _ in itertools.groupby(called)] == ["short", "long"] * 4
  assert times["long"] == pytest.approx([0.1] * 3)
  assert times["short"] == pytest.approx([0.0041] * 3)  # one call's share of ten


def test_the_sizes_are_patches_of_8_to_48_pixels():
  assert grid.paper_sizes(240) == [5, 6, 8, 10, 12, 15, 16, 20, 24, 30]


def test_input_is_measured_per_core():
  settings = dict(
    total_steps=1000,
    input=dict(
      data=dict(name="digits", split="train"),
      pp="resize(24)|value_range(-1, 1)|onehot(10)|keep('image', 'labels')",
      batch_size=8,
    ),
    flexi=dict(seqhw=dict(v=(2,))),
    model=dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(12, 12), posemb_size=(2, 2)),
    optim=dict(lr=1e-3),
  )
  row = bench.reading(settings, seconds=0.2)
  assert row["image"] == "24x24x3" and row["images"] % 8 == 0 and row["images_per_core_s"] > 0


def test_a_step_takes_the_memory_of_the_state_before_it():
  _, state, programs = bench.training(FlexiViT(num_classes=10, variant="mu"), [2], 2, 48)
  held = trees.size_in_bytes((state.params, state.opt_state))
  assert programs.update.run.memory_analysis().alias_size_in_bytes >= 0.99 * held


def test_nothing_to_measure_is_an_error():
  with pytest.raises(errors.UserError, match="give --forward"):
    command.run(cli.parse(["bench"]))


@pytest.mark.slow
def test_the_second_start_is_faster():
  cold, warm = bench.starting("configs/digits.py:debug=True")
  assert (cold["programs"], warm["programs"]) == ("cold", "warm")
  assert warm["first_step_s"] < cold["first_step_s"]
