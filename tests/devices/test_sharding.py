"""Training on eight devices is training on one, and stores what it should for the backward pass."""

import contextlib
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, attention, vit
from flexivit_jax.objectives.supervised import supervised
from flexivit_jax.training import steps


def train_and_evaluate(path: str) -> None:
  """Writes the parameters after one step, and an evaluation's row, on all devices there are."""
  import optax

  from flexivit_jax.devices import compilation
  from flexivit_jax.evaluators.classification import classification
  from flexivit_jax.models import FlexiViT
  from flexivit_jax.objectives import supervised
  from flexivit_jax.training import steps

  model = FlexiViT(
    num_classes=3, patch_size=(6, 6), posemb_size=(2, 2), width=16, depth=1, mlp_dim=16,
    num_heads=2, head_zeroinit=False, pool_type="gap",
  )  # fmt: skip
  rng, mesh = np.random.default_rng(0), sharding.make_mesh()
  labels = np.eye(3, dtype=np.float32)[rng.integers(3, size=16)]
  image = rng.uniform(-1, 1, size=(16, 12, 12, 3)).astype(np.float32)
  batch = {"image": image, "labels": labels}
  tx = optax.sgd(0.5)
  params = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=0))()
  state = jax.device_put(
    steps.TrainState(np.int32(0), params, tx.init(params)), sharding.replicated(mesh)
  )
  step = functools.partial(
    steps.step, model=model, objective=supervised(mixup_p=0.5), tx=tx, seed=0, accumulate=2
  )
  specs = sharding.specs(batch, mesh)
  programs = compilation.compile_each(step, (state, specs), [{"seqhw": 4}], donate=(0,))
  (program,) = programs.values()
  on_devices = sharding.put_batch(batch, mesh)
  assert len(on_devices["image"].addressable_shards) == jax.device_count()
  state, _ = program.run(state, on_devices)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))

  test = [batch | {"_mask": (np.arange(16) < 13).astype(np.float32)}]
  rows = classification(model, test, mesh, seqhw=[2]).run(state.params)
  np.savez(path, *jax.tree.leaves(state.params), row=json.dumps(rows[0]), n=jax.device_count())


def test_eight_devices_make_the_same_step_and_evaluation_as_one(tmp_path, on_eight_devices):
  on_eight_devices(train_and_evaluate, str(tmp_path / "eight.npz"))
  train_and_evaluate(str(tmp_path / "one.npz"))
  with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "eight.npz") as eight:
    assert (int(one["n"]), int(eight["n"])) == (1, 8)
    for name in one.files:
      if name.startswith("arr_"):
        np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=1e-6)
    a, b = (json.loads(str(arrays["row"])) for arrays in (one, eight))
  assert (a["n"], a["top1"], a["top5"]) == (b["n"], b["top1"], b["top5"]) and a["n"] == 13
  np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)


def test_a_batch_that_does_not_divide_over_the_devices_is_an_error():
  mesh = jax.sharding.Mesh(np.array(jax.devices() * 8), ("data",))
  sharding.check_divides(16, mesh)
  with pytest.raises(UserError, match=r"batch_size=12 must be a multiple of .* devices, 8"):
    sharding.check_divides(12, mesh)


def test_specs_are_those_of_the_arrays_that_are_put():
  mesh = sharding.make_mesh()
  batch = {"image": np.zeros((4, 2, 2, 3), np.float32), "_id": np.arange(4)}
  specs, arrays = sharding.specs(batch, mesh), sharding.put_batch(batch, mesh)
  for name, array in arrays.items():
    spec = specs[name]
    assert (spec.shape, spec.dtype, spec.sharding) == (array.shape, array.dtype, array.sharding)
    np.testing.assert_array_equal(array, batch[name])


def teach(path: str) -> None:
  """Writes what a teacher says whose parameters are copies, and divided along "fsdp"; and what lies on each device."""
  from flexivit_jax import experiment
  from flexivit_jax.experiment import preparation

  data = {
    "name": "synthetic",
    "image_size": 12,
    "num_classes": 3,
    "num_examples": 16,
    "split": "train",
  }
  teacher = {
    "variant": "mu",
    "width": 64,
    "num_classes": 3,
    "patch_size": (4, 4),
    "posemb_size": (3, 3),
  }
  small = {"variant": "mu", "patch_size": (4, 4), "posemb_size": (3, 3)}
  found, bytes_each = {}, []
  for i, divide in enumerate((True, False)):
    exp = experiment.from_config(
      {
        "total_steps": 1,
        "input": {
          "data": data,
          "pp": "decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
          "batch_size": 16,
        },
        "model": small,
        "optim": {"lr": 1e-3},
        "flexi": {"seqhw": {"v": (2, 3)}},
        "objective": {"name": "distill", "teachers": {"big": {"model": teacher, "seqhw": 3}}},
        "mesh": {"data": 2, "fsdp": 4, "divide_teachers": divide},
      }
    )
    exp, mesh = preparation.place(exp)
    taught = preparation.teacher_logits(
      exp, 0, mesh, contextlib.ExitStack(), microbatches=[1], memory=float("inf")
    )
    image = np.random.default_rng(0).normal(size=(16, 12, 12, 3)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[np.arange(16) % 3]
    said = taught(0, {"image": image, "labels": labels}, jax.numpy.int32(0))
    found |= {f"{i}/{n}": a for n, a in enumerate(jax.tree.leaves(said))}
    bytes_each.append(sharding.bytes_each(taught._frozen))
  np.savez(path, bytes_each=bytes_each, **found)


@pytest.mark.full
def test_a_teacher_may_be_divided_otherwise_than_the_student(tmp_path, on_eight_devices):
  on_eight_devices(teach, str(tmp_path / "taught.npz"))
  with np.load(tmp_path / "taught.npz") as found:
    divided, copies = (found[f"{i}/0"] for i in (0, 1))
    np.testing.assert_allclose(divided, copies, rtol=1e-5, atol=1e-6)
    assert np.abs(copies).max() > 0.1
    assert found["bytes_each"][0] < 0.75 * found["bytes_each"][1]


# --- a kernel, which XLA cannot divide ---


def gradients_of_every_mesh(path: str) -> None:
  """Writes by how much gradients with the kernel, of meshes of eight devices, differ from the formula's on one."""
  attention.FORMS["splash"] = functools.partial(attention.splash, interpret=True)
  fields = dict(
    num_classes=3, patch_size=(4, 4), width=128, depth=1, mlp_dim=128, num_heads=2,
    head_zeroinit=False,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(16, 12, 12, 3)).astype(np.float32),
    "labels": np.eye(3, dtype=np.float32)[np.arange(16) % 3],
  }
  shapes = {"image": (12, 12, 3)}
  params = jax.jit(lambda: steps.init_params(FlexiViT(**fields), shapes, seed=0))()
  state = steps.TrainState(jnp.int32(0), params, None)
  step = functools.partial(steps.gradients, objective=supervised(), seed=0, seqhw=3)

  def on_mesh(fsdp, clip_each, accumulate):
    # Made for TPUs, whose kernel runs here step by step.
    model = FlexiViT(**fields, attention="splash:tpu")
    mesh = sharding.make_mesh(fsdp=fsdp)
    if fsdp > 1:
      model = model.clone(fsdp=mesh)
    placed = jax.device_put(state, sharding.divided(state, mesh))
    put = sharding.put_batch(batch, mesh)
    run = functools.partial(step, model=model, clip_each=clip_each, accumulate=accumulate)
    return jax.jit(run)(placed, put)[1]

  found = {}
  for name, arguments in {
    "data": (1, None, 2),
    "fsdp": (4, None, 1),
    "each": (1, 0.5, 1),
    "each, fsdp": (4, 0.5, 1),
  }.items():
    _, clip_each, accumulate = arguments
    model = FlexiViT(**fields, attention="einsum")
    run = functools.partial(step, model=model, clip_each=clip_each, accumulate=accumulate)
    want, got = jax.jit(run)(state, batch)[1], on_mesh(*arguments)
    differ = jax.tree.map(
      lambda a, b: float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()), got, want
    )
    found[name] = max(jax.tree.leaves(differ))
  with open(path, "w") as file:
    json.dump(found, file)


@pytest.mark.full
def test_a_kernel_runs_on_every_mesh(tmp_path, on_eight_devices):
  on_eight_devices(gradients_of_every_mesh, str(tmp_path / "found.json"))
  found = json.loads((tmp_path / "found.json").read_text())
  assert found.keys() == {"data", "fsdp", "each", "each, fsdp"}
  assert max(found.values()) < 1e-5


def lowered(mesh, platform, form, clip_each, seqhw, dtype="float32"):
  """The gradients of a step on a mesh, as StableHLO for a platform; three examples a device of four."""
  fsdp = mesh if sharding.lengths(mesh)[1] > 1 else None
  model = FlexiViT(
    num_classes=3, patch_size=(2, 2), width=128, depth=1, mlp_dim=128, num_heads=2, dtype=dtype,
    attention=form, fsdp=fsdp,
  )  # fmt: skip
  shapes = {"image": (2 * seqhw, 2 * seqhw, 3)}
  params = jax.eval_shape(lambda: steps.init_params(model, shapes, seed=0))

  def placed(leaf, where):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  state = steps.TrainState(
    placed(jax.ShapeDtypeStruct((), jnp.int32), sharding.replicated(mesh)),
    jax.tree.map(placed, params, sharding.divided(params, mesh)),
    None,
  )
  n = 3 * mesh.size
  batch = {
    name: placed(jax.ShapeDtypeStruct((n, *shape), jnp.float32), sharding.batch_split(mesh))
    for name, shape in (shapes | {"labels": (3,)}).items()
  }
  run = functools.partial(
    steps.gradients, model=model, objective=supervised(), seed=0, seqhw=seqhw, clip_each=clip_each
  )
  return jax.jit(run).trace(state, batch).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("fsdp", "clip_each"), [(1, None), (2, None), (1, 1.0)])
def test_a_step_with_a_kernel_is_lowered_for_a_mesh_of_tpus(fsdp, clip_each):
  """Of a kernel that sees more than its device's examples, lowering or the text would tell."""
  text = lowered(sharding.abstract_mesh(4, fsdp=fsdp), "tpu", "splash:tpu", clip_each, 4)
  results = re.findall(r"@tpu_custom_call\(.*-> .*?tensor<((?:\d+x)+)128x64xf32>", text)
  assert results and {r.split("x")[0] for r in results} == {"3"}
  # Once forwards: where parameters are divided, the rest of a block is computed again, what the kernel says is kept.
  assert len(re.findall(r'kernel_name = "splash_mha_fwd', text)) == 1


def lowered_for_gpus(path: str) -> None:
  """Writes the shapes of what cuDNN's calls return, on meshes of the devices there are."""
  from jax._src.cudnn import fused_attention_stablehlo

  fused_attention_stablehlo.check_cudnn_version = lambda: 91000  # none is installed here
  found = []
  for fsdp, clip_each in ((1, None), (2, None), (1, 1.0)):
    text = lowered(sharding.make_mesh(fsdp=fsdp), "cuda", "auto:gpu", clip_each, 10, "bfloat16")
    assert "CustomSPMDPartitioning" not in text
    found.append(re.findall(r"custom_call @__cudnn.*-> \(tensor<(\S+)>,", text))
  with open(path, "w") as file:
    json.dump(found, file)


@pytest.mark.full
def test_a_step_with_a_kernel_is_lowered_for_meshes_of_gpus(tmp_path, on_eight_devices):
  on_eight_devices(lowered_for_gpus, str(tmp_path / "found.json"))
  shapes = json.loads((tmp_path / "found.json").read_text())
  assert shapes == [["3x2x102x64xbf16"] * 2] * 3


# --- what is stored for the backward pass ---


def _residuals(fn, params, x):
  """Shapes of all arrays that the forward pass stores for the backward pass, traced only."""
  backward = jax.eval_shape(lambda params, x: jax.vjp(fn, params, x)[1], params, x)
  return [leaf.shape for leaf in jax.tree.leaves(backward)]


@pytest.mark.parametrize("form", ["einsum", "heads_first", "one_by_one"])
def test_a_divided_block_stores_its_activations_and_no_gathered_weight(form, monkeypatch):
  """The policy tells activations from weights by shape, and a wrong guess changes no number, only the memory."""
  block = vit.EncoderBlock(vit.BlockConfig(mlp_dim=256, num_heads=4, attention=form))
  x = jax.ShapeDtypeStruct((8, 10, 128), jnp.float32)
  params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
  whole = {leaf.shape for leaf in jax.tree.leaves(params)}
  apply = lambda params, x: block.apply({"params": params}, x)[0]  # noqa: E731
  divided = sharding.over_divided(apply, sharding.abstract_mesh(4, fsdp=2))

  def activations(shapes):
    return sum(len(shape) > 1 and shape[0] % 8 == 0 and 10 in shape for shape in shapes)

  stored = _residuals(divided, params, x)
  plain = _residuals(apply, params, x)
  # Of a division over devices each stores its piece: a gathered weight would be counted once a device.
  assert [s for s in stored if not (activations([s]) or s in whole or s == (8, 10))] == []
  assert abs(activations(stored) - activations(plain)) <= 1
  assert activations(stored) > 20

  kept = {}
  for name, remat in vit.REMAT.items():
    again = sharding.over_divided(apply, sharding.abstract_mesh(4, fsdp=2), remat)
    kept[name] = activations(_residuals(again, params, x))
  # The block's input; and the results of six products, but the MLP's second, which nothing needs.
  assert kept == {"blocks": 1, "dots": 6}

  monkeypatch.setattr(sharding, "_of_tokens", lambda *_, **__: False)
  assert activations(_residuals(divided, params, x)) == 1  # the block's input
  monkeypatch.setattr(sharding, "_of_tokens", lambda *_, **__: True)
  assert (4 * 128, 256) in _residuals(divided, params, x)


class Chip:
  platform = "tpu"

  def __init__(self, id: int, process_index: int, slice_index: int):
    self.id, self.process_index, self.slice_index = id, process_index, slice_index


@pytest.mark.parametrize(("fsdp", "fits"), [(1, True), (2, True), (8, True), (16, False)])
def test_parameters_are_divided_inside_of_a_slice_only(monkeypatch, fsdp, fits):
  """Two slices of two hosts of four chips; they lie along "data", whatever the order in which JAX lists them."""
  chips = [Chip(i, i // 4, i // 8) for i in range(16)]
  monkeypatch.setattr(jax, "devices", lambda: chips[::-1])
  if not fits:
    with pytest.raises(UserError, match=r"2 slices of 8 devices.*divides 8"):
      sharding.make_mesh(fsdp=fsdp)
    return
  mesh = sharding.make_mesh(fsdp=fsdp)
  for row in mesh.devices.reshape(sharding.lengths(mesh)):
    assert len({chip.slice_index for chip in row}) == 1


def test_hosts_of_gpus_are_no_slices():
  chip = Chip(0, 0, 3)
  assert sharding.slice_of(chip) == 3
  chip.platform = "gpu"
  assert sharding.slice_of(chip) == 0
  assert sharding.slice_of(jax.devices()[0]) == 0


GATHERING = dict(
  num_classes=3, patch_size=(6, 6), posemb_size=(2, 2), width=128, depth=2, mlp_dim=256, num_heads=2,
  head_zeroinit=False, dtype="bfloat16", scan=True, attention="einsum",
)  # fmt: skip


def test_blocks_send_their_parameters_in_the_dtype_that_the_mesh_says():
  from flexivit_jax.models import FlexiViT

  mesh = sharding.abstract_mesh(4, fsdp=4)
  spec = jax.ShapeDtypeStruct((8, 12, 12, 3), jnp.float32, sharding=sharding.batch_split(mesh))
  for dtype, sent in (("float32", "f32"), ("bfloat16", "bf16")):
    model = FlexiViT(**GATHERING, fsdp=mesh, gather_dtype=dtype)
    params = jax.eval_shape(model.init, jax.random.key(0), spec)["params"]
    placed = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      params,
      sharding.divided(params, mesh),
    )
    loss = lambda p, x, model=model: model.apply({"params": p}, x, seqhw=4)[0].sum()  # noqa: E731
    text = jax.jit(jax.grad(loss)).trace(placed, spec).lower(lowering_platforms=("tpu",)).as_text()
    gathered = re.findall(r"all_gather.*-> tensor<[^>]*x(\w+)>", text)
    scattered = re.findall(r"reduce_scatter.*?-> tensor<[^>]*x(\w+)>", text, re.DOTALL)
    assert len(gathered) == 12 and {*gathered} == {sent}  # six products, forwards and backwards
    assert len(scattered) == 6 and {*scattered} == {"f32"}
  with pytest.raises(UserError, match=r"gather_dtype='bfloat16' with model\.dtype='float32'"):
    model.clone(dtype="float32")


def gradients_of_odd_widths(path: str) -> None:
  """Writes gradients on one device, and on eight along "fsdp", where no axis of a block is a multiple of eight."""
  from flexivit_jax.models import FlexiViT

  # Query, key, value [132, 2, 66] are in 4 x 2 pieces; the MLP's [132, 131] in four, of which there are two copies.
  fields = GATHERING | dict(width=132, mlp_dim=131, dtype="float32")
  image = np.random.default_rng(0).uniform(-1, 1, size=(8, 12, 12, 3)).astype(np.float32)
  params = jax.jit(FlexiViT(**fields).init)(jax.random.key(0), image)["params"]
  mesh, found = sharding.make_mesh(fsdp=8), {}
  variants = {
    "one": {},
    "eight": {"fsdp": mesh},
    "by XLA": {"fsdp": mesh, "dropout": 1e-9},  # draws masks, which drop nothing here
    "float32": {"fsdp": mesh, "dtype": "bfloat16"},
    "bfloat16": {"fsdp": mesh, "dtype": "bfloat16", "gather_dtype": "bfloat16"},
  }
  for name, others in variants.items():
    model = FlexiViT(**fields | others)
    placed, batch = params, image
    if "fsdp" in others:
      placed = jax.device_put(params, sharding.divided(params, mesh))
      batch = sharding.put_batch(image, mesh)

    def loss(p, x, model=model):
      rngs = {"dropout": jax.random.key(1)}
      return (model.apply({"params": p}, x, seqhw=4, train=True, rngs=rngs)[0] ** 2).mean()

    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(placed, batch))
    found[name] = np.concatenate([np.ravel(leaf) for leaf in leaves])
  pieces = sorted(
    {sharding.pieces(x, w)
     for x, w in zip(*map(jax.tree.leaves, (params, sharding.divided(params, mesh))), strict=True)}
  )  # fmt: skip
  np.savez(path, pieces=pieces, **found)


@pytest.mark.full
def test_arrays_that_no_axis_divides_are_divided_along_two(tmp_path, on_eight_devices):
  on_eight_devices(gradients_of_odd_widths, str(tmp_path / "found.npz"))
  with np.load(tmp_path / "found.npz") as found:
    assert found["pieces"].tolist() == [1, 4, 8]
    norm = np.linalg.norm(found["one"])
    assert norm > 0
    for name in ("eight", "by XLA"):
      assert np.linalg.norm(found[name] - found["one"]) < 2e-6 * norm, name
    np.testing.assert_array_equal(found["float32"], found["bfloat16"])


def s_on_256_devices(path: str) -> None:
  """Writes what the gradients of S send in their program for 256 devices along "fsdp", and its memory."""
  from flexivit_jax.devices import collectives
  from flexivit_jax.models import FlexiViT

  mesh = sharding.make_mesh(fsdp=256)
  model = FlexiViT(num_classes=1000, variant="S", scan="by_block", attention="einsum", fsdp=mesh)
  shapes = {"image": (48, 48, 3)}
  params = jax.eval_shape(lambda: steps.init_params(model, shapes, seed=0))
  where = sharding.divided(params, mesh)
  everywhere, split = sharding.replicated(mesh), sharding.batch_split(mesh)

  def placed(leaf, where):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  step = placed(jax.ShapeDtypeStruct((), jnp.int32), everywhere)
  batch = {
    name: placed(jax.ShapeDtypeStruct((256, *shape), jnp.float32), split)
    for name, shape in (shapes | {"labels": (1000,)}).items()
  }
  run = functools.partial(steps.gradients, model=model, objective=supervised(), seed=0, seqhw=3)
  state = steps.TrainState(step, jax.tree.map(placed, params, where), None)
  compiled = jax.jit(run, out_shardings=(everywhere, where)).lower(state, batch).compile()
  found = {
    "gathered": [
      c.shapes[0]
      for c in collectives.collectives(compiled.as_text(), 256)
      if c.kind == "all-gather" and c.times == 12
    ],
    "results": compiled.memory_analysis().output_size_in_bytes,
    "params": sharding.bytes_each(params),
  }
  with open(path, "w") as file:
    json.dump(found, file)


@pytest.mark.slow
def test_s_is_compiled_for_256_devices(tmp_path, environment_of):
  """Not run. Its gradients are 0.6 MiB a device: all arrays of its blocks are divided by 256."""
  import subprocess
  import sys

  path = tmp_path / "found.json"
  code = "import runpy, sys; runpy.run_path(sys.argv[1])['s_on_256_devices'](sys.argv[2])"
  command = [sys.executable, "-c", code, __file__, str(path)]
  subprocess.run(command, env=environment_of(256), check=True)
  found = json.loads(path.read_text())
  assert found["results"] < 0.6 * 2**20 < found["params"] / 140
  # Of each block, in the one loop of the forward and of the backward pass: the whole, and of four a half before.
  for whole, number in (("384,1536", 2), ("1536,384", 2), ("384,6,64", 6), ("6,64,384", 2)):
    assert sum(f"f32[{whole}]" == shape for shape in found["gathered"]) == number, found["gathered"]


def gradients_by_gather_dtype(path: str) -> None:
  """Writes the gradients of a model whose blocks send their parameters in float32 and in bfloat16."""
  from flexivit_jax.models import FlexiViT

  mesh, found = sharding.make_mesh(data=2, fsdp=4), {}
  image = np.random.default_rng(0).uniform(-1, 1, size=(8, 12, 12, 3)).astype(np.float32)
  for dtype in ("float32", "bfloat16"):
    model = FlexiViT(**GATHERING, fsdp=mesh, gather_dtype=dtype)
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    placed = jax.device_put(params, sharding.divided(params, mesh))
    loss = lambda p, x, model=model: (model.apply({"params": p}, x, seqhw=4)[0] ** 2).mean()  # noqa: E731
    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(placed, sharding.put_batch(image, mesh)))
    found[dtype] = np.concatenate([np.ravel(leaf) for leaf in leaves])
  np.savez(path, **found)


@pytest.mark.full
def test_parameters_sent_in_bfloat16_give_the_same_bits(tmp_path, on_eight_devices):
  on_eight_devices(gradients_by_gather_dtype, str(tmp_path / "found.npz"))
  with np.load(tmp_path / "found.npz") as found:
    assert np.abs(found["float32"]).max() > 0
    np.testing.assert_array_equal(found["float32"], found["bfloat16"])


def gradients_with_masks(argument: str) -> None:
  """Writes the gradients of a model with dropout and stochastic depth on each mesh of all devices.

  The argument is JSON: [path of the result, meshes, fields of the model].
  """
  from flexivit_jax.models import FlexiViT

  path, meshes, fields = json.loads(argument)
  model = FlexiViT(
    num_classes=3, patch_size=(6, 6), posemb_size=(2, 2), width=128, depth=2, mlp_dim=256, num_heads=2,
    head_zeroinit=False, dropout=0.2, stochastic_depth=0.3, **fields,
  )  # fmt: skip
  image = np.random.default_rng(0).uniform(-1, 1, size=(8, 12, 12, 3)).astype(np.float32)
  params = jax.jit(model.init)(jax.random.key(0), image)["params"]
  found = {}
  for axes in meshes:
    mesh = sharding.make_mesh(**axes)
    placed = jax.device_put(params, sharding.divided(params, mesh))
    own = model.clone(fsdp=mesh if sharding.lengths(mesh)[1] > 1 else None)

    def loss(p, x, own=own):
      rngs = {"dropout": jax.random.key(1)}
      return (own.apply({"params": p}, x, seqhw=4, train=True, rngs=rngs)[0] ** 2).mean()

    compiled = jax.jit(jax.grad(loss)).lower(placed, sharding.put_batch(image, mesh)).compile()
    leaves = jax.tree.leaves(compiled(placed, sharding.put_batch(image, mesh)))
    found |= {f"{len(found)}": np.concatenate([np.ravel(leaf) for leaf in leaves])}
  np.savez(path, **found)


@pytest.mark.full
@pytest.mark.parametrize(
  ("fields", "meshes"),
  [
    ({}, [dict(data=8), dict(data=2, fsdp=4)]),
    (dict(scan="by_block", remat="dots"), [dict(data=1, fsdp=8)]),
  ],
)
def test_masks_are_the_same_on_every_mesh(tmp_path, on_eight_devices, fields, meshes):
  on_eight_devices(gradients_with_masks, json.dumps([str(tmp_path / "eight.npz"), meshes, fields]))
  gradients_with_masks(json.dumps([str(tmp_path / "one.npz"), [{}], fields]))
  with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "eight.npz") as eight:
    want = one["0"]
    for mesh, axes in enumerate(meshes):
      difference = np.linalg.norm(eight[f"{mesh}"] - want) / np.linalg.norm(want)
      assert difference < 5e-6, (axes, difference)  # by other masks it is of the size of 1
