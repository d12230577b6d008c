"""The tokenizer beside two towers of transformers: what its files say, and what is not used."""

import json

import pytest

from flexivit_jax.weights.transformers import towers

FIELDS = dict(max_length=5, vocab_size=6, eos_token=3)
VOCABULARY = {"<pad>": 0, "cat": 1, "dog": 2, "</s>": 3}


def written(folder, config=None):
  special = [
    dict(id=VOCABULARY[word], content=word, special=True, single_word=False, lstrip=False, rstrip=False,
         normalized=False)
    for word in ("<pad>", "</s>")
  ]  # fmt: skip
  model = {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<pad>"}
  content = {"version": "1.0", "model": model, "added_tokens": special}
  content |= {"pre_tokenizer": {"type": "Whitespace"}}
  (folder / towers.TOKENIZER).write_text(json.dumps(content))
  if config is not None:
    (folder / towers.TOKENIZER_CONFIG).write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize(
  ("family", "config", "expected"),
  [
    ("siglip", dict(pad_token="<pad>", eos_token="</s>"), dict(pad=0, end=3, lower=True)),
    ("siglip", dict(pad_token={"content": "<pad>"}), dict(pad=0, end=3, lower=True)),
    ("siglip", None, dict(pad=3, end=3, lower=True)),
    ("clip", None, dict(pad=3, end=3, lower=False)),
    ("clip", dict(pad_token="<pad>"), dict(pad=0, end=3, lower=False)),
  ],
)
def test_its_files_say_padding_and_end(tmp_path, family, config, expected):
  record, notes = towers.tokenizer(written(tmp_path, config), family, FIELDS)
  assert record.pop("tokenizer") == (tmp_path / towers.TOKENIZER).read_text()
  assert record == expected | {"length": 5} and notes == []


def test_there_may_be_none(tmp_path):
  assert towers.tokenizer(tmp_path, "clip", FIELDS) == (None, [])


@pytest.mark.parametrize(
  ("config", "fields", "expected"),
  [
    (dict(padding_side="left"), {}, "padding before a text"),
    (dict(pad_token="<nothing>"), {}, "no token '<nothing>'"),
    ({}, dict(vocab_size=3), "it has 4 tokens, the text tower 3"),
  ],
)
def test_one_that_does_not_fit_is_left_out_with_the_reason(tmp_path, config, fields, expected):
  record, notes = towers.tokenizer(written(tmp_path, config), "siglip", FIELDS | fields)
  assert record is None and expected in notes[0] and "tokenizer.json is not used" in notes[0]


def test_punctuation_that_siglips_own_tokenizer_leaves_out_is_said(tmp_path):
  folder = written(tmp_path, dict(tokenizer_class="SiglipTokenizer"))
  _, notes = towers.tokenizer(folder, "siglip", FIELDS)
  assert "punctuation" in notes[0]
