"""What runs a model at one size: a program of XLA, or onnxruntime where it is faster.

A program has one shape of batch. It gives an image the same bits whatever the other images are; programs of other
shapes may round otherwise.
"""

import functools
import os
import pathlib
import platform
import tempfile
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from flexivit_jax import errors, trees
from flexivit_jax.models import FlexiViT, TwoTowers, vit_part
from flexivit_jax.models.vit import Intermediates
from flexivit_jax.sizes import Patch, SeqHw, size_args, size_text
from flexivit_jax.trees import Params
from flexivit_jax.weights import baking, optional

if TYPE_CHECKING:
  from flexivit_jax.inference.predictor import Loaded

Result = tuple[Array, Intermediates]  # logits [n, k] and the named intermediates of a model
Fn = Callable[[Result], Array]  # what is wanted of it; pure
Call = Callable[[Params, Float32[np.ndarray, "n h w c"]], Array]
_OF_ONNX = ("onnx", "onnxruntime")  # packages
RUNTIMES = {"jax": ("float32", "bfloat16"), "onnx": ("float32", "int8")}


class Way(NamedTuple):
  """How a model is run: by what, and in which numbers the matrix products are."""

  runtime: str = "jax"
  dtype: str = "float32"


PLAIN = Way()


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    run: images [batch, h, w, c] -> what was wanted of each, [batch, ...]; another shape is an error.
    memory_mb: of the device, with the weights, 10^6 bytes; None: not known.
  """

  run: Callable[[np.ndarray], np.ndarray]
  memory_mb: float | None


def probabilities(result: Result) -> Float[Array, "n k"]:
  """The `fn` of classes."""
  return jax.nn.softmax(result[0])


def device_name() -> str:
  """The device in words; a CPU by its model and the cores that this process may use."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return str(device.device_kind)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{_processor()}, {cores} cores"


def _processor() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # only Linux has it
    return platform.processor() or platform.machine()
  names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  return next(names, platform.machine())


def runs_here(way: Way) -> bool:
  """Whether what a way needs is installed."""
  return way.runtime == "jax" or all(map(optional.version, _OF_ONNX))


def call(loaded: "Loaded", fn: Fn, size: SeqHw | Patch, way: Way = PLAIN) -> Call:
  """Returns (parameters, images) -> what is wanted, compiled at the first batch of each shape.

  Raises:
    UserError: as `compiled`.
  """
  _check(loaded.model, size, way)
  if way.runtime == "onnx":
    return _OnOnnx(loaded, fn, size, way.dtype)
  model = loaded.model if way.dtype == "float32" else loaded.model.clone(dtype=way.dtype)
  return _on_xla(model, fn, size)


def compiled(
  loaded: "Loaded",
  fn: Fn,
  size: SeqHw | Patch,
  *,
  batch: int,
  shape: tuple[int, int, int],
  way: Way = PLAIN,
) -> Program:
  """Returns a program that is compiled and has run once: nothing is compiled later.

  Args:
    loaded: the model.
    fn: what is wanted of its result.
    size: the size.
    batch: images at a time.
    shape: of an image: height, width, channels.
    way: what runs it.

  Raises:
    UserError: a size that does not divide the images; a way that this model cannot be run in, or whose package is not
      installed.
  """
  loaded.model.grid(shape[:2], **size_args(size))
  fixed = (batch, *shape)
  run: Any = call(loaded, fn, size, way)
  params = jax.device_put(loaded.params)  # once, not with every batch
  memory, images = None, np.zeros(fixed, np.float32)
  if isinstance(run, _OnXla):
    jitted, params = run.at(params, shape)
    program = jitted.lower(params, images).compile()
    if sizes := program.memory_analysis():
      held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
      memory = (held + sizes.temp_size_in_bytes) / 1e6
    run = program

  def of(images: np.ndarray) -> np.ndarray:
    if images.shape != fixed:
      raise ValueError(f"Got images of shape {images.shape}; this program takes {fixed}.")
    return np.asarray(run(params, np.asarray(images, np.float32)))

  of(images)
  return Program(of, memory)


def _check(model: Any, size: SeqHw | Patch, way: Way) -> None:
  if way.runtime not in RUNTIMES:
    raise errors.unknown("runtime", way.runtime, RUNTIMES)
  if way.dtype not in RUNTIMES[way.runtime]:
    raise errors.unknown(f"dtype of runtime {way.runtime}", way.dtype, RUNTIMES[way.runtime])
  if way != PLAIN and not isinstance(model, FlexiViT | TwoTowers):
    raise errors.UserError(
      f"A {type(model).__name__} runs in XLA in float32 alone; got runtime {way.runtime}, {way.dtype}."
    )
  if way.runtime == "onnx" and isinstance(size, Patch):
    raise errors.UserError(
      f"In onnxruntime a size is tokens per side; got patches, {size_text(size)}."
    )


@functools.lru_cache(maxsize=64)
def _on_xla(model: Any, fn: Fn, size: SeqHw | Patch) -> "_OnXla":
  return _OnXla(model, fn, size)


class _Baked(NamedTuple):
  """The arrays of a size, and the kernel that they were made of."""

  source: "weakref.ref[Any]"
  arrays: Params


class _OnXla:
  """XLA's programs of a size, one for each shape of image.

  Kernel and position grid are resized once, not in each forward pass: at a coarse size that is half of the time of a
  single image on a CPU (docs/performance.md). What no size changes stays that of the caller, and is not kept here.
  """

  def __init__(self, model: Any, fn: Fn, size: SeqHw | Patch):
    self._model, self._fn, self._size = model, fn, size
    self._programs: dict[tuple[int, ...], Any] = {}
    self._baked: dict[Any, _Baked] = {}  # by the shape and the device

  def __call__(self, params: Params, images: np.ndarray) -> Array:
    program, own = self.at(params, images.shape[1:])
    return program(own, images)

  def at(self, params: Params, shape: tuple[int, ...]) -> tuple[Any, Params]:
    """Returns the jitted function (parameters, images) of a shape of image, and these parameters of the size."""
    part = vit_part(self._model)
    vit = params[part] if part else params
    source = vit["embedding"]["kernel"]
    key = shape, _device(source)
    if key not in self._baked or self._baked[key].source() is not source:
      arrays = self._bake(params, shape, _device(source))
      self._baked[key] = _Baked(weakref.ref(source), arrays)
    own = trees.overlaid(vit, self._baked[key].arrays)
    return self._programs[shape], {**params, part: own} if part else own

  def _bake(self, params: Params, shape: tuple[int, ...], device: Any) -> Params:
    """Returns the arrays of a shape of image, and makes its program where there is none."""
    image_hw, args = (shape[0], shape[1]), size_args(self._size)
    names, flat = baking.resampled(self._model), trees.flatten(params)
    # By NumPy, wherever the parameters are: the same arrays on every device.
    on_host = trees.unflatten({name: np.asarray(flat[name]) for name in names if name in flat})
    model, baked, rest = baking.bake_whole(
      self._model, trees.overlaid(params, on_host), image_hw=image_hw, **args
    )
    part, flat = vit_part(model), trees.flatten(baked)
    start = f"{part}/" if part else ""
    arrays = {
      name.removeprefix(start): jax.device_put(flat[name], device) for name in names if name in flat
    }
    if shape not in self._programs:
      self._programs[shape] = jax.jit(
        lambda params, image: self._fn(model.apply({"params": params}, image, **rest))
      )
    return trees.unflatten(arrays)


def _device(array: Any) -> Any:
  """Where a JAX array is; None of a NumPy array."""
  return array.device if isinstance(array, jax.Array) else None


class _OnOnnx:
  """The ONNX graph of a size in onnxruntime, and `fn` of its output; a session for each shape of image.

  The graph is that of `flexivit export --to onnx`; its files are gone as soon as a session has read them.
  """

  def __init__(self, loaded: "Loaded", fn: Fn, size: SeqHw, dtype: str):
    self._loaded, self._size, self._dtype = loaded, size, dtype
    self._sessions: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {}
    # Of two towers the graph gives unit vectors, which is what the intermediates hold.
    self._fn = jax.jit(lambda output: fn((output, {"image": output})))
    for package in _OF_ONNX:
      optional.require(package, "Running a model in onnxruntime")

  def __call__(self, params: Params, images: np.ndarray) -> Array:
    shape = images.shape[1:]
    if shape not in self._sessions:
      self._sessions[shape] = self._session(shape)
    try:
      return self._fn(self._sessions[shape](np.asarray(images)))
    except KeyError as e:
      raise errors.UserError(
        f"In onnxruntime a model gives its output alone, not {e}; run it in XLA."
      ) from e

  def _session(self, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    from flexivit_jax.weights.export import frameworks, onnx

    with tempfile.TemporaryDirectory(prefix="flexivit") as name:
      folder = pathlib.Path(name, "onnx")
      onnx.write(
        folder, self._loaded.model, self._loaded.params, self._loaded.record,
        image_hw=(shape[0], shape[1]), sizes=[self._size],
      )  # fmt: skip
      path = folder / onnx.name_of(self._size)
      if self._dtype == "int8":
        path = frameworks.quantized(path)
      return frameworks.onnx_program(path)
