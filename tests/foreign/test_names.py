"""`flexivit predict --names` with a CLIP of transformers has the probabilities of transformers."""

import json

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.data import text

NAMES = ["red car", "blue dog", "green cat"]


@pytest.mark.convert
def test_probabilities_are_those_of_transformers(tmp_path, capsys):
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
  tokens = dict(vocab_size=300, max_position_embeddings=12, eos_token_id=1, pad_token_id=0)
  config = transformers.CLIPConfig(
    text_config=layers | tokens | dict(bos_token_id=None),
    vision_config=layers | dict(image_size=24, patch_size=8),
    projection_dim=16,
  )
  torch.manual_seed(0)
  model = transformers.CLIPModel(config).eval()
  for name, array in model.named_parameters():
    if name != "logit_scale":
      torch.nn.init.normal_(array, 0, 0.3)
  folder = tmp_path / "clip"
  model.save_pretrained(folder)
  (folder / "tokenizer.json").write_text(text.train(NAMES, 300))
  processor = dict(
    do_resize=True, do_center_crop=True, do_normalize=True, size={"shortest_edge": 24}, resample=3,
    crop_size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    image_processor_type="CLIPImageProcessor",
  )  # fmt: skip
  (folder / "preprocessor_config.json").write_text(json.dumps(processor))
  pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "photo.png")

  rows = text.load(folder, length=12, pad="[PAD]", end="[END]").encode(NAMES)
  images = torch.tensor(np.float32(pixels / 127.5 - 1).transpose(2, 0, 1)[None])
  with torch.no_grad():
    out = model(input_ids=torch.tensor(rows.astype(np.int64)), pixel_values=images)
  want = out.logits_per_image.softmax(-1)[0].numpy()

  ask = ["predict", str(tmp_path / "photo.png"), f"--checkpoint={folder}", "--seqhw=3"]
  assert cli.main([*ask, f"--names={','.join(NAMES)}", "--json"]) == 0
  top = json.loads(capsys.readouterr().out)["top"]
  found = {one["name"]: one["probability"] for one in top}
  np.testing.assert_allclose([found[name] for name in NAMES], want, atol=1e-5)
  assert cli.main(ask) == 2
  assert "its head is a projection" in capsys.readouterr().err
