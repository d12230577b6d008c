"""A photo through timm's and transformers' own pipelines and through ours: the same logits, for each kind of folder."""

import io

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import data, weights

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
SMALL = dict(embed_dim=48, num_heads=3, depth=2)


@pytest.fixture(scope="module")
def photo():
  """Encoded PNG, 533 x 377 pixels: coloured squares with noise."""
  rng = np.random.default_rng(1)
  squares = np.kron(rng.integers(0, 255, (13, 29, 3)), np.ones((29, 19, 1)))[:, :533]
  noisy = np.clip(squares + rng.normal(0, 20, squares.shape), 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(noisy).save(file, "PNG")
  return file.getvalue()


def ours(path, photo):
  """Logits as `flexivit predict` has them."""
  model, params, record = weights.load_with_record(path, dtype="float32")
  image = data.parse(weights.preparation(record))({"image": photo}, None)["image"]
  return np.asarray(model.apply({"params": params}, image[None])[0]), record


def opened(photo):
  return Image.open(io.BytesIO(photo)).convert("RGB")


def shake(model, std=0.08):
  """Draws all matrices again."""
  import torch

  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:
        parameter.normal_(0, std)


def timm_folder(path, name, cfg=None, **args):
  import timm
  import torch

  torch.manual_seed(0)
  given = dict(num_classes=5, **{**SMALL, **args})
  model = timm.create_model(name, **given, pretrained_cfg_overlay=cfg).eval()
  torch.nn.init.normal_(model.head.weight, std=0.5)
  if "siglip" in name:  # whose pool is drawn so small that all logits are nearly 0
    shake(model, 0.3)
  timm.models.save_for_hf(model, path, model_args={**SMALL, **args}, safe_serialization=True)
  return model


TIMM = [
  ("vit_tiny_patch16_224", {}),  # AugReg: mean 0.5
  ("deit_tiny_patch16_224", {}),  # ImageNet's mean
  ("vit_base_patch32_clip_224", {}),  # CLIP's mean, a norm before the blocks
  ("vit_base_patch16_siglip_224", {}),
  ("flexivit_small", {}),
  ("vit_tiny_patch16_224", dict(crop_mode="squash", crop_pct=0.95, interpolation="bilinear")),
  ("vit_tiny_patch16_224", dict(crop_mode="border", crop_pct=1.0, interpolation="lanczos")),
  ("vit_tiny_patch16_224", dict(crop_mode="border", mean=(0.2, 0.4, 0.9), crop_pct=0.8)),
  ("vit_tiny_patch16_224", dict(crop_pct=1.2, interpolation="nearest")),
]


@pytest.mark.parametrize(("name", "cfg"), TIMM)
def test_a_photo_through_timms_pipeline(tmp_path, photo, name, cfg):
  import timm
  import torch

  model = timm_folder(tmp_path / "hub", name, cfg)
  prepare = timm.data.create_transform(
    **timm.data.resolve_model_data_config(model), is_training=False
  )
  with torch.inference_mode():
    want = model(prepare(opened(photo))[None]).numpy()
  for file in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
    got, _ = ours(file, photo)
    print(f"timm {name} {cfg}: {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)


def kinds():
  """(name, model, image processor): one of each family."""
  import transformers as t

  labels = dict(num_labels=5, **SIZES)
  vit = t.ViTForImageClassification(t.ViTConfig(**labels))
  deit = t.DeiTForImageClassification(t.DeiTConfig(**labels))
  dino = t.Dinov2ForImageClassification(t.Dinov2Config(image_size=224, patch_size=14, **labels))
  siglip = t.SiglipForImageClassification(t.SiglipConfig(vision_config=SIZES, num_labels=5))
  clip = t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(projection_dim=5, **SIZES))
  yield "ViT", vit, t.ViTImageProcessor()
  yield "DeiT", deit, t.DeiTImageProcessor()
  yield "DINOv2", dino, t.BitImageProcessor(size={"shortest_edge": 256})
  yield "SigLIP", siglip, t.SiglipImageProcessor()
  yield "CLIP", clip, t.CLIPImageProcessor()
  for number in (0, 1, 4, 5):  # the other filters of Pillow
    yield f"ViT, filter {number}", vit, t.ViTImageProcessor(resample=number)


# Pillow's and torchvision's resizes differ by a grey level here and there. Ours is Pillow's.
LIMITS = {"pil": 1e-5, "torchvision": 1e-3}


def test_a_photo_through_transformers_pipelines(tmp_path, photo):
  import torch
  import transformers

  torch.manual_seed(0)
  for name, model, processor in kinds():
    shake(model)
    path = tmp_path / name
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    got, record = ours(path, photo)
    for backend, limit in LIMITS.items():
      if backend == "torchvision" and "filter" in name:
        continue  # hamming and box are not torchvision's
      own = transformers.AutoImageProcessor.from_pretrained(path, backend=backend)
      with torch.inference_mode():
        out = model(own(images=opened(photo), return_tensors="pt")["pixel_values"])
      want = (out.logits if hasattr(out, "logits") else out.image_embeds).numpy()
      shown = f"{np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}"
      print(f"transformers {name}, {backend}: {shown}")
      np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=f"{name}, {backend}")
    assert not any("not known" in note or "squashed" in note for note in record["notes"])


def test_what_is_written_after_reading_is_prepared_alike(tmp_path, photo):
  """timm's folder to ours, then to transformers and to timm: each framework's pipeline gives the same logits."""
  import timm
  import torch
  import transformers

  timm_folder(tmp_path / "hub", "deit_tiny_patch16_224")
  want, _ = ours(tmp_path / "hub", photo)
  loaded = weights.load_with_record(tmp_path / "hub", dtype="float32")
  weights.save_transformers(tmp_path / "hf", *loaded, image_hw=(224, 224), seqhw=14)
  weights.save_timm(tmp_path / "again", *loaded, image_hw=(224, 224), seqhw=14)
  model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf")
  own = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
  with torch.inference_mode():
    got = model(own(images=opened(photo), return_tensors="pt")["pixel_values"]).logits.numpy()
  np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)
  model = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
  prepare = timm.data.create_transform(
    **timm.data.resolve_model_data_config(model), is_training=False
  )
  with torch.inference_mode():
    got = model(prepare(opened(photo))[None]).numpy()
  np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)
