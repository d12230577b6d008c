"""Other frameworks, where they are installed: they run what was written for them, for certificates, and write exports.

Reading and writing weights needs none of them, but for PyTorch's own files (`torch_files`).
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import types
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Float, Int

from flexivit_jax import errors
from flexivit_jax.trees import Arrays
from flexivit_jax.weights import optional
from flexivit_jax.weights.export import onnx_graph
from flexivit_jax.weights.optional import Foreign

Program = Callable[[np.ndarray], np.ndarray]  # images [n, h, w, c] -> logits [n, k]

COMPARING_ONNX = "Comparing an ONNX export with its source, which --no-verify leaves out,"

COMPARING_SAVED_MODEL = "Comparing a SavedModel with its source, which --no-verify leaves out,"


def transformers_logits(
  folder: str | os.PathLike[str], image: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n k"]:
  """Runs a folder of Hugging Face's transformers as it is, in float32 on the CPU.

  Args:
    folder: with config.json and model.safetensors; nothing is fetched from anywhere else.
    image: pixels as the model takes them, normalised with its own mean and std.

  Returns:
    The logits; of a model without a head its pooled output: the class token after the last LayerNorm, SigLIP's pooled
    token, CLIP's embedding of the image.

  Raises:
    UserError: transformers or torch is not installed, or arrays that the model has are not in the folder.
  """
  torch, model = _transformers_model(folder)
  pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    output = _pooled(model, pixels)
  return output.numpy()


def transformers_embeddings(
  folder: str | os.PathLike[str],
  image: Float[np.ndarray, "n h w c"],
  tokens: Int[np.ndarray, "m l"],
) -> tuple[Float[np.ndarray, "n e"], Float[np.ndarray, "m e"], Float[np.ndarray, "n m"]]:
  """Runs a CLIP or SigLIP of transformers: unit vectors of images and texts, and their scaled products.

  Args:
    folder, image: as for `transformers_logits`.
    tokens: of texts; every one counts, also of padding.

  Raises:
    UserError: see `transformers_logits`.
  """
  torch, model = _transformers_model(folder)
  pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    out = model(pixel_values=pixels, input_ids=torch.from_numpy(tokens.astype(np.int64)))
  return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def _transformers_model(folder: str | os.PathLike[str]) -> tuple[types.ModuleType, Foreign]:
  """Returns torch, and the model of a folder, in float32 and not in training."""
  why = f"Running {folder}"
  torch, transformers = optional.require("torch", why), optional.require("transformers", why)
  config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
  name = config.architectures[0]
  options = {"add_pooling_layer": False} if name in ("ViTModel", "DeiTModel") else {}
  model, loaded = getattr(transformers, name).from_pretrained(
    folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
  )
  if lacking := sorted(loaded["missing_keys"]):
    raise errors.UserError(f"{folder} lacks arrays of {name}: {', '.join(lacking)}.")
  return torch, model.eval()


def _pooled(model: Foreign, pixels: Foreign) -> Foreign:
  """Returns the output of a transformers model that stands for the whole image."""
  if hasattr(model, "get_image_features"):  # it has a tower for text, too
    return model.get_image_features(pixel_values=pixels).pooler_output
  out = model(pixel_values=pixels)
  for name in ("logits", "image_embeds", "pooler_output"):
    if getattr(out, name, None) is not None:
      return getattr(out, name)
  return out.last_hidden_state[:, 0]


def save_onnx(
  path: pathlib.Path, graph: onnx_graph.Graph, location: str, places: Mapping[str, tuple[int, int]]
) -> None:
  """Writes a graph as an ONNX model whose weights lie in another file.

  Args:
    path: the file to write.
    graph: what to write.
    location: the file with the weights, float32 and little-endian, relative to the folder of `path`.
    places: (offset, length) in bytes of each of the graph's weights there; others are left alone.
  """
  onnx = optional.require("onnx", "Writing ONNX")
  constants = [onnx.numpy_helper.from_array(a, name) for name, a in graph.constants.items()]
  weights = []
  for name, shape in graph.weights.items():
    external = onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT)
    external.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), (location, *places[name]), strict=True):
      external.external_data.add(key=key, value=str(value))
    weights.append(external)
  model = onnx.helper.make_model(
    _graph_proto(onnx, graph, [*constants, *weights]),
    producer_name="flexivit_jax",
    opset_imports=[onnx.helper.make_opsetid("", onnx_graph.OPSET)],
    ir_version=9,  # the one that came with this opset; onnx would write its own newest
  )
  path.write_bytes(model.SerializeToString(deterministic=True))


def _graph_proto(onnx: types.ModuleType, graph: onnx_graph.Graph, initializers: list) -> Foreign:
  def described(name: str, shape: tuple[int | str, ...]) -> Foreign:
    kind = onnx.TensorProto.INT64 if name == "tokens" else onnx.TensorProto.FLOAT
    return onnx.helper.make_tensor_value_info(name, kind, shape)

  outputs = graph.outputs
  if not isinstance(outputs, dict):
    shape = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = {graph.nodes[-1].name: shape}
  return onnx.helper.make_graph(
    [onnx.helper.make_node(n.op, n.inputs, [n.name], n.name, **n.attributes) for n in graph.nodes],
    "flexivit",
    [described(graph.input, ("n", *graph.shape))],
    [described(name, ("n", *shape)) for name, shape in outputs.items()],
    initializers,
  )


def check_onnx(path: pathlib.Path) -> None:
  """Raises onnx's own error for a file that is no valid model, shapes included."""
  optional.require("onnx", "Writing ONNX").checker.check_model(str(path), full_check=True)


def onnx_program(path: pathlib.Path, input_name: str = "image") -> Program:
  """Returns the function from images [n, h, w, c] to logits [n, k] of an ONNX model, in onnxruntime on the CPU.

  With input_name="tokens" it takes those, [n, l]. Of a model with several outputs it gives each by name.
  """
  runtime = optional.require("onnxruntime", COMPARING_ONNX)
  session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  dtype = np.int64 if input_name == "tokens" else np.float32
  names = [one.name for one in session.get_outputs()]

  def run(x: np.ndarray) -> Foreign:
    outputs = session.run(names, {input_name: x.astype(dtype)})
    return outputs[0] if len(names) == 1 else dict(zip(names, outputs, strict=True))

  return run


def quantized(path: pathlib.Path) -> pathlib.Path:
  """Writes an ONNX model in int8 beside it: weights of matrix products by column, activations as they come.

  Returns:
    The new file, which holds all of its weights.
  """
  optional.require("onnxruntime", "int8")
  quantization = importlib.import_module("onnxruntime.quantization")
  out = path.with_name(f"{path.stem}_int8.onnx")
  options = dict(per_channel=True, weight_type=quantization.QuantType.QInt8)
  root, level = logging.getLogger(), logging.getLogger().level
  root.setLevel(logging.ERROR)  # It advises a preprocessing that changes nothing in our graphs.
  try:
    quantization.quantize_dynamic(path, out, op_types_to_quantize=["MatMul", "Gemm"], **options)
  finally:
    root.setLevel(level)
  return out


def timm_logits(model: Foreign, image: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n k"]:
  """Runs a timm model, or the one in a folder that `save_timm` wrote, on pixels as it takes them."""
  torch, timm = (optional.require(name, "Running a timm model") for name in ("torch", "timm"))
  if isinstance(model, (str, os.PathLike)):
    model = timm.create_model(f"local-dir:{os.fspath(model)}", pretrained=True)
  pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
  with torch.inference_mode():
    return model.eval()(pixels).numpy()


def save_tensorflow(
  folder: pathlib.Path,
  shared: Arrays,
  programs: Mapping[str, tuple[Callable[..., jax.Array], Arrays]],
  shape: tuple[int, ...],
) -> None:
  """Writes a SavedModel.

  Args:
    folder: where to.
    shared: arrays by name that all programs take.
    programs: by signature: a JAX function of (arrays by name, images [n, *shape]), and the arrays that are its own.
    shape: of one image.
  """
  tf = optional.require("tensorflow", "Writing a SavedModel")
  jax2tf = importlib.import_module("jax.experimental.jax2tf")
  module = tf.Module()
  module.shared = {name: tf.Variable(array, trainable=False) for name, array in shared.items()}
  image = tf.TensorSpec((None, *shape), tf.float32, name="image")
  shapes = [None, f"(n, {', '.join(map(str, shape))})"]

  def signature(forward: Callable[..., jax.Array], variables: Foreign) -> Foreign:
    converted = jax2tf.convert(forward, polymorphic_shapes=shapes, with_gradient=False)
    run = tf.function(lambda image: {"logits": converted(variables, image)}, autograph=False)
    return run.get_concrete_function(image)

  signatures = {}
  for name, (forward, resampled) in programs.items():
    variables = module.shared | {n: tf.Variable(a, trainable=False) for n, a in resampled.items()}
    setattr(module, name, variables)  # what a module holds is what is saved
    signatures[name] = signature(forward, variables)
  tf.saved_model.save(module, str(folder), signatures=signatures)


def tensorflow_programs(folder: pathlib.Path, names: tuple[str, ...]) -> dict[str, Program]:
  """Returns the functions from images to logits of a SavedModel's signatures."""
  tf = optional.require("tensorflow", COMPARING_SAVED_MODEL)
  loaded = tf.saved_model.load(str(folder))

  def program(name: str) -> Program:
    def run(image: np.ndarray) -> np.ndarray:
      return loaded.signatures[name](image=tf.constant(image))["logits"].numpy()

    return run

  return {name: program(name) for name in names}
