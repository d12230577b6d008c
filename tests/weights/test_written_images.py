"""What a record says of images and classes goes into what is written, and is what is read there."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from flexivit_jax import weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import folders, stated

FIELDS = dict(
  num_classes=2, patch_size=(6, 6), posemb_size=(4, 4), width=16, depth=1, mlp_dim=8, num_heads=2,
  pool_type="tok",
)  # fmt: skip
OURS = (folders.MANIFEST, folders.RECORD)


@functools.cache
def network():
  model = FlexiViT(**FIELDS)
  image = jax.ShapeDtypeStruct((1, 24, 24, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  return model, jax.tree.map(lambda s: np.full(s.shape, 0.1, np.float32), shapes)


def made(pp):
  model, params = network()
  record = {"model": FIELDS, "pp": pp, "class_names": ["cat", "dog"], "notes": []}
  return model, params, record | {"source": {"file": "run", "format": "checkpoint of a run"}}


def as_others_read_it(folder: pathlib.Path) -> dict:
  for name in OURS:
    (folder / name).unlink()
  return weights.load_with_record(folder)[-1]


RUNS = [
  ("decode|resize(24)", "resize(24, method='pil_bilinear')"),
  ("decode|resize(24, 'cubic')", "resize(24, method='pil_bicubic')"),
  ("decode|resize(30, 'area')|central_crop(24)", "resize(30, method='pil_box')|central_crop(24"),
  ("decode|resize_small(29)|central_crop(24)", "resize_small(29, method='pil_box', rounding='down')|central_crop(24"),
]  # fmt: skip


@pytest.mark.parametrize(("pp", "want"), RUNS)
@pytest.mark.parametrize("save", [weights.save_timm, weights.save_transformers])
def test_a_runs_preparation_is_what_others_read_in_the_folder(tmp_path, save, pp, want):
  labels = "|onehot(2)|keep('image', 'labels')"
  save(tmp_path / "out", *made(f"{pp}|value_range(-1, 1){labels}"), image_hw=(24, 24), seqhw=4)
  record = as_others_read_it(tmp_path / "out")
  assert record["pp"].startswith(f"decode|{want}") and record["class_names"] == ["cat", "dog"]
  assert [n for n in record["notes"] if ".json" in n and "checksums" not in n] == []


@pytest.mark.parametrize("save", [weights.save_timm, weights.save_transformers])
def test_a_folder_of_another_size_is_prepared_for_that_size(tmp_path, save):
  made_ = made("decode|resize_small(28)|central_crop(24)|value_range(-1, 1)")
  save(tmp_path / "out", *made_, image_hw=(48, 48), seqhw=4)
  record = as_others_read_it(tmp_path / "out")
  assert "resize_small(56" in record["pp"] and "central_crop(48" in record["pp"]


@pytest.mark.parametrize("to", range(24, 60))
def test_timm_finds_the_resize_again_from_one_number(to):
  one = stated.Stated((24, 24), "shorter", (to, to), (24 / to, 24 / to), "pil_box", "even", 0, "x")
  assert int(24 / one.one_crop_pct()) == to


def test_what_is_stated_travels_through_an_npz(tmp_path):
  model, params, record = made("decode|resize(24, 'cubic')|value_range(-1, 1)")
  weights.save_timm(tmp_path / "hub", model, params, record, image_hw=(24, 24), seqhw=4)
  for name in OURS:
    (tmp_path / "hub" / name).unlink()
  config = json.loads((tmp_path / "hub" / "config.json").read_text())
  config["pretrained_cfg"] |= {"mean": [0.4] * 3, "std": [0.3] * 3, "crop_pct": 0.8}
  (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
  loaded = weights.load_with_record(tmp_path / "hub")
  weights.save_npz(tmp_path / "a.npz", *loaded)
  shutil.rmtree(tmp_path / "hub")
  *_, record = weights.load_with_record(tmp_path / "a.npz")
  for key in ("pp", "images", "class_names", "folded_input"):
    assert record[key] == loaded[-1][key]
  want = "resize(60, method='pil_bicubic')|central_crop(48, 'even', fill=0)"
  assert weights.preparation(record, 48) == f"decode|{want}|value_range(-1, 1)"
