"""timm runs what we write, and we run what it writes: the same logits, every parameter random."""

import os
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import bare, certificate, torch_files
from flexivit_jax.weights.export import frameworks
from flexivit_jax.weights.timm import folder as timm_folder, names as timm_names

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_like(shapes):
  """Random arrays by name that keep the scale of the activations."""
  rng = np.random.default_rng(0)

  def draw(name, shape):
    x = rng.normal(size=shape).astype(np.float32)
    if re.search(r"norm.*(weight|scale)$|LayerNorm_\d/scale|gamma$", name):
      return 1 + np.float32(0.3) * x
    if len(shape) == 1:
      return np.float32(0.3) * x
    return x / np.float32(np.prod(shape) // max(shape)) ** np.float32(0.5)

  return {name: draw(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def flexivit_s():
  """Makes (model, params, record) of a FlexiViT-S with random parameters."""

  def make(depth=4, **fields):
    fields = dict(num_classes=1000, variant="S", depth=depth) | fields
    model = FlexiViT(**fields)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    params = trees.unflatten(random_like({n: s.shape for n, s in shapes.items()}))
    return model, params, {"model": fields}

  return make


def assert_timm_agrees(made, out, p, **fields):
  model, params, record = made(**fields)
  image, seqhw = certificate.images((240, 240), 3), 240 // p
  weights.save_timm(out, model, params, record, image_hw=(240, 240), seqhw=seqhw)
  want = certificate.logits(model, params, image, seqhw)
  got = frameworks.timm_logits(out, image)
  assert np.abs(want[0] - want[1]).max() > 0.1  # the two images do make a difference
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [8, 12, 16, 20, 30, 40, 48])
def test_timm_gives_our_logits_at_one_patch_size(flexivit_s, tmp_path, p):
  assert_timm_agrees(flexivit_s, tmp_path / "out", p)


def test_timm_knows_the_names_of_our_classes(tmp_path):
  import timm

  names = ["ant", "café", "0"]
  fields = dict(
    width=16, depth=1, mlp_dim=16, num_heads=2, num_classes=3, patch_size=(8, 8), posemb_size=(2, 2)
  )
  model = FlexiViT(**fields)
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
  weights.save_timm(
    tmp_path / "out", model, params, {"model": fields, "class_names": names}, image_hw=(16, 16)
  )
  theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
  assert list(theirs.pretrained_cfg["label_names"]) == names


def test_timm_gives_our_logits_in_full_depth(flexivit_s, tmp_path):
  assert_timm_agrees(flexivit_s, tmp_path / "out", 30, depth=12)


@pytest.mark.parametrize(
  "fields",
  [
    dict(pool_type="gap", gelu="exact"),
    dict(pool_type="map", gelu="quick"),
    dict(registers=4, num_classes=0),
    dict(pool_type="gap", registers=2, posemb="sincos2d"),
    dict(pool_type="map", registers=2),
    dict(pre_norm=True, layer_norm_eps=1e-5),
    dict(pre_norm=True),
  ],
)
def test_timm_gives_our_logits_for_every_kind_of_model(flexivit_s, tmp_path, fields):
  assert_timm_agrees(flexivit_s, tmp_path / "out", 48, depth=2, **fields)


@pytest.mark.parametrize("p", [8, 16])
def test_timm_resizes_the_stored_kernel_as_we_do_where_the_grid_grows(flexivit_s, tmp_path, p):
  import timm

  model, params, record = flexivit_s(depth=2)
  image = certificate.images((240, 240), 3)
  weights.save_timm(tmp_path / "out", model, params, record, image_hw=(240, 240))
  name = f"local-dir:{tmp_path / 'out'}"
  want = certificate.logits(model, params, image, 240 // p)
  made = timm.create_model(name, pretrained=True, img_size=240, patch_size=p)
  np.testing.assert_allclose(frameworks.timm_logits(made, image), want, rtol=0, atol=1e-5)
  # set_input_size resizes bicubically whatever the architecture: another model.
  resized = timm.create_model(name, pretrained=True)
  resized.set_input_size(img_size=(240, 240), patch_size=(p, p))
  assert np.abs(frameworks.timm_logits(resized, image) - want).max() > 0.01


TIMM = {
  "flexivit_small": dict(depth=2),
  "vit_tiny_patch16_224": dict(depth=4),
  "deit3_small_patch16_384": dict(depth=2, img_size=128),
  "vit_small_patch14_dinov2": dict(depth=2, img_size=112),
  "vit_small_patch14_reg4_dinov2": dict(depth=2, img_size=112),
  "deit_tiny_distilled_patch16_224": dict(depth=2),
  "vit_base_patch16_siglip_224": dict(depth=2, embed_dim=96, num_heads=3),
  "vit_large_patch16_siglip_512": dict(depth=2, embed_dim=96, num_heads=3, img_size=128),
  "vit_base_patch16_siglip_gap_224": dict(depth=2, embed_dim=96, num_heads=3),
  "vit_base_patch16_clip_224": dict(depth=2, embed_dim=96, num_heads=3),
  "vit_base_patch16_clip_quickgelu_224": dict(depth=2, embed_dim=96, num_heads=3, num_classes=5),
  "test_vit3": {},
}
GIVEN = {  # what no array says, and a folder does
  "vit_base_patch16_clip_quickgelu_224": dict(gelu="quick"),
  "vit_large_patch16_siglip_512": dict(gelu="tanh"),
  "test_vit3": dict(pool_type="map"),
}


@pytest.fixture
def timm_model():
  """Makes (timm's model with random parameters, images in [-1, 1] of its size)."""
  import timm
  import torch

  def make(name):
    model = timm.create_model(name, **TIMM[name])
    arrays = random_like({n: tuple(t.shape) for n, t in model.state_dict().items()})
    model.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()})
    return model, certificate.images(tuple(model.patch_embed.img_size), 3)

  return make


def native(model, params, image):
  return certificate.logits(model, params, image, image.shape[1] // model.patch_size[0])


@pytest.mark.parametrize("name", TIMM)
def test_we_give_timms_logits(timm_model, tmp_path, name):
  source, image = timm_model(name)
  save_file({n: t.numpy() for n, t in source.state_dict().items()}, tmp_path / "w.safetensors")
  heads = source.blocks[0].attn.num_heads
  model, params = weights.load(tmp_path / "w.safetensors", num_heads=heads, **GIVEN.get(name, {}))
  want = frameworks.timm_logits(source, image)
  assert np.abs(want[0] - want[1]).max() > 0.1
  np.testing.assert_allclose(native(model, params, image), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(TIMM.keys() - {"test_vit3"}))  # which says it nowhere
def test_a_folder_that_timm_saved_says_all(timm_model, tmp_path, name):
  from timm.models import _hub

  source, image = timm_model(name)
  _hub.save_for_hf(source, tmp_path / "hub", safe_serialization=True)
  model, params, record = weights.load_with_record(tmp_path / "hub")
  cfg = source.pretrained_cfg
  normalised = ((image + 1) / 2 - np.array(cfg["mean"])) / np.array(cfg["std"])
  want = frameworks.timm_logits(source, normalised.astype(np.float32))
  np.testing.assert_allclose(native(model, params, image), want, rtol=0, atol=1e-5)
  assert ("folded_input" in record) == ({*cfg["mean"], *cfg["std"]} != {0.5})


@pytest.mark.parametrize("name", ["deit3_small_patch16_384", "vit_small_patch14_dinov2"])
def test_we_give_timms_logits_with_mean_and_std_folded(timm_model, tmp_path, name):
  source, image = timm_model(name)
  save_file({n: t.numpy() for n, t in source.state_dict().items()}, tmp_path / "w.safetensors")
  model, params = weights.load(tmp_path / "w.safetensors", mean=MEAN, std=STD)
  normalised = ((image + 1) / 2 - np.array(MEAN)) / np.array(STD)
  want = frameworks.timm_logits(source, normalised.astype(np.float32))
  np.testing.assert_allclose(native(model, params, image), want, rtol=0, atol=1e-5)


def test_what_we_wrote_timm_saves_and_we_read_again(flexivit_s, tmp_path):
  import timm
  from timm.models import _hub

  model, params, record = flexivit_s(depth=2, registers=2, gelu="exact")
  weights.save_timm(tmp_path / "ours", model, params, record, image_hw=(240, 240))
  again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True)
  _hub.save_for_hf(again, tmp_path / "theirs", safe_serialization=True)
  ours = dict(kernel_operator="linear", grid_operator="linear_antialias")
  got, back = weights.load(tmp_path / "theirs", **ours)
  assert got.clone(variant="S") == model
  jax.tree.map(np.testing.assert_array_equal, back, params)


def on_meta(name):
  """A model of one block without memory for its arrays; some that are no plain ViT insist on all blocks."""
  import timm
  import torch

  with torch.device("meta"):
    try:
      return timm.create_model(name, depth=1, weight_init="skip")
    except (AssertionError, TypeError):
      return timm.create_model(name)


FAMILIES = ["vit_base*", "vit_small*", "vit_large*", "vit_s[!m]*", "vit_[!bls]*", "*e[ix][it]*_*"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_list_of_unusual_architectures_is_timms(family):
  """Every architecture of timm's with these names: what we believe of it is so, or its arrays are refused."""
  import timm
  from timm.models.deit import VisionTransformerDistilled
  from timm.models.vision_transformer import VisionTransformer

  gelus = {"GELU": "exact", "GELUTanh": "tanh", "QuickGELU": "quick"}
  seen = 0
  for name in timm.list_models(family):
    if not timm_folder._KNOWN.fullmatch(name):
      continue
    model = on_meta(name)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    first = {n: s for n, s in shapes.items() if not re.match(r"blocks\.[1-9]", n)}
    arrays = {n: np.broadcast_to(np.float32(0), shape) for n, shape in first.items()}
    pretrained = {"mean": [0.5], "std": [0.5]}
    config = {
      "architecture": name,
      "pretrained_cfg": pretrained,
      "global_pool": getattr(model, "global_pool", None),
    }
    try:
      told = timm_folder.told(pathlib.Path(), config, arrays)
      found = timm_names.convert(arrays, told).fields | told
    except UserError:
      continue
    assert type(model) in (VisionTransformer, VisionTransformerDistilled), name
    block = model.blocks[0]
    assert found["num_heads"] == block.attn.num_heads, name
    assert found["layer_norm_eps"] == block.norm1.eps, name
    assert found["gelu"] == gelus[type(block.mlp.act).__name__], name
    seen += 1
  assert seen > 5


def saved(path, content, **options):
  import torch

  torch.save(content, path, **options)
  return path


@pytest.fixture
def state(timm_state_dict):
  """Tensors of a small ViT in timm's names."""
  import torch

  return {n: torch.from_numpy(a) for n, a in timm_state_dict().items()}


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "model_state_dict"])
def test_pytorchs_own_files_load_as_the_same_arrays(tmp_path, state, wrap, suffix):
  content = (
    state if wrap is None else {wrap: {f"module.{n}": t for n, t in state.items()}, "epoch": 3}
  )
  model, params, record = weights.load_with_record(
    saved(tmp_path / f"w.{suffix}", content), num_heads=4
  )
  save_file({n: t.numpy() for n, t in state.items()}, tmp_path / "w.safetensors")
  want, arrays = weights.load(tmp_path / "w.safetensors", num_heads=4)
  assert model == want and record["format"] == f"{suffix} in timm's names"
  jax.tree.map(np.testing.assert_array_equal, params, arrays)
  assert any(f"{wrap}.module." in note for note in record["notes"]) == (wrap is not None)


def test_half_precision_views_and_averaged_weights(tmp_path, state):
  import torch

  half = {n: t.to(torch.bfloat16 if "attn" in n else torch.float16) for n, t in state.items()}
  half["head.weight"] = half["head.weight"].T.contiguous().T  # not in the order of its rows
  arrays, _ = torch_files.read_torch(saved(tmp_path / "half.pth", half))
  for name, tensor in half.items():
    np.testing.assert_array_equal(arrays[name], tensor.float().numpy())
  both = {"model": state, "model_ema": {n: t + 1 for n, t in state.items()}}
  path = saved(tmp_path / "ema.pth", both)
  for ema, more in ((False, 0), (True, 1)):
    content = bare.read(path, ema=ema)
    np.testing.assert_array_equal(content.arrays["norm.bias"], state["norm.bias"].numpy() + more)
    assert any("--ema" in note for note in content.notes)


def test_a_hub_folder_with_pytorchs_file_only(timm_model, tmp_path):
  from timm.models import _hub

  source, image = timm_model("deit_tiny_distilled_patch16_224")
  _hub.save_for_hf(source, tmp_path / "hub", safe_serialization=False)
  assert (tmp_path / "hub" / "pytorch_model.bin").exists()
  model, params = weights.load(tmp_path / "hub", mean=(0.5,) * 3, std=(0.5,) * 3)
  want = frameworks.timm_logits(source, image)
  np.testing.assert_allclose(native(model, params, image), want, rtol=0, atol=1e-5)


class Bomb:
  """Writes a file when it is unpickled."""

  def __init__(self, marker):
    self.marker = str(marker)

  def __reduce__(self):
    return os.mkdir, (self.marker,)


def _evil(folder, tensors, marker):
  """Files that ask for something to be run, in different places."""
  import argparse

  bomb = Bomb(marker)
  saved(folder / "value.pth", tensors | {"evil": bomb})
  saved(folder / "beside.pth", {"model": tensors, "args": bomb})
  saved(folder / "name.pth", {"model": tensors, "args": argparse.Namespace(lr=bomb)})
  saved(folder / "old.pth", tensors | {"evil": bomb}, _use_new_zipfile_serialization=False)
  (folder / "bare.pth").write_bytes(__import__("pickle").dumps(bomb))
  return sorted(folder.glob("*.pth"))


# An audit hook cannot be taken away again, so this runs in a process of its own.
NO_PICKLE = """
import os, pickle, sys
import torch
import flexivit_jax.errors as errors
from flexivit_jax.weights import torch_files
seen = []
names = ("pickle.find_class", "os.mkdir", "os.system", "subprocess.Popen")
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in names else None)
for path in sys.argv[1:]:
  try:
    torch_files.read_torch(__import__("pathlib").Path(path))
    print("loaded")
  except errors.UserError as e:
    print("refused" if "cannot be read as PyTorch" in str(e) else e)
assert not seen, seen
pickle.loads(pickle.dumps(os.getcwd))
assert seen, "the hook sees nothing"
"""


def test_nothing_in_a_pytorch_file_is_run(tmp_path, state):
  good, marker = saved(tmp_path / "good.pt", state), tmp_path / "marker"
  evil = _evil(tmp_path, state, marker)
  assert len(evil) == 5
  command = [sys.executable, "-c", NO_PICKLE, str(good), *map(str, evil)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["loaded"] + ["refused"] * 5
  assert not marker.exists()
  import torch

  torch.load(tmp_path / "value.pth", weights_only=False)
  assert marker.exists(), "the bomb is none"


def test_what_is_refused_is_named_in_one_line(tmp_path, state):
  file = saved(tmp_path / "w.pth", state | {"evil": Bomb(tmp_path / "marker")})
  with pytest.raises(
    UserError, match=r"w.pth cannot be .* it wants posix.mkdir, .* was not run"
  ) as e:
    weights.load(file)
  assert len(str(e.value).splitlines()) == 1


def _many(torch, state):
  return {f"{n}.{i}": t for i in range(4) for n, t in state.items()}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda torch, s: {"step": 3, "model": {"epoch": 4}}, "holds no tensors by name"),
    (lambda torch, s: {"optimizer": {"state": s}}, "holds no tensors by name"),
    (lambda torch, s: {"model": {1: s["norm.bias"]}}, "the first names are 1"),
    (lambda torch, s: s["norm.bias"], "holds one Tensor; expected weights by name"),
    (lambda torch, s: {"model": s, "state_dict": s}, r"below 'model\.' and below 'state_dict\.'"),
    (lambda torch, s: s | {"x": torch.zeros(1).expand(10**9)}, r"would expand to \d+"),
    (_many, r"would expand to \d+"),
    (lambda torch, s: s | {"x": torch.zeros(9, device="meta")}, "on meta; expected plain numbers"),
    (lambda torch, s: s | {"x": torch.eye(9).to_sparse()}, "torch.sparse_coo of float32"),
    (lambda torch, s: s | {"x": torch.zeros(9, dtype=torch.complex64)}, "strided of complex64"),
  ],
)
def test_what_is_no_plain_tensor_by_name_is_refused(tmp_path, state, change, message):
  import torch

  with pytest.raises(UserError, match=message):
    weights.load(saved(tmp_path / "w.pth", change(torch, state)))


def _rezip(path, change, method=zipfile.ZIP_STORED):
  """Writes the parts of an archive again, the pickle changed."""
  with zipfile.ZipFile(path) as archive:
    parts = {i.filename: archive.read(i) for i in archive.infolist()}
  with zipfile.ZipFile(path, "w", method) as archive:
    for name, part in parts.items():
      archive.writestr(name, change(part) if name.endswith("data.pkl") else part)


def test_archives_that_say_more_than_they_hold_are_refused(tmp_path):
  import torch

  file = saved(tmp_path / "w.pth", {"a": torch.zeros(4)})
  _rezip(file, lambda pickled: pickled.replace(b"K\x04", b"M\x10\x27"))  # 10,000 numbers of 4
  with pytest.raises(UserError, match="cannot be read as PyTorch's weights: Trying to resize"):
    weights.load(file)
  saved(file, {"a": torch.zeros(2**20)})
  _rezip(file, lambda pickled: pickled, zipfile.ZIP_DEFLATED)
  with pytest.raises(UserError, match=r"is compressed; torch.save never does that"):
    weights.load(file)
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match=r"cannot be read as PyTorch's weights: .*not a zip file"):
    weights.load(file)


def test_the_arrays_outlive_the_file(tmp_path, state):
  file = saved(tmp_path / "w.pth", state)
  arrays, _ = torch_files.read_torch(file)
  file.write_bytes(bytes(file.stat().st_size))
  for name, tensor in state.items():
    np.testing.assert_array_equal(arrays[name], tensor.numpy())


def test_what_training_tools_save_beside_weights_is_no_hindrance(tmp_path, state):
  import argparse
  import collections
  import datetime
  import pathlib

  content = {
    "state_dict": {f"module._orig_mod.{n}": t for n, t in state.items()},
    "state_dict_ema": {n: t + 1 for n, t in state.items()},
    "args": argparse.Namespace(lr=1e-3, out=pathlib.Path("x")),
    "metric": np.float64(0.5),
    "best": np.float32(1),
    "history": np.zeros(3),
    "when": datetime.datetime(2026, 1, 1),
    "counts": collections.OrderedDict(a=1),
    "optimizer": {"state": {0: {"exp_avg": state["norm.bias"]}}},
    "epoch": 3,
  }
  want, params = weights.load(saved(tmp_path / "bare.pth", state), num_heads=4)
  for name in ("model_best.pth.tar", "last.ckpt", "model_best.pth"):
    model, arrays = weights.load(saved(tmp_path / name, content), num_heads=4)
    assert model == want
    jax.tree.map(np.testing.assert_array_equal, arrays, params)


def test_the_names_of_openai_and_openclip_give_the_logits_of_transformers_clip(tmp_path):
  import torch
  import transformers

  config = transformers.CLIPVisionConfig(
    hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32,
    patch_size=8, projection_dim=24, hidden_act="quick_gelu",
  )  # fmt: skip
  torch.manual_seed(0)
  model = transformers.CLIPVisionModelWithProjection(config).eval()
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
  a = {n: t.detach() for n, t in model.state_dict().items()}
  v, e = "vision_model.", "vision_model.embeddings."
  names = {
    "class_embedding": a[f"{e}class_embedding"],
    "positional_embedding": a[f"{e}position_embedding.weight"],
    "conv1.weight": a[f"{e}patch_embedding.weight"],
    "proj": a["visual_projection.weight"].T.contiguous(),
  }
  for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
    names |= {f"{ours}.{leaf}": a[f"{v}{theirs}.{leaf}"] for leaf in ("weight", "bias")}
  for i in range(2):
    to, of = f"transformer.resblocks.{i}.", f"{v}encoder.layers.{i}."
    for leaf in ("weight", "bias"):
      parts = [a[f"{of}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
      names[f"{to}attn.in_proj_{leaf}"] = torch.cat(parts)
      for ours, theirs in (
        ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
      ):  # fmt: skip
        names[f"{to}{ours}.{leaf}"] = a[f"{of}{theirs}.{leaf}"]
  content = {f"visual.{n}": t for n, t in names.items()} | {"logit_scale": torch.ones(())}
  file = saved(tmp_path / "open_clip_pytorch_model.bin", content | {"text.x": torch.zeros(2)})
  ours, params, record = weights.load_with_record(
    file, gelu="quick", mean=(0.5,) * 3, std=(0.5,) * 3, num_heads=2
  )
  assert any("OpenCLIP" in note for note in record["notes"])
  image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  with torch.inference_mode():
    want = model(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).image_embeds.numpy()
  np.testing.assert_allclose(native(ours, params, image), want, rtol=0, atol=2e-5)
