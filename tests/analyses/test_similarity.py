"""CKA against its definition, and what it does not change with."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest

from flexivit_jax import weights
from flexivit_jax.analyses import similarity
from flexivit_jax.errors import UserError
from flexivit_jax.models.flexivit import FlexiViT


def unbiased_hsic(x, y):
  """Song et al. 2012 as written, term by term: sums over different examples i, j, q, r."""
  k, other = x @ x.T, y @ y.T
  n = len(x)
  pairs = sum(k[i, j] * other[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
  fours = [
    (i, j, q, r)
    for i in range(n) for j in range(n) for q in range(n) for r in range(n)
    if len({i, j, q, r}) == 4
  ]  # fmt: skip
  both = sum(k[i, j] * other[q, r] for i, j, q, r in fours) / len(fours)
  threes = [(i, j, q) for i in range(n) for j in range(n) for q in range(n) if len({i, j, q}) == 3]
  one = sum(k[i, j] * other[i, q] for i, j, q in threes) / len(threes)
  return pairs + both - 2 * one


def test_cka_is_its_definition():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(7, 5)), rng.normal(size=(7, 3))
  y[:, 0] += x[:, 0]
  want = unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
  assert similarity.cka(x, y) == pytest.approx(want, abs=1e-9)


def test_equal_is_one_and_rotation_shift_and_scale_change_nothing():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 9))
  rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  assert similarity.cka(x, x) == pytest.approx(1.0, abs=1e-12)
  assert similarity.cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0, abs=1e-9)
  assert similarity.cka(x, y) == pytest.approx(similarity.cka(x @ rotation - 1, y), abs=1e-9)
  assert abs(similarity.cka(rng.normal(size=(2000, 3)), rng.normal(size=(2000, 3)))) < 0.01


def test_minibatches_come_near_to_all_at_once():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(4096, 8))
  y = x @ rng.normal(size=(8, 5)) + rng.normal(size=(4096, 5))
  whole = similarity.cka(x, y)
  apart = []
  for size in (16, 64, 512):
    parts = similarity.MinibatchCKA(2)
    for i in range(0, 4096, size):
      parts.update([x[i : i + size], y[i : i + size]])
    found = parts.result()
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(found), 1.0, atol=1e-12)
    apart.append(abs(found[0, 1] - whole))
  assert apart[2] < 0.003 and max(apart) < 0.02


def test_a_map_keeps_the_distances_of_a_plane():
  rng = np.random.default_rng(3)
  points = rng.normal(size=(9, 2))
  distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
  found = similarity.embed(distances)
  np.testing.assert_allclose(
    np.linalg.norm(found[:, None] - found[None], axis=-1), distances, atol=1e-9
  )
  assert (found[np.abs(found).argmax(axis=0), [0, 1]] > 0).all()


def test_distances_are_angles():
  angles = similarity.arc_cosine(np.array([[1.0, 0.5], [-0.01, 1.0 + 1e-12]]))
  np.testing.assert_allclose(angles, [[0, np.pi / 3], [np.pi / 2, 0]])


def test_too_few_examples_and_other_features_are_errors():
  with pytest.raises(UserError, match="CKA of 3 examples; it takes at least 4"):
    similarity.cka(np.ones((3, 2)), np.ones((3, 2)))
  with pytest.raises(UserError, match="Got 1 features, expected 2"):
    similarity.MinibatchCKA(2).update([np.ones((5, 2))])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_feature_has_no_cka_and_the_others_keep_theirs(value):
  rng = np.random.default_rng(4)
  x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
  parts = similarity.MinibatchCKA(3)
  parts.update([x, np.full((9, 7), value), y])
  found = parts.result()
  assert np.isnan(found[1]).all() and np.isnan(found[:, 1]).all()
  np.testing.assert_array_equal(np.diag(found)[::2], 1)
  assert found[0, 2] == pytest.approx(similarity.cka(x, y), abs=1e-12)
  points = similarity.embed(similarity.arc_cosine(found))
  assert np.isnan(points[1]).all() and np.isfinite(points[::2]).all()
  assert np.isnan(similarity.embed(np.full((1, 1), np.nan))).all()


def test_the_tool_writes_null_for_a_layer_that_is_constant(
  repository, random_params, tmp_path, monkeypatch, capsys
):
  fields = dict(
    num_classes=10,
    patch_size=(4, 4),
    posemb_size=(3, 3),
    width=16,
    depth=1,
    mlp_dim=24,
    num_heads=4,
  )
  model = FlexiViT(**fields)
  params = random_params(model, (24, 24, 3))
  params["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_1"]["kernel"][:] = 0
  weights.save_npz(tmp_path / "vit.npz", model, params, {"model": fields})
  out = tmp_path / "cka"
  given = [tmp_path / "vit.npz", "--config=configs/digits.py:debug", f"--out={out}", "--seqhw=2,4"]
  monkeypatch.setattr(sys, "argv", ["representations.py", *map(str, given)])
  runpy.run_path(str(repository / "tools" / "paper" / "representations.py"), run_name="__main__")
  found = json.loads((out / "cka.json").read_text(), parse_constant=pytest.fail)
  sa, mlp, pooled = found["cka"][:3]
  assert mlp == [None] * 6 and found["map"][1] == [None, None]
  assert (
    [value is None for value in sa]
    == [value is None for value in pooled]
    == [False, True, False] * 2
  )
  rows = (out / "cka.csv").read_text().splitlines()
  assert rows[2] == "2 | block 0 mlp,,,,,,"
  assert "block 0 mlp: 2 not defined, 4 not defined" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tool_compares_all_layers_and_sizes_of_a_run(repository, tmp_path, debug_run):
  """Of a model that was hardly trained; equal to itself, and as large as it says."""
  run, out = debug_run, tmp_path / "cka"
  tool = [
    "tools/paper/representations.py",
    run,
    "--config=configs/digits.py:debug",
    f"--out={out}",
    "--seqhw=2,4",
  ]
  subprocess.run([sys.executable, *tool], check=True, cwd=repository)
  found = json.loads((out / "cka.json").read_text())
  matrix = np.array(found["cka"])
  assert found["rows"] == [
    f"{n} | {layer}" for n in (2, 4) for layer in ("block 0 sa", "block 0 mlp", "pooled")
  ]
  assert matrix.shape == (6, 6) and found["grid"] == [2, 2] and found["examples"] == 20
  np.testing.assert_allclose(np.diag(matrix), 1.0)
  np.testing.assert_allclose(matrix, matrix.T)
  assert len((out / "cka.csv").read_text().splitlines()) == 7
  assert {p.name for p in out.iterdir()} == {
    f"{kind}{name}"
    for kind in ("", "class_token_")
    for name in ("cka.json", "cka.csv", "cka.png", "map.png")
  }
  tokens = json.loads((out / "class_token_cka.json").read_text())
  assert tokens["rows"] == [f"{n} | {layer}" for n in (2, 4) for layer in ("block 0", "pooled")]
  # After the only block the token is what is pooled, but for a LayerNorm; and the pooled ones are the same as before.
  np.testing.assert_allclose(tokens["cka"][1][3], matrix[2, 5], rtol=1e-6)
