"""`flexivit tokenizer`: a tokenizer of captions, by one command."""

import re

import pytest

from flexivit_jax import cli
from flexivit_jax.data import text

pytest.importorskip("tokenizers")

DATA = ["name=synthetic", "split=train", "image_size=8", "num_examples=20", "annotated=True"]


def test_a_tokenizer_is_written_once_and_is_always_the_same(tmp_path, capsys):
  files = [tmp_path / name for name in ("a.json", "b.json")]
  for file in files:
    assert cli.main(["tokenizer", *DATA, "--out", str(file), "--size=300"]) == 0
  assert files[0].read_bytes() == files[1].read_bytes()
  said = capsys.readouterr().out.splitlines()[0]
  call = re.search(r"tokenize\((.*), length=(\d+), pad='\[PAD\]', end='\[END\]'\)", said)
  tokens = text.load(files[0], length=int(call[2]), pad="[PAD]", end="[END]")
  assert f"model.text.vocab_size={tokens.vocab_size}" in said
  assert tokens.full_length("rectangles of class 3") < 12
  assert cli.main(["tokenizer", *DATA, "--out", str(files[0])]) == 2
  assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    (DATA[:-1], "has no captions"),
    ([*DATA, "--size=9"], "size=9; expected at least 258"),
    (["split=train"], "Give name="),
  ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, line, expected):
  assert cli.main(["tokenizer", *line, "--out", str(tmp_path / "t.json")]) == 2
  assert expected in capsys.readouterr().err
  assert not (tmp_path / "t.json").exists()
