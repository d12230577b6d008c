"""Folders of transformers give the same logits here and there: theirs read by us, ours read by them."""

import json

import jax
import numpy as np
import pytest

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights.export import frameworks
from flexivit_jax.weights.transformers import families as transformers_families

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
BERT = SIZE | dict(intermediate_size=48)
DINO = SIZE | dict(mlp_ratio=2)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
TEXT |= dict(vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=1)

# Class of models: (its config's class, the config, of a model with two towers the projection and labels).
MODELS = {
  "vit": ("ViTModel", "ViTConfig", BERT),
  "vit without the biases": ("ViTModel", "ViTConfig", BERT | dict(qkv_bias=False)),
  "vit of a rectangle": (
    "ViTForImageClassification",
    "ViTConfig",
    BERT | dict(image_size=(16, 24), patch_size=(4, 8), num_labels=5),
  ),
  "vit with tanh": (
    "ViTForImageClassification",
    "ViTConfig",
    BERT | dict(hidden_act="gelu_pytorch_tanh", num_labels=2),
  ),
  "vit with gelu_new": (
    "ViTForImageClassification",
    "ViTConfig",
    BERT | dict(hidden_act="gelu_new", num_labels=3, num_channels=1),
  ),
  "vit without labels": ("ViTForImageClassification", "ViTConfig", BERT | dict(num_labels=0)),
  "deit": ("DeiTModel", "DeiTConfig", BERT),
  "deit classifier": ("DeiTForImageClassification", "DeiTConfig", BERT | dict(num_labels=5)),
  "deit with a teacher": (
    "DeiTForImageClassificationWithTeacher",
    "DeiTConfig",
    BERT | dict(num_labels=5),
  ),
  "dinov2": ("Dinov2Model", "Dinov2Config", DINO),
  "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO | dict(num_labels=5)),
  "dinov2 with registers": (
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersConfig",
    DINO | dict(num_register_tokens=3),
  ),
  "dinov2 with registers, classifier": (
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersConfig",
    DINO | dict(num_labels=5),
  ),
  "clip tower": ("CLIPVisionModel", "CLIPVisionConfig", BERT),
  "clip tower with exact gelu": (
    "CLIPVisionModel",
    "CLIPVisionConfig",
    BERT | {"hidden_act": "gelu"},
  ),
  "clip projection": (
    "CLIPVisionModelWithProjection",
    "CLIPVisionConfig",
    BERT | dict(projection_dim=12),
  ),
  "clip": (
    "CLIPModel",
    "CLIPConfig",
    dict(vision_config=BERT, text_config=TEXT, projection_dim=12),
  ),
  "siglip tower": ("SiglipVisionModel", "SiglipVisionConfig", BERT),
  "siglip of no whole number of patches": (
    "SiglipVisionModel",
    "SiglipVisionConfig",
    BERT | dict(image_size=35),
  ),
  "siglip": ("SiglipModel", "SiglipConfig", dict(vision_config=BERT, text_config=TEXT)),
  "siglip classifier": (
    "SiglipForImageClassification",
    "SiglipConfig",
    dict(vision_config=BERT, text_config=TEXT, num_labels=5),
  ),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
  """Loading bars and warnings about arrays that are meant to be left out."""
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()


def save(folder, name, **more):
  """Saves a random model with no array at its initial value, and returns the folder."""
  import torch
  import transformers

  cls, config, values = MODELS[name]
  model = getattr(transformers, cls)(getattr(transformers, config)(**values))
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for array, p in model.named_parameters():
      random = torch.randn(p.shape, generator=generator)
      # LayerNorms and LayerScale stay near 1, so that nothing vanishes.
      near = 1.0 if p.ndim == 1 and array.endswith(("weight", "lambda1")) else 0.0
      p.copy_(near + 0.3 * random)
  model.save_pretrained(folder, **more)
  return folder


def images(hw, channels=3, n=2):
  return np.random.default_rng(1).uniform(-1, 1, (n, *hw, channels)).astype(np.float32)


def run(model, params, image, **size):
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x, **size)[0])(params, image))


def assert_close(got, want, atol):
  assert got.shape == want.shape
  assert want.std() > 0.1 and want.std(axis=0).max() > 0.01  # images differ
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_gives_its_logits_here(tmp_path, name):
  folder = save(tmp_path / "model", name)
  model, params, record = weights.load_with_record(folder)
  kernel = params["embedding"]["kernel"]
  hw = tuple(record["image_size"])
  image = images(hw, kernel.shape[2])
  rest = 3 if "no whole number" in name else 0
  padded = np.pad(image, [(0, 0), (0, rest), (0, rest), (0, 0)], constant_values=9)
  want = frameworks.transformers_logits(folder, padded)
  assert_close(run(model, params, image), want, atol=1e-5)
  assert record["source"]["format"].startswith("transformers folder, ")


def test_shards_are_put_together(tmp_path):
  whole = save(tmp_path / "whole", "vit")
  parts = save(tmp_path / "parts", "vit", max_shard_size="20KB")
  assert len(list(parts.glob("*.safetensors"))) > 2
  model, params = weights.load(parts)
  want, expected = weights.load(whole)
  assert model == want
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_what_the_image_processor_does_is_folded_in(tmp_path):
  import transformers
  from PIL import Image

  folder = save(tmp_path / "model", "clip projection")
  size = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
  processor = transformers.CLIPImageProcessor(**size)
  processor.save_pretrained(folder)
  pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
  pixel_values = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
  want = frameworks.transformers_logits(folder, pixel_values.transpose(0, 2, 3, 1))
  model, params, record = weights.load_with_record(folder)
  got = run(model, params, (pixels[None] / 127.5 - 1).astype(np.float32))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  assert record["folded_input"]["mean"] == list(processor.image_mean)


def test_the_defaults_are_those_of_the_config_classes():
  import transformers

  for name, family in transformers_families.FAMILIES.items():
    config = transformers.AutoConfig.for_model(name).to_dict()
    if family.nested:
      config = config["vision_config"] | {"projection_dim": config.get("projection_dim")}
    for key, default in family.defaults.items():
      if key != "pooler_output_size":  # filled in there
        assert config[key] == default, (name, key)


def random_flexivit(**fields):
  """Returns (model, params, record) of a FlexiViT at its usual 32x32 kernel and 7x7 grid."""
  given = dict(width=384, depth=2, mlp_dim=1536, num_heads=6, num_classes=10) | fields
  model = FlexiViT(**given)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))["params"]
  rng = np.random.default_rng(3)

  def random(name, s):
    near = 1.0 if name.endswith("scale") else 0.0
    # Of the order of a trained model's, so that float32 can tell logits from rounding.
    return (near + 0.05 * rng.normal(size=s.shape)).astype(np.float32)

  params = trees.map_named(random, shapes)
  record = {"model": {}, "class_names": [f"class {i}" for i in range(model.num_classes)]}
  return model, params, record


@pytest.mark.parametrize("patch", [8, 12, 16, 20, 30, 40, 48])
def test_what_we_write_gives_our_logits_in_transformers(tmp_path, patch):
  model, params, record = random_flexivit()
  folder, image = tmp_path / "vit", images((240, 240))
  weights.save_transformers(folder, model, params, record, image_hw=(240, 240), seqhw=240 // patch)
  got = frameworks.transformers_logits(folder, image)
  assert_close(got, run(model, params, image, seqhw=240 // patch), atol=2e-5)


@pytest.mark.parametrize(
  "fields",
  [
    dict(gelu="exact"),
    dict(gelu="quick", layer_norm_eps=1e-3),
    dict(posemb="sincos2d"),
    dict(num_classes=0),
    dict(scan=True),
  ],
)
def test_other_models_that_we_write(tmp_path, fields):
  small = dict(width=32, mlp_dim=48, num_heads=4, posemb_size=(4, 3), patch_size=(16, 16))
  model, params, record = random_flexivit(**small, **fields)
  folder, image = tmp_path / "vit", images((24, 36))  # patches of 4x6 pixels
  weights.save_transformers(folder, model, params, record, image_hw=(24, 36), seqhw=6)
  want = run(model, params, image, seqhw=6)
  np.testing.assert_allclose(frameworks.transformers_logits(folder, image), want, rtol=0, atol=1e-5)


def test_transformers_reads_the_labels_and_prepares_images_as_we_do(tmp_path):
  import transformers
  from PIL import Image

  model, params, record = random_flexivit(width=32, mlp_dim=48, num_heads=4)
  folder = tmp_path / "vit"
  weights.save_transformers(folder, model, params, record, image_hw=(64, 96), seqhw=4)
  config = transformers.AutoConfig.from_pretrained(folder)
  assert [config.id2label[i] for i in range(10)] == record["class_names"]
  processor = transformers.AutoImageProcessor.from_pretrained(folder)
  pixels = np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)
  got = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
  np.testing.assert_allclose(got.transpose(0, 2, 3, 1)[0], pixels / 127.5 - 1, rtol=0, atol=1e-6)


def test_a_folder_that_lacks_arrays_is_not_run(tmp_path):
  folder = save(tmp_path / "model", "vit")
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(
    json.dumps(config | {"architectures": ["ViTForImageClassification"]})
  )
  with pytest.raises(UserError, match=r"lacks arrays of ViTForImage.*: classifier\.bias, class"):
    frameworks.transformers_logits(folder, images((32, 32)))
