"""Files of a model of parts, a Segmenter: what is written comes back, and its FlexiViT alone is one."""

import pathlib

import jax
import numpy as np
import pytest

from flexivit_jax import cli, trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import OwlViT, Segmenter
from flexivit_jax.weights import model_records, tasks

BACKBONE = dict(patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=1, mlp_dim=24, num_heads=2)


def made(seed=0, **fields):
  """A model, random parameters of it, and its record."""
  fields = dict(num_classes=3, backbone=BACKBONE, decoder_depth=1) | fields
  model = Segmenter(**fields)
  image = np.zeros((1, 12, 12, 3), np.float32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, seqhw=1))["params"]
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda s: rng.normal(0.1, 0.3, s.shape).astype(np.float32), shapes)
  names = ["sky", "road", "car"]
  return model, params, {"model": model_records.record_of(model), "class_names": names}


def assert_same(params, others):
  params, others = trees.flatten(params), trees.flatten(others)
  assert params.keys() == others.keys()
  for name, array in params.items():
    np.testing.assert_array_equal(array, others[name], name)


@pytest.mark.parametrize("fields", [{}, dict(decoder="linear", fuse=2)])
def test_an_npz_of_a_segmenter_comes_back_with_its_classes(tmp_path, fields):
  model, params, record = made(**fields)
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  assert tasks.name_of(tmp_path / "w.npz") == "segmenter"
  got, back, again = tasks.load(tmp_path / "w.npz")
  assert_same(back, params)
  assert model_records.record_of(got) == again["model"] == model_records.record_of(model)
  assert again["class_names"] == record["class_names"] and again["notes"] == []


def test_a_part_that_a_config_leaves_out_is_none():
  record = {"model": {"name": "owl_vit", "num_classes": 3, "backbone": BACKBONE}}
  assert model_records.of_record(pathlib.Path("w.npz"), record).text is None


TEXT = dict(width=16, depth=1, mlp_dim=32, num_heads=2, vocab_size=30, max_length=4)


@pytest.mark.parametrize(
  ("fields", "queries"),
  [
    ({}, None),
    (dict(text=TEXT), np.ones((1, 2, 4), np.int32)),
    (dict(query_length=5, objectness=True), np.ones((1, 2, 5), np.float32)),
  ],
  ids=["closed", "text", "vectors"],
)
def test_an_npz_of_a_detector_comes_back_whatever_its_queries_are(tmp_path, fields, queries):
  model = OwlViT(num_classes=3, backbone=BACKBONE, embed_dim=8, **fields)
  image = np.zeros((1, 12, 12, 3), "f")
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, queries, seqhw=1))["params"]
  params = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), shapes)
  record = {"model": model_records.record_of(model), "class_names": ["a", "b", "c"]}
  record["text"] = {"tokenizer": "bytes", "length": 4, "pad": 0, "end": 1, "lower": False}
  assert (record["model"]["text"] is None) == ("text" not in fields)
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  assert tasks.name_of(tmp_path / "w.npz") == "owl_vit"
  got, back, again = tasks.load(tmp_path / "w.npz")
  assert_same(back, params)
  assert model_records.record_of(got) == again["model"] == record["model"]
  assert again["text"] == record["text"]
  assert got.inputs == model.inputs


def test_blocks_that_are_stacked_in_memory_are_written_one_by_one(tmp_path):
  model, params, record = made()
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  weights.save_npz(tmp_path / "again.npz", *tasks.load(tmp_path / "w.npz", scan=True))
  with np.load(tmp_path / "w.npz") as first, np.load(tmp_path / "again.npz") as second:
    assert {*first.files} == {*second.files}


def test_its_flexivit_alone_is_one(tmp_path):
  model, params, record = made()
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  got, back, again = weights.load_with_record(tmp_path / "w.npz")
  assert got == model.parts["backbone"]
  assert_same(back, params["backbone"])
  assert "class_names" not in again
  assert again["notes"] == ["The backbone of a segmenter alone."]
  assert tasks.name_of(tmp_path / "w.npz") == "segmenter"


def test_inspect_says_what_it_is(tmp_path, capsys):
  weights.save_npz(tmp_path / "w.npz", *made())
  assert cli.main(["inspect", str(tmp_path / "w.npz")]) == 0
  out = capsys.readouterr().out
  for part in (
    "segmenter, 3 classes",
    "decoder mask, decoder_depth 1",
    "sky, road, car",
    "in decoder",
  ):
    assert part in out


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(name="segmentor"), "Unknown model of a record 'segmentor'.*Did you mean 'segmenter'"),
    (dict(decoders="mask"), "field of the record in w.npz: 'decoders'.*'decoder'"),
    (dict(backbone=None), "does not say what backbone it is of"),
    (dict(backbone=dict(depth="two")), "has depth='two'; expected int"),
  ],
)
def test_a_record_of_no_model_is_refused(change, message):
  record = {"model": {"name": "segmenter", "num_classes": 3, "backbone": BACKBONE} | change}
  with pytest.raises(UserError, match=message):
    model_records.of_record(pathlib.Path("w.npz"), record)


def test_arrays_of_another_model_are_all_named(tmp_path):
  model, params, record = made()
  record["model"]["decoder_depth"] = 2
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  with pytest.raises(UserError, match=r"(?s)does not fit the model segmenter:.*encoderblock_1"):
    tasks.load(tmp_path / "w.npz")
