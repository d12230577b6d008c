"""A model of two towers is trained by the trainer as it is: its parts start from files, each under its own name."""

import jax
import numpy as np
import pytest

from flexivit_jax import errors, experiment, train as train_lib, trees, weights
from flexivit_jax.data.preprocess import OPS
from flexivit_jax.experiment import loaders
from flexivit_jax.models import FlexiViT, OwlViT, counting
from flexivit_jax.running import checkpoint, metrics_writer
from flexivit_jax.training import steps
from flexivit_jax.weights import model_records, tasks

FIELDS = dict(variant="mu", num_classes=3)


@pytest.fixture
def settings(monkeypatch):
  monkeypatch.setitem(OPS, "numbers", numbers)
  data = dict(name="synthetic", split="train", image_size=24, num_classes=4, num_examples=32)
  pp = "decode|value_range|numbers|keep('image', 'tokens')"
  text = dict(width=16, depth=1, mlp_dim=16, num_heads=2, vocab_size=20, max_length=5)
  return dict(
    total_steps=3,
    input=dict(data=dict(data, annotated=True), pp=pp, batch_size=8, threads=0),
    model=dict(name="two_towers", embed_dim=8, image=dict(variant="mu"), text=text),
    objective=dict(name="sigmoid_contrastive"),
    flexi=dict(seqhw=dict(v=(4,))),
    optim=dict(lr=1e-2),
    log_every=1,
  )


def numbers(record):
  return record | {"tokens": np.arange(5, dtype=np.int32) + record["label"]}


@pytest.fixture
def file(tmp_path):
  model = FlexiViT(**FIELDS)
  params = steps.init_params(model, {"image": (24, 24, 3)}, 1)
  weights.save_npz(tmp_path / "vit.npz", model, params, {"model": FIELDS})
  return str(tmp_path / "vit.npz"), params


def test_a_locked_tower_starts_from_a_file_and_stays_as_it_is(settings, file, tmp_path):
  path, params = file
  settings["init"] = dict(image=dict(checkpoint=path, new_head=True))
  settings["optim"]["freeze"] = ("image/.*",)
  run = tmp_path / "run"
  train_lib.train(settings, run)
  saved, record = checkpoint.load_params(run)
  for name in ("embedding", "Transformer", "pos_embedding"):
    expected = params[name]
    assert trees.digest(saved["image"][name]) == trees.digest(expected)
  assert record["model"]["bias"] == pytest.approx(-np.log(7))
  rows = metrics_writer.read_rows(run / "metrics.jsonl")
  assert len({row["loss"] for row in rows}) == 3
  # The run is read as two towers, and its image tower as a FlexiViT.
  towers, both, _ = weights.towers.load(run)
  assert trees.digest(both) == trees.digest(saved)
  vit, image = weights.load(run)
  assert trees.digest(image) == trees.digest(saved["image"])
  assert vit == towers.parts["image"]
  assert trees.digest(weights.load_into(run, vit)) == trees.digest(image)


@pytest.mark.parametrize(
  ("init", "expected"),
  [
    (dict(checkpoint="x.npz"), r"init\.checkpoint of a model of parts; .* init\.image\.checkpoint"),
    (dict(imag=dict(checkpoint="x")), r"init\.imag.*init\.image"),
    (dict(image=dict(checkpoints="x")), r"init\.image\.checkpoints.*init\.image\.checkpoint"),
    (dict(image="x.npz"), r"init\.image is 'x.npz'"),
  ],
)
def test_where_parts_start_is_checked(settings, init, expected):
  settings["init"] = init
  with pytest.raises(errors.UserError, match=expected):
    experiment.from_config(settings)


def test_a_file_of_other_channels_is_refused(settings, tmp_path):
  model = FlexiViT(**FIELDS)
  params = steps.init_params(model, {"image": (24, 24, 1)}, 1)
  weights.save_npz(tmp_path / "grey.npz", model, params, {"model": FIELDS})
  settings["init"] = dict(image=dict(checkpoint=str(tmp_path / "grey.npz"), new_head=True))
  with pytest.raises(errors.UserError, match="images of 1 channels, the data's have 3"):
    experiment.from_config(settings)


def test_a_batch_of_one_is_refused(settings):
  settings["input"]["batch_size"] = 1
  with pytest.raises(errors.UserError, match=r"compares the examples of a batch.*at least 2"):
    experiment.from_config(settings)


@pytest.mark.full
def test_a_locked_tower_is_counted_without_its_backward_pass(settings):
  free = experiment.from_config(settings)
  settings["optim"]["freeze"] = ("image/.*",)
  locked = experiment.from_config(settings)
  size, shapes = {"seqhw": 4}, free.shapes
  image = 2e9 * 8 * FlexiViT(variant="mu", num_classes=8).gmacs(shapes, **size)
  np.testing.assert_allclose(free.step_flops(size) - locked.step_flops(size), 2 * image, rtol=0.05)
  whole, part = (
    counting.activation_bytes(free.model, shapes, frozen, **size)
    for frozen in (None, locked.optimizer.frozen)
  )
  assert part < 0.3 * whole


def test_an_objective_without_a_bias_trains_a_model_without_one(settings):
  assert experiment.from_config(settings).model.bias == pytest.approx(-np.log(7))
  settings["objective"]["name"] = "softmax_contrastive"
  softmax = experiment.from_config(settings)
  assert softmax.model.bias is None and softmax.model_record["bias"] is None
  settings["model"]["bias"] = -3.0  # as it was asked for
  assert experiment.from_config(settings).model.bias == -3.0


def test_a_backbone_is_like_its_file_and_starts_from_it(settings, file, tmp_path):
  """The fields that are given beside `like` differ from the file's; the decoder's are the config's."""
  path, params = file
  settings["model"] = dict(name="segmenter", backbone=dict(like=path, stochastic_depth=0.5))
  settings["objective"] = dict(name="segmentation")
  settings["input"]["pp"] = "decode|value_range|keep('image', 'mask')"
  settings["init"] = dict(backbone=dict(checkpoint=path, new_head=True))
  exp = experiment.from_config(settings)
  fields = exp.model.backbone
  whole = FlexiViT(**FIELDS)
  assert (fields["width"], fields["depth"]) == (whole.width, whole.depth)
  assert fields["stochastic_depth"] == 0.5 and "like" not in fields and exp.model.num_classes == 4
  assert trees.digest(exp.init["backbone"]["embedding"]) == trees.digest(params["embedding"])
  settings["model"]["backbone"]["variant"] = "mu"
  with pytest.raises(errors.UserError, match=r"variant='mu' and like=.*both say what model it is"):
    experiment.from_config(settings)


BACKBONE = dict(patch_size=(8, 8), posemb_size=(3, 3), width=16, depth=1, mlp_dim=16, num_heads=2)
TOWER = dict(width=8, depth=1, mlp_dim=16, num_heads=2, vocab_size=20, max_length=5)


@pytest.fixture
def detector(settings, tmp_path):
  """Settings of a detector of four fixed classes, and the path of one that compares images with texts."""
  stored = OwlViT(backbone=BACKBONE, text=TOWER, embed_dim=8, box_bias="corner", gelu="exact")
  shapes = tasks.params_of(stored, 3)
  params = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), shapes)
  weights.save_npz(
    tmp_path / "open.npz", stored, params, {"model": model_records.record_of(stored)}
  )
  boxes = "pad_boxes(4)|relative_boxes('xyxy')|keep('image', 'boxes', 'box_mask', 'box_labels')"
  settings["input"]["pp"] = f"decode|value_range|{boxes}"
  settings["objective"] = dict(name="detection")
  fields = dict(embed_dim=8, box_bias="corner", gelu="exact")
  settings["model"] = dict(name="owl_vit", backbone=BACKBONE, **fields)
  return settings, str(tmp_path / "open.npz"), params


def test_a_detector_of_fixed_classes_starts_from_one_of_texts(detector, tmp_path):
  settings, path, params = detector
  settings["init"] = dict(checkpoint=path, new_head=True)
  settings["model"]["backbone"] = BACKBONE | dict(patch_size=(12, 12))  # the kernel is resized
  exp = experiment.from_config(settings)
  assert "text" not in exp.init and "queries" not in exp.init
  for name in ("box_2", "class_embedding", "merged_class_token", "class_shift"):
    assert trees.digest(exp.init[name]) == trees.digest(params[name])
  assert exp.init["backbone"]["embedding"]["kernel"].shape[:2] == (12, 12)
  # What that run gives starts another one, and no name is lost.
  closed, record = exp.model, {"model": exp.model_record, "class_names": ["a", "b", "c", "d"]}
  whole = jax.tree.map(lambda s: np.ones(s.shape, np.float32), tasks.params_of(closed, 3))
  weights.save_npz(tmp_path / "closed.npz", closed, whole, record)
  start = loaders.load_parts(closed, checkpoint=str(tmp_path / "closed.npz"))
  assert start.params["queries"].shape == (1, 4, 8) and start.classes.names == ("a", "b", "c", "d")
  with pytest.raises(errors.UserError, match=r"(?s)queries: expected .*init\.new_head=True"):
    loaders.load_parts(closed.clone(num_classes=3), checkpoint=str(tmp_path / "closed.npz"))


@pytest.mark.parametrize(
  ("model", "init", "expected"),
  [
    ({}, {}, r"model\.text: none in the config; init\.new_head=True"),
    (dict(box_bias="centre"), dict(new_head=True), r"box_bias: 'corner' in the file, 'centre' in"),
    (dict(name="segmenter"), {}, "holds a OwlViT, model.name is that of a Segmenter"),
    ({}, dict(posemb_size=(2, 2)), r"init\.posemb_size"),
  ],
)
def test_a_whole_that_does_not_fit_is_refused(detector, model, init, expected):
  settings, path, _ = detector
  settings["init"] = dict(checkpoint=path, **init)
  if model.get("name") == "segmenter":
    settings["model"] = dict(name="segmenter", backbone=BACKBONE)
    settings["objective"] = dict(name="segmentation")
    settings["input"]["pp"] = "decode|value_range|keep('image', 'mask')"
  else:
    settings["model"] |= model
  with pytest.raises(errors.UserError, match=expected):
    experiment.from_config(settings)


def test_another_text_tower_is_refused(detector):
  _, path, _ = detector
  fields = dict(backbone=BACKBONE, embed_dim=8, box_bias="corner", gelu="exact")
  model = OwlViT(text=TOWER | dict(width=16), **fields)
  with pytest.raises(errors.UserError, match=r"another text tower:\n  width: 8 in the file, 16 in"):
    loaders.load_parts(model, checkpoint=path)


def test_the_towers_of_a_detector_start_from_its_file(detector):
  _, path, params = detector
  model = OwlViT(backbone=BACKBONE, text=TOWER, embed_dim=8)
  parts = dict(backbone=dict(checkpoint=path), text=dict(checkpoint=path))
  loaded = loaders.load_parts(model, **parts).params
  for name in parts:
    assert trees.digest(loaded[name]) == trees.digest(params[name])
  same = OwlViT(backbone=BACKBONE, text=TOWER, embed_dim=8, box_bias="corner", gelu="exact")
  whole = loaders.load_parts(same, checkpoint=path).params
  assert trees.digest(whole) == trees.digest(params)
