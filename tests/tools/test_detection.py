"""tools/paper/detection.py: each run is a config that loads, and its table is what the runs measured."""

import importlib.util
import json
import pathlib

from flexivit_jax import config, experiment

ROOT = pathlib.Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("detection", ROOT / "tools/paper/detection.py")
detection = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(detection)
FILES = {"init": "a", "data_dir": "b", "photos": "", "vectors": "v.npz", "shuffled": "s.npz"}


def test_every_run_is_a_config_that_loads():
  drawn, vectors = {}, {}
  for task, made in detection.MINIATURES.items():
    for name in made.runs:
      spec = detection.spec(made, name, FILES, "seed=1")
      settings = config.load(f"{ROOT / spec}")
      experiment.check(settings)
      [sizes] = settings["flexi"].values()
      drawn[task, name] = sizes["v"]
      vectors[task, name] = settings["evals"]["test"].get("vectors")
      assert settings["seed"] == 1 and settings["input"]["data"]["data_dir"] == "b"
  assert drawn["emoji", "flexible"] == drawn["emoji", "shuffled"] == (4, 6, 8, 12)
  assert drawn["emoji", "p16"] == (12,) and drawn["bccd", "p40"] == ((6, 8),)
  assert drawn["bias", "corner_5"] == (5,) and drawn["bias", "centre_15"] == (15,)
  assert vectors["emoji", "p16"] == "v.npz" and vectors["emoji", "shuffled"] == "s.npz"


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
    alone = [{"tokens": row["tokens"], "ap50": row["ap50_novel"] * 2} for row in rows]
    (folder / "eval_novel.json").write_text(json.dumps({"rows": alone}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    (folder / "log.txt").write_text("2.26e+13 FLOPs expected in all\n")
    (folder / "ledger.json").write_text(
      json.dumps([{"saves": {"367": {"steps": 120.0}}}, {"saves": {}}])
    )
  coarse, fine = detection.measured("p16", tmp_path)
  assert (coarse["patch"], coarse["novel"], coarse["base"]) == (48, "12.5", "60.0")
  assert (fine["novel"], fine["novel_low"], fine["novel_high"]) == ("37.5", "25.0", "50.0")
  assert (coarse["novel_alone"], fine["novel_alone_high"]) == ("25.0", "100.0")
  assert (fine["TFLOPs"], fine["minutes"], fine["seeds"], fine["ceiling"]) == ("23", "2", 2, "100.0")  # fmt: skip
  assert detection.measured("flexible", tmp_path) == []
  last = detection.table([coarse, fine], ("base", "novel")).splitlines()[-1]
  assert last == "| p16 | 60.0 / 12.5 | 60.0 / 37.5 | 23 | 2 | 2 |"
