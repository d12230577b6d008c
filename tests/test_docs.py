"""README.md and docs/*.md do what they say.

Every command in a ```bash fence and every ```python fence is run, top to bottom, in a copy of the
repository that is fresh for each page. A ```text fence right after one is its output: the words
must be the same, and the numbers within one unit of their last digit.

`make test` runs the pages of BRIEF, which are done in seconds; `make test-full` and .ci/run run all.

A command that would take too long stands in INSTEAD with the small form that is run for it, one
that cannot be run at all in NOT_RUN with the reason. Both are looked up by the exact line.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted([*REPOSITORY.glob("README.md"), *REPOSITORY.glob("docs/*.md")])
LEFT_OUT = (
  ".git",
  ".venv*",  # that of the conversion tests is gigabytes
  ".cache",
  ".hypothesis",
  ".*_cache",
  "__pycache__",
  "runs",
  "*.egg-info",
)
BRIEF = {"dependencies.md"}
LANGUAGES = {"bash", "python", "text"}
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")

MAKE_PHOTOS = REPOSITORY / "tests" / "make_photos.py"

# Shown command: the command that is run instead of it.
FOLDER = "configs/folder.py:data_dir=photos"
SHORT = "--config.model.depth=1 --config.total_epochs=1 --config.input.batch_size=4"
INSTEAD: dict[str, str] = {
  "make demo": "make --dry-run demo && flexivit train --config configs/digits.py:debug --workdir runs/demo/flexivit"
  " --config.evals.test.seqhw='(2, 4, 8)' --config.flexi.seqhw.v='(2,)'",
  "make docs": "make --dry-run docs",
  "make test": "make --dry-run test test-full lint",
  # On eight images of noise, in folders as the page describes them.
  f"flexivit train --config {FOLDER} --workdir runs/photos": f"python {MAKE_PHOTOS} && flexivit train"
  f" --config {FOLDER} {SHORT} --config.flexi.seqhw.v='(5,)' --workdir runs/photos",
}
# A fixed ViT of patch 3 at 24 px, as it would be without training, and the images of noise.
INSTEAD["flexivit flexify --init vit.npz --data photos --out runs/flexible"] = (
  f"python {MAKE_PHOTOS} && flexivit train --config configs/digits.py:fixed=8,debug --workdir runs/tiny"
  " && flexivit flexify --init runs/tiny --data photos --out runs/flexible --epochs 1 --image_size 24"
  " --seqhw 2,8 --batch_size 4"
)
pack = "flexivit pack name=folder data_dir=photos split=train --out packed"
INSTEAD[pack] = f"python {MAKE_PHOTOS} && {pack}"
# The model that the page has just trained stands in for a pretrained file.
tuned = "flexivit train --config configs/folder.py:init={},data_dir=photos --workdir runs/tuned"
INSTEAD[tuned.format("vit.npz")] = (
  f"{tuned.format('runs/photos')} --config.total_epochs=1 --config.input.batch_size=4"
  " --config.flexi.seqhw.v='(5,)' --config.evals.test.seqhw='(5,)'"
)
INSTEAD[tuned.format("runs/flexible/model.npz")] = (
  f"{tuned.format('runs/flexible/model.npz')} --config.total_epochs=1 --config.input.batch_size=4"
  " --config.flexi.seqhw.v='(2, 4)' --config.evals.test.seqhw='(2, 4)'"
)
# A guarantee of eight images of noise.
INSTEAD["flexivit cascade runs/tuned --alpha 0.05 --out cascade.json"] = (
  "flexivit cascade runs/tuned --alpha 0.5 --delta 0.2 --out cascade.json"
)
for form, debug, folder in (
  ("", ":debug", "flexivit"),
  (":fixed=8", ":fixed=8,debug", "fixed8"),
  (":fixed=4", ":fixed=4,debug", "fixed4"),
):
  train = "flexivit train --config configs/cifar10.py{} --workdir runs/cifar10/{}"
  INSTEAD[train.format(form, folder)] = train.format(debug, folder)

# Drawings with captions, and towers that learn in seconds.
captioned = "name=captions data_dir=captioned split=train --out tokenizer.json --size 8192"
INSTEAD[f"flexivit tokenizer {captioned}"] = (
  f"python {REPOSITORY / 'tests' / 'make_captions.py'} && flexivit tokenizer {captioned}"
)
clip = "flexivit train --config configs/flexiclip.py:data=captions,data_dir=captioned,vocab=8192 --workdir runs/clip"
INSTEAD[clip] = (
  f"{clip} --config.total_epochs=4 --config.input.batch_size=48 --config.evals.test.batch_size=24"
  " --config.flexi.seqhw.v='(5,)' --config.evals.test.seqhw='(5, 8)' --config.model.image.variant=mu"
  " --config.model.text.width=32 --config.model.text.depth=1 --config.model.text.mlp_dim=64 --config.optim.lr=3e-3"
)

# Shown command: why it is not run.
_TINY = "flexivit export runs/tiny.npz {} --image_size=24 --seqhw=2,4,8"
NOT_RUN: dict[str, str] = {
  "flexivit train --config configs/flexilit.py:data=captions,data_dir=captioned,text=bert-base-uncased --workdir"
  " runs/lit": "needs published weights: tests/experiment/test_parts.py",
  _TINY.format("tiny_onnx --to=onnx"): "needs onnx: tests/foreign/test_onnx.py",
  _TINY.format("tiny_tf --to=saved_model"): "needs TensorFlow: tests/foreign/test_saved_model.py",
}


class Fence(NamedTuple):
  page: str
  line: int
  language: str
  text: str
  adjacent: bool = True  # nothing stands between it and the fence before


def fences(page: Path) -> list[Fence]:
  """The fenced blocks of a page, in order."""
  text, name = page.read_text(), page.relative_to(REPOSITORY).as_posix()
  found, end = [], 0
  for m in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
    line, adjacent = text[: m.start()].count("\n") + 1, not text[end : m.start()].strip()
    found.append(Fence(name, line, m[1].strip(), m[2], adjacent))
    end = m.end()
  return found


def commands(fence: Fence) -> list[str]:
  """The lines of a bash fence: continued lines joined, comments and empty lines left out."""
  lines = fence.text.replace("\\\n", " ").splitlines()
  lines = [re.sub(r"\s+# .*$", "", " ".join(line.split())) for line in lines]
  return [line for line in lines if line and not line.startswith("#")]


def run(command: list[str], folder: Path, where: str) -> str:
  path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
  done = subprocess.run(
    command,
    cwd=folder,
    env=os.environ | {"PATH": path, "PYTHONPATH": str(folder)},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, f"{where}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
  return done.stdout


def run_fence(fence: Fence, folder: Path) -> str:
  """Runs what a fence shows; returns what it printed."""
  where = f"{fence.page}:{fence.line}"
  if fence.language == "python":
    return run([sys.executable, "-c", fence.text], folder, where)
  printed = ""
  for command in commands(fence):
    if command not in NOT_RUN:
      shell = INSTEAD.get(command, command)
      printed += run(["bash", "-euo", "pipefail", "-c", shell], folder, f"{where}: {shell}")
  return printed


def check_output(printed: str, shown: Fence) -> None:
  """Compares words exactly and numbers to one unit of the last digit that is shown."""
  where = f"{shown.page}:{shown.line}: this is printed now:\n{printed}"
  assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown.text).split(), where
  for got, want in zip(NUMBER.findall(printed), NUMBER.findall(shown.text), strict=True):
    mantissa, _, exponent = want.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    assert abs(float(got.replace(",", "")) - float(want.replace(",", ""))) <= 1.01 * unit, where


@pytest.fixture
def copy(tmp_path: Path) -> Path:
  """A copy of the repository, so that commands can write where they like."""
  target = tmp_path / "repository"
  shutil.copytree(REPOSITORY, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
  return target


def page_or_full(page: Path):
  long = page.name not in BRIEF and any(f.language in ("bash", "python") for f in fences(page))
  return pytest.param(page, id=page.name, marks=pytest.mark.full if long else ())


@pytest.mark.parametrize("page", [page_or_full(page) for page in PAGES])
def test_page_does_what_it_says(page: Path, copy: Path):
  printed = None
  for fence in fences(page):
    if fence.language == "text":
      if printed is not None and fence.adjacent:
        check_output(printed, fence)
      printed = None
    else:
      printed = run_fence(fence, copy)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_in_a_language_that_is_checked(page: Path):
  others = [f for f in fences(page) if f.language not in LANGUAGES]
  assert not others, f"use one of {sorted(LANGUAGES)}: {others}"


def test_no_exception_is_left_from_a_command_that_is_gone():
  shown = {c for page in PAGES for f in fences(page) if f.language == "bash" for c in commands(f)}
  assert not NOT_RUN.keys() - shown
  if (REPOSITORY / "README.md").exists():
    assert not INSTEAD.keys() - shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path):
  links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)|src=\"(?!https?:)([^\"]+)\"", page.read_text())
  for link in (a or b for a, b in links):
    assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
  ("printed", "shown", "same"),
  [
    ("a 1.00 b", "a 1.01 b", True),
    ("a 1.00 b", "a 1.03 b", False),
    ("a 1.00 b", "a 1.00 c", False),
    ("a 1 b", "a 1 2 b", False),
    ("1,024 px", "1,025 px", True),
    ("2.0e-3", "3.2e-3", False),
  ],
)
def test_the_comparison_can_fail(printed: str, shown: str, same: bool):
  fence = Fence("page", 1, "text", shown)
  if same:
    check_output(printed, fence)
  else:
    with pytest.raises(AssertionError):
      check_output(printed, fence)
