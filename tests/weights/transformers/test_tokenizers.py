"""The tokenizer beside two towers of transformers: what its files say, and what is not used."""

import json

import pytest

from flexivit_jax.data import text
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


MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]


def merged(folder, merges=MERGES, **more):
  """Writes the files of a small CLIP tokenizer without a tokenizer.json."""
  letters = [chr(c) for c in range(33, 127)]
  words = [*letters, *(letter + "</w>" for letter in letters)]
  words += [line.replace(" ", "") for line in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
  vocab = {word: i for i, word in enumerate(words)} | more
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
  return vocab


def test_byte_pairs_in_two_files_are_clips_tokenizer(tmp_path):
  """That transformers makes the same of the same files: tests/foreign/test_detector.py."""
  vocab = merged(tmp_path)
  (tmp_path / towers.TOKENIZER_CONFIG).write_text(json.dumps({"pad_token": "!"}))
  fields = dict(max_length=7, vocab_size=len(vocab), eos_token=len(vocab) - 1)
  record, notes = towers.tokenizer(tmp_path, "owlvit", fields)
  assert notes == [] and (record["pad"], record["end"], record["length"]) == (0, len(vocab) - 1, 7)
  row = text.of_record(record).encode(["A  Cat, dog"])[0]
  words = ["<|startoftext|>", "a</w>", "cat</w>", ",</w>", "dog</w>", "<|endoftext|>", "!"]
  assert row.tolist() == [vocab[word] for word in words]
  assert towers.tokenizer(tmp_path, "siglip", fields | dict(vocab_size=300)) == (None, [])


@pytest.mark.parametrize(
  ("merges", "pad", "expected"),
  [(["c a t"], "!", "merges.txt: expected two parts"), (MERGES, "[PAD]", "no token '[PAD]'")],
)
def test_byte_pairs_that_are_broken_are_left_out_with_the_reason(tmp_path, merges, pad, expected):
  vocab = merged(tmp_path, merges)
  (tmp_path / towers.TOKENIZER_CONFIG).write_text(json.dumps({"pad_token": pad}))
  fields = dict(max_length=7, vocab_size=len(vocab), eos_token=len(vocab) - 1)
  record, notes = towers.tokenizer(tmp_path, "clip", fields)
  assert record is None and expected in notes[0]
