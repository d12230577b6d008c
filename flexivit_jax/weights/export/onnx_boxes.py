"""The ONNX graph of a detector at one patch size: `onnx_graph` for its FlexiViT, the heads here."""

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors
from flexivit_jax.models import FlexiViT, OwlViT, owl_vit
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Params
from flexivit_jax.weights.export.onnx_graph import (
  Graph,
  check_dtype,
  dense,
  encoded,
  gelu,
  layer_norm,
  patch_tokens,
)

BIAS = "box_bias"  # the weight with where boxes begin, which no parameter holds
BACKBONE = "backbone/"


def with_unit_queries(model: OwlViT, params: Params) -> tuple[OwlViT, Params]:
  """Returns (model, params) whose queries are the vectors that tokens are compared with.

  Raises:
    UserError: the queries are not fixed.
  """
  if model.open:
    raise errors.UserError(
      "This detector's queries are texts or vectors, and an exported one has fixed ones; give --names."
    )
  if not model.unit_queries:
    return model, params
  queries = np.asarray(params["queries"], np.float32)
  norm = np.linalg.norm(queries, axis=-1, keepdims=True)
  unit = queries / (norm + np.float32(owl_vit.NORM_EPS))
  return model.clone(unit_queries=False), {**params, "queries": unit}


def bias(model: OwlViT, grid_hw: Size) -> Float[np.ndarray, "1 l 4"]:
  """Returns where the boxes of a grid begin, the array `BIAS`."""
  return owl_vit.BOX_BIASES[model.box_bias](grid_hw).reshape(1, -1, 4)


def describe(model: OwlViT, vit: FlexiViT, channels: int) -> Graph:
  """Returns the graph, from "image" to "pred_boxes" [n, l, 4] and "class_logits" [n, l, k].

  Args:
    model: the detector, as `with_unit_queries` returns it.
    vit: its FlexiViT, baked: kernel and grid are those in use.
    channels: of the images.

  Raises:
    UserError: the model's matrix products are not in float32.
  """
  check_dtype(vit)
  (ph, pw), (gh, gw), d = vit.patch_size, vit.posemb_size, vit.width
  length, k, e = gh * gw, model.num_classes, model.embed_dim
  outputs: dict[str, tuple[int, ...]] = {"pred_boxes": (length, 4), "class_logits": (length, k)}
  graph = Graph((gh * ph, gw * pw, channels), outputs)
  everything = encoded(graph, vit, "image", BACKBONE)
  x = patch_tokens(graph, vit, everything, "tokens")
  if model.merge == "class_token":
    cls = graph.add("Slice", "class_token", everything, [0], [1], [1])
    x = graph.add("Mul", "merged", x, cls)
  x = layer_norm(graph, vit, "merged_class_token", x)

  own = dense(graph, "class_embedding", x, d, e)
  norm = graph.add("ReduceL2", "class_embedding/norm", own, [-1], keepdims=1)
  norm = graph.add("Add", "class_embedding/norm_eps", norm, owl_vit.NORM_EPS)
  own = graph.add("Div", "class_embedding/unit", own, norm)
  queries = graph.add(
    "Transpose", "queries/Transpose", graph.weight("queries", 1, k, e), perm=(0, 2, 1)
  )
  scores = graph.add("MatMul", "scores", own, queries)
  shifted = graph.add("Add", "shifted", scores, dense(graph, "class_shift", x, d, 1))
  scale = graph.add("Elu", "class_scale/Elu", dense(graph, "class_scale", x, d, 1))
  scale = graph.add("Add", "class_scale/more", scale, 1.0)
  graph.add("Mul", "class_logits", shifted, scale)

  for i in range(2):
    x = gelu(graph, model.gelu, f"box_{i}", dense(graph, f"box_{i}", x, d, d))
  moved = dense(graph, "box_2", x, d, 4)
  moved = graph.add("Add", "box/biased", moved, graph.weight(BIAS, 1, length, 4))
  graph.add("Sigmoid", "pred_boxes", moved)
  return graph
