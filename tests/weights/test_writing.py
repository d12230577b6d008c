"""What is written comes back, with the record, and big_vision's loader finds what it looks for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import npz

FIELDS = dict(
  num_classes=5, patch_size=(6, 4), posemb_size=(2, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)


def made(**fields):
  model = FlexiViT(**FIELDS, gelu="exact", kernel_operator="cubic_antialias", **fields)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 6, 4, 3)))["params"]
  return model, params


@pytest.mark.parametrize("scan", [False, True])
def test_model_parameters_and_record_come_back(tmp_path, scan):
  model, params = made(scan=scan)
  record = {"class_names": ["a", "b"], "model": {**FIELDS, "gelu": "exact"}}
  record["model"]["kernel_operator"] = "cubic_antialias"
  weights.save_npz(tmp_path / "out" / "w.npz", model, params, record)
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["w.npz"]
  got, back, again = weights.load_with_record(tmp_path / "out" / "w.npz", scan=scan)
  assert got == model  # The arrays alone could tell neither the grid nor the GELU.
  assert again["class_names"] == ["a", "b"]
  for name, array in trees.flatten(back).items():
    np.testing.assert_array_equal(array, trees.flatten(params)[name])


def test_the_second_moment_of_patches_comes_back(tmp_path):
  moment = tuple(0.9**k for k in range(6))
  model, params = made(kernel_moment=moment)
  record = {"model": FIELDS | {"kernel_moment": list(moment)}}
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  assert weights.load(tmp_path / "w.npz")[0].kernel_moment == moment


def test_big_vision_finds_its_parameters_and_nothing_else_among_them(tmp_path):
  model, params = made()
  weights.save_npz(tmp_path / "w.npz", model, params, {"model": FIELDS})
  with np.load(tmp_path / "w.npz", allow_pickle=False) as archive:
    arrays = dict(archive)
  # Its loader takes arrays of raw bytes for bfloat16, and of the first parts of the names only "params".
  assert all(array.dtype.kind in "fu" for array in arrays.values())
  assert {name.split("/")[0] for name in arrays} == {"params", npz.RECORD}
  assert {n.removeprefix("params/") for n in arrays if "/" in n} == trees.flatten(params).keys()


def test_nothing_is_overwritten_and_no_other_format_is_guessed(tmp_path):
  model, params = made()
  weights.save_npz(tmp_path / "w.npz", model, params, {"model": FIELDS})
  with pytest.raises(UserError, match="is there already"):
    weights.save_npz(tmp_path / "w.npz", model, params, {"model": FIELDS})
  with pytest.raises(UserError, match=r"only \.npz can be written"):
    weights.save_npz(tmp_path / "w.onnx", model, params, {"model": FIELDS})


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"model": {"widht": 3}}, "Did you mean 'width'"),
    ([1], "holds no JSON object"),
    ({"model": [1]}, "does not say what model"),
    ({"model": {**FIELDS, "width": "x"}}, "width='x'; expected int"),
    ({"model": {**FIELDS, "width": 32}}, r"expected float32\[32\], got float32\[16\]"),
  ],
)
def test_a_record_that_does_not_describe_the_arrays_is_an_error(tmp_path, record, message):
  _, params = made()
  arrays = {f"params/{n}": np.asarray(a) for n, a in trees.flatten(params).items()}
  np.savez(
    tmp_path / "w.npz",
    **arrays,
    **{npz.RECORD: np.frombuffer(json.dumps(record).encode(), np.uint8)},
  )
  with pytest.raises(UserError, match=message):
    weights.load(tmp_path / "w.npz")
