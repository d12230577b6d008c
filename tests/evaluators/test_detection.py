"""The evaluator of detection scores what pycocotools scores on the files, on any devices, in any batches."""

import contextlib
import functools
import io
import json
import socket
import subprocess
import sys
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import config, experiment, train as train_lib
from flexivit_jax.data import text
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import results
from flexivit_jax.evaluators.detection import METRICS, detection, top_pairs
from flexivit_jax.experiment import costs
from flexivit_jax.models import FlexiViT, OwlViT
from flexivit_jax.models.counting import Counted
from flexivit_jax.models.grid import padded_grid
from flexivit_jax.running import distributed
from flexivit_jax.specs import image as image_spec, spec
from flexivit_jax.training import steps

pytest.importorskip("pycocotools")
SIDE = 24  # of the image that the model sees
SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class Scripted(nn.Module, Counted):
  """Says of the image whose first pixel is i what its parameters hold for i, for as many tokens as the grid has."""

  num_classes: int = 3
  dtype: str = "float32"
  inputs: ClassVar = {"image": image_spec()}
  outputs: ClassVar = {"pred_boxes": spec("tokens 4"), "class_logits": spec("tokens classes")}

  @nn.compact
  def __call__(self, image, *, train=False, **size):
    gh, gw = self.grid(image.shape[1:3], **size)[2]
    index = jnp.round((image[:, 0, 0, 0] + 1) * 127.5).astype(jnp.int32)
    boxes = self.param("boxes", nn.initializers.zeros, (8, 64, 4))[index, : gh * gw]
    logits = self.param("logits", nn.initializers.zeros, (8, 64, self.num_classes))
    return boxes, {"pred_boxes": boxes, "class_logits": logits[index, : gh * gw]}

  @nn.nowrap
  def grid(self, image_hw, *, seqhw=None, grid_hw=None, patch_hw=None):
    return padded_grid(image_hw, (4, 4), seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw)


@functools.cache
def scenes():
  """Eight photos of several sizes with up to 12 boxes of three classes; the third has none, some are of crowds."""
  rng = np.random.default_rng(0)
  made = []
  for i in range(8):
    h, w = (int(n) for n in rng.integers(30, 300, 2))
    n = 0 if i == 2 else int(rng.integers(1, 13))
    low = rng.uniform(0, 0.6, (n, 2)) * [w, h]
    high = np.minimum(low + rng.uniform(0.08, 0.4, (n, 2)) * [w, h], [w, h])
    boxes = np.round(np.concatenate([low, high], 1), 2)
    made.append(((h, w), boxes, rng.integers(0, 3, n), rng.random(n) < 0.1))
  return made


def scale_of(hw):
  """Pixels of the model's image for one of the file's: the longer side has SIDE, and is rounded."""
  ratio = max(n / SIDE for n in hw)
  return [max(1, round(n / ratio)) / n for n in hw]


def answers(noise, seed=0):
  """Parameters of `Scripted`, boxes around the true ones; and the same in pixels of the files."""
  rng = np.random.default_rng(seed)
  boxes, logits = np.zeros((8, 64, 4), np.float32), np.full((8, 64, 3), -9.0, np.float32)
  boxes[..., 2:] = 0.01
  for i, (hw, true, labels, _) in enumerate(scenes()):
    sy, sx = scale_of(hw)
    for k, (box, label) in enumerate(zip(true, labels, strict=True)):
      for token in (k, 63 - k) if noise else (k,):
        moved = box + rng.normal(0, noise, 4) * np.tile(box[2:] - box[:2], 2)
        x0, y0, x1, y1 = moved * [sx, sy, sx, sy] / SIDE
        boxes[i, token] = (x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0), abs(y1 - y0)
        logits[i, token] = rng.normal(-2, 1, 3) if noise else -9
        logits[i, token, label] = rng.normal(1, 1)
  return {"boxes": boxes, "logits": logits}


def by_hand(params, tokens):
  """What is found, by NumPy: (image, box as x, y, w, h in pixels of the file, class, score) each."""
  found = []
  for i, (hw, *_) in enumerate(scenes()):
    sy, sx = scale_of(hw)
    boxes, logits = (params[k][i, :tokens].astype(float) for k in ("boxes", "logits"))
    scores = np.float64(np.asarray(jax.nn.sigmoid(np.float32(logits))))
    pairs = sorted(np.ndindex(*scores.shape), key=lambda at, s=scores: -s[at])[:60]
    for token, label in pairs:
      cx, cy, w, h = boxes[token] * SIDE
      x0, x1 = np.clip([(cx - w / 2) / sx, (cx + w / 2) / sx], 0, hw[1])
      y0, y1 = np.clip([(cy - h / 2) / sy, (cy + h / 2) / sy], 0, hw[0])
      found.append((i, [x0, y0, x1 - x0, y1 - y0], label, scores[token, label]))
  return found


def written(folder, ids):
  """Writes the photos and their boxes in COCO's form; returns its content."""
  (folder / "val").mkdir()
  images, rows = [], []
  for i, (hw, boxes, labels, crowd) in enumerate(scenes()):
    Image.fromarray(np.full((*hw, 3), i, np.uint8)).save(folder / "val" / f"{i}.png")
    images.append({"id": i + 7, "file_name": f"{i}.png", "height": hw[0], "width": hw[1]})
    for (x0, y0, x1, y1), label, iscrowd in zip(boxes.tolist(), labels, crowd, strict=True):
      w, h = x1 - x0, y1 - y0
      row = {
        "id": len(rows) + 1,
        "image_id": i + 7,
        "category_id": ids[label],
        "iscrowd": int(iscrowd),
      }
      rows.append(row | {"bbox": [x0, y0, w, h], "area": w * h})
  categories = [{"id": k, "name": f"thing {k}"} for k in reversed(ids)]
  content = {"images": images, "annotations": rows, "categories": categories}
  (folder / "val.json").write_text(json.dumps(content))
  return content


def section(folder, **options):
  pp = (
    f"decode|origin()|resize_keep({SIDE}, 'contain')|pad({SIDE}, fill=0)|value_range|pad_boxes(12)"
    "|keep('image', 'boxes', 'box_labels', 'box_mask', 'box_crowd', 'origin')"
  )
  data = dict(name="coco", split="val", data_dir=str(folder), images="val")
  given = dict(type="detection", data=data, pp=pp, batch_size=3, seqhw=(8,), threads=0, pairs=60)
  return given | options


def rows_of_config(folder, params, **options):
  evaluation = experiment.build_evaluation("evals.test", section(folder, **options), every=1)
  evaluation.check(Scripted())
  evaluator = evaluation.make(Scripted(), sharding.make_mesh())
  return evaluation, evaluator, evaluator.run(params)


@pytest.mark.parametrize("ids", [(1, 13, 90), (0, 1, 2)])
def test_a_config_scores_files_as_pycocotools_does(tmp_path, ids):
  """Photos that are no squares, a photo without boxes, crowds, categories with gaps or from 0 on."""
  from pycocotools import coco, cocoeval

  content, params = written(tmp_path, ids), answers(0.1)
  evaluation, evaluator, rows = rows_of_config(tmp_path, params, seqhw=(8, 4))
  assert [row["seqhw"] for row in rows] == [8, 4] and rows[0]["n"] == 8
  for row, tokens in zip(rows, (64, 16), strict=True):
    with contextlib.redirect_stdout(io.StringIO()):
      true = coco.COCO()
      true.dataset = content
      true.createIndex()
      found = [
        {"image_id": i + 7, "bbox": box, "category_id": ids[label], "score": score}
        for i, box, label, score in by_hand(params, tokens)
      ]
      tool = cocoeval.COCOeval(true, true.loadRes(found), "bbox")
      tool.evaluate()
      tool.accumulate()
      tool.summarize()
    for name, value in zip(SCORES, tool.stats, strict=False):
      assert row.get(name, -1) == pytest.approx(value, abs=1e-9), name
    of_class = tool.eval["precision"][..., 0, -1].mean((0, 1))
    np.testing.assert_allclose(row["class_ap"], of_class, atol=1e-9)
  assert 0.2 < rows[0]["ap"] < 0.8 and rows[0]["class_ap"][0] > 0.1
  assert experiment.classes_of_tables(evaluation, rows) == [f"thing {k}" for k in ids]
  assert {k for k in rows[0] if k.startswith("ap50_tokens_")} > {"ap50_tokens_1_to_4"}
  shown = results.table(rows, evaluation.metrics)
  assert "AP50" in shown and "ceiling" in shown and "class_ap" not in shown
  (tmp_path / "out").mkdir()
  results.write(tmp_path / "out" / "eval.json", {"name": "x"}, rows, evaluator)
  made = json.loads((tmp_path / "out" / "eval.json").read_text())["rows"][0]["samples"]
  assert all((tmp_path / "out" / "eval_samples" / name).is_file() for name in made)


# --- batches made here ---


def batches(batch_size=3, padding=True, **more):
  """The scenes as pp makes them, whatever is in a photo; the last batch is padded with NaN."""
  rows = []
  for i, (hw, boxes, labels, crowd) in enumerate(scenes()):
    n, (sy, sx) = 12 - len(boxes), scale_of(hw)
    rows.append(
      {
        "image": np.full((SIDE, SIDE, 3), i / 127.5 - 1, np.float32),
        "boxes": np.float32(np.concatenate([boxes * [sx, sy, sx, sy], np.zeros((n, 4))])),
        "box_labels": np.concatenate([labels, np.full(n, -1)]),
        "box_mask": np.float32(np.arange(12) < len(boxes)),
        "box_crowd": np.concatenate([crowd, np.zeros(n, bool)]),
        "origin": np.array([*hw, 0, 0, SIDE / sy, SIDE / sx], np.float32),
        "_mask": np.float32(1),
        **{key: values[i] for key, values in more.items()},
      }
    )
  made = []
  for begin in range(0, 8, batch_size):
    part = rows[begin : begin + batch_size]
    filler = {k: np.full_like(v, np.nan if v.dtype.kind == "f" else 0) for k, v in part[0].items()}
    part = part + [filler | {"_mask": np.float32(0)}] * (batch_size - len(part)) * padding
    made.append({k: np.stack([row[k] for row in part]) for k in part[0]})
  return made


def rows_of(data=None, params=None, model=None, **options):
  options = {"seqhw": (8,), "samples": 0, "pairs": 30} | options
  evaluator = detection(model or Scripted(), data or batches(), sharding.make_mesh(), **options)
  return evaluator.run(answers(0.1) if params is None else params)


def test_the_ceiling_is_what_a_perfect_detector_reaches():
  perfect = answers(0)
  fine, coarse = rows_of(params=perfect, seqhw=(4, 2))
  assert fine["ap"] == fine["ap50"] == pytest.approx(1, abs=1e-12)
  assert (fine["ceiling_recall"], fine["dropped_boxes"]) == (1, 0)
  number = [int((~crowd).sum()) for *_, crowd in scenes()]
  dropped = sum(max(0, n - 4) for n in number)
  assert coarse["dropped_boxes"] == dropped > 0
  assert coarse["ceiling_recall"] == pytest.approx(1 - dropped / sum(number))
  assert coarse["ap"] < 0.9
  assert fine["class_boxes"] == np.bincount(
    np.concatenate([labels[~crowd] for _, _, labels, crowd in scenes()])
  ).tolist()  # fmt: skip


def test_an_image_alone_and_in_any_batch_is_scored_alike():
  together = rows_of(batches(8))
  assert rows_of(batches(1)) == rows_of(batches(3)) == rows_of(batches(8)[::-1]) == together
  assert rows_of(batches(3)[::-1]) == together  # no order of the images matters
  assert together[0]["n"] == 8


def test_equal_scores_do_not_make_the_order_of_images_matter():
  params = answers(0.2)
  params["logits"] = np.round(params["logits"] / 2)
  assert rows_of(batches(3), params) == rows_of(batches(3)[::-1], params)


def test_the_best_pairs_are_those_of_all_tokens_and_classes():
  rng = np.random.default_rng(0)
  logits, boxes = np.float32(rng.normal(size=(2, 5, 3))), np.float32(rng.random((2, 5, 4)))
  logits[0, 2, 1] = np.nan
  made = jax.device_get(top_pairs(jnp.array(logits), jnp.array(boxes), 7))
  for i in range(2):
    flat = np.nan_to_num(logits[i], nan=-np.inf).ravel()
    order = np.argsort(-flat, kind="stable")[:7]
    np.testing.assert_allclose(made["score"][i], 1 / (1 + np.exp(-flat[order])), rtol=1e-5)
    assert made["label"][i].tolist() == (order % 3).tolist()
    c, s = boxes[i, order // 3, :2], boxes[i, order // 3, 2:]
    np.testing.assert_allclose(made["box"][i], np.concatenate([c - s / 2, c + s / 2], 1), atol=1e-6)
  assert top_pairs(jnp.array(logits), jnp.array(boxes), 300)["score"].shape == (2, 15)


def test_a_model_that_gives_no_numbers_finds_nothing():
  params = {k: np.full_like(v, np.nan) for k, v in answers(0.1).items()}
  (row,) = rows_of(params=params)
  assert row["ap"] == 0 and np.isfinite(row["ceiling_recall"])


def test_groups_of_classes_and_only_one_of_them():
  groups = {"base": (0, 2), "novel": (1,), "empty": ()}
  (row,) = rows_of(class_groups=groups, pairs=300)
  base, novel = row["ap_base"], row["ap_novel"]
  assert novel == row["class_ap"][1] and "ap_empty" not in row
  assert base == pytest.approx((row["class_ap"][0] + row["class_ap"][2]) / 2)
  (few,) = rows_of(class_groups=groups, pairs=5)
  (alone,) = rows_of(class_groups=groups, pairs=5, only="novel")
  assert alone["ap"] == alone["ap_novel"] > few["ap_novel"]  # others do not take the places
  assert alone["class_ap"][0] is None and "ap_base" not in alone
  (all_pairs,) = rows_of(class_groups=groups, only="novel", pairs=300)
  assert all_pairs["ap"] == novel


def test_areas_in_tokens_depend_on_the_grid():
  params = answers(0.1)
  fine, coarse = rows_of(params=params, seqhw=(8, 2))
  assert "ap50_tokens_4_to_16" in fine and "ap50_tokens_4_to_16" not in coarse
  assert "ap50_tokens_below_1" in coarse and fine["ap_small"] >= 0
  assert "ap50_tokens_4_to_16" in results.table([coarse, fine], METRICS)  # what one lacks is empty


def test_lvis_counts_only_what_images_were_searched_for():
  searched, lenient = np.zeros((2, 8, 3), np.float32)
  (coco,) = rows_of(rules="coco")
  data = batches(neg_labels=searched, not_exhaustive=lenient)
  (lax,) = rows_of(data, rules="lvis", class_groups={"rare": (1,)})
  everywhere = batches(neg_labels=1 - searched, not_exhaustive=lenient)
  (strict,) = rows_of(everywhere, rules="lvis")
  loose = batches(neg_labels=1 - searched, not_exhaustive=1 - lenient)
  (lenient_row,) = rows_of(loose, rules="lvis")
  assert strict["ap"] == coco["ap"] < lax["ap"] < lenient_row["ap"]
  assert lax["ap_rare"] == lax["class_ap"][1]


# --- names as queries ---

TEXT = dict(width=12, depth=1, mlp_dim=16, num_heads=2, vocab_size=258, max_length=24)
BACKBONE = dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(6, 6), posemb_size=(4, 4))
NAMES = ("red_car, auto", "Cat", "tree")
TEMPLATES = ["a photo of a {}.", "{}"]


@functools.cache
def detector(**fields):
  model = OwlViT(backbone=BACKBONE, embed_dim=8, **(fields or {"text": TEXT}))
  shapes = {"image": (SIDE, SIDE, 3), "queries": (3, fields.get("query_length", 24))}
  params = jax.eval_shape(lambda: steps.init_params(model, shapes, 0))
  rng = np.random.default_rng(1)
  return model, jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape) * 0.4), params)


def tokens():
  return text.load("bytes", length=24, pad="[END]", end="[END]")


def mean_logits(model, params, queries):
  """Scripted answers: what the model says of each image, the logits a mean over the templates."""
  image = np.concatenate([b["image"] for b in batches(8)])
  run = jax.jit(lambda q: model.apply({"params": params}, image, q, seqhw=4)[1])
  outs = [run(np.tile(one, (8, 1, 1))) for one in queries]
  logits = np.full((8, 64, 3), -99, np.float32)
  logits[:, :16] = np.mean([out["class_logits"] for out in outs], axis=0)
  boxes = np.zeros((8, 64, 4), np.float32)
  boxes[:, :16] = outs[0]["pred_boxes"]
  return {"boxes": boxes, "logits": logits}


def found_by(answers):
  """The images with boxes that the model finds: those of its first five tokens."""
  rng, whole = np.random.default_rng(3), batches(8)[0]
  c, s = answers["boxes"][:, :5, :2], answers["boxes"][:, :5, 2:]
  boxes = np.concatenate([c - s / 2, c + s / 2], -1) * SIDE
  labels = rng.integers(0, 3, (8, 5))
  more = {"box_mask": np.ones((8, 5), np.float32), "box_crowd": np.zeros((8, 5), bool)}
  origin = np.tile(np.float32([SIDE, SIDE, 0, 0, SIDE, SIDE]), (8, 1))
  return [whole | more | {"boxes": np.float32(boxes), "box_labels": labels, "origin": origin}]


def check_same(row, expected):
  assert row.keys() == expected.keys() and 0.01 < row["ap50"] < 1
  for key in ("ap", "ap50", "class_ap"):
    assert row[key] == pytest.approx(expected[key], abs=1e-6), key


def test_names_are_queries_and_logits_are_averaged_over_templates():
  model, params = detector()
  sentences = [[f"a photo of a {name}", name] for name in ("red car", "cat", "tree")]
  queries = [tokens().encode([s[i] for s in sentences]) for i in range(2)]
  answers = mean_logits(model, params, queries)
  options = dict(class_names=NAMES, tokens=tokens(), templates=TEMPLATES, seqhw=(4,))
  (row,) = rows_of(found_by(answers), params, model, **options)
  check_same(row, *rows_of(found_by(answers), answers, seqhw=(4,)))


def test_vectors_of_names_are_matched_by_name(tmp_path):
  model, params = detector(query_length=5)
  vectors = np.float32(np.random.default_rng(0).normal(size=(4, 5)))
  path = str(tmp_path / "names.npz")
  np.savez(path, names=np.array(["tree", "dog", "Cat", "red_car, auto"]), vectors=vectors)
  answers = mean_logits(model, params, [vectors[[3, 2, 0]]])
  options = dict(data=found_by(answers), model=model, seqhw=(4,), class_names=NAMES, vectors=path)
  (row,) = rows_of(params=params, **options)
  check_same(row, *rows_of(found_by(answers), answers, seqhw=(4,)))
  with pytest.raises(UserError, match=r"has no vector of 2 of the 3 classes: 'trees', 'dogs'"):
    rows_of(params=params, **options | {"class_names": ("trees", "Cat", "dogs")})
  with pytest.raises(UserError, match=r"none.npz cannot be read"):
    rows_of(params=params, **options | {"vectors": str(tmp_path / "none.npz")})


def test_costs_are_those_of_images_once_names_are_embedded():
  model, params = detector()
  options = dict(class_names=NAMES, tokens=tokens(), templates=["{}"], samples=0)
  evaluator = detection(model, batches(8), sharding.make_mesh(), seqhw=(4,), **options)
  evaluator.run(params)
  (cost,) = evaluator.costs(params, 1)
  with_texts = 2 * model.gmacs({"image": (SIDE, SIDE, 3), "queries": (3, 24)}, seqhw=4)
  assert cost["tokens"] == 16 and cost["patch"] == 6 and 0 < cost["gflops"] < with_texts


OPEN = """
from ml_collections import ConfigDict


def get_config(arg=""):
  data = dict(name="synthetic", image_size=(40, 56), num_examples=8, annotated=True)
  known = dict(data, split="train", num_classes=3, classes=("red", "green", "blue"))
  asked = dict(data, split="test", num_classes=2, classes=("blue", "pink"))
  boxes = "pad(64, fill=0)|value_range|pad_boxes(8)"
  queries = "sample_queries(4, 2)|query_tokens('bytes', length=24, pad='[END]', end='[END]')"
  text = dict(width=12, depth=1, mlp_dim=16, num_heads=2, vocab_size=258, max_length=24)
  keys = "'image', 'boxes', 'box_mask', 'box_targets', 'queries'"
  pp = f"decode|{queries}|{boxes}|relative_boxes('xyxy')|keep({keys})"
  test = f"decode|origin()|{boxes}|keep('image', 'boxes', 'box_labels', 'box_mask', 'origin')"
  return ConfigDict(dict(
    total_steps=1,
    input=dict(data=known, pp=pp, batch_size=4, threads=0),
    model=dict(name="owl_vit", embed_dim=8, backbone=dict(variant="mu", patch_size=(8, 8)), text=text),
    objective=dict(name="detection", queries=True),
    flexi=dict(seqhw=dict(v=(4,))),
    optim=dict(lr=1e-3),
    evals=dict(test=dict(type="detection", data=asked, pp=test, seqhw=(4,), batch_size=4, threads=0)),
  ))
"""


def test_names_of_an_evaluation_need_not_be_those_of_the_training(tmp_path):
  """And to embed them once is what a plan counts."""
  (tmp_path / "open.py").write_text(OPEN)
  settings = config.load(str(tmp_path / "open.py"))
  exp = experiment.from_config(settings)
  evaluation = exp.evaluations["test"]
  assert evaluation.source.class_names == ("blue", "pink")
  closed = exp.model.clone(text=None, num_classes=2)
  flops = costs._evaluation_flops(exp, evaluation)
  assert flops == 2e9 * closed.gmacs({"image": (64, 64, 3)}, seqhw=4) * 8


@pytest.mark.full
def test_a_run_with_queries_measures_other_names(tmp_path):
  (tmp_path / "open.py").write_text(OPEN)
  train_lib.train(config.load(str(tmp_path / "open.py")), tmp_path / "run")
  content = json.loads((tmp_path / "run" / "eval.json").read_text())
  assert content["classes"] == ["blue", "pink"] and content["rows"][0]["n"] == 8
  assert (tmp_path / "run" / "eval_samples" / content["rows"][0]["samples"][0]).is_file()


EIGHT = """
from ml_collections import ConfigDict


def get_config(arg=""):
  data = dict(name="synthetic", image_size=(40, 56), num_classes=3, num_examples=8, annotated=True, split="train")
  boxes = "pad(64, fill=0)|value_range|pad_boxes(8)"
  keys = "'image', 'boxes', 'box_labels', 'box_mask'"
  test = f"decode|origin()|{boxes}|keep({keys}, 'origin')"
  backbone = dict(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=(8, 8))
  return ConfigDict(dict(
    total_steps=800,
    input=dict(data=data, pp=f"decode|{boxes}|relative_boxes('xyxy')|keep({keys})", batch_size=8, threads=0),
    model=dict(name="owl_vit", embed_dim=16, backbone=backbone),
    objective=dict(name="detection"),
    flexi=dict(seqhw=dict(v=(4, 8))),
    optim=dict(lr=1e-3, clip=1.0, schedule=dict(decay_type="cosine", warmup_percent=0.05)),
    checkpoint=dict(every_steps=800),
    evals=dict(test=dict(type="detection", data=data, pp=test, seqhw=(4, 8), batch_size=8, threads=0)),
  ))
"""


@pytest.mark.slow
def test_eight_images_are_learnt_by_heart_at_two_sizes(tmp_path):
  """Data, model, matching, loss, boxes on the files' images and scores together: AP50 above 0.95."""
  (tmp_path / "eight.py").write_text(EIGHT)
  train_lib.train(config.load(str(tmp_path / "eight.py")), tmp_path / "run")
  rows = json.loads((tmp_path / "run" / "eval.json").read_text())["rows"]
  assert [row["ap50"] > 0.95 for row in rows] == [True, True], rows


def test_samples_show_the_photo_without_padding():
  evaluator = detection(
    Scripted(), batches(), sharding.make_mesh(), seqhw=(8,), samples=3, class_names=NAMES
  )
  (row,) = evaluator.run(answers(0.1))
  files = evaluator.pictures()
  assert row["samples"] == ["0_8.jpg", "1_8.jpg", "2_8.jpg"]
  assert set(files) == {f"{i}_{what}.jpg" for i in range(3) for what in ("true", 8)}
  for i in range(3):
    seen = [round(n * s) for n, s in zip(scenes()[i][0], scale_of(scenes()[i][0]), strict=True)]
    picture = Image.open(io.BytesIO(files[f"{i}_8.jpg"]))
    assert picture.height / picture.width == pytest.approx(seen[0] / seen[1], rel=0.02)


# --- what is refused ---


def changed(**changes):
  return [batches()[0] | changes]


@pytest.mark.parametrize(
  ("data", "options", "expected"),
  [
    (
      [{"image": np.zeros((1, 8, 8, 3)), "_mask": np.ones(1)}],
      {},
      r"needs \['box_labels', 'box_ma",
    ),
    (None, dict(rules="lvis"), r"needs \['neg_labels', 'not_exhaustive'\].*federated"),
    (None, dict(rules="pascal"), "Unknown rules 'pascal'; known: coco, lvis"),
    (changed(boxes=batches()[0]["boxes"] / 24), {}, "are shares of the image.*relative_boxes out"),
    (
      changed(box_labels=batches()[0]["box_labels"] + 1),
      {},
      "A box is of class 3; expected 0 to 2",
    ),
    (changed(box_mask=batches()[0]["box_mask"] * 0), {}, "No box of the 3 images counts"),
    (None, dict(only="novel"), "Unknown group of classes 'novel'"),
    (None, dict(class_groups={"small": (0,)}), r"called \['small'\], as sizes of boxes"),
    (None, dict(pairs=0), "pairs=0, samples=0; expected 1 or more"),
    (None, dict(templates="one"), "templates='one' of a detector whose queries are its classes"),
    (None, dict(model=FlexiViT(variant="mu")), "FlexiViT gives no class_logits and no pred_boxes"),
    (None, dict(model=OwlViT(text=TEXT, backbone=BACKBONE)), "The data name no classes"),
    (
      None,
      dict(model=OwlViT(text=TEXT, backbone=BACKBONE), class_names=NAMES, vectors="x"),
      "vectors='x' of a detector with a text tower",
    ),
    (
      None,
      dict(model=OwlViT(query_length=5, backbone=BACKBONE), class_names=NAMES),
      "takes vectors of names: give vectors=",
    ),
    (
      None,
      dict(model=OwlViT(text=TEXT, backbone=BACKBONE), class_names=NAMES, seqhw=(4,)),
      "need the tokenizer",
    ),
    (
      batches(neg_labels=np.zeros((8, 2)), not_exhaustive=np.zeros((8, 3))),
      dict(rules="lvis"),
      "'neg_labels' has shape .*expected a row of 3 classes",
    ),
  ],
)
def test_what_cannot_be_measured_is_refused(data, options, expected):
  with pytest.raises(UserError, match=expected):
    rows_of(data, **options)


def test_metrics_are_in_every_row():
  (row,) = rows_of(params={"boxes": np.zeros((8, 64, 4), "f"), "logits": np.zeros((8, 64, 3), "f")})
  assert all(metric.name in row for metric in METRICS)


def on_all_devices(path: str) -> None:
  """Writes the rows on all devices that there are, of classes and of names."""
  closed = rows_of(batches(8), seqhw=(8, 4))
  model, params = detector()
  opened = rows_of(
    batches(8), params, model, seqhw=(4,), class_names=NAMES, tokens=tokens(), templates=TEMPLATES
  )
  with open(path, "w") as file:
    json.dump({"rows": closed, "open": opened, "devices": jax.device_count()}, file)


@pytest.mark.full
def test_eight_devices_measure_as_one(tmp_path, on_eight_devices):
  on_all_devices(str(tmp_path / "one.json"))
  on_eight_devices(on_all_devices, str(tmp_path / "eight.json"))
  one, eight = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "eight"))
  assert eight["devices"] == 8 and eight["rows"] == one["rows"]
  assert eight["open"][0]["ap"] == pytest.approx(one["open"][0]["ap"], abs=0.02)


def on_two_processes(argument: str) -> None:
  """Writes the rows of one of two processes: of the first five images, or of three and a batch of padding alone."""
  number, port, path = argument.split(",")
  distributed.start(f"127.0.0.1:{port}", 2, int(number))
  whole = batches(8)[0]
  padding = {k: np.zeros_like(v) for k, v in whole.items()}
  chosen = [[0, 1, 2], [3, 4]] if number == "0" else [[5, 6, 7], []]
  data = [
    {k: np.concatenate([whole[k][rows], padding[k][: 3 - len(rows)]]) for k in whole}
    for rows in chosen
  ]
  rows = rows_of(data, seqhw=(8, 4))
  with open(f"{path}/{number}.json", "w") as file:
    json.dump({"rows": rows, "processes": jax.process_count()}, file)


@pytest.mark.full
def test_two_processes_measure_as_one(tmp_path, environment_of):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  call = "import runpy, sys; runpy.run_path(sys.argv[1])['on_two_processes'](sys.argv[2])"
  started = [
    subprocess.Popen(
      [sys.executable, "-c", call, __file__, f"{i},{port},{tmp_path}"], env=environment_of(1)
    )
    for i in range(2)
  ]
  assert [process.wait(timeout=300) for process in started] == [0, 0]
  first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
  assert first == second and first["processes"] == 2
  assert first["rows"] == json.loads(json.dumps(rows_of(batches(8), seqhw=(8, 4))))
