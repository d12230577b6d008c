"""The embeddings of a locked image tower are cached: by example, size and tower, and the run is the same to the bit."""

import jax
import numpy as np
import pytest

from flexivit_jax import errors, experiment, train as train_lib
from flexivit_jax.running import checkpoint, metrics_writer
from flexivit_jax.training import locked

pytest.importorskip("tokenizers")

PP = "decode|resize(24)|value_range|random_caption|tokenize('bytes', length=8, pad=0, end=1)|keep('image', 'tokens')"


def config(**changes):
  data = dict(name="synthetic", split="train", image_size=24, num_classes=4, num_examples=12)
  text = dict(width=16, depth=1, mlp_dim=16, num_heads=2, vocab_size=258, max_length=8)
  base = dict(
    total_steps=5,
    input=dict(data=dict(data, annotated=True), pp=PP, batch_size=8, threads=0),
    model=dict(name="two_towers", embed_dim=8, image=dict(variant="mu"), text=text),
    objective=dict(name="sigmoid_contrastive"),
    flexi=dict(seqhw=dict(v=(2, 4))),
    optim=dict(lr=1e-2, freeze=("image/.*",)),
    log_every=1,
  )
  return base | changes


def losses(run):
  return [row["loss"] for row in metrics_writer.read_rows(run / "metrics.jsonl")]


@pytest.mark.full
def test_a_run_that_reads_the_cache_is_bit_equal_to_one_that_does_not(
  tmp_path, monkeypatch, capsys
):
  cached = config(tower_cache=str(tmp_path / "cache"))
  with monkeypatch.context() as patched:
    patched.setattr(locked.EmbeddingCache, "read", lambda *_: None)  # nothing is read
    uncached = train_lib.train(cached, tmp_path / "uncached")

  asked = []
  whole = locked.EmbeddingCache.read

  def read(*args):
    asked.append(whole(*args) is not None)
    return whole(*args)

  monkeypatch.setattr(locked.EmbeddingCache, "read", read)
  again = train_lib.train(cached, tmp_path / "again")
  assert asked == [True] * 5
  assert losses(uncached) == losses(again)
  a, b = (checkpoint.load_params(run)[0]["text"] for run in (uncached, again))
  for name, array in a["head"].items():
    np.testing.assert_array_equal(array, b["head"][name])
  # One program for all: the same numbers, but for rounding.
  np.testing.assert_allclose(
    losses(train_lib.train(config(), tmp_path / "one")), losses(again), rtol=1e-5
  )


def test_rows_are_found_by_example_and_size_and_a_damaged_one_is_missing(tmp_path):
  cache = locked.EmbeddingCache(tmp_path, {"tower": "a"}, examples=6, length=3)
  ids, rows = np.array([4, 1]), np.float32([[1, 2, 3], [0, 0, 0]])
  assert cache.read({"seqhw": 2}, ids) is None
  cache.write({"seqhw": 2}, ids, rows)
  again = locked.EmbeddingCache(tmp_path, {"tower": "a"}, examples=6, length=3)
  np.testing.assert_array_equal(again.read({"seqhw": 2}, ids[::-1]), rows[::-1])
  assert again.read({"seqhw": 2}, np.array([1, 2])) is None
  assert again.read({"seqhw": 4}, ids) is None
  other = locked.EmbeddingCache(tmp_path, {"tower": "b"}, examples=6, length=3)
  assert other.read({"seqhw": 2}, ids) is None
  (file,) = cache.folder.glob("*2.rows")
  content = bytearray(file.read_bytes())
  content[4 * 20] ^= 1  # the first byte of example 4
  file.write_bytes(content)
  damaged = locked.EmbeddingCache(tmp_path, {"tower": "a"}, examples=6, length=3)
  assert damaged.read({"seqhw": 2}, np.array([4])) is None
  assert damaged.read({"seqhw": 2}, np.array([1])) is not None


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    (dict(optim=dict(lr=1e-2)), "the image tower is not locked"),
    (
      dict(input=config()["input"] | dict(pp=PP.replace("resize(24)", "flip_lr|resize(24)"))),
      "flip_lr in input.pp change an image",
    ),
    (dict(tower_cache="s3://bucket/cache"), "it cannot be in a bucket"),
  ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, change, expected):
  with pytest.raises(errors.UserError, match=f"tower_cache cannot be used: .*{expected}"):
    experiment.from_config(config(**{"tower_cache": str(tmp_path), **change}))


def test_several_processes_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(errors.UserError, match=r"tower_cache cannot be used: .*several processes"):
    experiment.from_config(config(tower_cache=str(tmp_path)))


def test_what_a_cache_depends_on(tmp_path):
  def about(**changes):
    return experiment.from_config(config(tower_cache=str(tmp_path), **changes)).tower_cache.about

  section = config()["input"]
  longer = PP.replace("random_caption", "first_caption")
  assert about() == about(input=section | dict(pp=longer)) == about(seed=1)
  assert about() != about(input=section | dict(pp=PP.replace("resize(24)", "resize(48)")))
