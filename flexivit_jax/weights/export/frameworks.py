"""Other frameworks, where they are installed: the only file of the package that imports them.

Reading and writing weights needs none of them, but for PyTorch's own `.pth` and `.bin` files. What was written is run
here in the framework that it was written for, for the certificate.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors
from flexivit_jax.trees import Arrays
from flexivit_jax.weights.export import onnx_graph

# Packages that a package imports late, in the middle of a conversion: an image library of another build than torch.
_COMPANIONS = {"timm": ("torch", "torchvision"), "transformers": ("torch", "torchvision")}
COMPARING_ONNX = "Comparing an ONNX export with its source, which --no-verify leaves out,"

_DTYPES = (
  *("float64", "float32", "float16", "bfloat16", "bool"),
  *("int64", "int32", "int16", "int8", "uint8"),
)
COMPARING_SAVED_MODEL = "Comparing a SavedModel with its source, which --no-verify leaves out,"
_ADVICE = "pip install -r requirements-convert.txt has the versions that are tested"


def version(package: str) -> str:
  """E.g. "timm 1.0.31"; an empty string where it is not installed."""
  try:
    return f"{package} {importlib.metadata.version(package)}"
  except importlib.metadata.PackageNotFoundError:
    return ""


def require(package: str, why: str) -> types.ModuleType:
  """Imports a package that is not a dependency of ours.

  Args:
    package: its name.
    why: what needs it, e.g. "Reading model.pth".

  Raises:
    UserError: the package, or one that it imports, is not installed or cannot be imported.
  """
  try:
    for companion in _COMPANIONS.get(package, ()):
      if importlib.util.find_spec(companion) is not None:
        importlib.import_module(companion)
    return importlib.import_module(package)
  except Exception as e:  # a library of another build raises RuntimeError, OSError, ...
    if isinstance(e, ModuleNotFoundError) and e.name == package:
      problem = f"is not installed; {_ADVICE}"
    else:
      problem = f"cannot be imported: {_import_cause(e)}. {_installed(package)} A new environment helps; {_ADVICE}"
    raise errors.UserError(f"{why} needs the package {package}, which {problem}.") from e


def _import_cause(error: Exception) -> str:
  text = str(error).strip() or type(error).__name__
  return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}"


def _installed(package: str) -> str:
  """The versions that have to fit each other, in one sentence."""
  names = filter(None, map(version, ("torch", *_COMPANIONS.get(package, ()), package)))
  return f"Installed: {', '.join(dict.fromkeys(names)) or 'unknown versions'}."


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
  why = f"Running {folder}"
  torch, transformers = require("torch", why), require("transformers", why)
  config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
  name = config.architectures[0]
  given = {"add_pooling_layer": False} if name in ("ViTModel", "DeiTModel") else {}
  model, loaded = getattr(transformers, name).from_pretrained(
    folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **given
  )
  if lacking := sorted(loaded["missing_keys"]):
    raise errors.UserError(f"{folder} lacks arrays of {name}: {', '.join(lacking)}.")
  pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    output = _pooled(model.eval(), pixels)
  return output.numpy()


def _pooled(model: Any, pixels: Any) -> Any:
  """The one output of a model in transformers that stands for the whole image."""
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
  onnx = require("onnx", "Writing ONNX")
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


def _graph_proto(onnx: types.ModuleType, graph: onnx_graph.Graph, initializers: list) -> Any:
  def described(name: str, shape: tuple[int | str, ...]) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

  return onnx.helper.make_graph(
    [onnx.helper.make_node(n.op, n.inputs, [n.name], n.name, **n.attributes) for n in graph.nodes],
    "flexivit",
    [described("image", ("n", *graph.image_shape))],
    [described(graph.nodes[-1].name, ("n", graph.outputs))],
    initializers,
  )


def check_onnx(path: pathlib.Path) -> None:
  """Raises onnx's own error for a file that is no valid model, shapes included."""
  require("onnx", "Writing ONNX").checker.check_model(str(path), full_check=True)


def onnx_program(path: pathlib.Path) -> Callable[[Any], np.ndarray]:
  """Returns the function from images [n, h, w, c] to logits [n, k] of an ONNX model, in onnxruntime on the CPU."""
  runtime = require("onnxruntime", COMPARING_ONNX)
  session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  return lambda image: session.run(None, {"image": image})[0]


def read_torch(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
  """Returns (arrays by name, {}) of a file that torch.save wrote; half precision is widened.

  torch reads it with weights_only: no name in it is looked up that is not one of torch's own tensors or of `_HARMLESS`,
  and nothing in it is run. The levels of nested dicts are joined by dots: "state_dict.module.head.weight". What is no
  tensor is left out, and so is the state of an optimizer.

  Raises:
    UserError: PyTorch is not installed; the file is none of torch.save's, or asks for anything else to be loaded, or
      would expand; it holds no tensors.
  """
  _check_archive(path)
  torch = require("torch", f"Reading {path.name}")
  try:
    with torch.serialization.safe_globals(_harmless()):
      content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except Exception as e:  # what a broken or evil file makes a reader raise cannot be foreseen
    raise errors.UserError(f"{path} cannot be read as PyTorch's weights: {_cause(e)}.") from e
  tensors = dict(_tensors(path, torch, content))
  if not tensors:
    raise errors.UserError(f"{path} holds no tensors by name; expected the weights of a model.")
  _check_tensors(path, torch, tensors)
  return {n: _array(torch, tensor) for n, tensor in tensors.items()}, {}


# Classes beside tensors that training tools save, and that do nothing when they are made.
_HARMLESS = (
  *("argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray"),
  *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath"),
  *("datetime.date", "datetime.datetime", "datetime.timedelta", "datetime.timezone"),
  *(
    "builtins.slice",
    "builtins.range",
    "builtins.frozenset",
    "decimal.Decimal",
    "fractions.Fraction",
  ),
)
_NOT_WEIGHTS = re.compile(
  r"(optim|opt_|lr_sched|sched|scaler|amp|rng|loops|hyper_param|hparams)", re.IGNORECASE
)
_LEVELS = 5  # of nested dicts; deeper ones are no weights


def _harmless() -> list[Any]:
  """Classes that torch may make: `_HARMLESS`, and NumPy's numbers, as which many tools save a metric."""
  named = [getattr(importlib.import_module(m), n) for m, n in (x.rsplit(".", 1) for x in _HARMLESS)]
  kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "u4", "u8", "?")]
  plain = [int, float, bool, str, list, dict, set, tuple]
  return [
    *named,
    *plain,
    *kinds,
    np.asarray(0.0)[()].__reduce__()[0],
    np.ndarray(0).__reduce__()[0],
  ]


def _tensors(
  path: pathlib.Path, torch: Any, content: Any, prefix: str = "", level: int = 0
) -> Iterator[tuple[str, Any]]:
  """The tensors of nested dicts with their joined names; those of an optimizer are left out."""
  if not isinstance(content, Mapping):
    kind = type(content).__name__
    raise errors.UserError(f"{path} holds one {kind}; expected weights by name.")
  for key, value in content.items():
    name = f"{prefix}{key}"
    if isinstance(value, torch.Tensor):
      yield name, value
    elif isinstance(value, Mapping) and level < _LEVELS and not _NOT_WEIGHTS.match(str(key)):
      yield from _tensors(path, torch, value, f"{name}.", level + 1)


def timm_logits(model: Any, image: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n k"]:
  """Runs a timm model, or the one in a folder that `save_timm` wrote, on pixels as it takes them."""
  torch, timm = (require(name, "Running a timm model") for name in ("torch", "timm"))
  if isinstance(model, (str, os.PathLike)):
    model = timm.create_model(f"local-dir:{os.fspath(model)}", pretrained=True)
  pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
  with torch.inference_mode():
    return model.eval()(pixels).numpy()


def _check_archive(path: pathlib.Path) -> None:
  """Raises a UserError unless the file is a zip whose parts are stored as they are, as torch.save writes it."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
  except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
    raise errors.UserError(
      f"{path} cannot be read as PyTorch's weights: {e}. torch.save has written zip archives since 1.6 (2020); save an"
      " older file again with a newer PyTorch."
    ) from e
  packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
  total, size = sum(m.file_size for m in members), path.stat().st_size
  if packed or total > size:
    what = f"{packed[0]} is compressed" if packed else f"{size} bytes would expand to {total}"
    raise errors.UserError(
      f"{path} cannot be read as PyTorch's weights: {what}; torch.save never does that."
    )


def _cause(error: Exception) -> str:
  """One line of torch's many."""
  if refused := re.search(r"GLOBAL (\S+)", str(error)):
    return (
      f"it wants {refused[1]}, which is no tensor, and was not run. If you trust the file, open it with PyTorch and"
      " save its weights alone"
    )
  if reason := re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error)):
    return reason[1].strip()
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return [*lines, type(error).__name__][0]


def _check_tensors(path: pathlib.Path, torch: Any, tensors: dict[str, Any]) -> None:
  """Raises a UserError for tensors that are no plain numbers, or larger than what is stored of them."""
  for name, tensor in tensors.items():
    dtype = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or dtype not in _DTYPES:
      raise errors.UserError(
        f"{path}: {name} is {tensor.layout} of {dtype}, on {tensor.device}; expected plain numbers."
      )
  total, size = sum(t.nbytes for t in tensors.values()), path.stat().st_size
  if (
    total > 2 * size
  ):  # a stride of 0 repeats one number as often as it likes; names may share their tensor
    raise errors.UserError(f"{path}: {size} bytes would expand to {total}; no weights do that.")


def _array(torch: Any, tensor: Any) -> np.ndarray:
  """A copy, for the file is mapped into memory; half precision as float32."""
  half = tensor.dtype in (torch.bfloat16, torch.float16)
  return np.array((tensor.float() if half else tensor).detach().numpy())


def save_tensorflow(
  folder: pathlib.Path,
  shared: Mapping[str, np.ndarray],
  programs: Mapping[str, tuple[Callable[..., Any], Mapping[str, np.ndarray]]],
  shape: tuple[int, ...],
) -> None:
  """Writes a SavedModel.

  Args:
    folder: where to.
    shared: arrays by name that all programs take.
    programs: by signature: a JAX function of (arrays by name, images [n, *shape]), and the arrays that are its own.
    shape: of one image.
  """
  tf = require("tensorflow", "Writing a SavedModel")
  jax2tf = importlib.import_module("jax.experimental.jax2tf")
  module = tf.Module()
  module.shared = {name: tf.Variable(array, trainable=False) for name, array in shared.items()}
  image = tf.TensorSpec((None, *shape), tf.float32, name="image")
  shapes = [None, f"(n, {', '.join(map(str, shape))})"]

  def signature(forward: Callable[..., Any], variables: Any) -> Any:
    converted = jax2tf.convert(forward, polymorphic_shapes=shapes, with_gradient=False)
    run = tf.function(lambda image: {"logits": converted(variables, image)}, autograph=False)
    return run.get_concrete_function(image)

  signatures = {}
  for name, (forward, own) in programs.items():
    variables = module.shared | {n: tf.Variable(a, trainable=False) for n, a in own.items()}
    setattr(module, name, variables)  # what a module holds is what is saved
    signatures[name] = signature(forward, variables)
  tf.saved_model.save(module, str(folder), signatures=signatures)


def tensorflow_programs(
  folder: pathlib.Path, names: tuple[str, ...]
) -> dict[str, Callable[[Any], np.ndarray]]:
  """Returns the functions from images to logits of a SavedModel's signatures."""
  tf = require("tensorflow", COMPARING_SAVED_MODEL)
  loaded = tf.saved_model.load(str(folder))

  def program(name: str) -> Callable[[Any], np.ndarray]:
    def run(image: Any) -> np.ndarray:
      return loaded.signatures[name](image=tf.constant(image))["logits"].numpy()

    return run

  return {name: program(name) for name in names}
