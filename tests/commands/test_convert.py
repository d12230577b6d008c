"""`flexivit convert` and `flexivit inspect`, as a user calls them, on small files of other projects."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from flexivit_jax import cli, errors, weights
from flexivit_jax.inference import predictions
from flexivit_jax.weights import conversion

MEAN_STD = ["--mean=0.485,0.456,0.406", "--std=0.229,0.224,0.225"]


@pytest.fixture
def file(tmp_path, timm_state_dict):
  save_file(timm_state_dict(layer_scale=True), tmp_path / "deit.safetensors")
  return tmp_path / "deit.safetensors"


@pytest.mark.parametrize("options", [[], MEAN_STD])
def test_the_written_file_gives_the_sources_logits(file, tmp_path, options, capsys):
  out = tmp_path / "out.npz"
  assert cli.main(["convert", str(file), str(out), "--num_heads=4", *options]) == 0
  assert "seqhw   4: largest difference" in capsys.readouterr().out
  certificate = json.loads((tmp_path / "out.certificate.json").read_text())
  rows = {row["seqhw"]: row for row in certificate["rows"]}
  assert rows.keys() == {2, 4, 8, 16, 32}
  assert rows[4]["largest_difference"] < 1e-4
  got, want = (np.array(rows[4][f"{side}_logits"]) for side in ("target", "source"))
  assert np.abs(got - want).max() == pytest.approx(rows[4]["largest_difference"])
  assert want.std() > 0.1  # Logits that are all alike would certify nothing.
  _, _, record = weights.load_with_record(out)
  assert record["source"] == {"file": "deit.safetensors", "format": "safetensors in timm's names"}
  assert record["format"] == "npz in big_vision's names, written by flexivit"
  assert record["model"]["gelu"] == "exact" and ("folded_input" in record) == bool(options)


def test_flexified_it_is_close_at_its_own_size_and_says_what_it_was(file, tmp_path):
  out = tmp_path / "out.npz"
  assert cli.main(["convert", str(file), str(out), "--num_heads=4", "--flexify=16,7"]) == 0
  model, _, record = weights.load_with_record(out)
  assert (model.patch_size, model.posemb_size) == ((16, 16), (7, 7))
  assert record["flexified_from"] == {"patch_size": [8, 8], "grid": [4, 4]}


def test_a_conversion_that_changes_the_logits_leaves_nothing(file, tmp_path, monkeypatch):
  def wrong(path, model, params, record):
    norm = params["Transformer"]["encoder_norm"]
    encoder = params["Transformer"] | {"encoder_norm": norm | {"bias": norm["bias"] + 0.1}}
    write(path, model, params | {"Transformer": encoder}, record)

  write = weights.save_npz
  monkeypatch.setattr(weights, "save_npz", wrong)
  with pytest.raises(errors.UserError, match=r"differs at seqhw=2 by .*nothing is written"):
    conversion.convert(file, tmp_path / "out.npz", num_heads=4)
  assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_inspect_says_what_is_in_the_file(file, timm_state_dict, capsys):
  assert cli.main(["inspect", str(file), "--num_heads=4"]) == 0
  lines = capsys.readouterr().out.splitlines()
  count = sum(
    a.size for a in timm_state_dict().values()
  )  # Folded: LayerScale is no parameter of ours.
  words = {line.split("  ")[0]: line for line in lines}
  assert words["format"].endswith("safetensors in timm's names")
  assert "width 32, depth 2, mlp 48, 4 heads, pool tok, 7 classes" in words["architecture"]
  # The position of the class token is in the class token.
  assert words["parameters"].endswith(f"{count - 32:,}")
  assert "kernel 8x8 pixels, position grid 4x4" in words["native size"]
  assert "32x32; seqhw that divide it: 1, 2, 4, 8, 16, 32" in words["image"]
  assert any(line.startswith("note: LayerScale is folded") for line in lines)


def test_predict_prepares_images_as_a_fixed_model_wants_them(file, tmp_path):
  Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(tmp_path / "image.png")
  # 32 tokens a side divide 32 pixels, and not the 240 of a FlexiViT.
  (got,) = predictions.predict([tmp_path / "image.png"], file, seqhw=32)
  assert len(got.top) == 5
  with pytest.raises(errors.UserError, match="does not divide"):
    predictions.predict([tmp_path / "image.png"], file, seqhw=32, image_size=240)


@pytest.mark.parametrize(
  ("to", "seqhw", "patch"),
  [
    *(("timm", None, (8, 8)), ("timm", "8x4", (4, 8))),
    *(("transformers", None, (8, 8)), ("transformers", "8", (4, 4))),
  ],
)
def test_another_frameworks_folder_gives_the_sources_logits(
  file, tmp_path, capsys, to, seqhw, patch
):
  out = tmp_path / "out"
  size = [] if seqhw is None else [f"--seqhw={seqhw}"]
  assert cli.main(["convert", str(file), str(out), f"--to={to}", "--num_heads=4", *size]) == 0
  printed = capsys.readouterr().out
  certificate = json.loads((tmp_path / "out.certificate.json").read_text())
  (row,) = certificate["rows"]
  assert str(row["seqhw"]) == (seqhw or "4") and row["largest_difference"] < 1e-4
  assert certificate["record"]["compared_in"] in printed
  assert np.std(row["source_logits"]) > 0.1
  model, _ = weights.load(out)
  assert model.patch_size == patch and model.gelu == "exact"


def test_a_framework_that_gives_other_logits_leaves_nothing(file, tmp_path, monkeypatch):
  wrong = lambda out, image: np.ones((len(image), 7), np.float32)  # noqa: E731
  monkeypatch.setattr(conversion.optional, "version", lambda package: f"{package} 1")
  monkeypatch.setitem(
    conversion.FRAMEWORKS, "timm", conversion.FRAMEWORKS["timm"]._replace(run=wrong)
  )
  with pytest.raises(errors.UserError, match=r"written model differs by .*nothing is written"):
    conversion.convert_to("timm", file, tmp_path / "out", seqhw=8, num_heads=4)
  assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("to", ["big_vision", "timm"])
def test_no_verify_writes_no_certificate(file, tmp_path, to, capsys):
  out = tmp_path / "out.npz"
  given = ["convert", str(file), str(out), f"--to={to}", "--num_heads=4", "--no-verify"]
  assert cli.main(given) == 0
  assert "not compared with its source" in capsys.readouterr().out
  assert {p.name for p in tmp_path.iterdir()} == {file.name, out.name}


def test_mistakes_in_where_to_are_errors(file, tmp_path, capsys):
  assert cli.main(["convert", str(file), str(tmp_path / "out"), "--to=tim"]) == 2
  assert "Did you mean 'timm'" in capsys.readouterr().err
  for text in ("2,4", "all"):
    assert cli.main(["convert", str(file), str(tmp_path), "--to=timm", f"--seqhw={text}"]) == 2
    assert f"--seqhw={text}: a folder for timm holds one size; give one" in capsys.readouterr().err
  assert cli.main(["convert", str(file), str(tmp_path / "out.npz"), "--seqhw=8"]) == 2
  assert "holds the model for all sizes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["16", "16,7,7", "16.5,7", "0,7"])
def test_flexify_takes_two_whole_numbers(file, text, capsys):
  assert cli.main(["inspect", str(file), f"--flexify={text}"]) == 2
  assert "expected PATCH,GRID" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_vit_converts(shared, tmp_path, capsys):
  source, out = shared / "data" / "vit_ti16_augreg_in1k_224.npz", tmp_path / "vit_ti16.npz"
  assert cli.main(["convert", str(source), str(out)]) == 0
  assert cli.main(["inspect", str(out)]) == 0
  assert "5,717,224" in capsys.readouterr().out  # 192 fewer: the class token's position is folded
