"""The ONNX graph of a Segmenter at one patch size: `onnx_graph` for its FlexiViT, the decoder and the resize here."""

import numpy as np

from flexivit_jax.models import FlexiViT, Segmenter, segmenter
from flexivit_jax.sizes import Size, SizeArgs
from flexivit_jax.trees import Params
from flexivit_jax.weights import baking
from flexivit_jax.weights.export.onnx_graph import (
  Graph,
  block,
  check_dtype,
  dense,
  encoded,
  for_each_image,
  layer_norm,
  patch_tokens,
)

BACKBONE, COARSE = "backbone/", "coarse/backbone/"


def towers(
  model: Segmenter, params: Params, image_hw: Size, size: SizeArgs
) -> dict[str, tuple[FlexiViT, Params]]:
  """Returns the baked FlexiViT of each pass and its parameters, by what is before the names of its weights."""
  patch_hw, _, grid_hw = model.grid(image_hw, **size)
  padded = patch_hw[0] * grid_hw[0], patch_hw[1] * grid_hw[1]
  vit, own = model.parts["backbone"], params["backbone"]
  made = {BACKBONE: baking.bake(vit, own, image_hw=padded, patch_hw=patch_hw)}
  if model.fuse:
    coarse = patch_hw[0] * model.fuse, patch_hw[1] * model.fuse
    made[COARSE] = baking.bake(vit, own, image_hw=padded, patch_hw=coarse)
  return made


def describe(
  model: Segmenter, vits: dict[str, tuple[FlexiViT, Params]], image_hw: Size, channels: int
) -> Graph:
  """Returns the graph, from "image" to "pixel_logits" [n, h, w, k].

  Args:
    model: the Segmenter.
    vits: as `towers` returns them. The second pass has weights of its own where its size changes them; the others
      are those of the first.
    image_hw: pixels of the images, which are padded where the patches do not divide them.
    channels: of the images.

  Raises:
    UserError: the model's matrix products are not in float32.
  """
  check_dtype(vits[BACKBONE][0])
  fine = vits[BACKBONE][0]
  (ph, pw), (gh, gw), d = fine.patch_size, fine.posemb_size, fine.width
  graph = Graph((*image_hw, channels), (*image_hw, model.num_classes))
  image, padded = "image", (gh * ph, gw * pw)
  if padded != image_hw:
    pads = [0, 0, 0, 0, 0, padded[0] - image_hw[0], padded[1] - image_hw[1], 0]
    image = graph.add("Pad", "padded", image, pads)
  x = patch_tokens(graph, fine, encoded(graph, fine, image, BACKBONE), "tokens")
  if model.fuse:
    coarse = vits[COARSE][0]
    y = patch_tokens(graph, coarse, encoded(graph, coarse, image, COARSE), "coarse/tokens")
    y = _resized(graph, y, coarse.posemb_size, d, (model.fuse, model.fuse), "coarse")
    y = graph.add("Reshape", "coarse/flat", y, [0, gh * gw, d])
    x = graph.add("Add", "fused", x, dense(graph, "fusion", y, d, d))
  if model.decoder == "linear":
    x = dense(graph, "head", x, d, model.num_classes)
  else:
    x = _mask_decoder(graph, model, fine, x)
  x = _resized(graph, x, (gh, gw), model.num_classes, (ph, pw), "pixels")
  if padded != image_hw:
    x = graph.add("Slice", "pixels/cut", x, [0, 0], [*image_hw], [1, 2])
  graph.add("Identity", "pixel_logits", x)
  return _sharing(graph)


def _sharing(graph: Graph) -> Graph:
  """Lets the second pass take the weights of the first, but for those that its size changes."""

  def name_of(name: str) -> str:
    own = any(name == f"{COARSE}{resampled}" for resampled in baking.RESAMPLED)
    return name if own or name not in graph.weights else name.removeprefix("coarse/")

  nodes = [node._replace(inputs=tuple(map(name_of, node.inputs))) for node in graph.nodes]
  weights = {name_of(name): shape for name, shape in graph.weights.items()}
  return Graph(graph.shape, graph.outputs, graph.input, nodes, weights, graph.constants)


def _mask_decoder(graph: Graph, model: Segmenter, vit: FlexiViT, x: str) -> str:
  """Scores [n, l, k] of tokens [n, l, d]; see `models.segmenter.MaskDecoder`."""
  d, k = vit.width, model.num_classes
  length = vit.posemb_size[0] * vit.posemb_size[1]
  x = dense(graph, "decoder/projection", x, d, d)
  x = graph.add("Concat", "decoder/all", x, for_each_image(graph, "decoder/classes", k, d), axis=1)
  like = vit.clone(mlp_dim=4 * d, num_heads=max(1, d // 64))
  for i in range(model.decoder_depth):
    x = block(graph, like, f"decoder/blocks/encoderblock_{i}", x)
  x = layer_norm(graph, like, "decoder/blocks/encoder_norm", x)
  unit = []
  for name, begin, end in (("patch", 0, length), ("class", length, length + k)):
    part = graph.add("Slice", f"decoder/{name}", x, [begin], [end], [1])
    kernel = graph.weight(f"decoder/{name}_kernel", d, d)
    part = graph.add("MatMul", f"decoder/{name}/MatMul", part, kernel)
    norm = graph.add("ReduceL2", f"decoder/{name}/norm", part, [-1], keepdims=1)
    norm = graph.add("Max", f"decoder/{name}/Max", norm, segmenter.EPS)
    unit.append(graph.add("Div", f"decoder/{name}/unit", part, norm))
  classes = graph.add("Transpose", "decoder/class/Transpose", unit[1], perm=(0, 2, 1))
  x = graph.add("MatMul", "decoder/scores", unit[0], classes)
  scale, bias = (graph.weight(f"decoder/mask_norm/{part}", k) for part in ("scale", "bias"))
  return graph.add(
    "LayerNormalization", "decoder/mask_norm/LayerNormalization", x, scale, bias, axis=-1,
    epsilon=1e-5,
  )  # fmt: skip


def _resized(graph: Graph, x: str, grid_hw: Size, k: int, times: Size, name: str) -> str:
  """Rows [n, l, k] of a grid as [n, h, w, k], so many times finer, bilinearly between centres."""
  x = graph.add("Reshape", f"{name}/grid", x, [0, *grid_hw, k])
  x = graph.add("Transpose", f"{name}/channels_first", x, perm=(0, 3, 1, 2))
  scales = f"{name}/scales"
  graph.constants[scales] = np.asarray([1, 1, *times], np.float32)
  x = graph.add(
    "Resize", f"{name}/Resize", x, "", scales, mode="linear",
    coordinate_transformation_mode="half_pixel",
  )  # fmt: skip
  return graph.add("Transpose", f"{name}/channels_last", x, perm=(0, 2, 3, 1))
