"""ONNX exports in onnxruntime: the model's logits, weights once, and nothing is left of what went wrong."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import cli, errors, trees, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import certificate
from flexivit_jax.weights.export import comparison, onnx as onnx_folder

FIELDS = dict(num_classes=5, patch_size=(6, 6), posemb_size=(3, 3), layer_norm_eps=1e-3)
FIELDS |= dict(width=16, depth=2, mlp_dim=24, num_heads=4)
VARIATIONS = {
  "tok": {},
  "tok, quick, pre_norm": dict(gelu="quick", pre_norm=True),
  "tok, sincos2d, exact, registers": dict(posemb="sincos2d", gelu="exact", registers=4),
  "gap, exact": dict(pool_type="gap", gelu="exact"),
  "gap, sincos2d, registers, scan": dict(
    pool_type="gap", posemb="sincos2d", registers=3, scan=True
  ),
  "map, quick, scan, remat": dict(pool_type="map", gelu="quick", scan=True, remat=True),
  "map, sincos2d, registers": dict(pool_type="map", posemb="sincos2d", registers=1),
  "tok+gap, registers, exact": dict(pool_type="tok+gap", registers=2, gelu="exact"),
  "tok+gap, sincos2d": dict(pool_type="tok+gap", posemb="sincos2d"),
  "tok+reg, pre_norm": dict(pool_type="tok+reg", registers=1, pre_norm=True),
  "tok+reg, sincos2d, quick": dict(
    pool_type="tok+reg", registers=2, posemb="sincos2d", gelu="quick"
  ),
  "no head, map": dict(num_classes=0, pool_type="map"),
  "no head, tok+gap": dict(num_classes=0, pool_type="tok+gap"),
}


def make(**fields):
  """Returns (model, params): small, every array random and NumPy."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, *model.patch_size, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def images(n, hw=(24, 24)):
  return np.random.default_rng(n).uniform(-1, 1, (n, *hw, 3)).astype(np.float32)


def run(file, image):
  """As a user without this project does."""
  import onnxruntime

  session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
  return session.run(None, {"image": image})[0]


def places(file):
  """(offset, length) in weights.bin of each array of a graph."""
  import onnx

  arrays = onnx.load(file, load_external_data=False).graph.initializer
  said = {a.name: {each.key: each.value for each in a.external_data} for a in arrays}
  outside = {name: entries for name, entries in said.items() if entries}
  assert {entries["location"] for entries in outside.values()} == {"weights.bin"}
  return {n: (int(e["offset"]), int(e["length"])) for n, e in outside.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """An export with two sizes; not to be changed."""
  out = tmp_path_factory.mktemp("onnx") / "vit.onnx"
  onnx_folder.write(out, *make(), {}, image_hw=(24, 24), sizes=(4, 8, 4))
  return out


@pytest.mark.parametrize("fields", VARIATIONS.values(), ids=VARIATIONS)
def test_logits_are_the_models_at_every_size_and_batch(fields, tmp_path):
  model, params = make(**fields)
  out, hw = tmp_path / "vit", (24, 36)
  onnx_folder.write(out, model, params, {}, image_hw=hw, sizes=(2, 3, 12))
  for size in (2, 3, 12):
    want = certificate.logits(model, params, images(5, hw), size)
    largest = np.abs(want).max()
    assert largest > 0.1
    for n in (1, 5):
      got = run(out / f"seqhw_{size:02}.onnx", images(5, hw)[:n])
      np.testing.assert_allclose(got, want[:n], atol=2e-6 * largest)


def test_the_folder_holds_a_graph_a_size_and_the_record_says_so(written):
  names = ["flexivit_manifest.txt", "record.json", "seqhw_04.onnx", "seqhw_08.onnx", "weights.bin"]
  assert sorted(path.name for path in written.iterdir()) == names
  assert [path.name for path in written.parent.iterdir()] == ["vit.onnx"]
  record = onnx_folder.read_record(written)
  assert record["format"] == "flexivit onnx 1" and record["sizes"] == [4, 8]
  assert record["image_shape"] == [24, 24, 3] and record["outputs"] == 5 and record["opset"] == 20


def test_images_come_in_any_number_and_of_one_shape(written):
  import onnxruntime

  session = onnxruntime.InferenceSession(str(written / "seqhw_04.onnx"))
  image, logits = session.get_inputs()[0], session.get_outputs()[0]
  assert (image.name, image.shape) == ("image", ["n", 24, 24, 3])
  assert (logits.name, logits.shape) == ("logits", ["n", 5])


def test_an_array_that_no_size_changes_lies_there_once(written):
  _, params = make()
  flat, four, eight = (
    trees.flatten(params),
    places(written / "seqhw_04.onnx"),
    places(written / "seqhw_08.onnx"),
  )
  assert four.keys() == eight.keys() == flat.keys()
  assert {n for n in flat if four[n] != eight[n]} == {"embedding/kernel", "pos_embedding"}
  data = (written / "weights.bin").read_bytes()
  for name, (offset, length) in four.items():
    assert offset % 64 == 0
    if name not in ("embedding/kernel", "pos_embedding"):
      assert data[offset : offset + length] == flat[name].tobytes()
  all_places = sorted({*four.values(), *eight.values()})
  ends = [offset + length for offset, length in all_places]
  assert all(end <= begin < end + 64 for end, (begin, _) in zip(ends, all_places[1:], strict=False))
  assert all_places[0][0] == 0 and ends[-1] == len(data)


def test_large_arrays_begin_at_a_page(tmp_path):
  onnx_folder.write(
    tmp_path / "vit", *make(mlp_dim=1200, depth=1), {}, image_hw=(24, 24), sizes=(4,)
  )
  large = [offset for offset, n in places(tmp_path / "vit" / "seqhw_04.onnx").values() if n > 2**16]
  assert len(large) == 2 and not any(offset % 4096 for offset in large)


def test_names_in_the_graph_are_those_of_parameters_and_layers(written):
  import onnx

  graph = onnx.load(written / "seqhw_04.onnx", load_external_data=False).graph
  arrays, nodes = ({each.name for each in part} for part in (graph.initializer, graph.node))
  assert "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel" in arrays
  assert "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/Softmax" in nodes
  assert not {node.op_type for node in graph.node} & {"Resize", "Conv"}
  inline = [each for each in graph.initializer if not each.external_data]
  assert inline and max(len(each.raw_data) for each in inline) <= 48  # the shape of six axes


def test_it_can_be_moved(written, tmp_path):
  want = run(written / "seqhw_08.onnx", images(3))
  shutil.copytree(written, tmp_path / "a" / "elsewhere")
  shutil.move(tmp_path / "a", tmp_path / "b")
  got = run(tmp_path / "b" / "elsewhere" / "seqhw_08.onnx", images(3))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["weights.bin", "seqhw_08.onnx"])
def test_a_flipped_bit_is_found(written, tmp_path, name):
  bad = shutil.copytree(written, tmp_path / "bad")
  data = bytearray((bad / name).read_bytes())
  data[len(data) // 2] ^= 1
  (bad / name).write_bytes(data)
  with pytest.raises(errors.UserError, match=f"{name} has other bytes"):
    onnx_folder.load(bad)


def test_equal_exports_are_equal_files(written, tmp_path):
  onnx_folder.write(tmp_path / "vit", *make(), {}, image_hw=(24, 24), sizes=(4, 8))
  for path in written.iterdir():
    assert path.read_bytes() == (tmp_path / "vit" / path.name).read_bytes()


def test_only_a_new_folder_is_written(written, tmp_path):
  with pytest.raises(errors.UserError, match="is there already"):
    onnx_folder.write(written, *make(), {}, image_hw=(24, 24), sizes=(4,))
  with pytest.raises(errors.UserError, match=r"give a name without \.zip"):
    onnx_folder.write(tmp_path / "vit.zip", *make(), {}, image_hw=(24, 24), sizes=(4,))


def test_what_goes_wrong_on_the_way_leaves_nothing(tmp_path):
  model, params = make()
  with pytest.raises(errors.UserError, match="seqhw=5 does not divide the image"):
    onnx_folder.write(tmp_path / "vit", model, params, {}, image_hw=(24, 24), sizes=(4, 5))
  with pytest.raises(errors.UserError, match=r"extra clss float32\[1,1,16\]"):
    extra = params | {"clss": params["cls"]}
    onnx_folder.write(tmp_path / "vit", model, extra, {}, image_hw=(24, 24), sizes=(4,))
  with pytest.raises(errors.UserError, match="dtype='bfloat16'"):
    half = model.clone(dtype="bfloat16")
    onnx_folder.write(tmp_path / "vit", half, params, {}, image_hw=(24, 24), sizes=(4,))
  assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_removed(written, tmp_path):
  model, params = make()
  out = shutil.copytree(written, tmp_path / "vit")
  head = params["head"] | {"bias": params["head"]["bias"] + 0.1}
  with pytest.raises(errors.UserError, match=r"differs at seqhw=4 by .*nothing is written"):
    comparison.verify(out, model, params | {"head": head}, to="onnx")
  assert not out.exists()


@pytest.fixture
def export(tmp_path, timm_state_dict):
  """Runs the command on a small timm model; returns its exit code."""
  save_file(timm_state_dict(), tmp_path / "vit.safetensors")

  def call(*options, source=tmp_path / "vit.safetensors"):
    return cli.main(["export", str(source), str(tmp_path / "vit"), "--to=onnx", *options])

  return call


def test_the_command_writes_a_certificate(export, tmp_path, capsys):
  assert export("--seqhw=2,4,2", "--num_heads=4") == 0
  assert "seqhw   4: largest difference" in capsys.readouterr().out
  written = json.loads((tmp_path / "vit.certificate.json").read_text())
  assert written["target"] == "vit" and [row["seqhw"] for row in written["rows"]] == [2, 4]
  assert max(row["largest_difference"] for row in written["rows"]) < 1e-5
  record = onnx_folder.read_record(tmp_path / "vit")
  assert record["source"] == {"file": "vit.safetensors", "format": "safetensors in timm's names"}
  model, params = weights.load(tmp_path / "vit.safetensors", num_heads=4)
  want = certificate.logits(model, params, images(3, (32, 32)), 4)
  got = run(tmp_path / "vit" / "seqhw_04.onnx", images(3, (32, 32)))
  np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_without_comparison_there_is_no_certificate(export, tmp_path, capsys):
  assert export("--seqhw=2", "--num_heads=4", "--no-verify") == 0
  assert "not compared with its source (--no-verify)" in capsys.readouterr().out
  assert {path.name for path in tmp_path.iterdir()} == {"vit.safetensors", "vit"}


def test_a_model_in_bfloat16_is_exported_in_float32_and_says_so(export, tmp_path, capsys):
  model, params = make(dtype="bfloat16")
  fields = FIELDS | {"dtype": "bfloat16"}
  weights.save_npz(tmp_path / "half.npz", model, params, {"model": fields})
  assert export("--seqhw=4", "--image_size=24", source=tmp_path / "half.npz") == 0
  note = "the model's own matrix products are in bfloat16"
  assert note in capsys.readouterr().out
  record = onnx_folder.read_record(tmp_path / "vit")
  assert record["model"]["dtype"] == "float32" and note in record["notes"][-1]
  want = certificate.logits(model.clone(dtype="float32"), params, images(2), 4)
  got = run(tmp_path / "vit" / "seqhw_04.onnx", images(2))
  np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
