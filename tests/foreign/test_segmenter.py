"""Segmenter's PyTorch files, in and out, against a forward pass written here from the names of its arrays.

No published file could be fetched: the files here have the published names, and random numbers.
"""

import math

import jax
import numpy as np
import pytest
import yaml

from flexivit_jax import cli, trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import Segmenter
from flexivit_jax.weights import model_records, segmenter, tasks

WIDTH, PATCH, GRID, CLASSES = 128, 8, (3, 4), 5
HW = GRID[0] * PATCH, GRID[1] * PATCH


def state(decoder, layers=2, seed=0):
  """Random arrays in the published names."""
  rng = np.random.default_rng(seed)

  def block(prefix):
    d = WIDTH
    shapes = {
      "attn.qkv": (3 * d, d),
      "attn.proj": (d, d),
      "mlp.fc1": (4 * d, d),
      "mlp.fc2": (d, 4 * d),
    }
    return {f"{prefix}.{name}.weight": s for name, s in shapes.items()} | {
      f"{prefix}.{name}.bias": s[:1] for name, s in shapes.items()
    } | {f"{prefix}.{n}.{leaf}": (d,) for n in ("norm1", "norm2") for leaf in ("weight", "bias")}  # fmt: skip

  shapes = {
    "encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "encoder.patch_embed.proj.bias": (WIDTH,),
    "encoder.cls_token": (1, 1, WIDTH), "encoder.pos_embed": (1, 1 + math.prod(GRID), WIDTH),
    "encoder.norm.weight": (WIDTH,), "encoder.norm.bias": (WIDTH,),
    "encoder.head.weight": (1000, WIDTH), "encoder.head.bias": (1000,),
  }  # fmt: skip
  shapes |= block("encoder.blocks.0") | block("encoder.blocks.1")
  if decoder == "linear":
    shapes |= {"decoder.head.weight": (CLASSES, WIDTH), "decoder.head.bias": (CLASSES,)}
  else:
    for i in range(layers):
      shapes |= block(f"decoder.blocks.{i}")
    shapes |= {
      "decoder.cls_emb": (1, CLASSES, WIDTH), "decoder.proj_patch": (WIDTH, WIDTH),
      "decoder.proj_classes": (WIDTH, WIDTH),
      "decoder.proj_dec.weight": (WIDTH, WIDTH), "decoder.proj_dec.bias": (WIDTH,),
      "decoder.decoder_norm.weight": (WIDTH,), "decoder.decoder_norm.bias": (WIDTH,),
      "decoder.mask_norm.weight": (CLASSES,), "decoder.mask_norm.bias": (CLASSES,),
    }  # fmt: skip
  scale = {name: 0.7 / math.sqrt(s[-1]) if len(s) > 1 else 0.2 for name, s in shapes.items()}
  made = {name: scale[name] * rng.normal(size=s) for name, s in shapes.items()}
  return {
    n: (a + ("norm" in n and n.endswith("weight"))).astype(np.float32) for n, a in made.items()
  }


def save(folder, arrays, heads=4, normalization="vit"):
  """Writes a file as Segmenter's training does, and its variant.yml, with the tuple that PyYAML writes."""
  import torch

  folder.mkdir(parents=True, exist_ok=True)
  tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
  torch.save({"model": tensors, "n_cls": CLASSES, "epoch": 3}, folder / "checkpoint.pth")
  net = dict(
    backbone="vit_tiny_patch16_384", d_model=WIDTH, n_heads=heads, n_layers=2, n_cls=CLASSES, patch_size=PATCH,
    image_size=HW, normalization=normalization, decoder=dict(name="mask_transformer", n_layers=2),
  )  # fmt: skip
  (folder / "variant.yml").write_text(yaml.dump({"net_kwargs": net}))
  return folder / "checkpoint.pth"


def forward(arrays, image, heads, decoder_heads):
  """The scores [n, h, w, k] of pixels [n, h, w, c], in float64."""
  import torch
  from torch.nn import functional

  a = {name: torch.from_numpy(array).double() for name, array in arrays.items()}

  def norm(x, name):
    return functional.layer_norm(x, x.shape[-1:], a[f"{name}.weight"], a[f"{name}.bias"], 1e-5)

  def dense(x, name):
    return functional.linear(x, a[f"{name}.weight"], a[f"{name}.bias"])

  def block(x, name, heads):
    y = norm(x, f"{name}.norm1")
    n, length, d = y.shape
    q, k, v = (
      dense(y, f"{name}.attn.qkv").view(n, length, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    )
    y = ((q @ k.mT / math.sqrt(d // heads)).softmax(-1) @ v).transpose(1, 2).reshape(n, length, d)
    x = x + dense(y, f"{name}.attn.proj")
    return x + dense(
      functional.gelu(dense(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2"
    )

  x = torch.from_numpy(image).double().permute(0, 3, 1, 2)
  h, w = x.shape[2:]
  x = functional.pad(x, (0, -w % PATCH, 0, -h % PATCH))
  padded = x.shape[2:]
  rows, columns = (side // PATCH for side in padded)
  kernel, bias = (a[f"encoder.patch_embed.proj.{leaf}"] for leaf in ("weight", "bias"))
  x = functional.conv2d(x, kernel, bias, stride=PATCH).flatten(2).mT
  x = torch.cat([a["encoder.cls_token"].expand(len(x), -1, -1), x], 1)
  positions = a["encoder.pos_embed"]
  if (rows, columns) != GRID:
    grid = positions[:, 1:].mT.reshape(1, WIDTH, *GRID)
    grid = functional.interpolate(grid, (rows, columns), mode="bilinear").flatten(2).mT
    positions = torch.cat([positions[:, :1], grid], 1)
  x = x + positions
  for i in range(2):
    x = block(x, f"encoder.blocks.{i}", heads)
  x = norm(x, "encoder.norm")[:, 1:]
  if "decoder.head.weight" in a:
    scores = dense(x, "decoder.head")
  else:
    length = x.shape[1]
    x = torch.cat([dense(x, "decoder.proj_dec"), a["decoder.cls_emb"].expand(len(x), -1, -1)], 1)
    for i in range(sum(name.endswith("norm1.weight") for name in a if name.startswith("decoder"))):
      x = block(x, f"decoder.blocks.{i}", decoder_heads)
    x = norm(x, "decoder.decoder_norm")
    patches, classes = (
      x[:, :length] @ a["decoder.proj_patch"],
      x[:, length:] @ a["decoder.proj_classes"],
    )
    patches, classes = (v / v.norm(dim=-1, keepdim=True) for v in (patches, classes))
    scores = norm(patches @ classes.mT, "decoder.mask_norm")
  scores = scores.mT.reshape(len(x), CLASSES, rows, columns)
  scores = functional.interpolate(scores, tuple(padded), mode="bilinear")[:, :, :h, :w]
  return scores.permute(0, 2, 3, 1).numpy()


def ours(model, params, image, **size):
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x, **size)[0])(params, image))


def images(*hw):
  return np.random.default_rng(1).uniform(-1, 1, (2, *hw, 3)).astype(np.float32)


@pytest.mark.parametrize("decoder", ["linear", "mask"])
@pytest.mark.parametrize("hw", [HW, (20, 45)])
def test_a_file_is_read_as_the_model_that_it_is(decoder, hw, tmp_path):
  arrays = state(decoder)
  path = save(tmp_path / "seg", arrays)
  model, params, record = tasks.load(path)
  assert (model.decoder, model.num_classes, model.parts["backbone"].num_heads) == (
    decoder,
    CLASSES,
    4,
  )
  assert record["image_size"] == [*HW] and record["input"]["from"] == "variant.yml"
  image = images(*hw)
  want = forward(arrays, image, 4, WIDTH // 64)
  got = ours(model, params, image, patch_hw=(PATCH, PATCH))
  # Positions that are resized, and a norm of few scores, amplify rounding.
  limit = 1e-5 if hw == HW else 5e-5
  np.testing.assert_allclose(got, want, atol=limit * np.abs(want).max())


def test_pixels_normalised_as_for_deit_are_folded_in(tmp_path):
  arrays = state("linear")
  model, params, _ = tasks.load(save(tmp_path, arrays, normalization="deit"))
  image = images(*HW)
  mean, std = segmenter.NORMALISATIONS["deit"]
  normalised = (((image + 1) / 2 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)
  want = forward(arrays, normalised, 4, WIDTH // 64)
  np.testing.assert_allclose(ours(model, params, image), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_what_was_read_is_written_and_read_again(decoder, tmp_path):
  import torch

  arrays = state(decoder)
  model, params, record = tasks.load(save(tmp_path / "a", arrays))
  record = record | {"class_names": [*"abcde"]}
  segmenter.save_segmenter(tmp_path / "b", model, params, record, image_hw=HW)
  written = torch.load(tmp_path / "b" / "checkpoint.pth", weights_only=True)["model"]
  assert {n: tuple(a.shape) for n, a in written.items()} == {n: a.shape for n, a in arrays.items()}
  image = images(*HW)
  own = {name: tensor.numpy() for name, tensor in written.items()}
  want = forward(own, image, 4, WIDTH // 64)
  np.testing.assert_allclose(want, forward(arrays, image, 4, WIDTH // 64), atol=1e-6)
  back = tasks.load(tmp_path / "b" / "checkpoint.pth")
  assert back[2]["class_names"] == [*"abcde"]
  assert back[0] == model
  assert trees.diff(params, back[1]) == []
  for name, array in trees.flatten(params).items():
    np.testing.assert_array_equal(array, trees.flatten(back[1])[name], name)


def test_another_patch_size_is_written_with_its_kernel_and_positions(tmp_path):
  model, params, record = tasks.load(save(tmp_path / "a", state("mask")))
  segmenter.save_segmenter(tmp_path / "b", model, params, record, image_hw=HW, seqhw=(6, 8))
  back = tasks.load(tmp_path / "b" / "checkpoint.pth")
  image = images(*HW)
  want = ours(model, params, image, grid_hw=(6, 8))
  np.testing.assert_allclose(ours(*back[:2], image), want, atol=1e-5)


def test_a_model_that_segmenter_cannot_be_is_refused_with_the_reasons(tmp_path):
  backbone = dict(width=64, depth=1, mlp_dim=64, num_heads=2, pool_type="gap")
  model = Segmenter(num_classes=2, backbone=backbone, fuse=2)
  with pytest.raises(UserError, match=r"(?s)pool_type: 'gap'.*gelu: 'tanh'.*mlp_dim.*fuse: 2"):
    segmenter.save_segmenter(tmp_path / "b", model, {}, {}, image_hw=HW)


def test_weights_load_and_inspect_take_the_file(tmp_path, capsys):
  path = save(tmp_path, state("mask"))
  vit, _, record = weights.load_with_record(path)
  assert vit.num_classes == 0 and vit.layer_norm_eps == 1e-5 and vit.pool_type == "tok"
  assert any("Left out: model.decoder." in note for note in record["notes"])
  assert tasks.is_whole(path) and tasks.name_of(path) == "segmenter"
  assert cli.main(["inspect", str(path)]) == 0
  assert "segmenter, 5 classes; above is its backbone" in capsys.readouterr().out
  model, params, record = tasks.load(path)
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  assert tasks.load(tmp_path / "w.npz")[2]["model"] == model_records.record_of(model)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a: a.pop("decoder.cls_emb"), r"missing: decoder\.cls_emb"),
    (lambda a: a.update({"decoder.more": a["decoder.cls_emb"]}), r"unknown: decoder\.more"),
    (lambda a: a.update({"decoder.cls_emb": a["decoder.cls_emb"][:, :4]}), "does not fit the model segmenter"),
  ],
)  # fmt: skip
def test_a_decoder_that_is_not_whole_is_refused(change, message, tmp_path):
  arrays = state("mask", layers=1)
  change(arrays)
  with pytest.raises(UserError, match=message):
    tasks.load(save(tmp_path, arrays))


def test_a_variant_that_says_something_else_is_refused(tmp_path):
  path = save(tmp_path, state("linear"), normalization="clip")
  with pytest.raises(UserError, match=r"normalization in .*variant.yml.*'clip'"):
    tasks.load(path)
  (tmp_path / "variant.yml").write_text("net_kwargs: !!python/object:os.system {}")
  with pytest.raises(UserError, match="cannot be read as Segmenter's description"):
    tasks.load(path)
  (tmp_path / "variant.yml").unlink()
  notes = tasks.load(path, posemb_size=GRID, num_heads=4)[2]["notes"]
  assert any("There is no variant.yml" in note for note in notes)


def test_the_command_converts_both_ways_with_certificates(tmp_path, capsys):
  path = save(tmp_path / "a", state("mask", layers=1), normalization="deit")
  assert cli.main(["convert", str(path), str(tmp_path / "w.npz")]) == 0
  npz, folder = str(tmp_path / "w.npz"), str(tmp_path / "b")
  assert cli.main(["convert", npz, folder, "--to=segmenter", "--seqhw=3x4"]) == 0
  out = capsys.readouterr().out
  assert "largest difference of the pixels' logits" in out
  image = images(*HW)
  first, second = tasks.load(path)[:2], tasks.load(tmp_path / "b" / "checkpoint.pth")[:2]
  np.testing.assert_allclose(ours(*second, image), ours(*first, image), atol=1e-5)
  assert cli.main(["convert", npz, str(tmp_path / "c"), "--to=transformers"]) == 2
  assert "holds a Segmenter; expected --to=segmenter" in capsys.readouterr().err
