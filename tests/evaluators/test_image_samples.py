"""Which images are kept to look at, and what is said of them."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import image_samples, results
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.image_scores import ImageScores

SIZES = (2, 4)


def batches_of(ids, number, channels=1, seed=0):
  """Images in the order of `ids`, in batches; the last is filled up."""
  rng = np.random.default_rng(seed)
  pixels = rng.uniform(-1, 1, (max(ids) + 1, 8, 8, channels)).astype(np.float32)
  labels = np.eye(3, dtype=np.float32)[np.arange(max(ids) + 1) % 3]
  labels[7] = 0
  for begin in range(0, len(ids), number):
    some = np.array(ids[begin : begin + number])
    mask = np.pad(np.ones(len(some), np.float32), (0, number - len(some)))
    some = np.pad(some, (0, number - len(some)))
    yield {
      "image": pixels[some],
      "labels": labels[some],
      "_id": np.where(mask > 0, some, -1),
      "_mask": mask,
    }


def evaluated(model_and_params, batches, **options):
  model, params = model_and_params
  evaluator = classification(model, batches, sharding.make_mesh(), seqhw=SIZES, **options)
  return evaluator.run(params), evaluator


def test_samples_say_what_the_model_says_and_show_the_image(model_and_params):
  model, params = model_and_params
  batches = [*batches_of([*range(20)], 8)]
  rows, evaluator = evaluated(model_and_params, batches, samples=6)
  pictures = evaluator.pictures()
  for row, size in zip(rows, SIZES, strict=True):
    assert [f"{one['id']}.jpg" for one in row["samples"]] == [*pictures]
    for one in row["samples"]:
      (batch,) = batches_of([*range(20)], 20)
      image = batch["image"][one["id"]]
      found = int(model.apply({"params": params}, image[None], seqhw=size)[0].argmax())
      assert one["label"] == (-1 if one["id"] == 7 else one["id"] % 3)
      assert one["predicted"] == found and one["right"] == (found == one["label"])
      shown = np.array(Image.open(io.BytesIO(pictures[f"{one['id']}.jpg"])))
      assert np.abs(shown - (image[..., 0] + 1) * 127.5).mean() < 16
  wrong = [not all(row["samples"][i]["right"] for row in rows) for i in range(len(pictures))]
  assert wrong and all(wrong)
  classes = [(one["label"], one["id"]) for one in rows[0]["samples"]]
  assert classes == sorted(classes)


def test_they_depend_on_no_order(model_and_params):
  ids = [*range(300)]
  found = [evaluated(model_and_params, [*batches_of(ids, 64)])]
  np.random.default_rng(1).shuffle(ids)
  found += [evaluated(model_and_params, [*batches_of(ids, 48)])]
  assert found[0][0][0]["samples"] == found[1][0][0]["samples"]
  assert found[0][1].pictures() == found[1][1].pictures()
  assert len(found[0][1].pictures()) == 8


@pytest.mark.parametrize("processes", [1, 3])
def test_an_image_that_is_chosen_is_kept_by_the_process_that_reads_it(processes):
  """A process keeps more than its share of those that are drawn from the images of all."""
  rng = np.random.default_rng(0)
  n = 1000
  right = {str(size): rng.integers(0, 2, n).astype(np.uint8) for size in SIZES}
  predicted = {size: rng.integers(0, 3, n) for size in right}
  scores = ImageScores(np.arange(n), np.arange(n) % 3, right, predicted)
  samples = image_samples.chosen(scores, 1000)
  assert 70 < len(samples) < image_samples.LOOKED_AT  # about three quarters
  albums = [image_samples.Album() for _ in range(processes)]
  for i, album in enumerate(albums):
    assert len([*album.watched(batches_of([*range(i, n, processes)], 100))]) >= 4
  files = [album.files(samples) for album in albums]
  assert sum(map(len, files)) == len({name for made in files for name in made}) == len(samples)
  few = image_samples.chosen(scores, 10)
  assert all(len(set(one.right.values())) == 2 for one in few)  # the sizes disagree


def test_nothing_is_kept_where_it_is_not_asked_for_or_cannot_be(model_and_params):
  batches = [*batches_of([*range(20)], 10)]
  rows, evaluator = evaluated(model_and_params, batches, samples=0)
  assert evaluator.pictures() == {} and "samples" not in rows[0]
  without = [{k: v for k, v in batch.items() if k != "_id"} for batch in batches]
  rows, evaluator = evaluated(model_and_params, without)
  assert evaluator.pictures() == {} and "samples" not in rows[0]
  album = image_samples.Album()
  assert len([*album.watched(batches_of([*range(20)], 10, channels=4))]) == 2
  scores = ImageScores(
    np.arange(20), np.zeros(20, int), {"2": np.zeros(20, np.uint8)}, {"2": np.ones(20, int)}
  )
  assert album.files(image_samples.chosen(scores, 5)) == {}
  with pytest.raises(UserError, match="samples=-1 of an evaluation; expected 0 or more"):
    evaluated(model_and_params, batches, samples=-1)


def test_files_hold_the_latest_samples_and_nothing_of_the_users_goes(model_and_params, tmp_path):
  folder = tmp_path / "eval_samples"
  folder.mkdir()
  for name in ("4711.jpg", "0_2x4.png", "mine.jpg", "notes.txt"):
    (folder / name).write_text("")
  rows, evaluator = evaluated(model_and_params, [*batches_of([*range(20)], 10)])
  results.write(tmp_path / "eval.json", {"name": "run"}, rows, evaluator)
  written = json.loads((tmp_path / "eval.json").read_text())["rows"]
  assert written[0]["samples"] == rows[0]["samples"]
  named = {f"{one['id']}.jpg" for one in written[0]["samples"]}
  assert {path.name for path in folder.iterdir()} == named | {"mine.jpg", "notes.txt"}
  results.write(tmp_path / "eval.json", {"name": "run"}, rows)  # without pictures no row names them
  assert "samples" not in json.loads((tmp_path / "eval.json").read_text())["rows"][0]
