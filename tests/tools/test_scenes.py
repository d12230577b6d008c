"""tools/paper/scenes.py: each run is a config that loads, and its table is what the runs measured."""

import importlib.util
import json
import pathlib

from flexivit_jax import config, experiment

ROOT = pathlib.Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("scenes", ROOT / "tools/paper/scenes.py")
scenes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scenes)
FILES = {"init": "a", "data_dir": "b", "photos": "", "vectors": "v.npz", "shuffled": "s.npz"}


def test_every_run_is_a_config_that_loads():
  drawn, vectors = {}, {}
  for name in scenes.RUNS:
    settings = config.load(f"{ROOT / scenes.spec(name, FILES, 'steps=9,seed=1')}")
    experiment.check(settings)
    assert settings["total_steps"] == 9 and settings["seed"] == 1
    drawn[name], vectors[name] = settings["flexi"]["seqhw"]["v"], settings["evals"]["test"]["vectors"]  # fmt: skip
  assert drawn == {"flexible": (4, 6, 8, 12), "p16": (12,), "p32": (6,), "shuffled": (4, 6, 8, 12)}
  assert vectors == dict.fromkeys(("flexible", "p16", "p32"), "v.npz") | {"shuffled": "s.npz"}


def test_rows_are_means_over_seeds_and_their_range(tmp_path):
  for seed, novel in ((0, 0.25), (1, 0.5)):
    folder = tmp_path / f"seed{seed}" / "p16"
    folder.mkdir(parents=True)
    row = dict(ap50=0.5, ap50_base=0.6, ap=0.4, ceiling_recall=1.0, dropped_boxes=0, n=30)
    rows = [
      row | dict(patch=16, tokens=144, gflops=2.0, ap50_novel=novel),
      row | dict(patch=48, tokens=16, gflops=0.25, ap50_novel=novel - 0.25),
    ]
    (folder / "eval.json").write_text(json.dumps({"rows": rows}))
    (folder / "log.txt").write_text("2.26e+13 FLOPs expected in all\n")
    (folder / "ledger.json").write_text(
      json.dumps([{"saves": {"367": {"steps": 120.0}}}, {"saves": {}}])
    )
  coarse, fine = scenes.measured("p16", tmp_path)
  assert (coarse["patch"], coarse["novel"], coarse["base"]) == (48, "12.5", "60.0")
  assert (fine["novel"], fine["novel_low"], fine["novel_high"]) == ("37.5", "25.0", "50.0")
  assert (fine["TFLOPs"], fine["minutes"], fine["seeds"], fine["ceiling"]) == ("23", "2", 2, "100.0")  # fmt: skip
  assert scenes.measured("flexible", tmp_path) == []
  last = scenes.table([coarse, fine]).splitlines()[-1]
  assert last == "| p16 | 60.0 / 12.5 | 60.0 / 37.5 | 23 | 2 | 2 |"
