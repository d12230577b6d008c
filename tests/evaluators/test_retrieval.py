"""Retrieval against double loops in float64 and a case counted by hand; the evaluator on one device and on eight."""

import functools
import json

import jax
import numpy as np
import pytest

from flexivit_jax import experiment
from flexivit_jax.data.preprocess import OPS
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import embedding, retrieval as module
from flexivit_jax.evaluators.retrieval import both_ways, per_image, ranks, retrieval
from flexivit_jax.models import FlexiViT, TwoTowers
from flexivit_jax.training import steps

SIZES = [2, 4]


def share(values):
  return values[:, 0].sum() / values[:, 1].sum()


def by_loops(image, text, image_of, k, ties):
  """R@k both ways; `ties` is the share of equal ones that goes before what belongs to a query."""
  i2t, t2i = [], []
  for i, x in enumerate(image):
    own = max(float(np.dot(x, text[j])) for j in range(len(text)) if image_of[j] == i)
    others = [float(np.dot(x, text[j])) for j in range(len(text)) if image_of[j] != i]
    i2t.append(1 + sum(s > own for s in others) + ties * sum(s == own for s in others) <= k)
  for j, y in enumerate(text):
    own = float(np.dot(y, image[image_of[j]]))
    others = [float(np.dot(y, x)) for i, x in enumerate(image) if i != image_of[j]]
    t2i.append(1 + sum(s > own for s in others) + ties * sum(s == own for s in others) <= k)
  return np.mean(i2t), np.mean(t2i)


# --- ranks ---


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block", [1, 60, 2**23])
def test_recalls_are_those_of_double_loops_with_ties_among_them(seed, block, monkeypatch):
  """Small integers: products are exact, many of them equal, and some vectors are there twice."""
  monkeypatch.setattr(module, "BLOCK", block)
  rng = np.random.default_rng(seed)
  n, e = int(rng.integers(2, 20)), int(rng.integers(1, 4))
  image_of = np.sort(np.concatenate([np.arange(n), rng.integers(n, size=rng.integers(30))]))
  image = np.float32(rng.integers(-2, 3, (n, e)))
  text = np.float32(rng.integers(-2, 3, (len(image_of), e)))
  found = both_ways(image, text, image_of)
  for ties in (0.0, 0.5, 1.0):
    values = per_image(found, image_of, ties)
    for k in (1, 5, 10):
      i2t, t2i = by_loops(image, text, image_of, k, ties)
      assert share(values[f"i2t_r{k}"]) == pytest.approx(i2t)
      assert share(values[f"t2i_r{k}"]) == pytest.approx(t2i)


def test_a_case_counted_by_hand():
  """Three images at 0, 90 and 180 degrees. Captions: 0 and 80 of the first, 170 of the second, 100 of the third."""
  angle = lambda *d: np.stack([np.cos(np.deg2rad(d)), np.sin(np.deg2rad(d))], axis=1)  # noqa: E731
  image, text = angle(0, 90, 180), angle(0, 80, 170, 100)
  image_of = np.array([0, 0, 1, 2])
  found = both_ways(image, text, image_of)
  # The image at 0 has its own at 0. To 90, those at 80 and 100 are nearer than 170; to 180, 170 is nearer than 100.
  assert found["i2t"].above.tolist() == [0, 2, 1]
  # The caption at 80 is 10 degrees from another image, 80 from its own; 170 is nearest to 180, 100 to 90.
  assert found["t2i"].above.tolist() == [0, 1, 1, 1]
  values = per_image(found, image_of)
  assert share(values["i2t_r1"]) == pytest.approx(1 / 3)
  assert share(values["t2i_r1"]) == pytest.approx(1 / 4)
  assert share(values["i2t_r5"]) == share(values["t2i_r5"]) == 1.0


def test_a_constant_embedding_finds_nothing_by_the_order_of_the_data():
  image_of = np.repeat(np.arange(40), 2)
  found = both_ways(np.ones((40, 3)), np.ones((80, 3)), image_of)
  assert (found["i2t"].equal == 78).all() and (found["t2i"].equal == 39).all()
  assert share(per_image(found, image_of)["i2t_r10"]) == 0.0
  assert share(per_image(found, image_of, 0.0)["t2i_r1"]) == 1.0


def test_equal_vectors_are_equally_alike_wherever_they_stand():
  """Random floats, whose products a matrix product may round by their place."""
  rng = np.random.default_rng(0)
  queries, few = rng.normal(size=(50, 64)), np.float32(rng.normal(size=(7, 64)))
  candidates = few[np.arange(301) % 7]
  found = ranks(queries, candidates, np.arange(50)[:, None])
  assert set(found.equal) == {42} and set(found.above) <= {43 * k for k in range(7)}


# --- the evaluator ---


@functools.cache
def made():
  model = TwoTowers(
    image=dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(6, 6), posemb_size=(2, 2)),
    text=dict(width=12, depth=1, mlp_dim=16, num_heads=2, vocab_size=9, max_length=5),
    embed_dim=3,
  )
  shapes = {"image": (12, 12, 3), "tokens": (5,)}
  params = jax.eval_shape(lambda: steps.init_params(model, shapes, 0))
  rng = np.random.default_rng(1)
  return model, jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), params)


def batches(of=8, n=21, padding=3):
  """Images with one to three captions, some of them and some images there twice; the last batch padded with NaN."""
  rng = np.random.default_rng(0)
  image = np.float32(rng.uniform(-1, 1, (n, 12, 12, 3)))
  texts = np.int32(rng.integers(9, size=(n, 3, 5)))
  image[5], image[20] = image[1], image[1]
  texts[7, 0], texts[13, 0] = texts[2, 0], texts[2, 0]
  counted = np.float32(np.arange(3)[None] < rng.integers(1, 4, n)[:, None])
  whole = {"image": image, "texts": texts, "texts_mask": counted, "_mask": np.ones(n, np.float32)}
  for key, array in whole.items():
    filler = np.full((padding, *array.shape[1:]), 0 if key == "texts" else np.nan, array.dtype)
    whole[key] = np.concatenate([array, 0 * filler if key == "_mask" else filler])
  whole["_mask"][n:] = 0
  return [{k: v[i : i + of] for k, v in whole.items()} for i in range(0, n + padding, of)]


class Counting:
  """Batches that count how often they are read."""

  def __init__(self, batches):
    self.batches, self.read = batches, 0

  def __iter__(self):
    for batch in self.batches:
      self.read += 1
      yield batch


def noisy(step, key, *args, **options):
  made = step(*args, **options)
  noise = 1e-6 * jax.random.normal(jax.random.key(0), made[key].shape)
  return made | {key: made[key] + noise}


def test_rows_are_those_of_the_model_called_on_everything_at_once(monkeypatch):
  """Vectors come with a little noise by their place in a batch, as rounding may give them; no rank may see it."""
  for step, key in (("_image_step", "image"), ("_text_step", "embedded")):
    monkeypatch.setattr(embedding, step, functools.partial(noisy, getattr(embedding, step), key))
  model, params = made()
  counting = Counting(batches())
  evaluator = retrieval(model, counting, sharding.make_mesh(), seqhw=SIZES)
  rows = evaluator.run(params)
  assert counting.read == 1 + 3  # one to compile by
  whole = {k: np.concatenate([b[k] for b in batches()])[:21] for k in batches()[0]}
  captions = whole["texts_mask"] > 0
  text = jax.jit(lambda t: model.apply({"params": params}, tokens=t)[0])(whole["texts"][captions])
  # What is the same is the same to the bit, as the evaluator promises.
  text = {
    tuple(t): np.float64(x) for t, x in zip(whole["texts"][captions].tolist(), text, strict=True)
  }
  text = np.stack([text[tuple(t)] for t in whole["texts"][captions].tolist()])
  image_of = np.nonzero(captions)[0]
  for row in rows:
    size = {"seqhw": row["seqhw"]}
    embed = jax.jit(lambda x, size=size: model.apply({"params": params}, x, **size)[0])
    image = np.float64(embed(whole["image"]))
    image[5] = image[20] = image[1]
    assert (row["n"], row["captions"]) == (21, captions.sum())
    for k in (1, 5, 10):
      sides = {"": 0.5, "_optimistic": 0.0, "_pessimistic": 1.0}
      for side, ties in sides.items():
        for way, want in zip(("i2t", "t2i"), by_loops(image, text, image_of, k, ties), strict=True):
          name = f"{way}_r{k}"
          assert row.get(name + side, row[name]) == pytest.approx(want), (name, side)
          low, high = row["intervals"][name]
          assert low <= row[name] <= high
  assert rows[0].keys() == rows[1].keys() and any("_optimistic" in k for k in rows[0])
  assert rows[0]["i2t_r10"] != rows[1]["i2t_r10"]
  assert [c["tokens"] for c in evaluator.costs(params, 1)] == [4, 16]


def change(batches, **arrays):
  return [batch | {k: f(batch[k]) for k, f in arrays.items()} for batch in batches]


@pytest.mark.parametrize(
  ("data", "expected"),
  [
    (
      change(batches(24), _mask=lambda m: m * (np.arange(24) == 3)),
      "among 1 images; expected at least 2",
    ),
    (change(batches(), texts_mask=lambda x: x * 0), "21 of 21 images have no caption, e.g. num"),
    (change(batches(), image=lambda x: x * np.nan), "Embeddings of seqhw=2 are not finite"),
    ([{k: v for k, v in b.items() if k != "texts"} for b in batches()], r"needs \['texts'\]"),
    (change(batches(), texts=lambda x: x[:, 0]), r"texts of shape \(8, 5\).*expected \[n, capt"),
  ],
)
def test_data_that_cannot_be_ranked_are_refused(data, expected):
  model, params = made()
  with pytest.raises(UserError, match=expected):
    retrieval(model, data, sharding.make_mesh(), seqhw=SIZES).run(params)


def test_a_model_without_texts_is_refused():
  with pytest.raises(UserError, match="A FlexiViT embeds no texts"):
    retrieval(FlexiViT(variant="mu"), batches(), sharding.make_mesh(), seqhw=SIZES)


def on_all_devices(path: str) -> None:
  """Writes the rows on all devices that there are, and how many these are."""
  model, params = made()
  rows = retrieval(model, batches(), sharding.make_mesh(), seqhw=SIZES).run(params)
  with open(path, "w") as file:
    json.dump({"rows": rows, "devices": jax.device_count()}, file)


@pytest.mark.full
def test_eight_devices_retrieve_as_one(tmp_path, on_eight_devices):
  rows = {}
  on_all_devices(str(tmp_path / "one.json"))
  on_eight_devices(on_all_devices, str(tmp_path / "eight.json"))
  for name in ("one", "eight"):
    rows[name] = json.loads((tmp_path / f"{name}.json").read_text())
  assert rows["eight"]["devices"] == 8 and rows["eight"]["rows"] == rows["one"]["rows"]


@pytest.mark.full
def test_a_config_asks_for_it(monkeypatch):
  def numbers(record):
    texts = np.int32([[len(text), ord(text[0]) % 9, 1, 2, 3] for text in record["captions"]])
    return record | {"texts": texts % 9, "texts_mask": np.ones(len(texts), np.float32)}

  monkeypatch.setitem(OPS, "numbers", numbers)
  data = dict(name="synthetic", split="test", image_size=12, num_examples=10, annotated=True)
  pp = "decode|value_range|numbers|keep('image', 'texts', 'texts_mask')"
  section = dict(type="retrieval", data=data, pp=pp, batch_size=5, seqhw=(2,), threads=0)
  model, params = made()
  evaluation = experiment.build_evaluation("evals.test", section, every=1)
  (row,) = evaluation.make(model, sharding.make_mesh()).run(params)
  assert row["n"] == 10 and 0 <= row["i2t_r1"] <= row["i2t_r10"] <= 1
  with pytest.raises(UserError, match=r"evals\.test\.seqwh.*evals\.test\.seqhw"):
    experiment.build_evaluation("evals.test", section | {"seqwh": (2,)}, every=1)
