"""`flexivit predict --names`: classes that are texts, with a model of two towers."""

import csv
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, trees, weights
from flexivit_jax.budget import cascade
from flexivit_jax.data import text
from flexivit_jax.inference import predictor, texts

NAMES = ["cat", "a red car", "dog"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """A folder of three images, which is the current one."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  for i in range(3):
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(f"{i}.png")
  return tmp_path


def run(capsys, *args):
  """Returns (exit code, stdout, stderr) of a command."""
  code = cli.main([*map(str, args)])
  return (code, *capsys.readouterr())


@functools.cache
def programs(model):
  of_texts = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens=tokens)[0])
  of_images = jax.jit(
    lambda params, image, size: model.apply({"params": params}, image, seqhw=size)[0],
    static_argnums=2,
  )
  return of_texts, of_images


def expected(file, image, size, templates=("{}",)):
  """The probabilities, by the model called on the image and each sentence in turn."""
  model, params, record = weights.towers.load(file)
  prepared = predictor.load(file).prepare(str(image))[None]
  tokens = text.of_record(record["text"])
  of_texts, of_images = programs(model)
  each = (of_texts(params, tokens.encode([t.replace("{}", n) for n in NAMES])) for t in templates)
  total = sum(map(np.float64, each))
  total /= np.linalg.norm(total, axis=1, keepdims=True)
  scores = np.exp(params["t"][0]) * (total @ np.float64(of_images(params, prepared, size))[0])
  if "b" in params:
    return 1 / (1 + np.exp(-scores - params["b"][0]))
  return np.exp(scores) / np.exp(scores).sum()


@pytest.mark.parametrize("bias", [-1.0, pytest.param(None, marks=pytest.mark.full)])
def test_probabilities_are_a_softmax_over_the_names_or_of_each_by_itself(
  save_towers, photos, capsys, bias
):
  common = ("--names=cat,a red car, dog", "--seqhw=4")
  args = ("predict", "0.png", "2.png", f"--checkpoint={save_towers(bias)}", *common, "--json")
  code, out, err = run(capsys, *args)
  assert code == 0 and ("do not add up" in err) == (bias is not None)
  rows = [json.loads(line) for line in out.splitlines()]
  assert [(row["file"], row["seqhw"]) for row in rows] == [
    ("0.png", 4), ("2.png", 4)
  ]  # fmt: skip
  for row in rows:
    want = expected(save_towers(bias), row["file"], row["seqhw"])
    order = np.argsort(-want)
    assert [one["name"] for one in row["top"]] == [NAMES[k] for k in order]
    found = [one["probability"] for one in row["top"]]
    np.testing.assert_allclose(found, want[order], atol=1e-5)


@pytest.mark.full
def test_templates_a_file_of_names_and_the_other_forms(save_towers, photos, capsys):
  (photos / "names.txt").write_text("\n".join(NAMES))
  (photos / "templates.txt").write_text("a {}\nmy {}.\n")
  common = ("--names=names.txt", "--templates=templates.txt", "--seqhw=4")
  code, out, _ = run(
    capsys,
    "predict",
    "1.png",
    f"--checkpoint={save_towers(None)}",
    *common,
    "--out=a.csv",
    "--top_k=9",
  )
  assert code == 0 and out == "a.csv: 1 images\n"
  ((row),) = csv.DictReader((photos / "a.csv").read_text().splitlines())
  want = expected(save_towers(None), "1.png", 4, ["a {}", "my {}."])
  assert row["name_1"] == NAMES[int(want.argmax())] and "name_3" in row and "name_4" not in row
  assert float(row["probability_1"]) == pytest.approx(want.max(), abs=1e-5)
  long = ("--names=cat,a very long name", "--seqhw=4")
  code, _, err = run(capsys, "predict", "1.png", f"--checkpoint={save_towers(None)}", *long)
  assert code == 0 and "1 of 2 texts are longer than 12 tokens and are cut" in err
  code, out, _ = run(capsys, "predict", "1.png", f"--checkpoint={save_towers(None)}", *common)
  assert code == 0 and len(out.splitlines()) == 4 and "%  a red car" in out


def test_a_tokenizer_is_used_in_blocks_without_changing_anything(save_towers, monkeypatch):
  loaded = predictor.load(save_towers(), texts=True)
  many = [f"name {i}" for i in range(7)]
  whole = texts.embed(loaded, many)
  monkeypatch.setattr(texts, "_ROWS", 3)
  np.testing.assert_allclose(texts.embed(loaded, many), whole, atol=1e-6)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--names=cat,,dog",), "Name 1 of 3, '', is empty"),
    (("--names=cat,dog, cat",), "Names 0 and 2 are the same text, 'cat'"),
    (("--names=cat", "--templates=five"), "templates='five' is neither of"),
    (("--templates=one",), "--templates are sentences for --names"),
    ((), "has no classes of its own: its head is a projection. With its text tower give"),
  ],
)
def test_what_cannot_be_asked_is_refused(save_towers, photos, capsys, args, message):
  code, out, err = run(
    capsys, "predict", "0.png", f"--checkpoint={save_towers()}", "--seqhw=4", *args
  )
  assert (code, out) == (2, "") and message in err


def test_weights_without_texts_or_without_a_tokenizer_are_refused(save_towers, photos, capsys):
  ask = ("predict", "0.png", "--seqhw=4", "--names=cat,dog")
  code, _, err = run(capsys, *ask, f"--checkpoint={save_towers(tokenizer=False)}")
  assert code == 2 and "has no tokenizer beside its text tower" in err
  model, params, record = weights.load_with_record(save_towers())
  weights.save_npz(photos / "image.npz", model, trees.unflatten(trees.flatten(params)), record)
  code, _, err = run(capsys, *ask, "--checkpoint=image.npz")
  assert code == 2 and "has an image tower and no text tower" in err


@pytest.mark.full
def test_a_cascade_of_names_is_calibrated_and_says_the_names_itself(save_towers, photos, capsys):
  """`predict` at the size of each answer says the same, with the same names."""
  rng = np.random.default_rng(1)
  for name in "abc":
    (photos / "own" / "val" / name).mkdir(parents=True)
    for i in range(4):
      pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
      Image.fromarray(pixels).save(photos / "own" / "val" / name / f"{i}.png")
  towers, names = save_towers(None), f"--names={','.join(NAMES)}"
  given = ("--data", "name=folder", "data_dir=own", "split=val", "--seqhw=2,4", "--alpha=0.6")
  code, out, err = run(capsys, "cascade", towers, *given, names, "--templates=one", "--out=c.json")
  assert code == 0, err
  made = cascade.read(photos / "c.json")
  assert (made.names, made.templates, made.n) == (tuple(NAMES), "one", 6)
  made = made._replace(
    sizes=(2, 4), thresholds=(0.4,), temperatures=(1.0, 1.0), costs=(1.0, 2.0), shares=(0.5, 0.5)
  )
  cascade.write(photos / "c.json", made)
  common = ("predict", "own", f"--checkpoint={towers}", "--json")
  code, out, err = run(capsys, *common, "--cascade=c.json")
  assert code == 0, err
  _, every, _ = run(capsys, *common, "--seqhw=2,4", names, "--templates=one")
  assert len(out.splitlines()) == 12 and set(out.splitlines()) < set(every.splitlines())
  code, _, err = run(capsys, *common, "--cascade=c.json", "--names=x,y")
  assert code == 2 and "calibrated for the names cat,a red car,dog" in err
