"""OWL-ViT and OWLv2 of transformers are read with heads and text tower, and give its boxes and logits."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import cli, resize, trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import tasks, text
from flexivit_jax.weights.transformers import towers as transformers_towers

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "owlv2.npz"


@pytest.fixture(scope="module")
def golden():
  """A small OWLv2 with random arrays, and what transformers makes of two images; see tests/golden/README.md."""
  with np.load(GOLDEN) as file:
    return dict(file)


def folder_of(golden, path, version=2, config=None, **arrays):
  """Writes the folder, with some arrays replaced, or without those that are None."""
  given, at = {}, 0
  for name, shape in json.loads(str(golden["shapes"])).items():
    size = math.prod(shape)
    given[name] = golden["arrays"][at : at + size].reshape(shape)
    at += size
  given |= arrays
  given = {n: np.array(a, np.float32) for n, a in given.items() if a is not None}
  about = json.loads(str(golden["config"])) | (config or {})
  if version == 1:
    given = {n.replace("owlv2.", "owlvit.", 1): a for n, a in given.items()}
    given = {n: a for n, a in given.items() if not n.startswith("objectness_head.")}
    about |= {"model_type": "owlvit", "architectures": ["OwlViTForObjectDetection"]}
  path.mkdir(exist_ok=True)
  (path / "config.json").write_text(json.dumps(about))
  save_file(given, path / "model.safetensors")
  return path


def run(model, params, golden, **size):
  image, tokens = golden["image"].astype(np.float32), golden["tokens"].astype(np.int32)
  with jax.default_matmul_precision("highest"):
    apply = jax.jit(lambda p, x, t: model.apply({"params": p}, x, t, **size)[1])
    return {name: np.asarray(array) for name, array in apply(params, image, tokens).items()}


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.full), 2])
def test_boxes_and_logits_are_those_of_transformers(tmp_path, golden, version):
  model, params, record = tasks.load(folder_of(golden, tmp_path / "owl", version))
  out = run(model, params, golden)
  np.testing.assert_allclose(out["pred_boxes"], golden["pred_boxes"], rtol=0, atol=1e-6)
  real = golden["logits"] > -1e5
  assert real.any() and not real.all()
  np.testing.assert_allclose(
    np.where(real, out["class_logits"], 0), np.where(real, golden["logits"], 0), rtol=0, atol=1e-5
  )
  assert (out["class_logits"][~real] <= -1e6).all()
  assert ("objectness" in out) == (version == 2)
  if version == 2:
    np.testing.assert_allclose(out["objectness"], golden["objectness"], rtol=0, atol=1e-5)
  assert record["model"]["name"] == "owl_vit" and record["image_size"] == [12, 12]


def test_another_patch_size_is_the_resized_kernel_and_grid(tmp_path, golden):
  model, params, _ = tasks.load(folder_of(golden, tmp_path / "owl"))
  out = run(model, params, golden, seqhw=4)
  assert out["pred_boxes"].shape == (2, 16, 4) and out["class_logits"].shape == (2, 16, 3)
  vit = params["backbone"]
  kernel = resize.pi_resize(vit["embedding"]["kernel"], (3, 3), model.backbone["kernel_operator"])
  grid = resize.resize_grid(
    vit["pos_embedding"].reshape(3, 3, -1), (4, 4), model.backbone["grid_operator"]
  )
  backbone = {**model.backbone, "patch_size": (3, 3), "posemb_size": (4, 4)}
  fixed = model.clone(backbone=backbone)
  embedding = vit["embedding"] | {"kernel": kernel}
  baked = vit | {"embedding": embedding, "pos_embedding": grid.reshape(1, 16, -1)}
  again = run(fixed, params | {"backbone": baked}, golden)
  for name in ("pred_boxes", "class_logits"):
    assert np.isfinite(out[name]).all()
    np.testing.assert_allclose(out[name], again[name], rtol=0, atol=1e-5)


def test_a_file_is_read_with_the_config_beside_it(tmp_path, golden):
  folder = folder_of(golden, tmp_path / "owl")
  whole, one = tasks.load(folder), tasks.load(folder / "model.safetensors")
  assert whole[0] == one[0]
  assert trees.digest(whole[1]) == trees.digest(one[1])
  vit, _, record = weights.load_with_record(folder)
  assert vit == whole[0].parts["backbone"]
  assert any("text tower and of the heads are left out" in note for note in record["notes"])
  assert not any("heads are left out" in note for note in whole[2]["notes"])


def test_the_text_tower_alone_is_one(tmp_path, golden):
  folder = folder_of(golden, tmp_path / "owl")
  model, params, _ = tasks.load(folder)
  weights.save_npz(tmp_path / "w.npz", model, params, tasks.load(folder)[2])
  for path in (folder, tmp_path / "w.npz"):
    tower, own, _ = text.load(path)
    assert tower == model.parts["text"]
    assert trees.digest(own) == trees.digest(params["text"])


def test_its_processor_says_how_images_are_prepared(tmp_path, golden):
  mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
  common = {"image_mean": mean, "image_std": std, "size": {"height": 12, "width": 12}}
  first = folder_of(golden, tmp_path / "first", version=1)
  kind = {"image_processor_type": "OwlViTImageProcessor", "resample": 3}
  (first / "preprocessor_config.json").write_text(json.dumps(common | kind))
  second = folder_of(golden, tmp_path / "second")
  kind = {"image_processor_type": "Owlv2ImageProcessor", "do_pad": True}
  (second / "preprocessor_config.json").write_text(json.dumps(common | kind))
  record = tasks.load(first)[2]
  assert record["pp"] == "decode|resize(12, method='pil_bicubic')|value_range(-1, 1)"
  assert record["folded_input"] == {"mean": mean, "std": std}
  record = tasks.load(second)[2]
  pads = "decode|pad('square', fill=0)|resize({}, method='pil_bilinear')|value_range(-1, 1)"
  assert record["pp"] == pads.format(12)
  assert any("blurs an image before it makes it smaller" in note for note in record["notes"])
  assert weights.preparation(record, 24) == pads.format(24)


def test_a_tokenizer_comes_along(tmp_path, golden):
  folder = folder_of(golden, tmp_path / "owl")
  assert any("No tokenizer" in note for note in tasks.load(folder)[2]["notes"])
  words = {"!": 0, "cat": 1, "dog": 2, "<end>": 11}
  content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "!"}}
  content |= {"pre_tokenizer": {"type": "Whitespace"}}
  (folder / transformers_towers.TOKENIZER).write_text(json.dumps(content))
  (folder / transformers_towers.TOKENIZER_CONFIG).write_text(json.dumps({"pad_token": "!"}))
  model, params, record = tasks.load(folder)
  about = {k: v for k, v in record["text"].items() if k != "tokenizer"}
  assert about == {"length": 4, "pad": 0, "end": 11, "lower": False}
  assert not any("okenizer" in note for note in record["notes"])
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  again, back, other = tasks.load(tmp_path / "w.npz")
  assert again.parts == model.parts and other["text"] == record["text"]
  assert trees.digest(back) == trees.digest(params)


def test_inspect_says_what_it_is(tmp_path, golden, capsys):
  assert cli.main(["inspect", str(folder_of(golden, tmp_path / "owl"))]) == 0
  out = capsys.readouterr().out
  for part in ("transformers folder, owlv2", "owl_vit", "box_bias corner", "objectness True"):
    assert part in out


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(config={"architectures": ["Owlv2Model"]}), "no heads that make boxes; expected Owlv2For"),
    (dict(config={"architectures": ["OwlV3"]}), "Unknown architecture in config.json: 'OwlV3'"),
    (dict(config={"projection_dim": 4}), "text_projection.weight"),
    ({"class_head.dense0.weight": None}, r"missing class_head.dense0.weight"),
    ({"objectness_head.dense2.bias": None}, r"missing objectness_head.dense2.bias"),
    ({"box_head.dense3.weight": np.ones((2, 2))}, r"extra box_head.dense3.weight"),
    ({"owlv2.text_model.more": np.ones(2)}, r"extra text_model.more"),
    ({"box_head.dense2.bias": np.full(4, np.nan)}, r"not finite in 1 arrays: box_2"),
    ({"layer_norm.weight": np.ones(9)}, r"(?s)layer_norm.weight.*9"),
  ],
)
def test_what_it_cannot_be_is_refused(tmp_path, golden, change, message):
  folder = folder_of(golden, tmp_path / "owl", **change)
  with pytest.raises(UserError, match=message):
    tasks.load(folder)
