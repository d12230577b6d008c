import json

import numpy as np
import pytest

from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import image_scores, results
from flexivit_jax.evaluators.classification import classification


def batch_of(ids, mask, seed=0):
  ids = np.array(ids)
  pixels = np.random.default_rng(seed).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
  labels = np.eye(3, dtype=np.float32)[np.arange(20) % 3]
  mask = np.array(mask, np.float32)
  return {
    "image": pixels[ids],
    "labels": labels[ids],
    "_id": np.where(mask > 0, ids, -1),
    "_mask": mask,
  }


def scores_of(model_and_params, batches):
  model, params = model_and_params
  evaluator = classification(model, batches, sharding.make_mesh(), seqhw=(2, 4))
  rows = evaluator.run(params)
  return rows, evaluator


def test_scores_are_of_real_images_by_id_in_any_order(model_and_params):
  rows, evaluator = scores_of(
    model_and_params, [batch_of([5, 3, 1, 0], [1, 1, 1, 1]), batch_of([2, 4, 9, 9], [1, 1, 0, 0])]
  )
  found = evaluator.image_scores()
  np.testing.assert_array_equal(found.ids, range(6))
  np.testing.assert_array_equal(found.labels, [0, 1, 2, 0, 1, 2])
  assert [*found.right] == ["2", "4"]
  for row, right in zip(rows, found.right.values(), strict=True):
    assert right.sum() == round(row["top1"] * row["n"])
  _, other = scores_of(
    model_and_params, [batch_of([4, 0, 2, 7], [1, 1, 1, 0]), batch_of([3, 1, 5, 9], [1, 1, 1, 0])]
  )
  assert image_scores.encoded(found) == image_scores.encoded(other.image_scores())


def test_batches_without_ids_have_no_scores(model_and_params):
  batch = batch_of([0, 1, 2, 3], [1, 1, 1, 1])
  del batch["_id"]
  assert scores_of(model_and_params, [batch])[1].image_scores() is None


def test_one_id_of_two_images_says_nothing(model_and_params):
  assert scores_of(model_and_params, [batch_of([1, 1, 2, 3], [1] * 4)])[1].image_scores() is None


def test_a_file_is_read_as_it_was_written_and_only_with_its_eval_json(model_and_params, tmp_path):
  rows, evaluator = scores_of(model_and_params, [batch_of([0, 1, 2, 3], [1, 1, 1, 0])])
  results.write(tmp_path / "eval.json", {"name": "run"}, rows, evaluator)
  digest = json.loads((tmp_path / "eval.json").read_text())["images_sha256"]
  found, made = image_scores.read(tmp_path / "eval.json", digest), evaluator.image_scores()
  np.testing.assert_array_equal(found.ids, made.ids)
  for size, right in made.right.items():
    np.testing.assert_array_equal(found.right[size], right)
  with pytest.raises(UserError, match="says nothing of single images"):
    image_scores.read(tmp_path / "eval.json", None)
  with pytest.raises(UserError, match=r"is not the one that was written with eval\.json"):
    image_scores.read(tmp_path / "eval.json", "0" * 64)
  (tmp_path / "eval_images.npz").write_bytes(b"PK nonsense")
  with pytest.raises(UserError, match="holds no scores of images"):
    image_scores.read(tmp_path / "eval.json", image_scores.digest(b"PK nonsense"))
  (tmp_path / "eval_images.npz").unlink()
  with pytest.raises(UserError, match="cannot be read"):
    image_scores.read(tmp_path / "eval.json", digest)
