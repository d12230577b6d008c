"""CLIP, SigLIP, SigLIP 2 of transformers give the same embeddings here and there: theirs read by us, ours by them."""

import json

import jax
import numpy as np
import pytest

from flexivit_jax import cli, trees, weights
from flexivit_jax.models import TwoTowers
from flexivit_jax.weights import model_records, towers
from flexivit_jax.weights.export import frameworks
from flexivit_jax.weights.transformers import towers as transformers_towers
from flexivit_jax.weights.transformers.towers_writer import save_towers

VISION = dict(
  hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8
)  # fmt: skip
TEXT = dict(
  hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=20,
  max_position_embeddings=7, bos_token_id=None, pad_token_id=None,
)  # fmt: skip
CLIP = dict(vision_config=VISION, text_config=TEXT | dict(eos_token_id=3), projection_dim=12)
# SigLIP 2 of a fixed size is a SigLIP whose text tower may be narrower than the image tower, with more tokens.
MODELS = {
  "clip": ("CLIP", CLIP),
  "clip of before": ("CLIP", CLIP | dict(text_config=TEXT | dict(eos_token_id=2))),
  "clip with exact gelu": (
    "CLIP",
    CLIP
    | dict(
      vision_config=VISION | dict(hidden_act="gelu"),
      text_config=CLIP["text_config"] | dict(hidden_act="gelu", layer_norm_eps=1e-3),
    ),
  ),
  "siglip": (
    "Siglip",
    dict(vision_config=VISION, text_config=TEXT | dict(hidden_size=32, eos_token_id=None)),
  ),
  "siglip2": (
    "Siglip",
    dict(
      vision_config=VISION,
      text_config=TEXT | dict(projection_size=32, vocab_size=300, eos_token_id=None),
    ),
  ),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()


def save(folder, name):
  """Saves a random model with no array at its initial value, and returns the folder."""
  import torch
  import transformers

  cls, values = MODELS[name]
  config = getattr(transformers, f"{cls}Config")(**values)
  model = getattr(transformers, f"{cls}Model")(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for array, p in model.named_parameters():
      near = 1.0 if p.ndim == 1 and array.endswith("weight") else 0.0
      p.copy_(near + 0.3 * torch.randn(p.shape, generator=generator))
  model.save_pretrained(folder)
  return folder


def examples(model, seed=1):
  """Two images, and three texts with the end token where one has to be, at different places."""
  rng = np.random.default_rng(seed)
  text = model.parts["text"]
  tokens = rng.integers(4, text.vocab_size - 1, (3, text.max_length))
  if text.eos_token is not None:
    tokens[np.arange(3), [text.max_length - 1, 2, 4]] = text.eos_token
  return rng.uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32), tokens


def run(model, params, image, tokens, **size):
  with jax.default_matmul_precision("highest"):
    run = jax.jit(lambda p, i, t: model.apply({"params": p}, i, t, **size)[1])
    image, text, t, b = (
      run(params, image[:, :, :, :], tokens).get(k) for k in ("image", "text", "t", "b")
    )
  products = np.exp(t[0]) * np.asarray(image) @ np.asarray(text).T
  return image, text, products + (0 if b is None else b[0])


def assert_close(got, want):
  for ours, theirs in zip(got, want, strict=True):
    assert ours.shape == theirs.shape and np.std(theirs, axis=0).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_gives_its_embeddings_here_and_again_there(tmp_path, name):
  folder = save(tmp_path / "model", name)
  model, params, record = towers.load(folder)
  image, tokens = examples(model)
  want = frameworks.transformers_embeddings(folder, image, tokens)
  assert_close(run(model, params, image, tokens), want)
  assert not any("left out" in note for note in record["notes"])
  save_towers(tmp_path / "again", model, params, record, image_hw=(24, 24))
  assert_close(frameworks.transformers_embeddings(tmp_path / "again", image, tokens), want)
  again, back, _ = towers.load(tmp_path / "again")
  assert again.parts == model.parts
  assert trees.digest(back["text"]) == trees.digest(params["text"])


def made(family, **text):
  """Two towers of ours that a model of transformers can be, with everything that has to be folded."""
  sizes = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
  image = dict(sizes, patch_size=(6, 6), posemb_size=(3, 3))
  text = dict(sizes, vocab_size=20, max_length=7) | text
  if family == "clip":
    image |= dict(pool_type="tok", pre_norm=True, num_classes=12)
    text |= dict(kind="clip", eos_token=5, num_classes=12)
  else:
    image |= dict(pool_type="map")
    text |= dict(kind="siglip", num_classes=16)
  model = TwoTowers(image=image, text=text, bias=None if family == "clip" else -2.0)
  inputs = np.zeros((1, 24, 24, 3)), np.zeros((1, 7), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)

  def random(name, s):
    near = 1.0 if name.endswith("scale") else 0.0
    return (near + 0.3 * rng.normal(size=s.shape)).astype(np.float32)

  return model, trees.map_named(random, shapes)


@pytest.mark.parametrize("seqhw", [2, 3, 4])
@pytest.mark.parametrize("family", transformers_towers.CLASSES)
def test_what_we_write_gives_our_embeddings_in_transformers(tmp_path, family, seqhw):
  bias = {"head_bias": True} if family == "clip" else {}
  model, params = made(family, **bias)
  image, tokens = examples(model)
  record = {"model": model_records.record_of(model)}
  save_towers(tmp_path / "out", model, params, record, image_hw=(24, 24), seqhw=seqhw)
  want = run(model, params, image, tokens, seqhw=seqhw)
  assert_close(frameworks.transformers_embeddings(tmp_path / "out", image, tokens), want)


def test_the_certificate_is_of_transformers_itself(tmp_path, capsys):
  model, params = made("siglip")
  weights.save_npz(tmp_path / "w.npz", model, params, {"model": model_records.record_of(model)})
  given = ["--to=transformers", "--seqhw=4", "--image_size=24"]
  assert cli.main(["convert", str(tmp_path / "w.npz"), str(tmp_path / "out"), *given]) == 0
  certificate = json.loads((tmp_path / "out.certificate.json").read_text())
  assert certificate["record"]["compared_in"].startswith("transformers ")
  assert max(certificate["rows"][0]["largest_differences"].values()) < 1e-5
  assert "seqhw   4: largest differences: image" in capsys.readouterr().out


def test_the_tokenizer_and_the_processor_go_there_and_back(tmp_path):
  """Its mean and std are folded in, and its tokenizer gives the tokens that transformers' own gives."""
  import tokenizers
  import transformers

  from flexivit_jax.data import text

  folder = save(tmp_path / "model", "clip")
  size = dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
  transformers.CLIPImageProcessor(**size).save_pretrained(folder)
  words = ["<pad>", "<start>", "cat", "<end>", "a", "dog", "of", "photo"]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(["<pad>", "<start>", "<end>"])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
  )
  special = dict(pad_token="<pad>", eos_token="<end>")
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
  fast.save_pretrained(folder)
  model, params, record = towers.load(folder)
  assert record["folded_input"]["mean"][0] == pytest.approx(0.48145466)
  tokens = text.of_record(record["text"])
  assert (tokens.length, tokens.pad, tokens.end, tokens.lower) == (7, 0, 3, False)
  captions = ["a photo of a cat", "dog"]
  want = fast(captions, padding="max_length", truncation=True, max_length=7)["input_ids"]
  np.testing.assert_array_equal(tokens.encode(captions), want)
  save_towers(tmp_path / "again", model, params, record, image_hw=(24, 24))
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
  got = again(captions, padding="max_length", truncation=True, max_length=7)["input_ids"]
  np.testing.assert_array_equal(got, want)
  assert towers.load(tmp_path / "again")[2]["text"] == record["text"]
