"""A plain NumPy ViT that runs timm's names as they are says what the converted model must give."""

import math
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import data, resize, weights
from flexivit_jax.errors import UserError

D, HEADS, MLP, DEPTH, PATCH = 32, 4, 48, 2, (8, 8)  # of the fixture `timm_state_dict`


def norm(a, name, x):
  eps = 1e-5 if "norm_pre.weight" in a else 1e-6
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
  return x * a[f"{name}.weight"] + a[f"{name}.bias"]


def dense(a, name, x):
  return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]


def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(q, k, v):
  n, _, d = q.shape
  q, k, v = (x.reshape(n, -1, HEADS, d // HEADS).transpose(0, 2, 1, 3) for x in (q, k, v))
  scores = q @ k.swapaxes(-1, -2) / math.sqrt(d // HEADS)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  x = (p / p.sum(-1, keepdims=True)) @ v
  return x.transpose(0, 2, 1, 3).reshape(n, -1, d)


def mlp(a, b, x):
  return dense(a, f"{b}mlp.fc2", gelu(dense(a, f"{b}mlp.fc1", x)))


def block(a, b, x):
  y = attention(*np.split(dense(a, f"{b}attn.qkv", norm(a, f"{b}norm1", x)), 3, axis=-1))
  x = x + a.get(f"{b}ls1.gamma", 1.0) * dense(a, f"{b}attn.proj", y)
  return x + a.get(f"{b}ls2.gamma", 1.0) * mlp(a, b, norm(a, f"{b}norm2", x))


def attention_pool(a, x):
  """One learned query over all tokens."""
  b, latent = "attn_pool.", np.tile(a["attn_pool.latent"], (len(x), 1, 1))
  k, v = np.split(dense(a, f"{b}kv", x), 2, axis=-1)
  x = dense(a, f"{b}proj", attention(dense(a, f"{b}q", latent), k, v))
  return (x + mlp(a, b, norm(a, f"{b}norm", x)))[:, 0]


def pool(a, x, prefix):
  """Of the normalised tokens [n, l, d]: logits, or what they are made of."""
  if "head_dist.weight" in a:
    return (dense(a, "head", x[:, 0]) + dense(a, "head_dist", x[:, 1])) / 2
  gap = x[:, 0] if "cls_token" in a else x[:, prefix:].mean(1)
  x = attention_pool(a, x) if "attn_pool.latent" in a else gap
  return dense(a, "head", x) if "head.weight" in a else x


def forward(state, image, patch=PATCH, kernel=None, position=None):
  """Logits of pixels [n, h, w, c], already normalised, in float64."""
  a = {name: array.astype(np.float64) for name, array in state.items()}
  n, h, w, c = image.shape
  kernel = a["patch_embed.proj.weight"] if kernel is None else kernel
  position = a["pos_embed"] if position is None else position
  x = image.reshape(n, h // patch[0], patch[0], w // patch[1], patch[1], c)
  x = np.einsum("nhpwqc,dcpq->nhwd", x, kernel) + a.get("patch_embed.proj.bias", 0)
  x = x.reshape(n, -1, x.shape[-1])
  tokens = [np.tile(a[t], (n, 1, 1)) for t in ("cls_token", "dist_token", "reg_token") if t in a]
  prefix = sum(t.shape[1] for t in tokens)
  if position.shape[1] > x.shape[1]:
    x = np.concatenate([*tokens, x], 1) + position
  else:
    x = np.concatenate([*tokens, x + position], 1)
  if "norm_pre.weight" in a:
    x = norm(a, "norm_pre", x)
  for i in range(DEPTH):
    x = block(a, f"blocks.{i}.", x)
  return pool(a, norm(a, "fc_norm" if "fc_norm.weight" in a else "norm", x), prefix)


def save(folder, state, kind="npz"):
  file = folder / f"weights.{kind}"
  if kind == "npz":
    np.savez(file, **state)
  else:
    save_file(state, file)
  return file


def pixels(n=2, hw=(32, 32)):
  return np.random.default_rng(1).uniform(-1, 1, (n, *hw, 3)).astype(np.float32)


def logits(model, params, image, **size):
  with jax.default_matmul_precision("highest"):
    return np.asarray(model.apply({"params": params}, jnp.asarray(image), **size)[0])


@pytest.mark.parametrize(
  "options",
  [
    {},
    dict(layer_scale=True, cls_position=False),
    dict(cls=False),
    dict(classes=0, layer_scale=True),
    dict(registers=4),
    dict(registers=3, cls_position=False),
    dict(registers=4, cls=False),
    dict(distilled=True),
    dict(attention_pool=True, cls=False),
    dict(pre_norm=True),
    dict(pre_norm=True, cls=False, registers=2, attention_pool=True),
    dict(final_norm="fc_norm"),
  ],
)
def test_logits_are_those_of_the_source(timm_state_dict, tmp_path, options):
  state = timm_state_dict(**options)
  pool = {"fc_norm": "tok"}.get(options.get("final_norm"))
  pool = "map" if "registers" in options and "attention_pool" in options else pool
  given = {} if pool is None else {"pool_type": pool}
  read = {
    kind: weights.load_with_record(save(tmp_path, state, kind), num_heads=HEADS, **given)
    for kind in ("npz", "safetensors")
  }
  model, params, _ = read["safetensors"]
  np.testing.assert_allclose(
    logits(model, params, pixels()), forward(state, pixels()), rtol=0, atol=1e-5
  )
  assert read["npz"][0] == model
  jax.tree.map(np.testing.assert_array_equal, read["npz"][1], params)
  for kind, (*_, one) in read.items():
    assert one["source"]["format"] == f"{kind} in timm's names"
    check_record(one, options)


def check_record(record, options):
  assert record["image_size"] == [32, 32] and record["native_patch_size"] == [8, 8]
  assert record["model"]["gelu"] == "exact"
  assert record["model"]["layer_norm_eps"] == (1e-5 if "pre_norm" in options else 1e-6)
  for option, word in NOTES.items():
    assert any(word in note for note in record["notes"]) == bool(options.get(option))


NOTES = {
  "layer_scale": "LayerScale",
  "pre_norm": "layer_norm_eps=1e-5",
  "attention_pool": "gelu='tanh'",
  "distilled": "distilled DeiT",
}


def test_a_class_token_that_is_not_the_output_is_a_register(timm_state_dict, tmp_path):
  state = timm_state_dict(registers=2)
  model, params = weights.load(save(tmp_path, state), num_heads=HEADS, pool_type="gap")
  assert (model.pool_type, model.registers) == ("gap", 3)
  renamed = dict(state)  # the same as registers of a model without a class token
  renamed["reg_token"] = np.concatenate([renamed.pop("cls_token"), state["reg_token"]], 1)
  want = forward(renamed, pixels())
  np.testing.assert_allclose(logits(model, params, pixels()), want, rtol=0, atol=1e-5)


def test_original_dinov2_files_are_read_as_timm_reads_them(timm_state_dict, tmp_path):
  state = timm_state_dict(layer_scale=True, registers=4, cls_position=False)
  first = np.random.default_rng(2).normal(size=(1, 1, D)).astype(np.float32)
  original = {n: a for n, a in state.items() if n not in ("reg_token", "cls_token", "pos_embed")}
  original |= {"register_tokens": state["reg_token"], "mask_token": np.zeros((1, D), np.float32)}
  original |= {
    "cls_token": state["cls_token"] - first,  # it alone has a position
    "pos_embed": np.concatenate([first, state["pos_embed"]], 1),
  }
  model, params, record = weights.load_with_record(save(tmp_path, original), num_heads=HEADS)
  assert model.registers == 4
  np.testing.assert_allclose(
    logits(model, params, pixels()), forward(state, pixels()), rtol=0, atol=1e-5
  )
  assert any(
    "only pre-training uses it" in note and "mask_token" in note for note in record["notes"]
  )


def test_original_deit3_files_call_layer_scale_otherwise(timm_state_dict, tmp_path):
  state = timm_state_dict(layer_scale=True)
  original = {
    n.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): a
    for n, a in state.items()
  }
  assert original.keys() != state.keys()
  model, params = weights.load(save(tmp_path, original), num_heads=HEADS)
  np.testing.assert_allclose(
    logits(model, params, pixels()), forward(state, pixels()), rtol=0, atol=1e-5
  )


def test_positions_that_fit_two_grids_must_be_told(timm_state_dict, tmp_path):
  state = timm_state_dict(registers=4)
  state["pos_embed"] = np.zeros((1, 9, D), np.float32)  # 9 cells, or 5 tokens and 4
  with pytest.raises(UserError, match=r"9 positions, 5 tokens .* 9 or 4 cells; give posemb_size"):
    weights.load(save(tmp_path, state), num_heads=HEADS)
  for side in (2, 3):
    model, _ = weights.load(save(tmp_path, state), num_heads=HEADS, posemb_size=(side, side))
    assert model.posemb_size == (side, side)


def test_heads_that_do_not_divide_the_width_are_an_error(timm_state_dict, tmp_path):
  with pytest.raises(UserError, match="num_heads=5 does not divide the width 32"):
    weights.load(save(tmp_path, timm_state_dict()), num_heads=5)


def test_another_patch_size_is_timms_cubic_resize_of_kernel_and_grid(timm_state_dict, tmp_path):
  state = timm_state_dict()
  model, params = weights.load(save(tmp_path, state), num_heads=HEADS)
  kernel = resize.pi_resize(
    state["patch_embed.proj.weight"].transpose(2, 3, 1, 0), (4, 4), "cubic_antialias"
  )
  matrix = resize.resize_matrix(4, 8, "cubic_antialias")
  grid = state["pos_embed"][0, 1:].reshape(4, 4, D)
  grid = np.einsum("yh,xw,hwd->yxd", matrix, matrix, grid).reshape(1, 64, D)
  position = np.concatenate([state["pos_embed"][:, :1], grid], 1)
  want = forward(state, pixels(), (4, 4), kernel.transpose(3, 2, 0, 1), position)
  np.testing.assert_allclose(logits(model, params, pixels(), seqhw=8), want, rtol=0, atol=2e-5)


def test_mean_and_std_of_the_input_are_folded(timm_state_dict, tmp_path):
  state, mean, std = timm_state_dict(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  file = save(tmp_path, state)
  model, params, record = weights.load_with_record(file, num_heads=HEADS, mean=mean, std=std)
  normalised = ((pixels() + 1) / 2 - np.array(mean)) / np.array(std)
  want = forward(state, normalised)
  np.testing.assert_allclose(logits(model, params, pixels()), want, rtol=0, atol=2e-5)
  assert record["folded_input"] == {"mean": list(mean), "std": list(std)}
  same, _ = weights.load(file, num_heads=HEADS, mean=(0.5,) * 3, std=(0.5,) * 3)
  assert same == model
  for wrong in (dict(mean=mean), dict(mean=mean, std=(1, 0, 1)), dict(mean=(0.5,), std=(0.5,))):
    with pytest.raises(UserError, match="mean"):
      weights.load(file, num_heads=HEADS, **wrong)


def test_heads_are_those_of_published_models_or_must_be_given(timm_state_dict, tmp_path):
  model, _, record = weights.load_with_record(save(tmp_path, timm_state_dict(width=192)))
  assert model.num_heads == 3 and "3 heads: as usual" in record["notes"][0]
  assert weights.load(save(tmp_path, timm_state_dict(width=128)))[0].num_heads == 2
  with pytest.raises(UserError, match="heads cannot be told from width 80; give num_heads"):
    weights.load(save(tmp_path, timm_state_dict(width=80)))


def test_all_differences_are_listed_in_timms_names(timm_state_dict, tmp_path):
  state = timm_state_dict()
  state["blocks.1.norm2.gain"] = state.pop("blocks.1.norm2.weight")
  state["blocks.0.mlp.fc2.weight"] = np.zeros((MLP, D), np.float32)
  state["head.bias"] = state["head.bias"].astype(np.float64)
  state["norm.bias"] = state["norm.bias"].astype(np.float16)  # widened: no difference
  with pytest.raises(UserError) as error:
    weights.load(save(tmp_path, state), num_heads=HEADS)
  assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
    "missing blocks.1.norm2.weight float32[32]. Did you mean 'blocks.1.norm2.gain'?",
    "extra blocks.1.norm2.gain float32[32]",
    "blocks.0.mlp.fc2.weight: expected float32[32,48], got float32[48,32]",
    "head.bias: expected float32[7], got float64[7]",
  ]


@pytest.mark.parametrize(
  ("options", "why"),
  [
    (dict(final_norm="fc_norm", cls=False), "fc_norm.weight: .*averages the tokens and then"),
    (dict(attention_pool=True), "attn_pool.latent and cls_token: .*leaves such tokens out"),
    (dict(attention_pool=True, cls=False, registers=1), "attn_pool.latent and reg_token: "),
  ],
)
def test_models_that_are_no_flexivit_are_errors(timm_state_dict, tmp_path, options, why):
  with pytest.raises(UserError, match=f"{why}.*not supported"):
    weights.load(save(tmp_path, timm_state_dict(**options)), num_heads=HEADS)


@pytest.mark.parametrize(
  ("options", "name"),
  [
    (dict(distilled=True), "head_dist.bias"),
    (dict(attention_pool=True, cls=False), "attn_pool.kv.bias"),
    (dict(pre_norm=True), "norm_pre.bias"),
    (dict(layer_scale=True), "blocks.1.ls2.gamma"),
  ],
)
def test_what_goes_with_other_arrays_is_asked_for(timm_state_dict, tmp_path, options, name):
  state = timm_state_dict(**options)
  del state[name]
  with pytest.raises(UserError, match=f"missing {name} "):
    weights.load(save(tmp_path, state), num_heads=HEADS)


@pytest.mark.parametrize("missing", ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_arrays_that_tell_the_architecture_are_asked_for(timm_state_dict, tmp_path, missing):
  state = timm_state_dict()
  state[missing + "s"] = state.pop(missing)
  with pytest.raises(UserError, match=f"missing {missing}. Did you mean '{missing}s'"):
    weights.load(save(tmp_path, state), num_heads=HEADS)


@pytest.mark.parametrize("name", ["pos_embed", "norm.weight", "patch_embed.proj.bias", "head.bias"])
def test_a_missing_array_is_named(timm_state_dict, tmp_path, name):
  state = timm_state_dict()
  del state[name]
  with pytest.raises(UserError, match=f"missing {name} "):
    weights.load(save(tmp_path, state), num_heads=HEADS)


def test_a_flexivit_that_was_already_resized_is_explained(timm_state_dict, tmp_path):
  state = timm_state_dict(cls_position=False, width=384)
  state["patch_embed.proj.weight"] = np.zeros((384, 3, 16, 16), np.float32)
  state["pos_embed"] = np.zeros((1, 225, 384), np.float32)
  model, _, record = weights.load_with_record(save(tmp_path, state))
  assert model.kernel_operator == "linear"
  note = next(n for n in record["notes"] if "already resized" in n)
  assert "pytorch_model.bin" in note and "lost" in note
  state["pos_embed"] = np.zeros((1, 196, 384), np.float32)  # DeiT-III at 224 px: nothing to say
  _, _, record = weights.load_with_record(save(tmp_path, state))
  assert not any("already resized" in n for n in record["notes"])


@pytest.mark.shared
def test_a_real_vit_gives_its_golden_logits(shared):
  model, params = weights.load(shared / "data" / "vit_ti16_augreg_in1k_224.npz")
  with np.load(shared / "data" / "vit_ti16_golden.npz") as golden:
    image = golden["pixels_u8"][:4].astype(np.float32) / 127.5 - 1
    got = logits(model, params, image)
    np.testing.assert_allclose(got, golden["vit_ti_logits"][:4], rtol=0, atol=1e-3)
    assert (got.argmax(1) == golden["vit_ti_logits"][:4].argmax(1)).all()


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_vit_is_right_on_as_many_photographs_as_it_should(shared):
  """81.3 % by an independent implementation, with Pillow's bicubic resize (../shared/data/README.md)."""
  model, params = weights.load(shared / "data" / "vit_ti16_augreg_in1k_224.npz")
  prepare = data.parse(
    "decode|resize_small(248, method='cubic')|central_crop(224)|value_range(-1, 1)"
  )
  forward = jax.jit(lambda p, x: model.apply({"params": p}, x)[0].argmax(-1))
  hits = []
  with zipfile.ZipFile(shared / "data" / "imagenet_sample_1k_256.zip") as archive:
    names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
    for begin in range(0, len(names), 50):
      records = ({"image": archive.read(n)} for n in names[begin : begin + 50])
      images = np.stack([prepare(r, None)["image"] for r in records])
      hits += list(np.asarray(forward(params, images)) == np.arange(begin, begin + 50))
  assert len(hits) == 1000
  assert abs(np.mean(hits) - 0.813) <= 0.003, np.mean(hits)
