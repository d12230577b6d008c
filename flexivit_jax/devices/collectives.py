"""What the devices of a mesh send to each other in a training step: expected from shapes, and read from a program."""

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from flexivit_jax import trees
from flexivit_jax.devices import sharding
from flexivit_jax.trees import Tree

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_IN_BLOCK = re.compile(r".*/encoderblock(_\d+)?/.*")


class Sent(NamedTuple):
  """Bytes that each device of a mesh takes part in moving: of whole arrays, or of what is left of them along "fsdp".

  `all_reduce` is over all devices, `all_reduce_data` along "data", the other two along "fsdp".
  """

  all_reduce: int
  all_reduce_data: int
  all_gather: int
  reduce_scatter: int

  def on_the_wire(self, data: int, fsdp: int) -> float:
    """Bytes that each device sends, where collectives go around rings: (n - 1) / n of an array, twice for a sum."""

    def ring(n: int) -> float:
      return (n - 1) / n

    return (
      2 * ring(data * fsdp) * self.all_reduce
      + 2 * ring(data) * self.all_reduce_data
      + ring(fsdp) * (self.all_gather + self.reduce_scatter)
    )


def expected(params: Tree, mesh: Mesh | AbstractMesh, *, gather_bytes: int = 4) -> Sent:
  """What a step sends for the parameters of a FlexiViT, or their shapes, without accumulation.

  A block's divided arrays are gathered forwards and backwards, and their gradients scattered; what lies outside the
  blocks is gathered once. Gradients of what is a copy are summed over all devices; those of an array in fewer pieces
  than there are devices along "fsdp", over the copies of each piece.

  Args:
    params: float32 arrays, or their shapes.
    mesh: over which they are divided.
    gather_bytes: of a number of a block that is gathered, 2 with `mesh.gather_dtype="bfloat16"`.
  """
  places = trees.flatten(sharding.divided(params, mesh))
  data, fsdp = sharding.lengths(mesh)
  sent = dict.fromkeys(Sent._fields, 0)
  for name, leaf in trees.flatten(params).items():
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    pieces = sharding.pieces(leaf, places[name])
    if pieces == 1:
      sent["all_reduce"] += size
      continue
    sent["all_gather"] += 2 * size * gather_bytes // 4 if _IN_BLOCK.fullmatch(name) else size
    sent["reduce_scatter"] += size
    if pieces < fsdp:
      sent["all_reduce"] += size // pieces  # over fewer devices: an upper bound
    elif data > 1:
      sent["all_reduce_data"] += size // fsdp
  return Sent(**sent)


def state_bytes(state: Tree, mesh: Mesh | AbstractMesh) -> int:
  """Bytes of a training state, or of its shapes, on each device of a mesh."""
  placed = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    state, sharding.divided(state, mesh),
  )  # fmt: skip
  return sharding.bytes_each(placed)


class Collective(NamedTuple):
  """One of a compiled program. `bytes` are those of its result, `group` how many devices talk, `times` in a run."""

  kind: str
  bytes: int
  group: int
  times: int
  shapes: tuple[str, ...]


def collectives(hlo: str, devices: int) -> list[Collective]:
  """The collectives of an optimized program for so many devices, `compiled.as_text()`; groups of one send nothing."""
  times = _times(hlo)
  operations = []
  for name, lines in _computations(hlo).items():
    for line in lines:
      match = _COLLECTIVE.match(line)
      if match is None:
        continue
      group = len(groups(line, devices)[0])
      if group > 1:
        shapes = tuple(re.findall(r"[a-z]+\d+\[[\d,]*\]", match[1]))
        operations.append(
          Collective(match[2], sum(map(_bytes, shapes)), group, times.get(name, 1), shapes)
        )
  return operations


def totals(operations: list[Collective]) -> Mapping[str, int]:
  """Bytes of each kind in a run of the program."""
  out: collections.Counter[str] = collections.Counter()
  for one in operations:
    out[one.kind] += one.bytes * one.times
  return out


def _computations(hlo: str) -> dict[str, list[str]]:
  bodies: dict[str, list[str]] = {}
  name = ""
  for line in hlo.splitlines():
    begin = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
    if begin:
      name = begin[1]
    bodies.setdefault(name, []).append(line)
  return bodies


def _times(hlo: str) -> dict[str, int]:
  """How often the body of each loop runs; loops in loops multiply."""
  inside: dict[str, tuple[str, int]] = {}
  for name, lines in _computations(hlo).items():
    for line in lines:
      body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
      if body:
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        inside[body[1]] = (name, int(count[1]) if count else 1)

  def of(name: str) -> int:
    if name not in inside:
      return 1
    outer, count = inside[name]
    return count * of(outer)

  return {name: of(name) for name in inside}


def groups(line: str, devices: int) -> list[list[int]]:
  """Which devices talk to each other in a collective of an optimized program, in each of the forms that XLA prints."""
  if listed := re.search(r"replica_groups=\{\{([\d,{}]+)\}\}", line):
    return [[int(n) for n in group.split(",")] for group in listed[1].split("},{")]
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    return _order(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
  axes = (
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
  )
  if mesh := re.search(axes, line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    along = re.findall(r"'(\w+)'", mesh[4])
    order = _order(mesh[2] or str(devices), mesh[3]).reshape([int(n) for n in sizes.values()])
    last = [list(sizes).index(name) for name in along]
    moved = np.moveaxis(order, last, range(-len(last), 0))
    return moved.reshape(-1, math.prod(int(sizes[name]) for name in along)).tolist()
  return [list(range(devices))]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _order(shape: str, axes: str | None) -> np.ndarray:
  """The devices counted along `shape`, its axes in another order."""
  counted = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return counted.transpose(_numbers(axes)) if axes else counted


def _bytes(shape: str) -> int:
  kind, _, dims = shape.removesuffix("]").partition("[")
  bits = int(re.sub(r"\D", "", kind))  # f32, bf16, u8
  return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
