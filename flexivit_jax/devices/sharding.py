"""Where arrays live: one mesh of all devices, with the axes "data" and "fsdp".

The batch is divided along both. Parameters, optimizer state and the EMA are a copy on each device along "data"
and divided along "fsdp" (fully sharded data parallelism, arXiv 1910.02054 and 2304.11277). With fsdp=1, the default,
that is plain data parallelism. No number depends on the mesh but for the order in which floats are added.

In the mesh "fsdp" is one axis for each of its prime factors: 8 devices are "fsdp0", "fsdp1" and "fsdp2" of two each. So
an array of which no axis is a multiple of 8 is divided along two of its axes, by 4 and by 2.
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
  axes = _axes(len(devices), data=data, fsdp=fsdp)
  _check_slices([slice_of(d) for d in devices], fsdp)
  shape = tuple(axes.values())
  return Mesh(
    np.array(devices).reshape(shape), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
  )


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
  axes = _axes(devices, data=data, fsdp=fsdp)
  return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _axes(devices: int, *, data: int, fsdp: int) -> dict[str, int]:
  """Names and lengths of a mesh's axes."""
  whole, divisor = mesh_shape(devices, data=data, fsdp=fsdp)
  factors = _prime_factors(divisor)
  if len(factors) < 2:
    return {"data": whole, "fsdp": divisor}
  return {"data": whole} | {f"fsdp{i}": n for i, n in enumerate(factors)}


def _prime_factors(n: int) -> list[int]:
  """From small to large; none of 1."""
  for factor in range(2, math.isqrt(n) + 1):
    if n % factor == 0:
      return [factor, *_prime_factors(n // factor)]
  return [n] if n > 1 else []


def lengths(mesh: Mesh | AbstractMesh) -> tuple[int, int]:
  """Numbers of devices along "data" and along "fsdp"."""
  return mesh.shape["data"], mesh.size // mesh.shape["data"]


def mesh_shape(devices: int, *, data: int = -1, fsdp: int = 1) -> tuple[int, int]:
  """Returns the lengths along "data" and "fsdp"; raises as `make_mesh`."""
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
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def divided(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
  """The shardings of parameters, or of what has their names and shapes: each large array is divided along "fsdp".

  Along the last of its longest axes that can be. Where none can be, along the axis that takes most of the factors of
  "fsdp", and those after it, which take the rest; a factor that no axis takes leaves copies. Small arrays are copies.
  """

  def place(name: str, leaf: Tree) -> NamedSharding:
    stacked = STACKED in name.split("/")[:-1]
    spec = _spec(leaf.shape[stacked:], mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * stacked, *spec) if spec else spec)

  return trees.map_named(place, tree)


def _spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  left = {name: n for name, n in mesh.shape.items() if name != "data" and n > 1}
  if math.prod(shape) < SMALLEST:
    return PartitionSpec()
  taken: dict[int, tuple[str, ...]] = {}
  while left:
    # No axis is chosen twice: of what it could take, nothing is left then.
    fitting = {axis: _fitting(n, left) for axis, n in enumerate(shape) if axis not in taken}
    best = max(
      fitting, key=lambda a: (math.prod(left[k] for k in fitting[a]), shape[a], a), default=None
    )
    if best is None or not fitting[best]:
      break
    taken[best] = fitting[best]
    left = {name: n for name, n in left.items() if name not in taken[best]}
  each = [taken.get(axis) for axis in range(max(taken, default=-1) + 1)]
  return PartitionSpec(*(names[0] if names and len(names) == 1 else names for names in each))


def _fitting(n: int, axes: Mapping[str, int]) -> tuple[str, ...]:
  """Names of those of a mesh's axes, of prime lengths, over which n elements divide."""
  names: tuple[str, ...] = ()
  for name, length in axes.items():
    if n % length == 0:
      names, n = (*names, name), n // length
  return names


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
    mesh: over whose "fsdp" the parameters are divided.
    remat: arguments of `jax.checkpoint` that say what `fn` keeps for the backward pass; None: all its activations.
    kernel_length: tokens as a kernel in `fn` pads them; None: there is no kernel in it.
    gather_dtype: in which parameters are sent; their gradients are scattered and summed in float32 all the same.
  """

  def run(params: Tree, x: jax.Array) -> Tree:
    specs = jax.tree.map(lambda leaf: _spec(leaf.shape, mesh), params)

    def gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
      if not spec:
        return leaf
      along = [(axis, _names(names)) for axis, names in enumerate(spec) if names]
      divides = {name for _, names in along for name in names}
      # Marked before: its gradient is then scattered along "fsdp" first, and only the piece summed over its copies.
      copies = tuple(name for name in mesh.axis_names if name not in divides)
      leaf = jax.lax.pcast(leaf, copies, to="varying")
      return _gathered(along, gather_dtype, leaf)

    def local(params: Tree, x: jax.Array) -> Tree:
      whole = lambda params, x: fn(jax.tree.map(gather, params, specs), x)  # noqa: E731
      policy = functools.partial(_of_tokens, len(x), {x.shape[1], kernel_length})
      return jax.checkpoint(whole, **({"policy": policy} if remat is None else remat))(params, x)

    split = PartitionSpec(mesh.axis_names)
    # JAX's kernels do not say along which axes their results differ, so that is not checked where there is one: the
    # sums of the gradients are the same.
    checked = kernel_length is None
    over = jax.shard_map(
      local, mesh=mesh, in_specs=(specs, split), out_specs=split, check_vma=checked
    )
    return over(params, x)

  return run


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else names


def _gathered(along: list[tuple[int, tuple[str, ...]]], dtype: str, leaf: jax.Array) -> jax.Array:
  """A parameter's pieces, put together; its gradient is not rounded as it is itself.

  Args:
    along: its axes that are divided, each with the names of the mesh's axes. All that each device gets is the same in
      one exchange for each or in one for all.
    dtype: in which it is sent.
    leaf: a device's piece.
  """

  def gather(leaf: jax.Array) -> jax.Array:
    sent = leaf.astype(dtype)
    for axis, names in along:
      sent = jax.lax.all_gather(sent, names, axis=axis, tiled=True)
    return sent.astype(leaf.dtype)

  if dtype == leaf.dtype:
    return gather(leaf)
  rounded = jax.custom_vjp(gather)

  def backward(_: None, g: jax.Array) -> tuple[jax.Array]:
    for axis, names in reversed(along):
      g = jax.lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
    return (g,)

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
  mesh = mesh_of(*arrays)
  if mesh.size == 1 or not mesh.are_all_axes_auto:  # one device, or inside of a `shard_map`
    return fn(*arrays)
  split = PartitionSpec(mesh.axis_names) if len(arrays[0]) % mesh.size == 0 else PartitionSpec()
  over = jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
  return over(*arrays)


def mesh_of(*arrays: jax.Array) -> AbstractMesh:
  """The mesh of those arrays of a program that are divided; one that is made in it, such as a constant, has none."""
  return max((jax.typeof(a).sharding.mesh for a in arrays), key=lambda mesh: mesh.size)


def _of_tokens(n: int, lengths: set[int | None], prim: object, *avals: Any, **params: Any) -> bool:
  """Whether an operation has part in what is kept for the backward pass: activations are, parameters are not.

  Told apart by the shape: [examples, tokens, ...] or [examples, heads, tokens, ...].
  """
  del prim, params
  return any(a.ndim > 2 and a.shape[0] == n and bool(lengths & {*a.shape[1:3]}) for a in avals)


def pieces(leaf: Tree, where: NamedSharding) -> int:
  """Number of different pieces of an array, or of its shape, on the devices; 1 where each has a copy."""
  return math.prod(leaf.shape) // max(1, math.prod(where.shard_shape(leaf.shape)))


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
