"""A profile of flexified weights without labels: what `flexivit flexify` measured stands for the accuracy."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from flexivit_jax import choose, cli, weights
from flexivit_jax.budget import profile


@pytest.fixture(scope="module")
def flexified(tmp_path_factory, timm_state_dict):
  """A folder that `flexivit flexify` wrote."""
  folder = tmp_path_factory.mktemp("retained")
  save_file(timm_state_dict(), folder / "vit.safetensors")
  (folder / "photos").mkdir()
  rng = np.random.default_rng(0)
  for i in range(20):
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
      folder / "photos" / f"{i}.png"
    )
  given = [f"--init={folder / 'vit.safetensors'}", f"--data={folder / 'photos'}", "--num_heads=4"]
  given += [f"--out={folder / 'out'}", "--image_size=32", "--seqhw=2,4", "--batch_size=4"]
  assert cli.main(["flexify", *given, "--epochs=0"]) == 0
  return folder / "out"


def scores(folder):
  return json.loads((folder / "retention.json").read_text())


def test_a_budget_without_labels(flexified):
  assert cli.main(["profile", str(flexified / "model.npz"), "--batch_sizes=1"]) in (None, 0)
  (measured,) = profile.read(flexified / "model.npz.profile.json")
  given = {row["seqhw"]: row for row in scores(flexified)["before"]}
  assert {row.size: row.value for row in measured.rows} == {
    s: r["agree1"] for s, r in given.items()
  }
  assert measured.metric["name"] == "agree1" and measured.image == (32, 32, 3)
  assert all(
    row.low <= row.value <= row.high and row.n == 2 and row.ms > 0 for row in measured.rows
  )
  assert choose(flexified / "model.npz", latency_ms=1e5).value == max(
    r["agree1"] for r in given.values()
  )


@pytest.mark.full
def test_another_metric_has_the_interval_that_was_measured(flexified, tmp_path):
  out = tmp_path / "p.json"
  given = [str(flexified / "model.npz"), "--metric=kl", f"--out={out}", "--batch_sizes=1"]
  assert cli.main(["profile", *given, "--seqhw=2"]) in (None, 0)
  (row,) = profile.read(out)[0].rows
  (stored,) = (row for row in scores(flexified)["before"] if row["seqhw"] == 2)
  assert [row.low, row.high] == stored["intervals"]["kl"] and row.value == stored["kl"]


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda s: s.pop("before"), "is damaged"),
    (lambda s: s.update(before=[]), "is damaged"),
    (lambda s: s.update(before=[{"seqhw": "x", "agree1": 1, "n": 1}]), "is damaged"),
    (lambda s: s.update(weights="0" * 64), "does not say that it is of the weights"),
    (lambda s: s.pop("weights"), "run `flexivit flexify` again"),
  ],
)
def test_what_does_not_fit_is_said(flexified, tmp_path, capsys, change, said):
  model, params, record = weights.load_with_record(flexified / "model.npz")
  weights.save_npz(tmp_path / "model.npz", model, params, record)
  changed = scores(flexified)
  change(changed)
  (tmp_path / "retention.json").write_text(json.dumps(changed))
  assert cli.main(["profile", str(tmp_path / "model.npz")]) == 2
  assert said in capsys.readouterr().err


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (["--seqhw=8"], "Unknown size of"),
    (["--metric=top1"], "Unknown metric 'top1'; known: agree1"),
    (["--ways=jax:bfloat16"], "agree1 is measured in float32 alone"),
  ],
)
def test_what_was_not_measured_is_refused(flexified, capsys, given, said):
  assert cli.main(["profile", str(flexified / "model.npz"), *given]) == 2
  assert said in capsys.readouterr().err
