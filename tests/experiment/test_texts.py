"""Texts in a run: their tokens fit the text tower, are the same wherever they are made, and travel in checkpoints."""

import json

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import errors, experiment
from flexivit_jax.data import text
from flexivit_jax.experiment import costs, restoring
from flexivit_jax.train import report_costs

pytest.importorskip("tokenizers")

TOKENS = "tokenize('bytes', length=8, pad='[PAD]', end='[END]')"
PP = f"decode|resize(24)|value_range|random_caption|{TOKENS}|keep('image', 'tokens')"


@pytest.fixture
def settings(tmp_path):
  folder = tmp_path / "photos" / "train"
  folder.mkdir(parents=True)
  rows = []
  for i, caption in enumerate(["a cat", "a dog", "a very long caption", "an owl"]):
    Image.fromarray(np.full((24, 24, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
  (folder / "metadata.jsonl").write_text("\n".join(rows))
  data = dict(name="captions", split="train", data_dir=str(tmp_path / "photos"))
  tower = dict(width=16, depth=1, mlp_dim=16, num_heads=2, vocab_size=258, max_length=8)
  return dict(
    total_steps=2,
    input=dict(data=data, pp=PP, batch_size=4, threads=0),
    model=dict(name="two_towers", embed_dim=8, image=dict(variant="mu"), text=tower),
    objective=dict(name="softmax_contrastive"),
    flexi=dict(seqhw=dict(v=(2,))),
    optim=dict(lr=1e-2),
    log_every=1,
  )


def test_a_checkpoint_holds_the_tokenizer_and_a_run_says_how_many_captions_are_cut(
  settings, tmp_path, capsys
):
  exp = experiment.from_config(settings)
  report_costs(exp)
  assert "25.0% of 4 captions are longer than 8 tokens and are cut" in capsys.readouterr().err
  with exp.batches(0) as batches:
    record = json.loads(json.dumps(restoring.record(exp, 0, {}, batches)))
  tokens = text.of_record(record["text"])
  assert tokens == text.load("bytes", length=8, pad=text.PAD, end=text.END)
  restoring.check_text(exp, record["text"], tmp_path)
  with pytest.raises(errors.UserError, match="texts as other tokens, which differ in lower; give"):
    restoring.check_text(exp, record["text"] | {"lower": True}, tmp_path)


@pytest.mark.parametrize(
  ("tower", "expected"),
  [
    (dict(vocab_size=200), "has 258 tokens, model.text.vocab_size is 200"),
    (dict(max_length=7), "makes 8 tokens, model.text.max_length is 7"),
    (
      dict(pool_type="eos", eos_token=5),
      "end with the token 1, model.text pools the first token 5",
    ),
    (dict(pad_token=2), "padded with the token 0, model.text leaves out the token 2"),
  ],
)
def test_tokens_that_do_not_fit_the_tower_are_refused(settings, tower, expected):
  settings["model"]["text"] |= tower
  with pytest.raises(errors.UserError, match=expected):
    experiment.from_config(settings)


def test_another_tokenizer_in_an_evaluation_is_refused(settings):
  pp = PP.replace("[PAD]", "[END]")
  settings["evals"] = dict(test=dict(data=settings["input"]["data"], pp=pp, batch_size=4, seqhw=(2,)))  # fmt: skip
  with pytest.raises(
    errors.UserError, match=r"evals\.test\.pp makes tokens in another way.*\(pad\)"
  ):
    experiment.from_config(settings)


def test_a_config_is_planned_without_the_file_of_its_tokenizer(settings):
  settings["input"]["pp"] = PP.replace("'bytes'", "'nowhere.json'").replace("'[END]'", "'</s>'")
  with pytest.raises(errors.UserError, match=r"nowhere\.json does not exist"):
    experiment.from_config(settings)
  planned = costs.on_accelerator(settings)
  assert experiment.from_config(planned, opening=costs.PLANNED).shapes["tokens"] == (8,)


def test_captions_inside_other_data_are_counted(settings, capsys):
  settings["input"]["data"] = dict(
    name="synthetic", split="train", image_size=24, num_examples=8, annotated=True
  )
  report_costs(experiment.from_config(settings))
  assert "100.0% of 8 captions" in capsys.readouterr().err
