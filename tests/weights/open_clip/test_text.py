"""Files of OpenCLIP and OpenAI's CLIP: the text tower gives what a forward pass of its own in float64 gives."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax.errors import UserError
from flexivit_jax.weights import certificate, towers

WIDTH, HEADS, MLP, DEPTH, VOCABULARY, LENGTH, OUT = 16, 2, 24, 2, 12, 6, 5


def arrays(prefix="", *, custom=False, bias=False):
  """A file's arrays, below a prefix; `custom` puts the text tower below "text."."""
  rng = np.random.default_rng(0)

  def blocks(base, width):
    shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    shapes |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    shapes |= {"mlp.c_fc.weight": (MLP, width), "mlp.c_fc.bias": (MLP,)}
    shapes |= {"mlp.c_proj.weight": (width, MLP), "mlp.c_proj.bias": (width,)}
    shapes |= {f"{n}.{part}": (width,) for n in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return {f"{base}.{i}.{n}": shape for i in range(DEPTH) for n, shape in shapes.items()}

  image = {"conv1.weight": (64, 3, 4, 4), "class_embedding": (64,), "proj": (64, OUT)}
  image |= {"positional_embedding": (10, 64)} | blocks("transformer.resblocks", 64)
  image |= {f"{n}.{p}": (64,) for n in ("ln_pre", "ln_post") for p in ("weight", "bias")}
  text = {"token_embedding.weight": (VOCABULARY, WIDTH), "positional_embedding": (LENGTH, WIDTH)}
  text |= {"ln_final.weight": (WIDTH,), "ln_final.bias": (WIDTH,)}
  text |= blocks("transformer.resblocks", WIDTH)
  if bias:
    text |= {"text_projection.weight": (OUT, WIDTH), "text_projection.bias": (OUT,)}
  else:
    text["text_projection"] = (WIDTH, OUT)
  shapes = {f"visual.{n}": shape for n, shape in image.items()}
  shapes |= {("text." if custom else "") + n: shape for n, shape in text.items()}
  shapes |= {"logit_scale": ()} | ({"logit_bias": ()} if bias else {})
  near = lambda name: "ln_" in name and name.endswith("weight")  # noqa: E731
  return {
    f"{prefix}{n}": np.asarray(near(n) + 0.3 * rng.normal(size=shape), np.float32)
    for n, shape in shapes.items()
  }


def forward(a, tokens, *, gelu, causal=True, last=False, eps=1e-5):
  """OpenCLIP's text transformer in float64, by its own names."""
  a = {name: array.astype(np.float64) for name, array in a.items()}

  def norm(name, x):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred / scale * a[f"{name}.weight"] + a[f"{name}.bias"]

  def dense(name, x):
    return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

  x = a["token_embedding.weight"][tokens] + a["positional_embedding"]
  n, length, width = x.shape
  for i in range(DEPTH):
    base = f"transformer.resblocks.{i}"
    y = norm(f"{base}.ln_1", x)
    qkv = y @ a[f"{base}.attn.in_proj_weight"].T + a[f"{base}.attn.in_proj_bias"]
    q, k, v = (
      part.reshape(n, length, HEADS, -1).transpose(0, 2, 1, 3) for part in np.split(qkv, 3, -1)
    )
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // HEADS)
    if causal:
      scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = (p / p.sum(-1, keepdims=True)) @ v
    x = x + dense(f"{base}.attn.out_proj", y.transpose(0, 2, 1, 3).reshape(n, length, width))
    x = x + dense(f"{base}.mlp.c_proj", gelu(dense(f"{base}.mlp.c_fc", norm(f"{base}.ln_2", x))))
  x = norm("ln_final", x)
  x = x[:, -1] if last else x[np.arange(n), tokens.argmax(1)]
  plain = "text_projection" in a
  x = x @ a["text_projection"] if plain else dense("text_projection", x)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def quick(x):
  return x / (1 + np.exp(-1.702 * x))


def tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def embed(model, params, tokens):
  return certificate.embeddings(model, params, np.zeros((1, 12, 12, 3)), tokens, None).text


@pytest.mark.parametrize("prefix", ["", "module."])
def test_clips_file_alone_is_read_with_what_the_caller_says(tmp_path, prefix):
  file = arrays(prefix)
  save_file(file, tmp_path / "clip.safetensors")
  given = dict(gelu="quick", text=dict(num_heads=HEADS))
  model, params, record = towers.load(tmp_path / "clip.safetensors", **given)
  tower = model.parts["text"]
  assert (tower.eos_token, tower.causal, tower.gelu) == (VOCABULARY - 1, True, "quick")
  tokens = certificate.texts(tower)
  bare = {name.removeprefix(prefix): a for name, a in file.items()}
  want = forward(bare, tokens, gelu=quick)
  np.testing.assert_allclose(embed(model, params, tokens), want, atol=1e-5)
  assert params["t"][0] == bare["logit_scale"] and "b" not in params
  notes = " ".join(record["notes"])
  assert "with 2 heads" in notes and "Left out" not in notes
  assert "gelu='quick'" in notes and towers.NO_TOKENIZER in notes


def test_its_config_says_what_siglips_text_tower_is(tmp_path):
  file = arrays(custom=True, bias=True)
  save_file(file, tmp_path / "open_clip_model.safetensors")
  text = dict(heads=HEADS, no_causal_mask=True, proj_bias=True, pool_type="last")
  text |= dict(norm_kwargs={"eps": 1e-6}, act_kwargs={"approximate": "tanh"})
  config = {"model_cfg": {"text_cfg": text}, "preprocess_cfg": {}}
  with pytest.raises(UserError, match=r"has a bias, so it is not CLIP's.*open_clip_config\.json"):
    towers.load(tmp_path / "open_clip_model.safetensors")
  (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
  model, params, _ = towers.load(tmp_path / "open_clip_model.safetensors")
  tokens = certificate.texts(model.parts["text"])
  bare = {name.removeprefix("text."): a for name, a in file.items()}
  want = forward(bare, tokens, gelu=tanh, causal=False, last=True, eps=1e-6)
  np.testing.assert_allclose(embed(model, params, tokens), want, atol=1e-5)
  assert params["b"][0] == file["logit_bias"]


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    (lambda a: a | {"cls_emb": np.zeros(WIDTH, np.float32)}, "cls_emb, as CoCa's"),
    (lambda a: a | {"ln_final.extra": np.zeros(3, np.float32)}, "ln_final.extra"),
    (lambda a: {n: v for n, v in a.items() if n != "logit_scale"}, "no logit_scale"),
    (lambda a: {n.replace("token_emb", "text.model.emb"): v for n, v in a.items()}, "inside Open"),
  ],
)
def test_another_text_tower_is_refused_by_name(tmp_path, change, expected):
  save_file(change(arrays()), tmp_path / "clip.safetensors")
  with pytest.raises(UserError, match=expected):
    towers.text_of(tmp_path / "clip.safetensors")
