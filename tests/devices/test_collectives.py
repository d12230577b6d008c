"""What compiled steps send over a mesh is what is expected, and nothing else."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from flexivit_jax.devices import collectives, sharding
from flexivit_jax.errors import UserError

SHAPE = dict(
  num_classes=10,
  patch_size=(8, 8),
  posemb_size=(4, 4),
  width=128,
  depth=4,
  mlp_dim=512,
  num_heads=4,
)
PROGRAMS = {"8x1": (8, 1, False), "1x8": (1, 8, True), "2x4": (2, 4, True)}


def compile_programs(path):
  """Writes the collectives of the gradients' and the update's program on each mesh of eight devices."""
  import functools
  import re

  import optax

  from flexivit_jax.devices import compilation
  from flexivit_jax.models import FlexiViT
  from flexivit_jax.objectives import supervised
  from flexivit_jax.training import steps

  found = {}
  for name, (data, fsdp, scan) in PROGRAMS.items():
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    model = FlexiViT(**SHAPE, scan=scan, fsdp=mesh if fsdp > 1 else None)
    tx, objective = optax.adam(1e-3), supervised()

    def init(model=model, tx=tx, objective=objective):
      return steps.init_state(steps.init_params(model, {"image": (32, 32, 3)}, 0), tx, objective)

    shapes = jax.eval_shape(init)
    where = sharding.divided(shapes, mesh)
    state = jax.tree.map(
      lambda x, w: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=w), shapes, where
    )
    batch = {
      "image": np.zeros((16, 32, 32, 3), np.float32),
      "labels": np.zeros((16, 10), np.float32),
    }
    batch, everywhere = sharding.specs(batch, mesh), sharding.replicated(mesh)
    gradients = functools.partial(
      steps.gradients, model=model, objective=objective, seed=0, seqhw=4
    )
    placed = (everywhere, where.params)
    made = jax.jit(gradients, out_shardings=placed).lower(state, batch).compile()
    loss = jax.ShapeDtypeStruct((), np.float32, sharding=everywhere)
    update = functools.partial(steps.update, objective=objective, tx=tx)
    after = compilation.compile_one(
      update, (state, loss, state.params), "", donate=(0,), out_shardings=(where, everywhere)
    )
    first = jax.jit(init, out_shardings=where).lower().compile()
    divided = [
      f"f32[{','.join(map(str, x.shape))}]"
      for x, w in zip(jax.tree.leaves(shapes.params), jax.tree.leaves(where.params), strict=True)
      if sharding.pieces(x, w) > 1 and x.shape[0] == SHAPE["depth"]
    ]
    text, memory = made.as_text(), first.memory_analysis()
    found[name] = {
      "gradients": collectives.collectives(text, mesh.size),
      "update": collectives.collectives(after.run.as_text(), mesh.size),
      "groups": [
        (match[1], collectives.groups(line, mesh.size))
        for line in text.splitlines()
        if (match := re.search(r" (all-gather|reduce-scatter|all-reduce)(?:-start)?\(", line))
      ],
      "whole": [shape for shape in divided if shape in text + first.as_text()],
      "divided": len(divided),
      "held": sharding.bytes_each(state),
      "init": memory.temp_size_in_bytes + memory.output_size_in_bytes,
      "expected": collectives.expected(state.params, mesh),
      "params": sharding.bytes_each(shapes.params),
      "state": sharding.bytes_each(shapes),
    }
  pathlib.Path(path).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def programs(tmp_path_factory, environment_of):
  import subprocess
  import sys

  file = tmp_path_factory.mktemp("programs") / "found.json"
  code = "import runpy, sys; runpy.run_path(sys.argv[1])['compile_programs'](sys.argv[2])"
  # With XLA's optimizations: what is to be seen are its results.
  environment = environment_of(8)
  environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  subprocess.run([sys.executable, "-c", code, __file__, str(file)], env=environment, check=True)
  found = json.loads(file.read_text())
  for one in found.values():
    one["expected"] = collectives.Sent(*one["expected"])
    for program in ("gradients", "update"):
      one[program] = [collectives.Collective(*c) for c in one[program]]
  return found


@pytest.mark.slow
def test_data_parallelism_is_one_sum_of_the_gradients(programs):
  """And of the loss; nothing else is as large as a KiB, in either program."""
  one = programs["8x1"]
  (large,) = [c for c in one["gradients"] if c.bytes > 1024]
  assert (large.kind, large.group, large.times) == ("all-reduce", 8, 1)
  assert large.bytes == one["params"] + 4 == one["expected"].all_reduce + 4
  assert not [c for c in one["update"] if c.bytes > 1024]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1x8", "2x4"])
def test_divided_parameters_are_gathered_twice_and_their_gradients_scattered(programs, name):
  """Of the arrays outside of the blocks XLA's CPU compiler sums the whole gradient and takes a piece of it."""
  one, (data, fsdp, _) = programs[name], PROGRAMS[name]
  expected, sent = one["expected"], collectives.totals(one["gradients"])
  assert sent["all-gather"] == expected.all_gather
  outside = expected.all_gather - 2 * (one["params"] - _outside() - expected.all_reduce)
  blocks = one["params"] - expected.all_reduce - outside
  assert sent["reduce-scatter"] * fsdp == blocks
  # The copies' gradients and the loss; along "data" the pieces of the blocks'; and what lies outside.
  summed = expected.all_reduce + 4 + (blocks // fsdp if data > 1 else 0)
  assert summed <= sent["all-reduce"] <= summed + 2 * outside + 1024
  assert not sent["all-to-all"] and not sent["collective-permute"]
  assert not [c for c in one["update"] if c.bytes > 1024]


@pytest.mark.slow
def test_between_two_slices_only_sums_are_sent(programs):
  """Two slices of four devices are the halves of the eight: parameters are gathered inside of each."""
  found = {kind: set() for kind in ("all-gather", "reduce-scatter", "all-reduce")}
  for kind, groups in programs["2x4"]["groups"]:
    found[kind].add(any(len({device // 4 for device in group}) > 1 for group in groups))
  assert found == {"all-gather": {False}, "reduce-scatter": {False}, "all-reduce": {False, True}}


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a'}", [[0, 1, 2, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 1], [2, 3]]),
    ("{}", [[0, 1, 2, 3]]),
  ],
)
def test_groups_of_devices_are_read_in_each_form_that_xla_prints(text, expected):
  assert collectives.groups(f"all-reduce(x), replica_groups={text}, to_apply=y", 4) == expected


def _outside():
  """Bytes of the divided arrays outside of the blocks: the patch embedding's kernel."""
  return 4 * 8 * 8 * 3 * 128


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1x8", "2x4"])
def test_no_divided_parameter_is_ever_whole_on_a_device(programs, name):
  """Neither all blocks' at once in a step, nor any at the start; what is held falls with the devices."""
  one = programs[name]
  assert one["divided"] == 6 and one["whole"] == []
  copies = (
    3 * one["expected"].all_reduce + 16
  )  # of parameters and two moments; the step's and Adam's counter
  assert one["held"] - copies <= (one["state"] - copies) / PROGRAMS[name][1] + 64
  assert one["init"] < 0.6 * one["state"]


def test_what_is_on_the_wire():
  sent = collectives.Sent(all_reduce=800, all_reduce_data=100, all_gather=80, reduce_scatter=40)
  assert sent.on_the_wire(8, 1) == pytest.approx(2 * 7 / 8 * 800 + 2 * 7 / 8 * 100)
  assert sent.on_the_wire(2, 4) == pytest.approx(2 * 7 / 8 * 800 + 100 + 3 / 4 * 120)
  assert sent.on_the_wire(1, 1) == 0


HLO = """
HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[16,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}
%cond (p: (s32[], f32[8])) -> pred[] {
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[2]{0}, f32[]) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %one = f32[5]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_collectives_are_read_from_a_program():
  gather, reduce = collectives.collectives(HLO, 8)
  assert gather == collectives.Collective("all-gather", 128, 4, 3, ("bf16[16,4]",))
  assert reduce == collectives.Collective("all-reduce", 12, 8, 1, ("f32[2]", "f32[]"))
  assert collectives.totals([gather, reduce]) == {"all-gather": 384, "all-reduce": 12}


def test_rules_of_division():
  mesh = sharding.abstract_mesh(8, fsdp=4)
  assert (mesh.axis_names, mesh.axis_sizes) == (("data", "fsdp0", "fsdp1"), (2, 2, 2))
  assert sharding.abstract_mesh(6, fsdp=3).axis_names == ("data", "fsdp")
  shapes = {
    "head": {"kernel": (64, 1000), "bias": (1000,)},
    "blocks": {"encoderblock": {"out": {"kernel": (12, 4, 32, 128)}, "odd": (12, 127, 129)}},
    "square": (128, 128),
    "two axes": (130, 6, 90),
    "half": (131, 90),
  }
  tree = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
  )
  specs = jax.tree.map(lambda s: tuple(s.spec), sharding.divided(tree, mesh))
  fsdp = ("fsdp0", "fsdp1")
  assert specs["head"] == {"kernel": (None, fsdp), "bias": ()}
  assert specs["blocks"]["encoderblock"]["out"]["kernel"] == (None, None, None, fsdp)
  assert not any(specs["blocks"]["encoderblock"]["odd"]) and specs["square"] == (None, fsdp)
  assert specs["two axes"] == ("fsdp0", None, "fsdp1") and specs["half"] == (None, "fsdp0")
  assert not any(
    jax.tree.leaves(sharding.divided(tree, sharding.abstract_mesh(8)), is_leaf=None)[0].spec
  )


@pytest.mark.parametrize("devices", [8, 12, 256, 360])
def test_every_factor_that_an_axis_has_divides_an_array(devices):
  """Pieces are as many as there can be, and along one axis wherever one suffices."""
  mesh, rng = sharding.abstract_mesh(devices, fsdp=devices), np.random.default_rng(0)
  for _ in range(100):
    shape = (32, *(int(n) for n in rng.integers(16, 800, size=2)))
    where = sharding.divided({"a": jax.ShapeDtypeStruct(shape, np.float32)}, mesh)["a"]
    pieces = sharding.pieces(jax.ShapeDtypeStruct(shape, np.float32), where)
    assert pieces == math.gcd(math.prod(shape), devices)
    if any(n % devices == 0 for n in shape):
      assert sum(names is not None for names in where.spec) == 1


def test_a_mesh_that_does_not_fit_the_devices_is_an_error():
  for section in ({"fsdp": 3}, {"data": 4, "fsdp": 4}, {"data": 0}, {"fsdp": 0}):
    with pytest.raises(UserError, match=r"does not fit 8 devices: their product must be that"):
      sharding.mesh_shape(8, **section)
