"""`flexivit flexify` from end to end on a tiny model and images of noise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from flexivit_jax import cli, errors, experiment, trees, weights
from flexivit_jax.data import text as text_data
from flexivit_jax.flexify import flexify, layout, recipe, retention
from flexivit_jax.models import FlexiViT, TwoTowers
from flexivit_jax.training import patch_schedule
from flexivit_jax.weights import model_records


@pytest.fixture
def init(tmp_path, timm_state_dict):
  """A ViT of 4 heads, 7 classes, patch 8 at 32 px."""
  save_file(timm_state_dict(), tmp_path / "vit.safetensors")
  return tmp_path / "vit.safetensors"


def draw(folder, n, seed=0):
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  for i in range(n):
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    coarse.resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def command(init, data, out, *more):
  given = [f"--init={init}", f"--data={data}", f"--out={out}", "--num_heads=4"]
  return ["flexify", *given, "--image_size=32", "--seqhw=2,4", "--batch_size=4", *more]


@pytest.mark.parametrize("name", ["model.npz", "README.md"])
def test_what_something_else_wrote_is_not_replaced(init, tmp_path, name):
  draw(tmp_path / "photos" / "holiday", 20)
  (tmp_path / name).write_text("mine")
  assert cli.main(command(init, tmp_path / "photos", tmp_path, "--epochs=0")) == 2
  assert (tmp_path / name).read_text() == "mine"


@pytest.mark.full
def test_unlabelled_images_bring_other_sizes_nearer_to_the_original(init, tmp_path, capsys):
  draw(tmp_path / "photos" / "holiday", 40)
  out = tmp_path / "out"
  given = command(init, tmp_path / "photos", out, "--epochs=5", "--lr=3e-4")
  assert cli.main(given) == 0
  kept = json.loads((out / "retention.json").read_text())
  before, after = ({r["seqhw"]: r for r in kept[stage]} for stage in ("before", "after"))
  # At its native size a model that was not touched is itself.
  assert before[4]["agree1"] == 1.0 and before[4]["kl"] < 1e-6
  assert after[2]["kl"] < 0.9 * before[2]["kl"] and after[2]["n"] == 4
  printed = capsys.readouterr().out
  assert "| 16 | 2x2 |" in printed and "top-1" not in printed
  card = (out / "README.md").read_text()
  assert retention.table(kept) in card and "vit.safetensors" in card and "- epochs: 5.0" in card
  model, params, record = weights.load_with_record(out / "model.npz")
  assert record["trained"] == {"seqhw": [2, 4]} and record["image_size"] == [32, 32]
  assert (model.gelu, model.num_heads, model.patch_size) == ("exact", 4, (8, 8))
  image = str(next((tmp_path / "photos" / "holiday").iterdir()))
  assert cli.main(["predict", image, f"--checkpoint={out / 'model.npz'}", "--seqhw=8"]) == 0
  # The same command again has nothing to train, and ends with the same model.
  assert cli.main(given) == 0
  _, again = weights.load(out / "model.npz")
  np.testing.assert_array_equal(again["head"]["kernel"], params["head"]["kernel"])
  assert json.loads((out / "retention.json").read_text()) == kept


def test_no_epochs_is_resizing_alone(init, tmp_path):
  draw(tmp_path / "photos", 10)
  out = tmp_path / "out"
  assert cli.main(command(init, tmp_path / "photos", out, "--epochs=0", "--buffers=16,2")) == 0
  assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.npz", "retention.json"]
  _, params = weights.load(out / "model.npz")
  _, want = weights.load(init, num_heads=4, flexify=((16, 16), (2, 2)))
  np.testing.assert_array_equal(params["embedding"]["kernel"], want["embedding"]["kernel"])
  np.testing.assert_array_equal(params["pos_embedding"], want["pos_embedding"])
  start, front, card = (out / "README.md").read_text().split("---\n", 2)
  assert start == "" and "Nothing was trained" in card
  about = yaml.safe_load(front)
  assert about["pipeline_tag"] == "image-classification" and "license" not in about


def test_moment_is_that_of_the_images_and_goes_with_the_model(init, tmp_path):
  draw(tmp_path / "photos", 10)
  given = command(init, tmp_path / "photos", tmp_path / "out", "--epochs=0", "--moment")
  assert cli.main(given) == 0
  model, _ = weights.load(tmp_path / "out" / "model.npz")
  assert len(model.kernel_moment) == 8 and model.kernel_moment[0] == 1.0
  assert 0.5 < model.kernel_moment[1] < 1  # smooth images: neighbours are alike
  assert "- moment: True" in (tmp_path / "out" / "README.md").read_text()


def test_labels_of_held_out_images_measure_accuracy(init, tmp_path):
  for label in range(7):
    draw(tmp_path / "photos" / "train" / str(label), 2, seed=label)
    draw(tmp_path / "photos" / "val" / str(label), 1, seed=label + 7)
  kept = flexify(
    init, tmp_path / "photos", tmp_path / "out", epochs=0, image_size=32,
    seqhw=(2, 4, (4, 2)), batch_size=4, loading=dict(num_heads=4),
  )  # fmt: skip
  assert kept["original"]["n"] == 7 and kept["original"]["patch"] == 8
  assert kept["before"][1]["top1"] == kept["original"]["top1"]
  assert "| patch | grid | agreement before | top-1 before |" in retention.table(kept)
  assert "\n| 8x16 | 4x2 |" in retention.table(kept)


def test_sizes_that_are_not_square_are_drawn_as_grids():
  square, mixed = (
    recipe.settings(
      recipe.FlexifyRecipe({}, dict(train={}), 7, (32, 32), seqhw, 4), FlexiViT(num_classes=7, variant="mu"),
      epochs=1, lr=1e-3, seed=0,
    )["flexi"] for seqhw in ((2, 4), (2, (4, 2)))
  )  # fmt: skip
  assert square == dict(seqhw=dict(v=(2, 4), share="flops"))
  assert mixed == dict(grid_hw=dict(v=((2, 2), (4, 2)), share="flops"))
  assert patch_schedule.all_static(patch_schedule.parse(mixed))[1] == {"grid_hw": (4, 2)}


def test_labels_of_other_classes_are_not_used(init, tmp_path):
  draw(tmp_path / "photos" / "train" / "cat", 10)
  sources = layout.divide(tmp_path / "photos").sources
  assert sources["test"] | {"split": ""} == dict(
    name="folder", data_dir=str(tmp_path / "photos"), split=""
  )
  plan = recipe.FlexifyRecipe({}, sources, 7, (32, 32), (2, 4), 4)
  assert not plan.labelled and "labels" not in recipe.evaluation(plan)["pp"]


def test_sizes_are_drawn_so_that_each_costs_the_same():
  model = FlexiViT(variant="mu", patch_size=(6, 6), posemb_size=(4, 4), num_classes=3)
  teacher = dict(model=recipe.fields_of(model), image=recipe.TEACHER_IMAGE)
  train = dict(name="synthetic", image_size=24, num_classes=3, num_examples=32, split="train")
  plan = recipe.FlexifyRecipe(teacher, {"train": train}, 3, (24, 48), (2, 6, 12), 4)
  config = recipe.settings(plan, model, epochs=1, lr=1e-3, seed=0)
  exp = experiment.from_config({**config, "init": None})
  found = patch_schedule.shares(exp.flexi, exp.step_flops)
  assert [size for size, _, _ in found] == [{"seqhw": 2}, {"seqhw": 6}, {"seqhw": 12}]
  parts, costs = zip(*((part, cost) for _, part, cost in found), strict=True)
  np.testing.assert_allclose(np.multiply(parts, costs), parts[0] * costs[0], rtol=1e-12)
  assert sum(parts) == pytest.approx(1) and parts[0] > parts[1] > parts[2]


@pytest.mark.parametrize("text", ["16", "16,2,2", "0,2"])
def test_buffers_are_two_sizes(init, tmp_path, text, capsys):
  draw(tmp_path / "photos", 10)
  given = command(init, tmp_path / "photos", tmp_path / "out", "--epochs=0", f"--buffers={text}")
  assert cli.main(given) == 2
  assert "expected PATCH,GRID" in capsys.readouterr().err


def test_a_model_for_images_that_are_not_square_is_an_error():
  with pytest.raises(errors.UserError, match="images of 32x48 pixels; only square ones"):
    recipe.native_side({"image_size": [32, 48]})
  assert recipe.native_side({"image_size": None, "image_shape": [24, 24, 3]}) == 24


def test_a_projection_and_a_model_without_classes_teach_embeddings():
  headless, head = FlexiViT(variant="mu"), FlexiViT(variant="mu", num_classes=7)
  assert recipe.embedding_of(headless, {}) == "pre_logits"
  assert recipe.embedding_of(head, {"projection": True}) == "logits"
  assert recipe.embedding_of(head, {}) is None
  assert recipe.embedding_of(head, {}, two_towers=True) == "logits"
  assert recipe.embedding_of(headless, {}, two_towers=True) == "pre_logits"


@pytest.mark.full
def test_of_two_towers_the_image_tower_is_made_flexible_and_the_text_tower_stays(tmp_path):
  image = dict(variant="mu", patch_size=(8, 8), posemb_size=(4, 4))
  tokens = text_data.load("bytes", length=5, pad=text_data.PAD, end=text_data.END)
  text = dict(vocab_size=tokens.vocab_size, max_length=5, width=8, depth=1, mlp_dim=12, num_heads=2)
  model = TwoTowers(image=image, text=text, embed_dim=6, bias=-2.0)
  inputs = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 5), int)
  params = model.init(jax.random.key(0), *inputs)["params"]
  about = {"model": model_records.record_of(model), "image_size": [32, 32], "text": tokens.record()}
  about |= {"native_patch_size": [8, 8], "native_grid": [4, 4]}
  weights.save_npz(tmp_path / "towers.npz", model, params, about)
  draw(tmp_path / "photos", 60)
  kept = flexify(
    tmp_path / "towers.npz", tmp_path / "photos", tmp_path / "out",
    epochs=1, image_size=32, seqhw=(2, 4), batch_size=4, names=("cat", "dog", "car"),
  )  # fmt: skip
  assert kept["before"][1]["cosine"] == pytest.approx(1, abs=1e-6)
  both, made, record = weights.towers.load(tmp_path / "out" / "model.npz")
  assert trees.digest(made["text"]) == trees.digest(params["text"])
  assert kept["before"][1]["zero_shot"] == 1 and "same name after" in retention.table(kept)
  assert record["text"] == tokens.record() and made["t"] == params["t"] and both.bias == -2.0
  _, tower = weights.load(tmp_path / "out" / "model.npz")
  assert trees.digest(tower) == trees.digest(made["image"]) != trees.digest(params["image"])
  assert record["trained"] == {"seqhw": [2, 4]}


@pytest.mark.full
def test_a_model_without_classes_is_nearer_to_its_own_embeddings(tmp_path, timm_state_dict):
  """Also where folders have names: these are no classes of the model."""
  save_file(timm_state_dict(classes=0), tmp_path / "vit.safetensors")
  for split, n in (("train", 30), ("val", 9)):
    draw(tmp_path / "photos" / split / "a", n, seed=n)
  out = tmp_path / "out"
  given = command(tmp_path / "vit.safetensors", tmp_path / "photos", out, "--epochs=6", "--lr=3e-4")
  assert cli.main(given) == 0
  kept = json.loads((out / "retention.json").read_text())
  before, after = ({r["seqhw"]: r for r in kept[stage]} for stage in ("before", "after"))
  assert before[4]["cosine"] == pytest.approx(1, abs=1e-6) and before[4]["neighbours"] == 1
  assert after[2]["cosine"] > before[2]["cosine"] and after[2]["n"] == 9
  assert "| patch | grid | cosine before | cosine after |" in retention.table(kept)
  card = (out / "README.md").read_text()
  assert "original's embeddings at randomly" in card and "flexivit embed PHOTOS" in card
