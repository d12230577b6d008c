"""Files in big_vision's naming come back bit for bit; others are errors that say what differs."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, vit

pytestmark = pytest.mark.faults

FIELDS = dict(
  num_classes=5, patch_size=(6, 4), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)
ARCHITECTURE = [*FIELDS, "pool_type", "posemb", "scan"]


def make(**fields):
  """Returns (model, its parameters by name), every array random."""
  model = FlexiViT(**{**FIELDS, **fields})
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6, 4, 3)))["params"]
  rng = np.random.default_rng(0)
  random = lambda s: rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return model, trees.flatten(jax.tree.map(random, shapes))


def save(path, flat, prefix="params/", **more):
  file = path / "weights.npz"
  np.savez(file, **{prefix + name: array for name, array in flat.items()}, **more)
  return file


def assert_loads(file, model, flat, **fields):
  got, params = weights.load(file, **fields)
  for field in ARCHITECTURE:
    assert getattr(got, field) == getattr(model, field), field
  params = trees.flatten(params)
  assert params.keys() == flat.keys()
  for name, array in params.items():
    assert isinstance(array, jax.Array) and array.dtype == jnp.float32
    np.testing.assert_array_equal(array, flat[name], err_msg=name)


@pytest.mark.parametrize("prefix", ["params/", ""])
@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
def test_architecture_and_parameters_come_back(tmp_path, pool, prefix):
  model, flat = make(pool_type=pool)
  assert_loads(save(tmp_path, flat, prefix), model, flat)


@pytest.mark.parametrize(
  "fields", [dict(num_classes=0), dict(posemb="sincos2d", posemb_size=(7, 7)), dict(depth=11)]
)
def test_other_architectures_come_back(tmp_path, fields):
  model, flat = make(**fields)  # Of eleven blocks, number 10 sorts before number 2.
  assert_loads(save(tmp_path, flat), model, flat)


def test_an_optimizers_arrays_are_left_out(tmp_path):
  model, flat = make()
  more = {"opt/0/mu/head/bias": np.ones(5), "opt/count": np.int32(3), "chrono/step": np.int64(7)}
  assert_loads(save(tmp_path, flat, **more), model, flat)
  assert_loads(save(tmp_path, flat, "", **more), model, flat)


def test_bfloat16_stored_as_raw_bytes_is_widened(tmp_path):
  model, flat = make()
  narrow = {name: a.astype(ml_dtypes.bfloat16) for name, a in flat.items()}
  file = save(tmp_path, narrow)
  with np.load(file) as archive:
    assert archive["params/head/bias"].dtype == np.dtype("V2")
  assert_loads(file, model, {name: a.astype(np.float32) for name, a in narrow.items()})


@pytest.mark.parametrize("stored_stacked", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_blocks_are_stacked_and_unstacked_as_the_model_wants_them(tmp_path, stored_stacked, scan):
  _, flat = make()
  layout = {True: vit.stack_blocks, False: vit.unstack_blocks}
  params = lambda stacked: trees.flatten(layout[stacked](trees.unflatten(flat)))  # noqa: E731
  model = FlexiViT(**FIELDS, scan=scan)
  assert_loads(save(tmp_path, params(stored_stacked)), model, params(scan), scan=scan)


def test_a_grid_that_is_no_square_needs_its_size(tmp_path):
  model, flat = make(posemb_size=(2, 3))
  file = save(tmp_path, flat)
  with pytest.raises(UserError, match=r"6 cells, which is no square; give posemb_size=\(h, w\)"):
    weights.load(file)
  assert_loads(file, model, flat, posemb_size=(2, 3))


def test_sizes_given_are_those_of_the_file_where_flexify_gives_others(tmp_path):
  _, flat = make(posemb_size=(2, 3))
  given = dict(patch_size=(6, 4), posemb_size=(2, 3))
  model, params = weights.load(save(tmp_path, flat), flexify=((8, 8), (3, 4)), **given)
  assert (model.patch_size, model.posemb_size) == ((8, 8), (3, 4))
  assert (
    params["embedding"]["kernel"].shape[:2] == (8, 8) and params["pos_embedding"].shape[1] == 12
  )


def test_fields_that_arrays_cannot_tell_are_taken_as_given(tmp_path):
  _, flat = make()
  model, _ = weights.load(save(tmp_path, flat), gelu="exact", dtype="bfloat16", dropout=0.1)
  assert (model.gelu, model.dtype, model.dropout) == ("exact", "bfloat16", 0.1)


def test_arrays_that_do_not_fit_are_all_listed_with_the_nearest(tmp_path):
  _, flat = make()
  flat["Transformer/encoderblock_1/LayerNorm_2/scale"] = flat.pop(
    "Transformer/encoderblock_1/LayerNorm_0/scale"
  )
  flat["head/kernel"] = np.zeros((17, 5), np.float32)
  flat["ema"] = np.zeros(3, np.float32)
  with pytest.raises(UserError) as error:
    weights.load(save(tmp_path, flat))
  first, *lines = str(error.value).splitlines()
  assert "weights.npz does not fit the model" in first
  assert [line.strip() for line in lines] == [
    "missing Transformer/encoderblock_1/LayerNorm_0/scale float32[16]. "
    "Did you mean 'Transformer/encoderblock_1/LayerNorm_2/scale'?",
    "extra Transformer/encoderblock_1/LayerNorm_2/scale float32[16]",
    "extra ema float32[3]",
    "head/kernel: expected float32[16,5], got float32[17,5]",
  ]


def test_given_fields_that_contradict_the_arrays_are_errors(tmp_path):
  _, flat = make()
  with pytest.raises(UserError, match=r"head/bias: expected float32\[7\], got float32\[5\]"):
    weights.load(save(tmp_path, flat), num_classes=7)
  with pytest.raises(UserError, match="query/kernel: expected"):
    weights.load(save(tmp_path, flat), num_heads=2)


@pytest.mark.parametrize(
  ("rename", "hint"),
  [
    (("embedding/kernel", "embedding/kernels"), "Did you mean 'embedding/kernel"),
    (("MlpBlock_0", "MlpBlock_3"), "Did you mean 'Transformer/encoderblock_0/MlpBlock_3/Dense_0"),
    (("Transformer", "vit"), "missing Transformer/encoderblock_0/"),
  ],
)
def test_other_models_are_errors(tmp_path, rename, hint):
  _, flat = make()
  flat = {name.replace(*rename): array for name, array in flat.items()}
  with pytest.raises(UserError, match=f"not the parameters of a FlexiViT.*{hint}"):
    weights.load(save(tmp_path, flat))


def test_pickled_objects_are_refused_and_not_run(tmp_path):
  class Bomb:
    def __reduce__(self):
      return (pytest.fail, ("was unpickled",))

  _, flat = make()
  file = save(tmp_path, flat, evil=np.array([Bomb()], dtype=object))
  with pytest.raises(UserError, match=r"weights.npz cannot be read as .npz: Object arrays"):
    weights.load(file)


def _truncated(tmp_path):
  return save(tmp_path, make()[1]).read_bytes()[:-2000]


def _one_array(tmp_path):
  np.save(tmp_path / "array.npy", np.zeros(3))
  return (tmp_path / "array.npy").read_bytes()


@pytest.mark.parametrize(
  "content", [lambda _: b"", lambda _: b"not a zip file", _truncated, _one_array]
)
def test_files_that_are_no_npz_are_errors(tmp_path, content):
  file = tmp_path / "w.npz"
  file.write_bytes(content(tmp_path))
  with pytest.raises(UserError, match=r"w.npz cannot be read as .npz: \S"):
    weights.load(file)


def test_paths_that_are_no_weights_are_errors(tmp_path):
  with pytest.raises(UserError, match=r"none.npz does not exist; expected a run folder"):
    weights.load(tmp_path / "none.npz")
  (tmp_path / "weights.h5").write_bytes(b"")
  with pytest.raises(UserError, match=r"weights.h5: expected a run folder"):
    weights.load(tmp_path / "weights.h5")
  with pytest.raises(UserError, match=re.escape(f"No checkpoint in {tmp_path}")):
    weights.load(tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
def test_the_references_own_files_load(shared, pool):
  model, params = weights.load(shared / "golden" / f"flexivit_{pool}.ckpt.npz")
  patch = (16, 16) if pool == "gap" else (32, 32)
  size = dict(width=64, depth=2, mlp_dim=128, num_heads=4)
  want = FlexiViT(num_classes=10, patch_size=patch, pool_type=pool, **size)
  assert model == want
  assert params["embedding"]["kernel"].shape == (*patch, 3, 64)


def test_a_model_that_resizes_otherwise_than_the_file_is_told(tmp_path):
  stored, flat = make(kernel_operator="cubic_antialias", grid_operator="cubic_antialias")
  file = tmp_path / "weights.npz"
  weights.save_npz(
    file,
    stored,
    trees.unflatten(flat),
    {"model": FIELDS | dict.fromkeys(("kernel_operator", "grid_operator"), "cubic_antialias")},
  )
  notes = {}
  for name, model in (("other", make()[0]), ("same", stored)):
    weights.load_into(
      file, model, accept=lambda _, record, name=name: notes.update({name: record.get("notes")})
    )
  [note] = [n for n in notes["other"] if "resizes with" in n]
  assert (
    "resizes with kernel_operator='cubic_antialias'" in note
    and "this model with kernel_operator='linear'" in note
  )
  assert not [n for n in notes["same"] or () if "resizes with" in n]
