"""Options of `flexivit serve` that no server starts with: each is one line, before anything listens."""

import pytest

from flexivit_jax import cli, weights
from flexivit_jax.models import FlexiViT

for package in ("httpx", "python_multipart", "starlette", "uvicorn"):
  pytest.importorskip(package)
FIELDS = dict(num_classes=3, width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(8, 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory, random_params):
  file = tmp_path_factory.mktemp("serve") / "model.npz"
  made = FlexiViT(**FIELDS, posemb_size=(3, 3), head_zeroinit=False)
  record = {
    "model": {**FIELDS, "patch_size": [8, 8], "posemb_size": [3, 3]}, "image_size": [24, 24],
    "source": {"file": "model.npz", "format": "ours"},
  }  # fmt: skip
  weights.save_npz(file, made, random_params(made, (24, 24, 3)), record)
  return file


@pytest.mark.parametrize(
  ("options", "problem"),
  [
    (["--port=70000"], "--port=70000; expected 0 to 65535"),
    (["--port=-1"], "--port=-1; expected 0 to 65535"),
    (["--batches=0"], "expected 1 to 8 numbers of 1 or more"),
    (["--queue=0"], "--queue=0; expected more than 0"),
    (["--body_mb=nan"], "--body_mb=nan; expected more than 0"),
    (["--read_s=-1"], "--read_s=-1.0; expected more than 0"),
    (["--max_wait_ms=-1"], "expected 0 or more"),
    (["--seqhw=7"], "seqhw=7 does not divide"),
    (["--seqhw=x"], "'x' is no size"),
    (["--accuracy_floor=0.5"], "profile"),
    (["--profile=none.json"], "none.json"),
    (["--cascade=none.json"], "none.json"),
    (["--token_file=none"], "none cannot be read"),
  ],
)
def test_one_line_and_no_server(model, monkeypatch, capsys, options, problem):
  from flexivit_jax.serving import run

  monkeypatch.setattr(run, "serve", lambda *args, **options: pytest.fail("it serves"))
  sizes = [] if options[0].startswith("--seqhw") else ["--seqhw=2"]
  assert cli.main(["serve", str(model), *sizes, *options]) == 2
  said = capsys.readouterr().err.strip().splitlines()
  assert problem in said[-1]
  assert said[-1].startswith("flexivit: error: ")


def test_a_page_asks_without_a_token(model, monkeypatch, capsys):
  monkeypatch.setenv("FLEXIVIT_TOKEN", "secret")
  assert cli.main(["serve", str(model), "--seqhw=2", "--demo"]) == 2
  assert "--demo asks without a token" in capsys.readouterr().err
