"""Puts known bugs into the code, one at a time, and counts those that the default tests catch.

    python tools/maintain/mutations.py --check                        is every place of the table still there?
    python tools/maintain/mutations.py --out results/mutations.csv    run the tests on each, go on where it stopped
    python tools/maintain/mutations.py --draw                         draw the table again, from the seed

The table, mutations.csv next to this file, holds the mutations: in which function which fragment of the source becomes
which other one. They are drawn from ROOMS with `random.Random(16)`. One that changes no result (an equivalent mutant),
or that is no bug that a person would make, has the reason in the column "rejected"; the next one drawn takes its place.

A fragment is an expression, a keyword argument, a default or a simple statement as `ast.unparse` writes it, and stands
exactly once in its function. So a table outlives new formatting, comments and modules that move (ROOMS has their old
and new paths). Whoever rewrites a mutated line writes its row anew: the same bug in the new words.

Each mutation is put into a copy of the checkout. Its room's tests are run first, and where none of them fails, all
others of the default lane that import the module, and END_TO_END: only then it has survived. Tests are found by
their file's name anywhere under tests/. A test that also fails without the mutation ends the program. One process at a
time: a quarter of a minute a mutation, several minutes where it survives. "open": the tests did not end in an hour.
"""

import argparse
import ast
import collections
import copy
import csv
import itertools
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from flexivit_jax import cli

SEED = 16
TIMEOUT_S = 3600
ENDLESS = "no end after"
ROOT = pathlib.Path(__file__).parent.parent.parent
TABLE = pathlib.Path(__file__).with_suffix(".csv")
FIELDS = ("mutation", "area", "room", "function", "kind", "old", "new", "rejected")
RESULTS = ("mutation", "caught", "by", "seconds", "tests")


class Room(NamedTuple):
  """Functions to mutate, and what tests them.

  Attributes:
    paths: of the module below flexivit_jax/, now and before; what was one file may be several.
    functions: qualified names; of a class its fields' defaults, of a constant its value.
    tests: names of test files, now and before, which fail soonest if one of the functions is wrong.
  """

  paths: tuple[str, ...]
  functions: tuple[str, ...]
  tests: tuple[str, ...]


def _room(paths: str, functions: str, tests: str) -> Room:
  return Room(*(tuple(text.split()) for text in (paths, functions, tests)))


ROOMS = {
  "resize": _room(
    "resize.py",
    "_triangle _keys_cubic _sampled _area pi_matrix _root second_moment zoom_matrix area_resize norm_resize resize_grid"
    " _apply _matmul_axis",
    "test_resize.py",
  ),
  "flexivit": _room(
    "models/flexivit.py models/grid.py models/flops.py",
    "PatchEmbed.__call__ resized_kernel FlexiViT FlexiViT.__call__ FlexiViT.prefix_length FlexiViT.features"
    " FlexiViT.num_features which_patch which_grid which_depth common_divisors gmacs",
    "test_flexivit.py test_grid.py test_flops.py",
  ),
  "vit": _room(
    "models/vit.py",
    "GELU decode_variant MlpBlock.__call__ Attention.__call__ BlockConfig EncoderBlock.__call__ Encoder.__call__"
    " Encoder._init_blocks MAPHead.__call__ sincos2d stack_blocks unstack_blocks",
    "test_vit.py test_flexivit.py",
  ),
  "attention": _room(
    "models/attention.py",
    "einsum heads_first one_by_one choose _by_head _attend _gradients _map_heads",
    "test_attention.py",
  ),
  "step": _room(
    "steps.py training/steps.py training/step.py",
    "init_params init_state gradients update step update_ema targets _keys _accumulated _split",
    "test_steps.py test_step.py",
  ),
  "programs": _room(
    "step_programs.py training/step_programs.py training/programs.py",
    "StepPrograms.with_gradients compile_steps _fitting _several",
    "test_step_programs.py test_programs.py",
  ),
  "schedules": _room(
    "schedules.py training/schedules.py",
    "to_steps cosine linear rsqrt constant make _ramps _progress _check_duration _check_fits",
    "test_schedules.py",
  ),
  "patch_schedule": _room(
    "patch_schedule.py training/patch_schedule.py",
    "adaptive draw probabilities all_static shares init_state update is_due _adapted _joint _by_cost _uniform _pick"
    " _parse_stages _probs",
    "test_patch_schedule.py",
  ),
  "optim": _room(
    "optim.py training/optim.py",
    "make adam momentum adafactor _scale_and_decay _scale_layers _descend_by_schedules _frozen_patterns _which_schedule"
    " _lr_tree _wd_tree",
    "test_optim.py test_layerwise.py",
  ),
  "losses": _room(
    "losses.py objectives/losses.py",
    "softmax_xent sigmoid_xent weighted kl logsoftmax_euclidean sparse_logits dense_logits check_mixup mixup",
    "test_losses.py",
  ),
  "distill": _room(
    "objectives/distill.py", "distill reordered teach", "test_distill.py test_losses.py"
  ),
  "self_distill": _room("objectives/self_distill.py", "self_distill", "test_self_distill.py"),
  "supervised": _room(
    "objectives/supervised.py", "supervised", "test_losses.py test_steps.py test_step.py"
  ),
  "loader": _room(
    "data/loader.py",
    "train_batches eval_batches TrainBatches.__next__ TrainBatches.next_ids TrainBatches.get_state"
    " TrainBatches.set_state TrainBatches.close EvalBatches.__len__ EvalBatches.__iter__ _plan _run _pipeline _join"
    " _Noticed.say_totals _count",
    "test_loader.py",
  ),
  "stream": _room(
    "data/stream.py",
    "make_chunk place_of _read _prepare _example room example_cache _stack _template check_limit",
    "test_stream.py test_loader.py",
  ),
  "checkpoint": _room(
    "checkpoint.py running/checkpoint.py",
    "Checkpoints.__init__ Checkpoints.choose Checkpoints.verify Checkpoints.check_room Checkpoints.check"
    " Checkpoints.restore Checkpoints.check_fit Checkpoints.restore_params Checkpoints.delete_from Checkpoints.close"
    " Checkpoints._sweep _ManifestHandler.finalize find read_record",
    "test_checkpoint.py test_manifest.py",
  ),
  "manifest": _room(
    "manifest.py running/manifest.py",
    "file_sums seal _read check_files check_arrays _pieces_of _piece _sum",
    "test_manifest.py",
  ),
  "timm_names": _room(
    "weights/timm_names.py weights/timm/names.py weights/torch_layout.py",
    "convert fold_input _renamed _with_biases _infer _pool _was_flexible _heads _convert _convert_tokens _convert_head",
    "test_timm_names.py timm/test_names.py test_torch_layout.py",
  ),
  "torch_layout": _room(
    "weights/timm_layers.py weights/torch_layout.py",
    "norm_from_torch dense_from_torch _mlp_from_torch _attention_from_torch _attention_to_torch",
    "test_timm_names.py timm/test_names.py test_torch_layout.py",
  ),
  "bake": _room(
    "weights/baking.py weights/bake.py", "bake", "test_baking.py test_bake.py test_artifact.py"
  ),
  "load": _room(
    "weights/reading.py weights/load.py",
    "load_with_record load_into not_finite native_side _check_same _fold_input _say_input _flexify",
    "test_reading.py test_load.py",
  ),
  "big_vision": _room(
    "weights/big_vision.py",
    "from_original _renamed split_position infer_fields without_pre_logits require square",
    "test_big_vision.py test_reading.py test_load.py",
  ),
}
# How many mutations of which rooms.
AREAS: dict[str, tuple[int, tuple[str, ...]]] = {
  "resize": (7, ("resize",)),
  "models": (10, ("flexivit", "vit", "attention")),
  "steps": (6, ("step", "programs")),
  "schedules": (8, ("schedules", "patch_schedule")),
  "optim": (6, ("optim",)),
  "losses": (7, ("losses", "distill", "self_distill", "supervised")),
  "data": (6, ("loader", "stream")),
  "checkpoint": (4, ("checkpoint", "manifest")),
  "weights": (6, ("timm_names", "torch_layout", "bake", "load", "big_vision")),
}
END_TO_END = ("test_train.py", "test_compatibility.py", "test_loop.py", "test_configs.py")


# --- places in the source ---

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SIMPLE = ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return | ast.Expr
SKIPPED = ast.Raise | ast.JoinedStr | ast.Assert | ast.Delete | ast.Import | ast.ImportFrom


class Piece(NamedTuple):
  """A part of a function that can be replaced: as `ast.unparse` writes it, and where it stands in the file."""

  text: str
  node: Any
  is_expression: bool


def scope(tree: ast.Module, name: str) -> ast.AST | None:
  """The function, class or constant of a qualified name, or None."""
  found: ast.AST = tree
  for part in name.split("."):
    inside = (n for n in ast.walk(found) if n is not found and _name(n) == part)
    node = next(inside, None)
    if node is None:
      return None
    found = node
  return found


def _name(node: ast.AST) -> str | None:
  """The name that a statement gives to something."""
  if isinstance(node, FUNCTIONS | ast.ClassDef):
    return node.name
  targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
  first = targets[0] if isinstance(node, ast.Assign | ast.AnnAssign) else None
  return first.id if isinstance(first, ast.Name) else None


def pieces(node: ast.AST) -> Iterator[Piece]:
  """All parts of a function that a mutation may replace: no annotations, docstrings, messages of errors or logs."""
  if isinstance(node, FUNCTIONS | ast.Lambda):
    yield from _defaults(node.args)
    for child in node.body if isinstance(node.body, list) else [node.body]:
      yield from pieces_of(child)
  elif isinstance(node, ast.ClassDef):
    for child in node.body:
      if isinstance(child, ast.AnnAssign):
        yield from pieces_of(child)
  else:
    yield from pieces_of(node)


def _defaults(args: ast.arguments) -> Iterator[Piece]:
  positional = [*args.posonlyargs, *args.args]
  pairs = [*zip(positional[len(positional) - len(args.defaults) :], args.defaults, strict=True)]
  pairs += [(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is not None]
  for arg, default in pairs:
    yield Piece(f"{arg.arg}={ast.unparse(default)}", default, False)


def pieces_of(node: ast.AST) -> Iterator[Piece]:
  """As `pieces`, of a statement or an expression and all that is in it."""
  if isinstance(node, SKIPPED) or _is_message(node):
    return
  if isinstance(node, FUNCTIONS | ast.Lambda | ast.ClassDef):
    yield from pieces(node)
    return
  if isinstance(node, ast.expr | ast.keyword | SIMPLE):
    yield Piece(ast.unparse(node), node, isinstance(node, ast.expr))
  for name, value in ast.iter_fields(node):
    called = isinstance(node, ast.Call) and name == "func" and isinstance(value, ast.Name)
    if name != "annotation" and not called:
      for child in value if isinstance(value, list) else [value]:
        if isinstance(child, ast.AST):
          yield from pieces_of(child)


def _is_message(node: ast.AST) -> bool:
  """Whether it is a docstring, or a call that only says something."""
  if isinstance(node, ast.Expr):
    return isinstance(node.value, ast.Constant)
  called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
  return bool(re.match(r"(errors\.|UserError|_?warn|_LOG|note)", called))


def find(root: pathlib.Path, row: dict[str, str]) -> tuple[pathlib.Path, Piece] | str:
  """The file and piece of a row of the table, or what is wrong."""
  room, found, where = ROOMS[row["room"]], [], []
  for path in (root / "flexivit_jax" / p for p in room.paths):
    node = scope(ast.parse(path.read_text()), row["function"]) if path.is_file() else None
    if node is not None:
      where.append(path)
      found += [(path, piece) for piece in pieces(node) if piece.text == row["old"]]
  if not where:
    return f"{row['mutation']}: no function {row['function']} in {', '.join(room.paths)}"
  if len(found) != 1:
    return (
      f"{row['mutation']}: {row['function']} has {row['old']!r} {len(found)} times, expected once"
    )
  return found[0]


def replaced(source: str, piece: Piece, row: dict[str, str]) -> str:
  """The source with the new fragment of a row in the place of a piece."""
  lines = source.encode().splitlines(keepends=True)
  node = piece.node
  begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
  end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
  new = row["new"]
  if piece.is_expression:
    new = f"({new})"
  elif isinstance(node, ast.expr):  # a default, of which the name stands in the row too
    new = f"({new.partition('=')[2]})"
  whole = source.encode()
  return (whole[:begin] + new.encode() + whole[end:]).decode()


# --- drawing ---

COMPARE: dict[type, type] = {
  ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
  ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
BINARY: dict[type, type] = {
  ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv,
  ast.FloorDiv: ast.Mod, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
}  # fmt: skip
FACTORS = ast.Mult | ast.Div | ast.BitAnd | ast.Pow | ast.BitOr | ast.MatMult
NAMES = {"mean": "sum", "sum": "mean", "max": "min", "min": "max", "minimum": "maximum", "maximum": "minimum",
         "sin": "cos", "cos": "sin", "any": "all", "all": "any", "zeros": "ones", "zeros_like": "ones_like",
         "ones_like": "zeros_like", "log_softmax": "softmax", "get": "pop"}  # fmt: skip
DROPPED = ("astype", "swapaxes", "stop_gradient", "sorted", "reversed", "sqrt", "abs", "ceil", "round", "copy",
           "reshape", "transpose")  # fmt: skip
MODULES = (
  r"np|jnp|xp|math|jax\.\w+"  # whose functions are no methods of what is in front of the dot
)


def mutants(node: Any, known: "Known") -> Iterator[tuple[str, Any]]:
  """The bugs that can be made of one node: (kind, the new node)."""
  if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
    ordered = isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
    kind = "off by one" if ordered else "wrong comparison"
    yield kind, ast.Compare(node.left, [COMPARE[type(node.ops[0])]()], node.comparators)
  elif isinstance(node, ast.BinOp) and not _is_path(node):
    if type(node.op) in BINARY:
      yield "wrong operator", ast.BinOp(node.left, BINARY[type(node.op)](), node.right)
    if isinstance(node.op, ast.Sub | ast.Div | ast.BitOr | ast.MatMult):
      yield "swapped operands", ast.BinOp(node.right, node.op, node.left)
    if isinstance(node.op, FACTORS):
      yield "dropped factor", node.left
    if isinstance(node.op, ast.Add | ast.Sub):
      yield "dropped term", node.left
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
    yield "wrong sign", node.operand
  elif isinstance(node, ast.BoolOp):
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "wrong logic", ast.BoolOp(other, node.values)
    for dropped in range(len(node.values)):
      rest = [v for i, v in enumerate(node.values) if i != dropped]
      yield "dropped condition", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
  elif isinstance(node, ast.IfExp):
    yield "swapped branches", ast.IfExp(node.test, node.orelse, node.body)
  elif isinstance(node, ast.Constant):
    yield from _constants(node, known)
  elif isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.ctx, ast.Load):
    yield "swapped axes", ast.Tuple([node.elts[1], node.elts[0]], node.ctx)
  elif isinstance(node, ast.Attribute) and node.attr == "T":
    yield "missing transposition", node.value
  elif isinstance(node, ast.Slice):
    if node.lower is not None:
      yield "wrong slice", ast.Slice(None, node.upper, node.step)
    if node.lower is not None and node.upper is None:
      yield "wrong slice", ast.Slice(None, node.lower, node.step)
    if node.upper is not None:
      yield "wrong slice", ast.Slice(node.lower, None, node.step)
  elif isinstance(node, ast.AugAssign):
    if type(node.op) in BINARY:
      yield "wrong operator", ast.AugAssign(node.target, BINARY[type(node.op)](), node.value)
    yield "lost accumulation", ast.Assign([node.target], node.value)
  elif isinstance(node, ast.Call):
    yield from _calls(node, known)


def _is_path(node: ast.BinOp) -> bool:
  """Whether a division seems to be one of `pathlib`."""
  text = ast.unparse(node)
  return isinstance(node.op, ast.Div) and re.search(r"folder|path|step\)", text) is not None


def _constants(node: ast.Constant, known: "Known") -> Iterator[tuple[str, Any]]:
  value = node.value
  if isinstance(value, bool):
    yield "wrong default", ast.Constant(not value)
  elif isinstance(value, int):
    yield "off by one", ast.Constant(value + 1)
    if value > 0:
      yield "off by one", ast.Constant(value - 1)
  elif isinstance(value, float):
    yield "wrong constant", ast.Constant(value / 10 if value else 1.0)
    yield "wrong constant", ast.Constant(value * 2 if value else 0.1)
  elif isinstance(value, str):
    for other in known.strings.get(id(node), ()):
      yield "wrong key", ast.Constant(other)


def _calls(node: ast.Call, known: "Known") -> Iterator[tuple[str, Any]]:
  func = node.func
  name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
  if name in NAMES:
    other: Any = ast.Name(NAMES[name])
    if isinstance(func, ast.Attribute):
      other = ast.Attribute(func.value, NAMES[name], func.ctx)
    yield "wrong function", ast.Call(other, node.args, node.keywords)
  if name in DROPPED:
    if isinstance(func, ast.Attribute) and not re.fullmatch(MODULES, ast.unparse(func.value)):
      yield "dropped call", func.value
    elif len(node.args) == 1:
      yield "dropped call", node.args[0]
  for i in range(len(node.keywords)):
    if node.keywords[i].arg:
      rest = [k for j, k in enumerate(node.keywords) if j != i]
      yield "dropped argument", ast.Call(func, node.args, rest)
  for i, (a, b) in enumerate(itertools.pairwise(node.args)):
    kinds = [known.types.get(ast.unparse(x)) for x in (a, b)]
    if kinds[0] is not None and kinds[0] == kinds[1]:
      swapped = [*node.args[:i], b, a, *node.args[i + 2 :]]
      yield "swapped arguments", ast.Call(func, swapped, node.keywords)


class Known(NamedTuple):
  """What makes a bug one that a person could make.

  Attributes:
    strings: of a string's node (by id) the others that play the same part: keys of the same dict, names of a tuple.
    types: of a parameter its annotation, so that only arguments of one type are swapped.
  """

  strings: dict[int, list[str]]
  types: dict[str, str]


def known_of(scope: ast.AST) -> Known:
  """See `Known`."""
  parts: dict[str, list[Any]] = collections.defaultdict(list)
  types: dict[str, str] = {}
  for node in ast.walk(scope):
    if isinstance(node, ast.Subscript):
      parts[f"of {ast.unparse(node.value)}"].append(node.slice)
    elif isinstance(node, ast.Dict):
      parts[f"of {node.lineno} {node.col_offset}"] += node.keys
    elif isinstance(node, ast.Tuple | ast.List):
      parts[f"in {node.lineno} {node.col_offset}"] += node.elts
    elif isinstance(node, ast.keyword):
      parts[f"as {node.arg}"].append(node.value)
    elif isinstance(node, ast.Compare):
      parts[f"is {ast.unparse(node.left)}"] += node.comparators
    elif isinstance(node, ast.arg) and node.annotation is not None:
      types[node.arg] = ast.unparse(node.annotation)
  strings = {}
  for nodes in parts.values():
    texts: list[Any] = [n for n in nodes if isinstance(getattr(n, "value", None), str)]
    for node in texts:
      strings[id(node)] = sorted({n.value for n in texts} - {node.value})
  return Known(strings, types)


def candidates(root: pathlib.Path, room: str, function: str) -> list[dict[str, str]]:
  """All mutations of a function whose fragments stand in it once, without duplicates."""
  for path in (root / "flexivit_jax" / p for p in ROOMS[room].paths):
    node = scope(ast.parse(path.read_text()), function) if path.is_file() else None
    if node is not None:
      break
  else:
    raise SystemExit(f"no function {function} in {ROOMS[room].paths}; correct ROOMS")
  every = list(pieces(node))
  times = collections.Counter(piece.text for piece in every)
  single = [piece for piece in every if times[piece.text] == 1]
  known = known_of(node)
  found: dict[tuple[str, str], dict[str, str]] = {}
  for piece in single:
    # What is in a smaller piece that stands there once is a bug of that one.
    smaller = [p for p in single if p is not piece and _within(p.node, piece.node)]
    for part in _walk(piece):
      if not any(_within(part, p.node) for p in smaller):
        for kind, new in mutants(part, known):
          text = _text(piece, part, new)
          if text is not None and text != piece.text:
            row = {"room": room, "function": function, "kind": kind, "old": piece.text, "new": text}
            found.setdefault((piece.text, text), row)
  return list(found.values())


def _walk(piece: Piece) -> list[ast.AST]:
  allowed = {id(p.node) for p in pieces_of(piece.node)} | {id(piece.node)}
  return [n for n in ast.walk(piece.node) if id(n) in allowed or isinstance(n, ast.Slice)]


def _within(part: Any, whole: Any) -> bool:
  return any(n is part for n in ast.walk(whole))


def _text(piece: Piece, part: ast.AST, new: ast.AST) -> str | None:
  """The text of a piece with one of its parts replaced; None where that is no Python."""
  whole = copy.deepcopy({"piece": piece.node, "part": part})
  changed = _Replace(whole["part"], new).visit(whole["piece"])
  text = ast.unparse(ast.fix_missing_locations(changed))
  if not piece.is_expression and isinstance(piece.node, ast.expr):
    text = f"{piece.text.partition('=')[0]}={text}"
  try:
    ast.parse(f"f({text})" if "=" in text and isinstance(piece.node, ast.keyword) else text)
  except SyntaxError:
    return None
  return text.strip()


class _Replace(ast.NodeTransformer):
  def __init__(self, old: ast.AST, new: ast.AST):
    self.old, self.new = old, new

  def visit(self, node: ast.AST) -> Any:
    return self.new if node is self.old else self.generic_visit(node)


def draw(root: pathlib.Path, rejected: dict[tuple[str, ...], str]) -> list[dict[str, str]]:
  """The table: for each area its number of mutations, and the rejected ones that were drawn before them."""
  rng = random.Random(SEED)
  table: list[dict[str, str]] = []
  for area, (number, rooms) in AREAS.items():
    pool = {(r, f): candidates(root, r, f) for r in rooms for f in ROOMS[r].functions}
    taken: collections.Counter[Any] = collections.Counter()
    # All areas draw equally often, so that a rejection in one changes nothing in the next.
    for _ in range(150):
      row = _drawn(rng, pool, rng.choice(rooms))
      if row is None or taken["all"] == number or any(key(row) == key(other) for other in table):
        continue
      reason = rejected.get(key(row), "")
      of = ((row["room"], row["function"]), row["kind"])
      if any(taken[what] == 2 for what in of):  # two of a function, two of a kind in an area
        continue
      if not reason:
        taken.update(["all", *of])
      name = "" if reason else f"{area}-{taken['all']:02d}"
      table.append({"mutation": name, "area": area, **row, "rejected": reason})
    if taken["all"] < number:
      raise SystemExit(f"{area}: {taken['all']} of {number} drawn; give it more functions")
  return table


def _drawn(
  rng: random.Random, pool: dict[tuple[str, str], Any], room: str
) -> dict[str, str] | None:
  """A bug of a function drawn first, then a kind: a function of many lines or a common kind does not prevail."""
  choices = pool[room, rng.choice(ROOMS[room].functions)]
  kind = rng.choice(sorted({row["kind"] for row in choices}) or [""])
  same = [row for row in choices if row["kind"] == kind]
  at = rng.random()
  return same[int(at * len(same))] if same else None


def key(row: dict[str, str]) -> tuple[str, ...]:
  """What identifies a mutation."""
  return row["room"], row["function"], row["old"], row["new"]


# --- running ---


def run(root: pathlib.Path, rows: list[dict[str, str]], out: pathlib.Path) -> None:
  """Runs the tests on each mutation that `out` does not have yet, and appends what they say.

  All with their room's own tests first, then those that are left with the further ones, which take long.
  """
  done = {row["mutation"] for row in read(out)} if out.is_file() else set()
  if not done:
    write(out, RESULTS, [])
  rows = [row for row in rows if row["mutation"] not in done]
  seconds = dict.fromkeys((row["mutation"] for row in rows), 0.0)
  with tempfile.TemporaryDirectory() as temporary:
    checkout = copied(root, pathlib.Path(temporary))
    for stage in (0, 1):
      left = []
      for row in rows:
        files = tests_of(checkout, row["room"])
        begin = time.monotonic()
        by = failure_with(row, checkout, files[stage])
        seconds[row["mutation"]] += time.monotonic() - begin
        if not by and stage == 0:
          left.append(row)
          continue
        caught = "open" if by.startswith(ENDLESS) else "yes" if by else "no"
        ran = " ".join(path.name for path in itertools.chain(*files[: stage + 1]))
        values = (row["mutation"], caught, by, f"{seconds[row['mutation']]:.0f}", ran)
        with out.open("a", newline="") as file:
          csv.writer(file, lineterminator="\n").writerow(values)
        print(*values[:4], flush=True)
      rows = left


def failure_with(row: dict[str, str], checkout: pathlib.Path, files: list[pathlib.Path]) -> str:
  """The first test that fails with a mutation and not without, or ""."""
  found = find(checkout, row)
  if isinstance(found, str):
    raise SystemExit(found)
  path, piece = found
  source = path.read_text()
  change(path, replaced(source, piece, row))
  by = failure(checkout, files)
  change(path, source)
  test = by.partition("[")[0]
  if test.startswith("tests/") and failure(checkout, [checkout / test]):
    raise SystemExit(f"{row['mutation']}: {test} fails without the mutation too")
  return by


def copied(root: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """A copy of a checkout, with the folder ../shared next to it where there is one."""
  checkout = folder / "checkout"
  skip = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "runs")
  shutil.copytree(root, checkout, ignore=skip, symlinks=True)
  shared = root.resolve().parent / "shared"
  if shared.is_dir():
    (folder / "shared").symlink_to(shared.resolve())
  return checkout


def change(path: pathlib.Path, text: str) -> None:
  """Writes a module; with a time of its own, for Python tells by time and size whether what it compiled is stale."""
  at = path.stat().st_mtime - 10
  path.write_text(text)
  os.utime(path, (at, at))


def tests_of(checkout: pathlib.Path, room: str) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """The files of tests that are run first, and all others that import a module of the room, or train."""
  every = sorted((checkout / "tests").rglob("test_*.py"))
  every = [path for path in every if path.parent.name != "foreign"]  # they need PyTorch
  first = [path for name in ROOMS[room].tests for path in every if path.match(f"**/{name}")]
  modules = {pathlib.PurePath(path) for path in ROOMS[room].paths}
  names = {path.stem for path in modules} | ({path.parent.name for path in modules} & PACKAGES)
  further = [p for p in every if imports(p) & names or p.name in END_TO_END]
  return first, [path for path in further if path not in first]


PACKAGES = {"models", "weights", "objectives"}  # give the names of their modules on


def imports(path: pathlib.Path) -> set[str]:
  """The last names of the modules of ours that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexivit_jax"):
      found |= {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)}
  return found - {"flexivit_jax"}


def failure(checkout: pathlib.Path, files: list[pathlib.Path]) -> str:
  """The first test that fails, or ""."""
  paths = [str(path.relative_to(checkout)) for path in files]
  try:
    done = subprocess.run(
      [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *paths],
      cwd=checkout,
      env=os.environ | {"PYTHONPATH": str(checkout)},
      capture_output=True,
      text=True,
      timeout=TIMEOUT_S,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return f"{ENDLESS} {TIMEOUT_S} s"
  if done.returncode in (0, 5):  # 5: there is no test of the default lane in these files
    return ""
  named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
  return named[1] if named else f"exit code {done.returncode}: {done.stdout[-200:]}"


# --- the table ---


def read(path: pathlib.Path) -> list[dict[str, str]]:
  """The rows of a CSV file."""
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


def write(path: pathlib.Path, fields: tuple[str, ...], rows: list[dict[str, str]]) -> None:
  """Writes a CSV file."""
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def check(root: pathlib.Path) -> list[str]:
  """What is wrong with the table: fragments that are not found exactly once, or whose mutation is no Python."""
  wrong = []
  for row in read(TABLE):
    if row["rejected"]:
      continue
    found = find(root, row)
    if isinstance(found, str):
      wrong.append(found)
      continue
    path, piece = found
    try:
      ast.parse(replaced(path.read_text(), piece, row))
    except SyntaxError as e:
      wrong.append(f"{row['mutation']}: {row['new']!r} is no Python: {e}")
  return wrong


def main() -> None:
  """Runs as the arguments say."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--check", action="store_true", help="only find every fragment")
  parser.add_argument("--draw", action="store_true", help="draw the table from the seed")
  parser.add_argument(
    "--out", type=pathlib.Path, help="CSV file of results, written or gone on with"
  )
  parser.add_argument("--only", default="", help="names of mutations, with commas (default: all)")
  parser.add_argument(
    "--root", type=pathlib.Path, default=ROOT, help="checkout to mutate (this one)"
  )
  args = parser.parse_args()
  if args.draw:
    known = read(TABLE) if TABLE.is_file() else []
    write(TABLE, FIELDS, draw(args.root, {key(row): row["rejected"] for row in known}))
  if wrong := check(args.root):
    sys.exit("\n".join(wrong))
  rows = [row for row in read(TABLE) if not row["rejected"]]
  print(f"{len(rows)} mutations, each found once in {args.root}")
  if args.out is not None:
    only = set(filter(None, args.only.split(",")))
    run(args.root, [r for r in rows if not only or r["mutation"] in only], args.out)


if __name__ == "__main__":
  cli.tool(main)
