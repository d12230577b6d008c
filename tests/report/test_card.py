"""The model card of a run: its front matter is YAML that the hub reads, and its numbers are those of eval.json."""

import json

import pytest
import yaml

from flexivit_jax import cli

HOSTILE = "a: b # | <img src=x onerror=alert(1)> `*_[x](y) \"'\n---\n- é"


@pytest.fixture
def run(tmp_path):
  """Makes a run folder; its headline is `metric`."""

  def make(metric="top1", name="ours", **over):
    stated = {"name": metric, "better": "max", "unit": "%", "interval": None}
    rows = [
      {
        "seqhw": grid,
        "patch": 48 // grid,
        "tokens": grid**2,
        "gflops": 0.5,
        "n": 50,
        metric: grid / 16,
      }
      for grid in (8, 2, 4)
    ]
    data = {"name": name, "dataset": "cifar10", "split": "test", "metrics": [stated], "rows": rows}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(data | {"trained_seqhw": [2, 4]} | over))
    return folder

  return make


def card(folder, *more):
  file = folder / "README.md"
  assert cli.main(["report", str(folder), f"--card={file}", *more]) in (None, 0)
  start, front, body = file.read_text("utf-8").split("---\n", 2)
  assert start == ""
  return yaml.safe_load(front), body


@pytest.mark.parametrize(
  ("metric", "task", "kind"),
  [
    ("top1", "image-classification", "accuracy"),
    ("miou", "image-segmentation", "mean_iou"),
    ("ap", "object-detection", "mean_average_precision"),
  ],
)
def test_results_of_each_task(run, metric, task, kind):
  front, body = card(run(metric))
  (model,) = front["model-index"]
  (result,) = model["results"]
  assert front["pipeline_tag"] == result["task"]["type"] == task and model["name"] == "ours"
  assert result["dataset"] == {"name": "cifar10", "type": "cifar10", "split": "test"}
  assert [(m["type"], m["value"]) for m in result["metrics"]] == [
    (kind, 12.5),
    (kind, 25),
    (kind, 50),
  ]
  assert "| 24 | 2 | 12.5 | 0.5 | 50 |" in body and "Not trained: seqhw 8." in body
  assert "license" not in front and "--seqhw 4" in body


@pytest.mark.parametrize(("metric", "dataset"), [("mystery", "cifar10"), ("top1", "")])
def test_what_is_not_known_is_left_out(run, metric, dataset):
  front, body = card(run(metric, dataset=dataset))
  assert "model-index" not in front and "| 6 | 8 | 50.0 |" in body


def test_names_are_texts_and_no_markup(run):
  front, body = card(run(name=HOSTILE, dataset=HOSTILE))
  assert front["model-index"][0]["results"][0]["dataset"]["name"] == " ".join(HOSTILE.split())
  for line in body.splitlines():
    if "img" in line:
      assert "\\<img" in line and "\\`" in line and "\\[x\\]" in line
  assert body.count("\n---") == 0


def test_a_card_is_replaced_and_another_file_is_not(run, capsys):
  folder = run()
  assert card(folder) == card(folder)
  (folder / "README.md").write_text("notes")
  assert cli.main(["report", str(folder), f"--card={folder / 'README.md'}"]) == 2
  assert "no model card of ours" in capsys.readouterr().err
  assert cli.main(["report", str(folder), f"--card={folder}"]) == 2
  assert "is a folder; expected a file" in capsys.readouterr().err


def test_several_models_have_no_card_in_common(run, capsys):
  folder = run(rows=[
    {"seqhw": 2, "patch": 24, "tokens": 4, "gflops": 0.5, "n": 50, "top1": 0.5, "depth": depth}
    for depth in (1, None)
  ])  # fmt: skip
  assert cli.main(["report", str(folder), f"--card={folder / 'README.md'}"]) == 2
  assert "--card is of one model; these are 2" in capsys.readouterr().err


@pytest.mark.convert
def test_the_hubs_own_package_reads_it(run):
  hub = pytest.importorskip("huggingface_hub")
  folder = run(name=HOSTILE)
  card(folder)
  data = hub.ModelCard.load(folder / "README.md").data
  assert [r.metric_value for r in data.eval_results] == [
    12.5,
    25,
    50,
  ] and data.model_name == " ".join(HOSTILE.split())
