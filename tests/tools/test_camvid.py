"""tools/paper/camvid.py: each run is a config that loads, and its table is what the runs measured."""

import importlib.util
import json
import pathlib

from flexivit_jax import config, experiment

ROOT = pathlib.Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("camvid", ROOT / "tools/paper/camvid.py")
camvid = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(camvid)


def test_every_run_is_a_config_that_loads():
  for arguments in camvid.RUNS.values():
    experiment.check(
      config.load(f"{ROOT / camvid.CONFIG}:{arguments},init=vit.npz,data_dir=d,seed=1")
    )


def test_rows_are_means_over_seeds_and_their_range(tmp_path):
  for seed, miou in ((0, 0.5), (1, 0.6)):
    folder = tmp_path / f"seed{seed}" / "linear"
    folder.mkdir(parents=True)
    row = dict(boundary_iou=0.25, pixel_accuracy=0.75, ceiling=0.9, n=30)
    rows = [
      row | dict(seqhw="15x20", patch=16, gflops=2.0, miou=miou),
      row | dict(seqhw="6x8", patch=40, gflops=0.5, miou=miou - 0.2),
    ]
    (folder / "eval.json").write_text(json.dumps({"rows": rows}))
    parts = [
      {"saves": {"0": {"steps": 0.0}, "92": {"steps": 60.0}}},
      {"saves": {"367": {"steps": 120.0}}},
      {"saves": {}},
    ]
    (folder / "log.txt").write_text("grid_hw=6x8: ...\n2.26e+13 FLOPs expected in all\n")
    (folder / "ledger.json").write_text(json.dumps(parts))
  coarse, fine = camvid.measured("linear", tmp_path)
  assert (coarse["patch"], coarse["miou"], coarse["low"], coarse["high"]) == (
    40,
    "35.0",
    "30.0",
    "40.0",
  )
  assert (fine["miou"], fine["minutes"], fine["seeds"], fine["ceiling"]) == ("55.0", "3", 2, "90.0")
  assert coarse["TFLOPs"] == "23"
  assert camvid.measured("mask", tmp_path) == []
  assert camvid.table(tmp_path).splitlines()[-1].startswith("| linear | 35.0 (30.0 to 40.0) |")
