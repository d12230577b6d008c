"""The command `flexivit`, as a user calls it."""

import json
import pathlib
import resource
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, errors, train, weights
from flexivit_jax.running import exit_codes

pytestmark = pytest.mark.faults

REPOSITORY = pathlib.Path(__file__).parents[1]
DEMO = ["--config.total_steps=20", "--config.model.depth=1", "--config.model.width=16"]
DEMO += ["--config.checkpoint.every_steps=20", "--config.optim.schedule.warmup_steps=2"]


def flexivit(*args, **kwargs):
  command = [sys.executable, "-m", "flexivit_jax.cli", *map(str, args)]
  return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def seconds(call):
  """The time a command takes; of the CPU, since the machine may be busy with other things."""
  used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # noqa: E731
  begin = used()
  call()
  return used() - begin


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of a tiny model on digits, by the command line."""
  workdir = tmp_path_factory.mktemp("run")
  assert cli.main(["train", "--config=configs/digits.py", f"--workdir={workdir}", *DEMO]) == 0
  return workdir


@pytest.mark.parametrize("command", ["", "train"])
def test_help_answers_at_once(command, tmp_path):
  """In 0.06 s of CPU time, of which 0.02 s are Python's; every command's file is imported for either."""

  def call():
    done = flexivit(*filter(None, [command]), "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: flexivit" in done.stdout

  assert min(seconds(call) for _ in range(3)) < 0.2


def test_the_public_names_import_nothing_slow_beside_jax_and_flax():
  """What is imported, and not how long it takes: seconds differ by a factor of two on a busy machine."""
  code = """
import sys
import jax, flax.linen
before = set(sys.modules)
from flexivit_jax import FlexiViT, load, pi_resize
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  slow = {
    "cv2",
    "grain",
    "matplotlib",
    "orbax",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tensorstore",
  }
  slow |= {"clu", "onnx", "onnxruntime", "timm", "torch", "transformers"}
  assert "flexivit_jax" in done.stdout.split()
  assert not slow & set(done.stdout.split())


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["train", "--config=nowhere.py", "--workdir=x"], "known: cifar10, detect_bccd"),
    (["train", "--config=digit", "--workdir=x"], "Did you mean 'digits'?"),
    (["train", "--config=digits:fixd=8", "--workdir=x"], "Did you mean 'fixed'?"),
    (
      ["train", "--config=digits", "--workdir=x", "--config.optim.lrr=1"],
      "Did you mean 'optim.lr'?",
    ),
    (
      ["train", "--config=digits", "--workdir=x", "--config.total_step=1"],
      "Did you mean 'total_steps'?",
    ),
    (["train", "--config=digits", "--workdir=x", "--config.total_steps=many"], "expected a int"),
    (["train", "--config=digits", "--workdir=x", "--work_dir=y"], "Did you mean '--workdir'?"),
    (["predict", "x.jpg", "--checkpoint=nothing", "--seqhw=3"], "nothing does not exist"),
    (["report", "nothing"], "flexivit eval"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(args) == exit_codes.ERROR
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1 and err.startswith("flexivit: error: ")
  assert not (tmp_path / "x").exists()


def test_eval_writes_what_training_wrote(run, tmp_path, capsys):
  out = tmp_path / "again.json"
  args = ["eval", "--config=digits", f"--checkpoint={run}", "--seqhw=all", f"--out={out}"]
  assert cli.main(args) == 0
  first, again = (json.loads(p.read_text()) for p in (run / "eval.json", out))
  stable = lambda rows: [{k: v for k, v in r.items() if k != "ms"} for r in rows]  # noqa: E731
  assert stable(first["rows"]) == stable(again["rows"])
  assert {k: v for k, v in first.items() if k != "rows"} == {
    k: v for k, v in again.items() if k != "rows"
  }
  assert "seqhw" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("out", "message"), [("", "is a folder"), ("none/e.json", "there is no folder")]
)
def test_eval_checks_where_results_go_before_it_computes(run, tmp_path, out, message, capsys):
  args = ["eval", "--config=digits", f"--checkpoint={run}", f"--out={tmp_path / out}"]
  assert cli.main(args) == exit_codes.ERROR
  said = capsys.readouterr()
  assert message in said.err and not said.out


def test_eval_at_sizes_that_were_never_trained(run, tmp_path):
  out, file = tmp_path / "eval.json", tmp_path / "rectangular.npz"
  model, params, record = weights.load_with_record(run)
  trained = {"trained": {"grid_hw": [[4, 6], [8, 8]]}}
  weights.save_npz(file, model, params, record | trained)
  args = ["eval", "--config=digits", f"--checkpoint={file}", "--seqhw=12,4x6", f"--out={out}"]
  assert cli.main(args) == 0
  rows = json.loads(out.read_text())["rows"]
  assert json.loads(out.read_text())["trained_seqhw"] == ["4x6", "8x8"]
  assert [(r["seqhw"], r["patch"], r["tokens"]) for r in rows] == [(12, 2, 144), ("4x6", "6x4", 24)]


def test_predict_prints_five_classes_and_the_time_when_asked(run, tmp_path, capsys):
  image = tmp_path / "digit.png"
  Image.fromarray(np.full((8, 8), 200, np.uint8)).save(image)
  assert cli.main(["predict", str(image), f"--checkpoint={run}", "--seqhw=8", "--time"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith(str(image)) and " ms)" in lines[0]
  assert len(lines) == 6 and all("%" in line for line in lines[1:])


def test_predict_at_a_size_that_does_not_divide_lists_those_that_do(run, tmp_path, capsys):
  image = tmp_path / "digit.png"
  Image.fromarray(np.zeros((8, 8), np.uint8)).save(image)
  assert cli.main(["predict", str(image), f"--checkpoint={run}", "--seqhw=7"]) == 2
  assert "sizes that do: 1, 2, 3, 4, 6, 8, 12, 24" in capsys.readouterr().err


def test_report_writes_the_page(run, tmp_path, capsys):
  assert cli.main(["report", str(run), f"--out={tmp_path}"]) == 0
  assert (tmp_path / "report.html").stat().st_size > 10_000
  assert "FlexiViT" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorflow_is_never_imported(run, tmp_path):
  image = tmp_path / "digit.png"
  Image.fromarray(np.zeros((8, 8), np.uint8)).save(image)
  commands = [
    ["train", "--config=digits", f"--workdir={tmp_path / 'run'}", *DEMO, "--config.total_steps=2"],
    ["eval", "--config=digits", f"--checkpoint={run}", "--seqhw=2"],
    ["predict", str(image), f"--checkpoint={run}", "--seqhw=2"],
  ]
  code = (
    "import sys; from flexivit_jax import cli\n"
    f"for c in {commands!r}: assert cli.main(c) == 0\n"
    "sys.exit(', '.join({m.split('.')[0] for m in sys.modules} & {'tensorflow', 'torch', 'timm'}) or 0)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_no_option_is_proposed_that_a_command_does_not_take():
  with pytest.raises(errors.UserError, match="Unknown argument '--config'") as raised:
    cli.parse(["bench", "--forward", "--config"])
  assert "mean '--config'" not in str(raised.value)


def test_what_a_command_takes_without_dashes_is_named():
  with pytest.raises(errors.UserError, match="`flexivit plan` takes CONFIG without --config"):
    cli.parse(["plan", "configs/digits.py", "--config=configs/digits.py"])


def test_overrides_without_a_config_are_refused():
  with pytest.raises(errors.UserError, match="no effect"):
    cli.parse(["report", "x", "--config.a=1"])


def test_a_reader_that_has_seen_enough_is_no_error():
  # The reader is gone long before the command, which has to start first, writes.
  command = (
    f"{sys.executable} -m flexivit_jax.cli inspect --list | head -c 0; echo ${{PIPESTATUS[0]}}"
  )
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_path_behind_an_equals_sign_may_begin_with_the_home_folder(tmp_path, monkeypatch, capsys):
  def workdir(text):
    return str(cli.parse(["train", "--config=digits", f"--workdir={text}"]).workdir)

  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  assert workdir("~/runs/a") == str(tmp_path / "home" / "runs" / "a")
  for literal in ("./~/a", "a~", "a/~", ".", "-a", "$HOME", "a=b", "x:y"):
    assert workdir(literal) == str(pathlib.Path(literal))  # "./" is no part of a path
  (tmp_path / "~").mkdir()
  assert workdir("~/a") == "~/a"
  for wrong, message in (("", "the path is empty"), ("~no-such-user/a", "no home folder is known")):
    with pytest.raises(SystemExit):
      workdir(wrong)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv",
  [
    ("verify", "a" * 300),
    ("inspect", "a" * 300),
    ("predict", "x.jpg", "--checkpoint", "b" * 5000, "--seqhw", "2"),
    ("train", "--config", "c" * 300, "--workdir", "x"),
    ("train", "--config", "configs/digits.py:debug", "--workdir", "d" * 300),
    ("report", "e" * 300),
  ],
)
def test_a_path_that_no_file_system_takes_is_one_line(argv, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert cli.main(argv) == 2
  last = capsys.readouterr().err.strip().splitlines()[-1]
  assert last.startswith("flexivit: error: ") and len(last) < 1000


@pytest.mark.parametrize("option", ["batch_size", "image_size", "rounds"])
def test_bench_of_nothing_is_refused(option, capsys):
  assert cli.main(["bench", "--forward", f"--{option}=0"]) == 2
  assert f"--{option}=0; expected at least 1" in capsys.readouterr().err


def test_python_m_flexivit_jax_train_is_the_command_train(tmp_path, monkeypatch, capsys):
  """A user's mistake ends it with code 2 and one line, as `flexivit train`."""
  monkeypatch.setattr(sys, "argv", ["train.py", "--config=none.py", f"--workdir={tmp_path}"])
  with pytest.raises(SystemExit) as end:
    runpy.run_path(train.__file__, run_name="__main__")
  assert end.value.code == exit_codes.ERROR
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("flexivit: error: ") and "none" in line


def test_exit_codes_are_those_of_the_documented_table():
  page = (REPOSITORY / "docs" / "reliability.md").read_text()
  table = page[page.index("| code | meaning |") :].split("\n\n")[0]
  documented = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
  codes = {str(v) for k, v in vars(exit_codes).items() if k.isupper()}
  assert documented == codes | {"1", "128 + n"}
