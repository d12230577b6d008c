"""`flexivit convert --to` compares what it writes in the framework that it is for."""

import json

import pytest
from safetensors.numpy import save_file

from flexivit_jax import cli


@pytest.mark.parametrize("seqhw", [None, 2, 8])
@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_the_certificate_is_of_the_framework_itself(timm_state_dict, tmp_path, capsys, to, seqhw):
  save_file(timm_state_dict(), tmp_path / "vit.safetensors")
  size = [] if seqhw is None else [f"--seqhw={seqhw}"]
  given = ["convert", str(tmp_path / "vit.safetensors"), str(tmp_path / "out"), f"--to={to}"]
  assert cli.main([*given, "--num_heads=4", *size]) == 0
  certificate = json.loads((tmp_path / "out.certificate.json").read_text())
  assert certificate["record"]["compared_in"].startswith(f"{to} ")
  assert certificate["rows"][0]["largest_difference"] < 1e-4
  assert f"in {to} " in capsys.readouterr().out
