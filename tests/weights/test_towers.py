"""Files of two towers: what is written comes back, and the image tower alone is a FlexiViT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import cli, trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import TwoTowers
from flexivit_jax.weights import (
  certificate,
  description,
  model_records,
  npz,
  text,
  tower_names,
  towers,
)

IMAGE = dict(
  patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=2, pool_type="map"
)
TEXT = dict(vocab_size=12, max_length=5, width=8, depth=2, mlp_dim=12, num_heads=2)
TOKENIZER = {"tokenizer": "{}", "length": 5, "pad": 1, "end": 1, "lower": True}


def made(seed=0, **fields):
  """A model, random parameters of it, and its record."""
  model = TwoTowers(**(dict(image=IMAGE, text=TEXT, embed_dim=6, bias=-2.0) | fields))
  inputs = jnp.zeros((1, 12, 12, 3)), jnp.zeros((1, 5), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda s: rng.normal(0.1, 0.3, s.shape).astype(np.float32), shapes)
  return model, params, {"model": model_records.record_of(model), "text": TOKENIZER}


def assert_same(params, others):
  params, others = trees.flatten(params), trees.flatten(others)
  assert params.keys() == others.keys()
  for name, array in params.items():
    np.testing.assert_array_equal(array, others[name], name)


@pytest.mark.parametrize("image", [{}, pytest.param({"scan": True}, marks=pytest.mark.full)])
def test_an_npz_of_ours_comes_back_with_its_tokenizer(tmp_path, image):
  model, params, record = made(image=IMAGE | image)
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  got, back, again = towers.load(tmp_path / "w.npz", **image)
  assert_same(back, params)
  assert again["text"] == TOKENIZER
  assert again["model"] == model_records.record_of(got)
  assert got.parts == model.parts and got.bias == back["b"][0]
  assert "embedding" not in again["model"] and again["notes"] == []


def test_the_image_tower_alone_is_a_flexivit(tmp_path):
  model, params, record = made()
  weights.save_npz(tmp_path / "w.npz", model, params, record | {"class_names": ["a", "b"]})
  got, back, again = weights.load_with_record(tmp_path / "w.npz")
  assert got == model.parts["image"]
  assert_same(back, params["image"])
  assert "class_names" not in again and model_records.IMAGE_ALONE in again["notes"]
  assert again["projection"] is True
  with pytest.raises(UserError, match="has an image tower and no text tower"):
    weights.save_npz(tmp_path / "image.npz", got, back, again)
    towers.load(tmp_path / "image.npz")


def by_big_vision(params):
  """Names of big_vision's module, written out once more: its own submodules are numbered by Flax."""
  theirs = {
    "image/": "params/img/",
    "text/embedding/": "params/txt/Embed_0/",
    "text/Transformer/": "params/txt/Encoder_0/",
    "text/": "params/txt/",
    "": "params/",
  }
  flat = {}
  for name, array in trees.flatten(params).items():
    ours = next(prefix for prefix in theirs if name.startswith(prefix))
    flat[theirs[ours] + name.removeprefix(ours)] = array
  return flat


def test_big_visions_file_of_two_towers_is_read(tmp_path):
  _, params, _ = made()
  np.savez(tmp_path / "siglip.npz", **by_big_vision(params))
  got, back, record = towers.load(tmp_path / "siglip.npz")
  assert_same(back, params)
  assert got.parts["text"].num_heads == 2 and got.parts["text"].pool_type == "last"
  assert got.parts["image"].pool_type == "map"
  tower, text_params, about = text.load(tmp_path / "siglip.npz")
  assert tower == got.parts["text"] and "BERT" not in " ".join(about["notes"])
  assert_same(text_params, params["text"])
  assert towers.NO_TOKENIZER in record["notes"]
  # What is written has the names that were read, and nothing else but the record.
  weights.save_npz(tmp_path / "again.npz", got, back, record)
  with np.load(tmp_path / "again.npz") as archive:
    assert {*archive.files} - {npz.RECORD} == by_big_vision(params).keys()
  with np.load(tmp_path / "siglip.npz") as archive:
    stacked = trees.flatten(tower_names.of_big_vision(dict(archive)))
  assert_same(trees.unflatten(stacked), params)


def big_visions_text(file, tokens):
  """big_vision's text transformer in float64, by the names in its file; the heads are axes of the arrays."""
  txt = "params/txt/"
  a = {n.removeprefix(txt): v.astype(np.float64) for n, v in file.items() if n.startswith(txt)}

  def norm(name, x):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / scale * a[f"{name}/scale"] + a[f"{name}/bias"]

  def dense(name, x):
    return x @ a[f"{name}/kernel"] + a[f"{name}/bias"]

  x = a["Embed_0/embedding"][tokens] + a["pos_embedding"]
  for i in range(2):
    base = f"Encoder_0/encoderblock_{i}"
    mha, y = f"{base}/MultiHeadDotProductAttention_0", norm(f"{base}/LayerNorm_0", x)
    q, k, v = (
      np.einsum("nld,dhe->nhle", y, a[f"{mha}/{part}/kernel"])
      + a[f"{mha}/{part}/bias"][None, :, None]
      for part in ("query", "key", "value")
    )
    p = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]))
    y = (p / p.sum(-1, keepdims=True)) @ v
    x = x + np.einsum("nhle,hed->nld", y, a[f"{mha}/out/kernel"]) + a[f"{mha}/out/bias"]
    y = dense(f"{base}/MlpBlock_0/Dense_0", norm(f"{base}/LayerNorm_1", x))
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + dense(f"{base}/MlpBlock_0/Dense_1", y)
  x = dense("head", norm("Encoder_0/encoder_norm", x)[:, -1])
  return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-8)


@pytest.mark.parametrize("written", [False, pytest.param(True, marks=pytest.mark.full)])
def test_texts_are_embedded_as_by_big_visions_names(tmp_path, written):
  """The image tower's numbers are compared in tests/models/test_flexivit.py."""
  model, params, record = made()
  np.savez(tmp_path / "siglip.npz", **by_big_vision(params))
  if written:
    weights.save_npz(tmp_path / "w.npz", model, params, record)
  with np.load(tmp_path / ("w.npz" if written else "siglip.npz")) as archive:
    file = dict(archive)
  loaded, params, _ = towers.load(tmp_path / "siglip.npz")
  tokens = certificate.texts(loaded.parts["text"])
  out = loaded.parts["text"].apply({"params": params["text"]}, tokens)[0]
  got = out / np.linalg.norm(out, axis=1, keepdims=True)
  np.testing.assert_allclose(got, big_visions_text(file, tokens), atol=1e-5)


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    (lambda a: {n: v for n, v in a.items() if n != "params/t"}, "no array t"),
    (lambda a: a | {"params/txt/MAPHead_0/probe": np.zeros(3)}, "pools by attention"),
    (lambda a: {n.replace("Encoder_0", "BertEncoder_0"): v for n, v in a.items()}, "missing"),
    (lambda a: a | {"params/txt/extra": np.zeros(3, np.float32)}, "text tower.*extra"),
    (lambda a: a | {"params/txt/head/bias": np.full(6, np.nan, np.float32)}, "not finite"),
  ],
)
def test_another_text_tower_is_refused_by_name(tmp_path, change, expected):
  _, params, _ = made()
  np.savez(tmp_path / "w.npz", **change(by_big_vision(params)))
  with pytest.raises(UserError, match=f"(?s){expected}"):
    towers.load(tmp_path / "w.npz")


def test_a_record_of_other_fields_is_refused(tmp_path):
  model, params, record = made()
  record["model"]["text"]["widht"] = 3
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  with pytest.raises(UserError, match=r"widht.*Did you mean 'width'"):
    towers.load(tmp_path / "w.npz")


@pytest.mark.full
def test_a_conversion_compares_both_embeddings_and_the_similarity(tmp_path, capsys):
  model, params, record = made()
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  given = ["convert", str(tmp_path / "w.npz"), "--image_size=12"]
  assert cli.main([*given, str(tmp_path / "out.npz")]) == 0
  assert "seqhw   3: largest differences: image 0.0e+00, text 0.0e+00" in capsys.readouterr().out
  assert_same(towers.load(tmp_path / "out.npz")[1], params)
  rows = json.loads((tmp_path / "out.certificate.json").read_text())["rows"]
  assert {row["seqhw"] for row in rows} == {2, 3, 4, 6, 12}
  row = rows[1]
  assert row["largest_differences"].keys() == {"image", "text", "similarity"}
  image, text = np.array(row["source_image"]), np.array(row["source_text"])
  want = np.exp(params["t"]) * image @ text.T + params["b"]
  np.testing.assert_allclose(row["target_similarity"], want, atol=1e-5)
  assert cli.main([*given, str(tmp_path / "image.npz"), "--image_only", "--no-verify"]) == 0
  assert weights.load(tmp_path / "image.npz")[0] == model.parts["image"]
  assert towers.text_of(tmp_path / "image.npz") is None


def test_towers_that_no_model_of_transformers_has_are_refused_by_their_features(tmp_path):
  model, params, record = made(image=IMAGE | dict(pool_type="tok"))
  with pytest.raises(UserError) as error:
    weights.save_towers(tmp_path / "out", model, params, record, image_hw=(12, 12))
  for words in ("CLIPModel", "pre_norm=False", "causal=False", "pool_type='last'"):
    assert words in str(error.value)
  assert not (tmp_path / "out").exists()


def test_both_towers_are_described(tmp_path):
  model, params, record = made()
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  lines = "\n".join(description.describe_towers(*towers.load(tmp_path / "w.npz")))
  assert "12 tokens, 5 positions, pool last, projection to 6" in lines
  assert "bias" in lines and "pads with 1" in lines
