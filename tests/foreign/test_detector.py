"""OWL-ViT and OWLv2 of transformers, of random shapes: their boxes and logits are ours, at their size."""

import json
import pathlib

import jax
import numpy as np
import pytest

from flexivit_jax.weights import tasks

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "owlv2.npz"
CLASSES = {
  "OwlViT": ("OwlViTConfig", "OwlViTForObjectDetection"),
  "OWLv2": ("Owlv2Config", "Owlv2ForObjectDetection"),
}
# Of the vision and the text tower, where they differ from `VISION` and `TEXT`.
SHAPES = {
  "small": ({}, {}),
  "other": (
    dict(
      image_size=40, patch_size=10, hidden_act="gelu", layer_norm_eps=1e-3, num_attention_heads=3
    ),
    dict(max_position_embeddings=5, vocab_size=50, hidden_act="gelu", num_hidden_layers=1),
  ),
}
VISION = dict(
  hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
)  # fmt: skip
TEXT = dict(
  vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
  max_position_embeddings=7,
)  # fmt: skip


def built(kind, vision, text):
  import torch
  import transformers

  config, network = (getattr(transformers, name) for name in CLASSES[kind])
  special = dict(bos_token_id=1, eos_token_id=text["vocab_size"] - 1, pad_token_id=0)
  made = config(
    text_config=text | special, vision_config=vision, projection_dim=text["hidden_size"]
  )
  model = network(made).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      torch.nn.init.normal_(parameter, std=0.4)
  return model


def answers(model, image, tokens):
  import torch

  pixels = torch.tensor(image.transpose(0, 3, 1, 2).copy())
  ids = torch.tensor(tokens.reshape(-1, tokens.shape[-1]).astype(int))
  with torch.no_grad():
    return model(input_ids=ids, pixel_values=pixels, attention_mask=(ids > 0).int())


def assert_same(theirs, out):
  assert np.abs(theirs.pred_boxes.numpy() - out["pred_boxes"]).max() < 1e-4
  logits = theirs.logits.numpy()
  real = logits > -1e5
  assert real.any() and not real.all()
  assert np.abs(logits - out["class_logits"])[real].max() < 1e-4
  assert (out["class_logits"][~real] <= -1e6).all()
  if "objectness" in out:
    assert np.abs(theirs.objectness_logits.numpy() - out["objectness"]).max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_boxes_and_logits_are_within_1e_4(tmp_path, kind, shape):
  vision, text = (a | b for a, b in zip((VISION, TEXT), SHAPES[shape], strict=True))
  theirs = built(kind, vision, text)
  theirs.save_pretrained(tmp_path / "owl")
  model, params, _ = tasks.load(tmp_path / "owl")
  assert model.objectness == (kind == "OWLv2")
  rng = np.random.default_rng(0)
  side, length, last = vision["image_size"], text["max_position_embeddings"], text["vocab_size"] - 1
  image = rng.uniform(-2, 2, (2, side, side, 3)).astype(np.float32)
  tokens = np.zeros((2, 4, length), np.int32)  # of the second image two queries are padding
  for row, end in ((0, 2), (1, length - 1), (2, 3), (3, 1), (4, 4), (5, 2)):
    tokens[row // 4, row % 4, :end] = rng.integers(1, last, end)
    tokens[row // 4, row % 4, end] = last
  with jax.default_matmul_precision("highest"):
    _, out = model.apply({"params": params}, image, tokens)
  assert_same(answers(theirs, image, tokens), out)


def test_the_golden_arrays_are_those_of_transformers():
  import torch
  import transformers

  with np.load(GOLDEN) as file:
    golden = dict(file)
  about = json.loads(str(golden["config"]))
  model = transformers.Owlv2ForObjectDetection(transformers.Owlv2Config(**about)).eval()
  shapes = json.loads(str(golden["shapes"]))
  ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
  parts = np.split(golden["arrays"].astype(np.float32), ends[:-1])
  state = {n: torch.tensor(a.reshape(s)) for (n, s), a in zip(shapes.items(), parts, strict=True)}
  model.load_state_dict(state)
  out = answers(model, golden["image"].astype(np.float32), golden["tokens"])
  np.testing.assert_allclose(out.pred_boxes, golden["pred_boxes"], rtol=0, atol=1e-6)
  np.testing.assert_allclose(out.objectness_logits, golden["objectness"], rtol=0, atol=1e-5)
  real = golden["logits"] > -1e5
  np.testing.assert_allclose(out.logits.numpy()[real], golden["logits"][real], rtol=0, atol=1e-5)


def test_images_are_prepared_nearly_as_by_the_processors(tmp_path):
  """Exactly where nothing is made smaller; OWLv2 blurs with a Gaussian first, where ours is Pillow's filter."""
  import transformers
  from PIL import Image

  from flexivit_jax import data

  rng = np.random.default_rng(0)
  small = rng.uniform(0, 255, (6, 9, 3)).astype(np.float32)
  photo = np.asarray(
    Image.fromarray(small.astype(np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)
  )
  for kind, limits in {"OwlViT": (0.02, 0.02), "OWLv2": (0.02, 0.1)}.items():
    name = "OwlViTImageProcessor" if kind == "OwlViT" else "Owlv2ImageProcessor"
    for side, limit in zip((120, 32), limits, strict=True):
      processor = getattr(transformers, name)(size=dict(height=side, width=side))
      theirs = processor(Image.fromarray(photo), return_tensors="np")["pixel_values"][0]
      folder = tmp_path / f"{kind}{side}"
      built(kind, VISION | dict(image_size=side), TEXT).save_pretrained(folder)
      processor.save_pretrained(folder)
      record = tasks.load(folder)[2]
      image = data.parse(record["pp"])({"image": photo}, rng)["image"]
      mean, std = (np.array(record["input"][key]) for key in ("mean", "std"))
      ours = (((image + 1) / 2 - mean) / std).transpose(2, 0, 1)
      assert ours.shape == theirs.shape
      assert np.abs(ours - theirs).mean() < limit, (kind, side, np.abs(ours - theirs).mean())


def test_clips_tokenizer_of_two_files_is_that_of_transformers(tmp_path):
  from transformers import CLIPTokenizer

  from flexivit_jax.data import text
  from flexivit_jax.weights.transformers import towers

  letters = [chr(c) for c in range(33, 127)]
  merges = ["c a", "ca t</w>", "d o", "do g</w>", "' s</w>", "r e", "re m"]
  words = [*letters, *(letter + "</w>" for letter in letters)]
  words += [line.replace(" ", "") for line in merges] + ["<|startoftext|>", "<|endoftext|>"]
  vocab = {word: i for i, word in enumerate(words)}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}))
  fields = dict(max_length=16, vocab_size=len(vocab), eos_token=len(vocab) - 1)
  record, _ = towers.tokenizer(tmp_path, "owlvit", fields)
  theirs = CLIPTokenizer.from_pretrained(tmp_path, pad_token="!")
  for one in ("a Cat's  dog", "remote control, 12 cats!", "dog-cat's 3rd", "A photo of a cat."):
    expected = theirs(one, padding="max_length", max_length=16, truncation=True)["input_ids"]
    assert text.of_record(record).encode([one])[0].tolist() == expected


def test_a_pickled_file_is_read_with_the_config_beside_it(tmp_path):
  import torch

  from flexivit_jax import trees

  theirs = built("OwlViT", VISION, TEXT)
  theirs.save_pretrained(tmp_path / "owl")
  whole = tasks.load(tmp_path / "owl")
  (tmp_path / "owl" / "model.safetensors").unlink()
  torch.save(theirs.state_dict(), tmp_path / "owl" / "pytorch_model.bin")
  one = tasks.load(tmp_path / "owl" / "pytorch_model.bin")
  assert trees.digest(one[1]) == trees.digest(whole[1])
