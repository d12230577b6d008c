"""The command `flexivit serve`: what it makes of its arguments, without a socket."""

import socket

import pytest

from flexivit_jax import cli, errors, weights
from flexivit_jax.budget import profile
from flexivit_jax.budget.profile import Profile, Row
from flexivit_jax.inference import programs

for package in ("httpx", "python_multipart", "starlette", "uvicorn"):
  pytest.importorskip(package)


@pytest.fixture
def serve(monkeypatch, capsys, tmp_path):
  """Runs the command; returns (exit code, stderr, what would be served)."""
  seen = []
  monkeypatch.delenv("FLEXIVIT_TOKEN", raising=False)
  monkeypatch.setattr("flexivit_jax.devices.compilation.keep_programs", lambda: None)
  monkeypatch.setattr(
    "flexivit_jax.serving.run.serve", lambda server, **given: seen.append((server, given))
  )

  def run(*args):
    code = cli.main(["serve", *map(str, args)])
    return code, capsys.readouterr().err, seen

  return run


def measured(file, device, way=("jax", "float32")):
  """Writes a profile beside the weights."""
  model, params, _ = weights.load_with_record(file)
  rows = [
    Row(size, n, ms=n * size, ms_p90=n * size, gflops=1.0, value=0.5 + size / 20, low=0.4 + size / 20,
        high=0.6 + size / 20, n=100, runtime=way[0], dtype=way[1])
    for size in (2, 3) for n in (1, 4)
  ]  # fmt: skip
  digest = weights.towers.digest(model, params)
  metric = {"name": "top1", "better": "max", "unit": "%"}
  made = Profile(digest, device, metric, {}, (24, 24, 3), {}, 1.0, tuple(rows))
  path = profile.path_of(file, digest)
  profile.write(path, made)
  return path


def test_sizes_are_those_of_the_profile_beside_the_weights(serve, file):
  path = measured(file, programs.device_name())
  try:
    code, _, [(server, given)] = serve(
      file, "--batches", "4,1,4", "--accuracy_floor", "0.52", "--port", 0
    )
  finally:
    path.unlink()
  assert code == 0 and given["host"] == "127.0.0.1" and given["port"] == 0
  assert server.policy.sizes == (2, 3) and server.policy.floor == 0.52
  assert server.settings.batches == (1, 4) and len(server.policy.profile.rows) == 4


def test_without_a_profile_sizes_are_those_of_the_training(serve, file):
  path = measured(file, "another device")
  try:
    code, err, [(server, _)] = serve(file)
  finally:
    path.unlink()
  assert code == 0 and "served without a profile" in err
  assert server.policy.sizes == (2, 4) and server.policy.profile is None


def test_an_open_server_says_so_and_a_token_is_read(serve, file, tmp_path, monkeypatch):
  assert "everybody who reaches 0.0.0.0" in serve(file, "--host", "0.0.0.0")[1]
  token = tmp_path / "token"
  token.write_text("geheim\n")
  _, err, seen = serve(file, "--host", "0.0.0.0", "--token_file", token)
  assert "everybody" not in err and seen[-1][0].settings.token == "geheim"
  monkeypatch.setenv("FLEXIVIT_TOKEN", "x")
  assert serve(file)[2][-1][0].settings.token == "x"


@pytest.mark.parametrize(
  "args,words",
  [
    (["--names", "cat,dog"], "--names are for detectors"),
    (["--batches", "0"], "--batches="),
    (["--port", "-1"], "--port=-1; expected 0 to 65535"),
    (["--body_mb", "nan"], "--body_mb=nan; expected more than 0"),
    (["--read_s", "-1"], "--read_s=-1.0; expected more than 0"),
    (["--seqhw", "7"], "seqhw=7 does not divide"),
    (["--port", "99999"], "--port=99999; expected 0 to 65535"),
    (["--queue", "0"], "--queue=0; expected more than 0"),
    (["--max_wait_ms", "-1"], "expected 0 or more"),
    (["--accuracy_floor", "0.5"], "needs a profile"),
    (["--token_file", "gone"], "cannot be read"),
    (["--token_file", "/dev/null"], "is empty"),
    (["--way", "onnx,jax"], "expected one"),
    (["--profile", "gone"], "There is no profile"),
    (["--cascade", "gone"], "cannot be read"),
    (["--seqhw", "x"], "x"),
  ],
)
def test_what_is_wrong_is_said_before_anything_is_served(serve, file, args, words):
  code, err, seen = serve(file, *args)
  assert code == 2 and words in err and not seen


def test_a_page_asks_without_a_token(serve, file, monkeypatch):
  monkeypatch.setenv("FLEXIVIT_TOKEN", "secret")
  code, err, seen = serve(file, "--demo")
  assert code == 2 and "--demo asks without a token" in err and not seen


def test_an_address_that_is_taken_is_one_line():
  from flexivit_jax.serving import run

  with socket.create_server(("127.0.0.1", 0)) as taken:
    for host, port in (("127.0.0.1", taken.getsockname()[1]), ("256.0.0.1", 80)):
      with pytest.raises(errors.UserError, match=f"--host={host} --port={port} cannot be"):
        run._bound(host, port)
