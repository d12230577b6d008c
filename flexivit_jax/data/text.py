"""Texts as tokens: by any tokenizer.json, by SentencePiece's .model files, or byte by byte.

How long a row is, how a text ends and what follows it is always stated (`Tokens`), whatever a file says of truncation
and padding.
"""

import base64
import binascii
import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Int32

from flexivit_jax import errors

BYTES = "bytes"
"""In the place of a file: each byte of a text in UTF-8 is a token, and there are `PAD` and `END`. Needs no file."""
PAD, END = "[PAD]", "[END]"
_SENTENCEPIECE = "sentencepiece:"  # before a .model file in base64

Ids = Callable[[str], list[int]]


@final
@dataclasses.dataclass(frozen=True)
class Tokens:
  """How a text becomes a row of tokens: all that is needed, so that a checkpoint which holds it needs no other file.

  Attributes:
    tokenizer: what a tokenizer.json holds, as text; or "sentencepiece:" and a .model file in base64.
    length: tokens of a row. A longer text is cut, and its end token kept.
    pad: the token after a text. With `pad` equal to `end` the last token of each row is `end`, as pool_type="last" of a
      text tower needs it; big_vision calls that eos="sticky" with pad_value=1.
    end: the last token of each text; added where the tokenizer does not add it. None: texts have none.
    lower: texts are put into lower case first.
  """

  tokenizer: str
  length: int
  pad: int
  end: int | None
  lower: bool = False

  def __post_init__(self) -> None:
    size = self.vocab_size
    for name, token in {"pad": self.pad, "end": self.end}.items():
      if token is not None and not 0 <= token < size:
        raise errors.UserError(
          f"{name}={token}; expected a token of the tokenizer, 0 to {size - 1}."
        )
    if self.length < (1 if self.end is None else 2):
      raise errors.UserError(f"length={self.length}; expected room for a token and the end token.")

  @property
  def vocab_size(self) -> int:
    """One more than the largest token."""
    return _opened(self.tokenizer).vocab_size

  def encode(self, texts: Sequence[str]) -> Int32[np.ndarray, "n l"]:
    """Returns a row for each text.

    Raises:
      UserError: a text that is empty, or of which nothing is left.
    """
    rows = [self._row(text) for text in texts]
    return np.array(rows, np.int32).reshape(len(rows), self.length)

  def full_length(self, text: str) -> int:
    """Returns how many tokens a text has before it is cut."""
    return len(self._whole(text))

  def record(self) -> dict[str, Any]:
    """Returns it as JSON, what `of_record` reads."""
    return dataclasses.asdict(self)

  def _row(self, text: str) -> list[int]:
    row = self._whole(text)
    if len(row) > self.length:
      row = row[: self.length]
      row[-1] = row[-1] if self.end is None else self.end
    return row + [self.pad] * (self.length - len(row))

  def _whole(self, text: str) -> list[int]:
    ids = _opened(self.tokenizer).ids(text.lower() if self.lower else text)
    if not text.strip() or not ids:
      raise errors.UserError(f"Got the text {text!r}, which has no tokens; expected words.")
    return ids if self.end is None or ids[-1] == self.end else [*ids, self.end]


def load(
  path: str | os.PathLike[str],
  *,
  length: int,
  pad: str | int,
  end: str | int | None,
  lower: bool = False,
) -> Tokens:
  """Reads a tokenizer.

  Args:
    path: a tokenizer.json, SentencePiece's .model, a folder with one of them, or `BYTES`.
    length, lower: see `Tokens`.
    pad, end: see `Tokens`; as text ("[SEP]", "</s>"), or as number.

  Raises:
    UserError: no such file; not a tokenizer; it has no such token; the package that reads it is not installed.
  """
  tokenizer = _read(path)
  opened = _opened(tokenizer)
  numbers: dict[str, int | None] = {}
  for name, token in {"pad": pad, "end": end}.items():
    number = opened.number(token) if isinstance(token, str) else token
    if number is None and token is not None:
      special = ", ".join(opened.special[:12]) or "none"
      raise errors.UserError(
        f"{path} has no token {token!r} ({name}=); its special tokens are {special}. Give one of its tokens."
      )
    numbers[name] = number
  return Tokens(tokenizer, length, numbers["pad"], numbers["end"], lower)


def of_record(record: Mapping[str, Any]) -> Tokens:
  """Returns what `Tokens.record` made.

  Raises:
    UserError: it is not one.
  """
  try:
    return Tokens(**record)
  except TypeError as e:
    raise errors.UserError(f"No record of a tokenizer: {e}.") from e


def train(texts: Iterable[str], size: int) -> str:
  """Returns a tokenizer.json, as text, whose tokens are the frequent pieces of these texts; always the same for them.

  Bytes that are frequent neighbours are joined (byte-pair encoding), so that no text has an unknown token. Texts are
  put into lower case, and their Unicode into one form (NFKC). Each ends with `END`.

  Args:
    texts: captions.
    size: the number of tokens at most: `PAD`, `END`, 256 bytes, and pieces.

  Raises:
    UserError: no texts, or a size without room for the bytes.
  """
  least = 2 + 256
  if size < least:
    raise errors.UserError(f"size={size}; expected at least {least}: all bytes, {PAD} and {END}.")
  tokenizers, tokenizer = _byte_level()
  lines = [text for text in texts if text.strip()]
  if not lines:
    raise errors.UserError("Got no texts to make a tokenizer of; expected captions.")
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[PAD, END],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  # One at a time: the library then counts in one thread.
  tokenizer.train_from_iterator(lines, trainer, length=len(lines))
  return _ending(tokenizers, tokenizer).to_str(pretty=True) + "\n"


class _Opened(NamedTuple):
  """A tokenizer that can be used; `number` of a token that it has not is None."""

  ids: Ids
  vocab_size: int
  number: Callable[[str], int | None]
  special: list[str]


@functools.lru_cache(maxsize=8)
def _opened(tokenizer: str) -> _Opened:
  if tokenizer.startswith(_SENTENCEPIECE):
    return _open_sentencepiece(tokenizer.removeprefix(_SENTENCEPIECE))
  library = _library("tokenizers")
  try:
    opened = library.Tokenizer.from_str(tokenizer)
  except Exception as e:  # the library raises no other class
    raise errors.UserError(f"Not a tokenizer.json: {e}") from e
  opened.no_truncation()
  opened.no_padding()
  names = {token.content for token in opened.get_added_tokens_decoder().values() if token.special}

  def ids(text: str) -> list[int]:
    encoded = opened.encode(text)
    return [] if all(encoded.special_tokens_mask) else encoded.ids

  largest = max(opened.get_vocab(with_added_tokens=True).values(), default=-1)
  return _Opened(ids, largest + 1, opened.token_to_id, sorted(names))


def _open_sentencepiece(encoded: str) -> _Opened:
  library = _library("sentencepiece")
  try:
    opened = library.SentencePieceProcessor(model_proto=base64.b64decode(encoded, validate=True))
  except (RuntimeError, binascii.Error) as e:
    raise errors.UserError(f"Not a model of SentencePiece: {e}.") from e
  size = opened.vocab_size()
  special = [opened.id_to_piece(i) for i in range(size) if opened.is_control(i)]

  def number(token: str) -> int | None:
    at = opened.piece_to_id(token)
    return at if opened.id_to_piece(at) == token else None

  return _Opened(opened.encode, size, number, special)


def _read(path: str | os.PathLike[str]) -> str:
  """Returns the file as `Tokens.tokenizer`."""
  if str(path) == BYTES:
    return _bytes()
  file = pathlib.Path(path)
  if file.is_dir():
    inside = [file / name for name in ("tokenizer.json", "spiece.model", "sentencepiece.model")]
    file = next((one for one in inside if one.is_file()), file / "tokenizer.json")
  if not file.is_file():
    raise errors.UserError(
      f"{file} does not exist; expected a tokenizer.json, a .model of SentencePiece, or {BYTES!r}. `flexivit tokenizer`"
      " makes one of your captions."
    )
  content = file.read_bytes()
  if file.suffix == ".model":
    return _SENTENCEPIECE + base64.b64encode(content).decode()
  try:
    json.loads(content)
    text = content.decode()
    _opened(text)
  except (ValueError, errors.UserError) as e:
    raise errors.UserError(
      f"{file} is no tokenizer.json: {e}. A file of SentencePiece ends in .model; a vocabulary alone (vocab.txt) is not"
      " enough."
    ) from e
  return text


@functools.cache
def _bytes() -> str:
  tokenizers, _ = _byte_level()
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate((PAD, END, *alphabet))}
  _, tokenizer = _byte_level(vocab)
  tokenizer.add_special_tokens([PAD, END])
  return _ending(tokenizers, tokenizer).to_str()


def _byte_level(vocab: Mapping[str, int] | None = None) -> tuple[Any, Any]:
  """Returns the library, and a tokenizer of bytes without merges; with None for the vocabulary it is to be trained."""
  tokenizers = _library("tokenizers")
  bpe = tokenizers.models.BPE() if vocab is None else tokenizers.models.BPE(dict(vocab), [])
  tokenizer = tokenizers.Tokenizer(bpe)
  normalizers = tokenizers.normalizers
  tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizers, tokenizer


def _ending(tokenizers: Any, tokenizer: Any) -> Any:
  """Returns the tokenizer, whose texts end with `END`."""
  end = (END, tokenizer.token_to_id(END))
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[end]
  )
  return tokenizer


def _library(name: str) -> types.ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise errors.UserError(
      f"Texts as tokens need the package {name}, which cannot be imported ({e}). Install it with"
      f" `pip install {name}`; the extra 'text' of flexivit_jax brings it."
    ) from e


class Sample(NamedTuple):
  """Lengths of some texts: how many there are, the share that is cut, mean and largest length in tokens."""

  number: int
  cut: float
  mean: float
  longest: int


def sample_lengths(tokens: Tokens, texts: Iterable[str], most: int = 1000) -> Sample | None:
  """Returns how long the first `most` of these texts are; None: there are none. Texts without words are left out."""
  lengths = [tokens.full_length(t) for t in itertools.islice(texts, most) if t.strip()]
  if not lengths:
    return None
  cut = sum(n > tokens.length for n in lengths) / len(lengths)
  return Sample(len(lengths), cut, sum(lengths) / len(lengths), max(lengths))
