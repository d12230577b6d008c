"""`flexivit pack`: the command line, its lock, its end by signals; and kills of the command itself."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.commands import pack
from flexivit_jax.data import make_source, packs
from flexivit_jax.running import exit_codes, run_folder

pytestmark = pytest.mark.faults

SYNTHETIC = ["name=synthetic", "split=train", "image_size=8", "num_examples=50"]


@pytest.fixture
def photos(tmp_path):
  for k, name in enumerate(("cat", "dog")):
    (tmp_path / "photos" / "train" / name).mkdir(parents=True)
    for i in range(4):
      image = np.random.default_rng((k, i)).integers(0, 256, (9, 7, 3), np.uint8)
      Image.fromarray(image).save(tmp_path / "photos" / "train" / name / f"{i}.png")
  return tmp_path / "photos"


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_a_folder_is_packed_and_verified(photos, tmp_path, capsys):
  out = tmp_path / "out"
  data = ["name=folder", f"data_dir={photos}", "split=train[:6]"]
  assert cli.main(["pack", *data, "--out", str(out)]) == 2
  assert "--split gives a name" in capsys.readouterr().err and not out.exists()
  line = ["pack", *data, "--out", str(out), "--split=train", "--shard_examples=4"]
  assert cli.main(line) == 0
  said = capsys.readouterr().out
  assert said.startswith(f"{out}: train: 6 examples in 2 shards of 0.2 MiB in all. To read it:")
  source = make_source(name="packed", split="train", data_dir=out)
  folder = make_source(name="folder", split="train[:6]", data_dir=photos)
  assert source.read(range(6)) == folder.read(range(6))
  assert cli.main(["verify", str(out)]) == 0
  shard = out / "train-00001.array_record"
  assert f"{shard}: as it was written" in capsys.readouterr().out
  data = bytearray(shard.read_bytes())
  data[-1] ^= 1
  shard.write_bytes(data)
  assert cli.main(["verify", str(out)]) == 2
  assert capsys.readouterr().err == f"flexivit: error: Damaged: {shard}.\n"
  shard.unlink()
  assert cli.main(line) == 0 and cli.main(["verify", str(out)]) == 0


def test_bad_rows_and_bad_lines(photos, tmp_path, capsys):
  path = photos / "train" / "cat" / "0.png"
  path.write_bytes(b"")
  out = tmp_path / "out"
  line = ["pack", "name=folder", f"data_dir={photos}", "split=train", "--out", str(out)]
  assert cli.main(line) == 2
  assert "('train/cat/0.png'): image: an empty file. Repair" in capsys.readouterr().err
  assert cli.main([*line, "--on_bad=skip"]) == 0
  said = capsys.readouterr()
  assert "train: 7 examples in 1 shard of" in said.out and ", 1 bad rows left out." in said.out
  assert "left out row" in said.err
  for bad, text in (
    (["photos"], "expected KEY=VALUE"),
    (["data_dir=photos"], "Give name="),
    (["name=a", "name=b"], "name= is given twice"),
    (["name=folder", "split=train", "data_dri=x"], "Did you mean 'data.data_dir'?"),
    (["name=tar"], "data.data_dir"),
    (["name=tar", "data_dir=x", "--shard_mb=1e400"], "--shard_mb is inf; expected"),
    (["name=tar", "data_dir=x", "--shard_mb=nan"], "--shard_mb is nan; expected"),
    (["name=tar", "data_dir=x", "num_classes=many"], "num_classes is 'many'; expected"),
  ):
    assert cli.main(["pack", *bad, "--out", str(tmp_path / "new")]) == 2
    assert text in capsys.readouterr().err, bad
  assert not (tmp_path / "new").exists()


def test_bad_annotations_are_left_out_and_recorded(photos, tmp_path, capsys):
  rows = [("0", "a cat"), ("1", " "), ("9", "no file"), ("2", "more")]
  lines = [json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in rows]
  (photos / "train" / "cat" / "metadata.jsonl").write_text("\n".join(lines))
  line = [
    "pack",
    "name=captions",
    f"data_dir={photos / 'train'}",
    "split=cat",
    "--out",
    str(tmp_path / "out"),
  ]
  assert cli.main(line) == 2
  assert (
    "2 bad rows: line 2: the caption is empty; line 3: no file '9.png'" in capsys.readouterr().err
  )
  assert cli.main([*line, "--on_bad=skip"]) == 0
  split = packs.split_of(tmp_path / "out", "cat")
  assert split["left_out"] == ["line 2: the caption is empty", "line 3: no file '9.png'"]
  source = make_source(name="packed", split="cat", data_dir=tmp_path / "out")
  assert sorted(r["captions"] for r in source.read(range(2))) == [("a cat",), ("more",)]
  assert source.labels is None


def test_progress_is_a_line_every_few_seconds(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(pack, "_EVERY_S", 0.0)
  assert cli.main(["pack", *SYNTHETIC, f"--out={tmp_path}", "--shard_examples=5"]) == 0
  lines = capsys.readouterr().err.splitlines()
  line = r"row 7/50 \| 1 shards \| 0 MiB \| [\d,]+ rows/s \| 0\.0 min left"
  assert len(lines) == 60 and re.fullmatch(line, lines[7])


def test_only_one_packs_into_a_folder(tmp_path, capsys):
  line = ["pack", *SYNTHETIC, "--out", str(tmp_path / "out")]
  with run_folder.locked(tmp_path / "out"):
    assert cli.main(line) == 2
  said = capsys.readouterr().err
  assert "is in use by process" in said and "give another --out" in said
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "photo.jpg").touch()
  assert cli.main([*line[:-1], str(tmp_path / "mine")]) == 2
  assert [p.name for p in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
  assert cli.main([*line[:-1], "s3://bucket/packed"]) == 2
  assert "aws s3 cp --recursive FOLDER s3://bucket/packed" in capsys.readouterr().err


def command(out):
  data = ["name=synthetic", "split=train", "image_size=64", "num_examples=1000"]
  return [sys.executable, "-m", "flexivit_jax", "pack", *data, f"--out={out}", "--shard_mb=0.2"]


def packed(out):
  subprocess.run(command(out), capture_output=True, check=True)
  return contents(out)


@pytest.mark.slow
def test_ten_kills_of_the_command_change_nothing(tmp_path):
  began = time.monotonic()
  left_alone = packed(tmp_path / "left_alone")
  took = time.monotonic() - began
  kills, rng = 0, random.Random(0)
  while kills < 10:
    with subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL) as run:
      time.sleep(rng.uniform(0.3 * took, 0.8 * took))
      run.kill()
    kills += run.returncode == -signal.SIGKILL
    if kills < 10 and (tmp_path / "killed" / "manifest.json").exists():
      assert contents(tmp_path / "killed") == left_alone
      shutil.rmtree(tmp_path / "killed")  # it is complete; another one
  assert packed(tmp_path / "killed") == left_alone


@pytest.mark.slow
def test_a_signal_is_one_line_and_the_same_command_goes_on(tmp_path):
  with subprocess.Popen(command(tmp_path / "out"), stderr=subprocess.PIPE, text=True) as run:
    while not (tmp_path / "out" / "train-00001.json").exists():
      time.sleep(0.01)
    run.terminate()
    _, err = run.communicate()
  assert run.returncode == exit_codes.STOPPED
  assert err == "flexivit: stopped by SIGTERM; the same command goes on\n"
  assert not list((tmp_path / "out").glob("*.tmp"))
  assert packed(tmp_path / "out") == packed(tmp_path / "left_alone")
