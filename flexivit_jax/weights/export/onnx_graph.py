"""The ONNX graph of a baked FlexiViT or a text tower as plain data; `frameworks.save_onnx` makes a file of it.

Written op by op beside `models`, where the same computation reads as in the paper, because the converter jax2onnx pins
orbax-checkpoint below 0.11.37 and we need 0.12. Weights bear the names of the parameters, nodes those of the layers.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax import errors
from flexivit_jax.models import FlexiViT, TextTower, two_towers

OPSET = 20  # the first with the op Gelu
_FLOAT, _INT32 = 1, 6  # of ONNX's TensorProto.DataType
Tower = FlexiViT | TextTower


class Node(NamedTuple):
  """One operation; its output bears its name."""

  op: str
  name: str
  inputs: tuple[str, ...]
  attributes: dict[str, Any]


@dataclasses.dataclass
class Graph:
  """Nodes in the order in which they run, from the input [n, ...] to what the last one gives, [n, k] or [n, h, w, k].

  A detector's graph gives several, by the names of their nodes.

  Attributes:
    shape: of one input: h, w, c of "image", or the length of "tokens".
    outputs: k, or (h, w, k) of a graph that gives scores of every pixel; of several, the shape of each by name.
    input: "image", float32, or "tokens", int64.
    nodes: filled by `add`.
    weights: shapes by name; a matrix where the parameter has more axes, of the same bytes.
    constants: small ones that stand in the graph itself, such as the shape that Reshape takes.
  """

  shape: tuple[int, ...]
  outputs: int | tuple[int, ...] | dict[str, tuple[int, ...]]
  input: str = "image"
  nodes: list[Node] = dataclasses.field(default_factory=list)
  weights: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def add(
    self, op: str, name: str, *inputs: str | int | float | list[int], **attributes: Any
  ) -> str:
    """Adds a node and returns the name of its output. Numbers among its inputs become constants."""
    names = []
    for i, value in enumerate(inputs):
      names.append(value if isinstance(value, str) else f"{name}/input_{i}")
      if not isinstance(value, str):
        dtype = np.float32 if isinstance(value, float) else np.int64
        self.constants[names[-1]] = np.asarray(value, dtype)
    self.nodes.append(Node(op, name, tuple(names), attributes))
    return name

  def weight(self, name: str, *shape: int) -> str:
    """Notes the shape that a weight is to have; returns its name."""
    self.weights[name] = shape
    return name


def describe(model: FlexiViT, channels: int, *, unit: bool = False) -> Graph:
  """Returns the graph of a model as `bake` returns it: kernel and grid are those in use.

  Its output is "logits", or "pre_logits" of a model without a head; with `unit` "image_embedding", of length 1.
  Position embeddings are the weight "pos_embedding" [1, l, d], learned or not. Blocks are written one by one, so a
  model with `scan` needs its parameters unstacked.

  Raises:
    UserError: the model's matrix products are not in float32.
  """
  check_dtype(model)
  (ph, pw), (gh, gw) = model.patch_size, model.posemb_size
  graph = Graph((gh * ph, gw * pw, channels), model.num_classes or model.num_features)
  x = _pool(graph, model, encoded(graph, model, "image"))
  if model.num_classes:
    x = dense(graph, "head", x, model.num_features, model.num_classes)
  if unit:
    return _unit(graph, x, "image_embedding")
  graph.add("Identity", "logits" if model.num_classes else "pre_logits", x)
  return graph


def encoded(graph: Graph, model: FlexiViT, image: str, prefix: str = "") -> str:
  """All tokens [n, l, d] of images that the patches divide, after the last LayerNorm; `prefix` is before all names."""
  x = _with_prefix(graph, model, _patches(graph, model, image, prefix), prefix)
  if model.pre_norm:
    x = layer_norm(graph, model, f"{prefix}pre_norm", x)
  for i in range(model.depth):
    x = block(graph, model, f"{prefix}Transformer/encoderblock_{i}", x)
  return layer_norm(graph, model, f"{prefix}Transformer/encoder_norm", x)


def patch_tokens(graph: Graph, model: FlexiViT, x: str, name: str) -> str:
  """The patches' tokens among all of them."""
  begin, length = model.prefix_length, model.posemb_size[0] * model.posemb_size[1]
  return graph.add("Slice", name, x, [begin], [begin + length], [1])


def describe_text(model: TextTower, prefix: str = "text/") -> Graph:
  """Returns the graph of a text tower, from "tokens" [n, l] to "text_embedding", of length 1.

  Args:
    model: the tower; texts have all its positions.
    prefix: before the names of its weights and nodes.

  Raises:
    UserError: the model's matrix products are not in float32.
  """
  check_dtype(model)
  d, length = model.width, model.max_length
  graph = Graph((length,), model.num_classes or d, "tokens")
  table = graph.weight(f"{prefix}embedding/embedding", model.vocab_size, d)
  x = graph.add("Gather", f"{prefix}embedding/Gather", table, "tokens", axis=0)
  positions = graph.weight(f"{prefix}pos_embedding", 1, length, d)
  x = graph.add("Add", f"{prefix}with_posemb", x, positions)
  if not model.norm_first:
    x = layer_norm(graph, model, f"{prefix}pre_norm", x)
  mask = _mask(graph, model, prefix)
  for i in range(model.depth):
    name = f"{prefix}Transformer/encoderblock_{i}"
    block_of = block if model.norm_first else _post_norm_block
    x = block_of(graph, model, name, x, mask)
  if model.norm_first:
    x = layer_norm(graph, model, f"{prefix}Transformer/encoder_norm", x)
  x = _pool_text(graph, model, prefix, x)
  if model.num_classes:
    x = dense(graph, f"{prefix}head", x, d, model.num_classes, bias=model.head_bias)
  return _unit(graph, x, "text_embedding")


def _mask(graph: Graph, model: TextTower, prefix: str) -> str | None:
  """What is attended to, bool, [n or 1, 1, l or 1, l]; None: everything is."""
  mask = None
  if model.causal:
    mask = f"{prefix}causal"
    graph.constants[mask] = np.tril(np.ones((model.max_length, model.max_length), bool))[None, None]
  if model.pad_token is None:
    return mask
  counted = graph.add("Unsqueeze", f"{prefix}mask", _counted(graph, model, prefix), [1, 2])
  return counted if mask is None else graph.add("And", f"{prefix}And", mask, counted)


def _counted(graph: Graph, model: TextTower, prefix: str) -> str:
  """Which tokens are no padding, bool [n, l]; made once."""
  name = f"{prefix}counted"
  if not any(node.name == name for node in graph.nodes):
    graph.add("Not", name, graph.add("Equal", f"{prefix}padding", "tokens", model.pad_token))
  return name


def _pool_text(graph: Graph, model: TextTower, prefix: str, x: str) -> str:
  """Tokens [n, l, d] as one vector a text, [n, d]."""
  name, kind = f"{prefix}pool", model.pool_type
  if kind in ("first", "last"):
    return graph.add("Gather", name, x, model.max_length - 1 if kind == "last" else 0, axis=1)
  if kind == "eos":
    ends = graph.add("Equal", f"{name}/ends", "tokens", model.eos_token)
    ends = graph.add("Cast", f"{name}/Cast", ends, to=_INT32)
    first = graph.add("ArgMax", f"{name}/ArgMax", ends, axis=1, keepdims=1)
    return graph.add("GatherND", name, x, first, batch_dims=1)
  if model.pad_token is None:
    return graph.add({"mean": "ReduceMean", "max": "ReduceMax"}[kind], name, x, [1], keepdims=0)
  counted = _counted(graph, model, prefix)
  if kind == "max":
    counted = graph.add("Unsqueeze", f"{name}/counted", counted, [2])
    x = graph.add("Where", f"{name}/Where", counted, x, float("-inf"))
    return graph.add("ReduceMax", name, x, [1], keepdims=0)
  # A text of padding alone is the mean of all of it.
  weight = graph.add("Cast", f"{name}/Cast", counted, to=_FLOAT)
  any_ = graph.add("ReduceMax", f"{name}/any", weight, [1], keepdims=1)
  none = graph.add("Sub", f"{name}/none", 1.0, any_)
  weight = graph.add("Add", f"{name}/weight", weight, none)
  weight = graph.add("Unsqueeze", f"{name}/weights", weight, [2])
  total = graph.add("ReduceSum", f"{name}/total", weight, [1], keepdims=0)
  x = graph.add("Mul", f"{name}/Mul", x, weight)
  return graph.add("Div", name, graph.add("ReduceSum", f"{name}/sum", x, [1], keepdims=0), total)


def _unit(graph: Graph, x: str, name: str) -> Graph:
  """Divides by the length, as `two_towers.unit`; the end of a graph."""
  norm = graph.add("ReduceL2", f"{name}/norm", x, [-1], keepdims=1)
  graph.add("Div", name, x, graph.add("Add", f"{name}/Add", norm, two_towers.EPS))
  return graph


def check_dtype(model: FlexiViT | TextTower) -> None:
  """Raises a UserError for a model whose matrix products are not in float32."""
  if model.dtype != "float32":
    raise errors.UserError(
      f"ONNX graphs are in float32, and this model has dtype={model.dtype!r};"
      " give the model with dtype='float32', the parameters are that already."
    )


def _patches(graph: Graph, model: FlexiViT, image: str, prefix: str) -> str:
  """Tokens [n, l, d] with their positions. In a Reshape, 0 stands for the axis as it is."""
  (ph, pw), (gh, gw), d = model.patch_size, model.posemb_size, model.width
  inputs, name = ph * pw * graph.shape[2], f"{prefix}embedding"
  x = graph.add("Reshape", f"{name}/cut", image, [0, gh, ph, gw, pw, graph.shape[2]])
  x = graph.add("Transpose", f"{name}/Transpose", x, perm=(0, 1, 3, 2, 4, 5))
  x = graph.add("Reshape", f"{name}/flat", x, [0, gh * gw, inputs])
  x = dense(graph, name, x, inputs, d)
  positions = graph.weight(f"{prefix}pos_embedding", 1, gh * gw, d)
  return graph.add("Add", f"{prefix}with_posemb", x, positions)


def _with_prefix(graph: Graph, model: FlexiViT, x: str, prefix: str) -> str:
  parts = [x]
  if model.registers:
    registers = for_each_image(graph, f"{prefix}registers", model.registers, model.width)
    parts.insert(0, registers)
  if "tok" in model.pool_type:
    parts.insert(0, for_each_image(graph, f"{prefix}cls", 1, model.width))
  return graph.add("Concat", f"{prefix}with_prefix", *parts, axis=1) if len(parts) > 1 else x


def for_each_image(graph: Graph, name: str, length: int, width: int) -> str:
  """A learned [1, length, width] as [n, length, width]."""
  n = graph.add("Shape", f"{name}/n", "image", start=0, end=1)
  shape = graph.add("Concat", f"{name}/shape", n, [1, 1], axis=0)
  return graph.add("Expand", f"{name}/Expand", graph.weight(name, 1, length, width), shape)


def block(graph: Graph, model: Tower, name: str, x: str, mask: str | None = None) -> str:
  """A Transformer block; of the model only what its blocks have in common."""
  y = layer_norm(graph, model, f"{name}/LayerNorm_0", x)
  y = _attention(graph, model, f"{name}/MultiHeadDotProductAttention_0", y, y, mask)
  x = graph.add("Add", f"{name}/+sa", x, y)
  y = layer_norm(graph, model, f"{name}/LayerNorm_1", x)
  y = _mlp(graph, model, f"{name}/MlpBlock_0", y)
  return graph.add("Add", f"{name}/+mlp", x, y)


def _post_norm_block(graph: Graph, model: Tower, name: str, x: str, mask: str | None) -> str:
  y = _attention(graph, model, f"{name}/MultiHeadDotProductAttention_0", x, x, mask)
  x = layer_norm(graph, model, f"{name}/LayerNorm_0", graph.add("Add", f"{name}/+sa", x, y))
  y = graph.add("Add", f"{name}/+mlp", x, _mlp(graph, model, f"{name}/MlpBlock_0", x))
  return layer_norm(graph, model, f"{name}/LayerNorm_1", y)


def _attention(
  graph: Graph, model: Tower, name: str, q: str, kv: str, mask: str | None = None
) -> str:
  d, heads = model.width, model.num_heads

  def project(part: str, x: str, order: tuple[int, ...], scale: float | None = None) -> str:
    x = dense(graph, f"{name}/{part}", x, d, d)
    if scale is not None:
      x = graph.add("Mul", f"{name}/{part}/scaled", x, scale)
    x = graph.add("Reshape", f"{name}/{part}/heads", x, [0, 0, heads, d // heads])
    return graph.add("Transpose", f"{name}/{part}/Transpose", x, perm=order)

  query = project("query", q, (0, 2, 1, 3), (d // heads) ** -0.5)
  key = project("key", kv, (0, 2, 3, 1))
  value = project("value", kv, (0, 2, 1, 3))
  scores = graph.add("MatMul", f"{name}/scores", query, key)
  if mask is not None:
    lowest = float(np.finfo(np.float32).min)
    scores = graph.add("Where", f"{name}/masked", mask, scores, lowest)
  weights = graph.add("Softmax", f"{name}/Softmax", scores, axis=-1)
  x = graph.add("MatMul", f"{name}/MatMul", weights, value)
  x = graph.add("Transpose", f"{name}/Transpose", x, perm=(0, 2, 1, 3))
  x = graph.add("Reshape", f"{name}/flat", x, [0, 0, d])
  return dense(graph, f"{name}/out", x, d, d)


def _mlp(graph: Graph, model: Tower, name: str, x: str) -> str:
  x = dense(graph, f"{name}/Dense_0", x, model.width, model.mlp_dim)
  x = gelu(graph, model.gelu, name, x)
  return dense(graph, f"{name}/Dense_1", x, model.mlp_dim, model.width)


def gelu(graph: Graph, kind: str, name: str, x: str) -> str:
  """The GELU of `vit.GELU` of this name."""
  if kind == "quick":
    gate = graph.add("Mul", f"{name}/quick", x, 1.702)
    gate = graph.add("Sigmoid", f"{name}/Sigmoid", gate)
    return graph.add("Mul", f"{name}/Gelu", x, gate)
  return graph.add("Gelu", f"{name}/Gelu", x, approximate={"tanh": "tanh", "exact": "none"}[kind])


def dense(graph: Graph, name: str, x: str, inputs: int, outputs: int, *, bias: bool = True) -> str:
  """A dense layer over the last axis."""
  x = graph.add("MatMul", f"{name}/MatMul", x, graph.weight(f"{name}/kernel", inputs, outputs))
  if not bias:
    return x
  return graph.add("Add", f"{name}/Add", x, graph.weight(f"{name}/bias", outputs))


def layer_norm(graph: Graph, model: Tower, name: str, x: str) -> str:
  """A LayerNorm over the last axis, the model's width."""
  scale, bias = (graph.weight(f"{name}/{part}", model.width) for part in ("scale", "bias"))
  return graph.add(
    "LayerNormalization", f"{name}/LayerNormalization", x, scale, bias, axis=-1,
    epsilon=model.layer_norm_eps,
  )  # fmt: skip


def _pool(graph: Graph, model: FlexiViT, x: str) -> str:
  """Tokens [n, l, d] as one vector an image, [n, d] or [n, 2d]."""
  pool = {
    "tok": lambda: graph.add("Gather", "pool/tok", x, 0, axis=1),
    "reg": lambda: graph.add("Gather", "pool/reg", x, 1, axis=1),
    "gap": lambda: _mean(graph, model, x),
    "map": lambda: _map_head(graph, model, "MAPHead_0", x),
  }
  parts = [pool[part]() for part in model.pool_type.split("+")]
  return graph.add("Concat", "pool/Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]


def _mean(graph: Graph, model: FlexiViT, x: str) -> str:
  """The mean of the patches' tokens."""
  x = patch_tokens(graph, model, x, "pool/tokens")
  return graph.add("ReduceMean", "pool/gap", x, [1], keepdims=0)


def _map_head(graph: Graph, model: FlexiViT, name: str, x: str) -> str:
  probe = for_each_image(graph, f"{name}/probe", 1, model.width)
  x = _attention(graph, model, f"{name}/MultiHeadDotProductAttention_0", probe, x)
  y = layer_norm(graph, model, f"{name}/LayerNorm_0", x)
  y = _mlp(graph, model, f"{name}/MlpBlock_0", y)
  x = graph.add("Add", f"{name}/+mlp", x, y)
  return graph.add("Gather", "pool/map", x, 0, axis=1)
