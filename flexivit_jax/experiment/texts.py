"""How texts become tokens in a run: in one way for all its data, which has to fit the text tower."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

from flexivit_jax import config, data, errors
from flexivit_jax.data import text
from flexivit_jax.data.text import Tokens
from flexivit_jax.models import Model, TextTower

_SAMPLE = 1000  # captions whose length is counted at the start of a run
_READ = 64  # examples that are read for it, where their captions are in the files of images


def of_run(
  pp: str, model: Model, tokens_of: Callable[[str], Tokens | None] = data.tokens_of
) -> Tokens | None:
  """Returns how the training data's preprocessing makes tokens of texts; None: it makes none.

  Args:
    pp: of the training data.
    model: whose text tower, if it has one, is to take the tokens.
    tokens_of: see `preprocess.tokens_of`.

  Raises:
    UserError: tokens that the text tower has not; more tokens than positions; another end or padding than it looks for.
  """
  tokens = tokens_of(pp)
  if tokens is not None:
    for name, part in getattr(model, "parts", {}).items():
      if isinstance(part, TextTower):
        _check(tokens, part, f"model.{name}")
  return tokens


def check_same(
  tokens: Tokens | None, evals: Mapping[str, str], tokens_of: Callable[[str], Tokens | None]
) -> None:
  """Raises a UserError where an evaluation's preprocessing makes tokens in another way than the training's."""
  for name, pp in evals.items():
    with config.naming(f"evals.{name}"):
      other = tokens_of(pp)
    if other is not None and tokens is not None and other != tokens:
      fields = [f for f, value in tokens.record().items() if value != other.record()[f]]
      raise errors.UserError(
        f"evals.{name}.pp makes tokens in another way than input.pp ({', '.join(fields)}); expected the same file, and"
        " length, pad, end and lower alike."
      )


def _check(tokens: Tokens, tower: TextTower, where: str) -> None:
  if tokens.vocab_size > tower.vocab_size:
    raise errors.UserError(
      f"The tokenizer of input.pp has {tokens.vocab_size} tokens, {where}.vocab_size is {tower.vocab_size}; expected at"
      " least as many. A tower from a file takes the tokenizer of that file."
    )
  if tokens.length > tower.max_length:
    raise errors.UserError(
      f"input.pp makes {tokens.length} tokens, {where}.max_length is {tower.max_length}; make one of them the other."
    )
  if tower.eos_token is not None and tokens.end != tower.eos_token:
    raise errors.UserError(
      f"Texts end with the token {tokens.end}, {where} pools the first token {tower.eos_token} (eos_token); expected"
      " the same."
    )
  if tower.pad_token is not None and tokens.pad != tower.pad_token:
    raise errors.UserError(
      f"Texts are padded with the token {tokens.pad}, {where} leaves out the token {tower.pad_token} (pad_token);"
      " expected the same."
    )


def note(tokens: Tokens, source: data.Source) -> str | None:
  """Returns a line on how long a sample of the captions is, and how many of it are cut; None: no captions."""
  sample = text.sample_lengths(tokens, _captions(source), _SAMPLE)
  if sample is None:
    return None
  return (
    f"{sample.cut:.1%} of {sample.number:,} captions are longer than {tokens.length} tokens and are cut (mean"
    f" {sample.mean:.1f}, longest {sample.longest})"
  )


def _captions(source: data.Source) -> Iterator[str]:
  """The captions of some examples that are spread over the data."""
  if source.listing is not None:
    records: Iterable[Mapping[str, object]] = source.listing()
    every = max(1, len(source) // _SAMPLE)
    chosen: Iterable[Mapping[str, object]] = itertools.islice(records, 0, None, every)
  else:
    every = max(1, len(source) // _READ)
    chosen = _readable(source, range(0, len(source), every))
  for record in chosen:
    captions = record.get("captions")
    yield from captions if isinstance(captions, tuple) else ()


def _readable(source: data.Source, indices: Iterable[int]) -> Iterator[Mapping[str, object]]:
  for index in indices:
    try:
      yield source[index]
    except Exception:  # bad examples are reported where batches are made
      continue
