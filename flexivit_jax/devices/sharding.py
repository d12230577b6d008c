"""Where arrays live: one mesh of all devices, with the axes "data" and "fsdp".

The batch is divided along both. Parameters, optimizer state and the EMA are a copy on each device along "data"
and divided along "fsdp" (fully sharded data parallelism, arXiv 1910.02054 and 2304.11277). With fsdp=1, the default,
that is plain data parallelism. No number depends on the mesh but for the order in which floats are added.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flexivit_jax import errors, trees
from flexivit_jax.trees import Tree

AXES = ("data", "fsdp")
OPTIONS = (
  "divide_teachers",
  "gather_dtype",
)  # of a config's mesh besides the arguments of `make_mesh`
SMALLEST = 2**13  # elements: what is smaller, biases and the like, is a copy on each device
STACKED = "encoderblock"  # parameters below this name have the blocks as their first axis


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
  """Returns the mesh of all devices of all processes, those of a process side by side.

  Several TPU slices lie along "data": processes are numbered slice by slice, so that "fsdp", whose devices are
  neighbours, stays inside of a slice and its fast links.

  Args:
    data: along this axis parameters are copies; -1: as many as there are devices for.
    fsdp: along this axis they are divided.

  Raises:
    UserError: the product is not the number of devices; or "fsdp" would cross slices.
  """
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  shape = mesh_shape(len(devices), data=data, fsdp=fsdp)
  _check_slices([slice_of(d) for d in devices], shape[1])
  return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def slice_of(device: Any) -> int:
  """The TPU slice of a device; 0 where there is one, or none: hosts of GPUs are no slices."""
  return int(getattr(device, "slice_index", 0) or 0) if device.platform == "tpu" else 0


def _check_slices(slices: Sequence[int], fsdp: int) -> None:
  """Raises a UserError if neighbours along "fsdp" are of several slices; `slices` are those of the devices."""
  groups = (set(slices[i : i + fsdp]) for i in range(0, len(slices), fsdp))
  if all(len(group) == 1 for group in groups):
    return
  each = len(slices) // len(set(slices))
  raise errors.UserError(
    f"mesh.fsdp={fsdp} divides parameters over more than one of {len(set(slices))} slices of {each} devices, so that"
    f" every block would be gathered over the slow network between them; give a number that divides {each}."
  )


def abstract_mesh(devices: int, *, data: int = -1, fsdp: int = 1) -> AbstractMesh:
  """The mesh that `make_mesh` would return where there are so many devices."""
  shape = mesh_shape(devices, data=data, fsdp=fsdp)
  return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_shape(devices: int, *, data: int = -1, fsdp: int = 1) -> tuple[int, int]:
  """Returns the lengths of both axes; raises as `make_mesh`."""
  whole = devices // fsdp if data == -1 and fsdp > 0 else data
  if fsdp < 1 or whole < 1 or whole * fsdp != devices:
    raise errors.UserError(
      f"mesh=dict(data={data}, fsdp={fsdp}) does not fit {devices} devices: their product must be that"
      " (data=-1: what is left)."
    )
  return whole, fsdp


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
  """Copies arrays that every process has, with the same values, to all devices; for one device they stay as given."""
  if mesh is None or mesh.size == 1:
    return tree

  def place(leaf: Tree) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return leaf  # it is there
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, replicated(mesh), lambda index: whole[index])

  return jax.tree.map(place, tree)


def batch_split(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Sharding of arrays `[n, ...]` whose examples are divided over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def divided(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
  """The shardings of parameters, or of what has their names and shapes: each large array is divided along "fsdp".

  Along the last of its longest axes that can be; arrays where none can be, and small ones, are copies.
  """

  def place(name: str, leaf: Tree) -> NamedSharding:
    stacked = STACKED in name.split("/")[:-1]
    spec = _spec(leaf.shape[stacked:], mesh.shape["fsdp"])
    return NamedSharding(mesh, PartitionSpec(*[None] * stacked, *spec) if spec else spec)

  return trees.map_named(place, tree)


def _spec(shape: tuple[int, ...], parts: int) -> PartitionSpec:
  axes = [axis for axis, n in enumerate(shape) if n % parts == 0]
  if parts == 1 or math.prod(shape) < SMALLEST or not axes:
    return PartitionSpec()
  chosen = max(axes, key=lambda axis: (shape[axis], axis))
  return PartitionSpec(*[None] * chosen, "fsdp")


def over_divided(
  fn: Callable[[Tree, jax.Array], Tree],
  mesh: Mesh | AbstractMesh,
  remat: Mapping[str, Any] | None = None,
  kernel_length: int | None = None,
  gather_dtype: str = "float32",
) -> Callable[[Tree, jax.Array], Tree]:
  """Returns `fn(params, x)`, which gathers the parameters while it runs, forwards and again backwards.

  No more than the parameters of one call are ever whole on a device, and their gradients are summed where they are
  divided: an all-gather in each direction and a reduce-scatter, as in ZeRO's third stage (arXiv 1910.02054).

  Args:
    fn: does the same with each example of `x` [n, l, d]; a block of a transformer.
    mesh: has an axis "fsdp".
    remat: arguments of `jax.checkpoint` that say what `fn` keeps for the backward pass; None: all its activations.
    kernel_length: tokens as a kernel in `fn` pads them; None: there is no kernel in it.
    gather_dtype: in which parameters are sent; their gradients are scattered and summed in float32 all the same.
  """

  def run(params: Tree, x: jax.Array) -> Tree:
    specs = jax.tree.map(lambda leaf: _spec(leaf.shape, mesh.shape["fsdp"]), params)

    def gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
      if not spec:
        return leaf
      # Marked before: its gradient is then scattered along "fsdp" first, and only the piece summed along "data".
      leaf = jax.lax.pcast(leaf, "data", to="varying")
      return _gathered(len(spec) - 1, gather_dtype, leaf)

    def local(params: Tree, x: jax.Array) -> Tree:
      whole = lambda params, x: fn(jax.tree.map(gather, params, specs), x)  # noqa: E731
      policy = functools.partial(_of_tokens, len(x), {x.shape[1], kernel_length})
      return jax.checkpoint(whole, **({"policy": policy} if remat is None else remat))(params, x)

    split = PartitionSpec(AXES)
    # JAX's kernels do not say along which axes their results differ, so that is not checked where there is one: the
    # sums of the gradients are the same.
    checked = kernel_length is None
    over = jax.shard_map(
      local, mesh=mesh, in_specs=(specs, split), out_specs=split, check_vma=checked
    )
    return over(params, x)

  return run


def _gathered(axis: int, dtype: str, leaf: jax.Array) -> jax.Array:
  """A parameter's pieces along "fsdp", put together; its gradient is not rounded as it is itself."""

  def gather(leaf: jax.Array) -> jax.Array:
    sent = jax.lax.all_gather(leaf.astype(dtype), "fsdp", axis=axis, tiled=True)
    return sent.astype(leaf.dtype)

  if dtype == leaf.dtype:
    return gather(leaf)
  rounded = jax.custom_vjp(gather)

  def backward(_: None, g: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True),)

  rounded.defvjp(lambda leaf: (gather(leaf), None), backward)
  return rounded(leaf)


def over_gathered(
  fn: Callable[..., Tree], mesh: Mesh | AbstractMesh, remat: Mapping[str, Any] | None = None
) -> Callable[..., Tree]:
  """Returns `fn(params, x, ...)` as `over_divided`, for functions that draw random numbers.

  All devices see one program, in which a random array is a function of its key and not of the mesh, and XLA gathers the
  parameters where they are said to be whole. It sums their gradients whole and then takes a piece, unless its compiler
  makes that a reduce-scatter.

  Args:
    fn: of parameters, `x` [n, l, d] and other arrays.
    mesh, remat: as for `over_divided`.
  """

  def whole(params: Tree, x: jax.Array, *others: Any) -> Tree:
    return fn(jax.lax.with_sharding_constraint(params, replicated(mesh)), x, *others)

  def run(params: Tree, x: jax.Array, *others: Any) -> Tree:
    policy = functools.partial(_of_tokens, len(x), {x.shape[1]})
    return jax.checkpoint(whole, **({"policy": policy} if remat is None else remat))(
      params, x, *others
    )

  return run


def by_example(fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  """Returns `fn(*arrays)`, run by each device for its own examples: for kernels, which XLA cannot divide.

  Where the examples do not divide over the mesh, as a single one under `jax.vmap`, each device runs it for all.

  Args:
    fn: does the same with each example of its arguments and has a result `[n, ...]`.
    *arrays: `[n, ...]`.
  """
  # The mesh of those that are divided; an array made in the program, such as a constant, has none.
  mesh = max((jax.typeof(a).sharding.mesh for a in arrays), key=lambda mesh: mesh.size)
  if mesh.size == 1 or not mesh.are_all_axes_auto:  # one device, or inside of a `shard_map`
    return fn(*arrays)
  split = PartitionSpec(mesh.axis_names) if len(arrays[0]) % mesh.size == 0 else PartitionSpec()
  over = jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
  return over(*arrays)


def _of_tokens(n: int, lengths: set[int | None], prim: object, *avals: Any, **params: Any) -> bool:
  """Whether an operation has part in what is kept for the backward pass: activations are, parameters are not.

  Told apart by the shape: [examples, tokens, ...] or [examples, heads, tokens, ...].
  """
  del prim, params
  return any(a.ndim > 2 and a.shape[0] == n and bool(lengths & {*a.shape[1:3]}) for a in avals)


def bytes_each(tree: Tree) -> int:
  """Bytes that a tree of arrays, or of their shapes and shardings, takes on each device."""

  def size(leaf: Tree) -> int:
    where = getattr(leaf, "sharding", None)
    shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize

  return sum(map(size, jax.tree.leaves(tree)))


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
  """Makes global arrays of this process's share of a batch, a tree of arrays, without waiting for the copy.

  Raises:
    UserError: if the global batch cannot be divided over the devices.
  """
  n = len(jax.tree.leaves(batch)[0]) * jax.process_count()
  check_divides(n, mesh)
  sharding = batch_split(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)  # all in one call: half the time on the host
  return jax.tree.map(lambda v: jax.make_array_from_process_local_data(sharding, v), batch)


def check_divides(batch_size: int, mesh: Mesh | AbstractMesh, name: str = "batch_size") -> None:
  """Raises a UserError if a global batch does not divide over the devices of the mesh."""
  if batch_size % mesh.size:
    raise errors.UserError(
      f"{name}={batch_size} must be a multiple of the number of devices, {mesh.size}."
    )


def possible_microbatches(batch_size: int, mesh: Mesh) -> list[int]:
  """The numbers of equal microbatches into which a global batch divides on the mesh, from small to large."""
  share = batch_size // mesh.size
  return [n for n in range(1, share + 1) if share % n == 0]


def specs(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of `put_batch(batch, mesh)`, for compiling ahead."""

  def spec(x: np.ndarray) -> jax.ShapeDtypeStruct:
    shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
    return jax.ShapeDtypeStruct(
      shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=batch_split(mesh)
    )

  return {k: spec(v) for k, v in batch.items()}
