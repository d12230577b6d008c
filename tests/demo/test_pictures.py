"""The demo page of models that give masks or boxes: its answers are those of predict."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.commands import demo as command
from flexivit_jax.data.inputs import Input
from flexivit_jax.demo import kinds
from flexivit_jax.inference import boxes, masks, predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pictures")
  low = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
  Image.fromarray(low).resize((48, 32), Image.Resampling.BICUBIC).save(folder / "photo.png")
  return folder


def content_of(folder, kind):
  """The data of the page, and the model."""
  args = ["demo", folder / f"{kind}.npz", "--static", folder / kind]
  assert cli.main([str(arg) for arg in [*args, "--images", folder / "photo.png"]]) in (None, 0)
  page = (folder / kind / "index.html").read_text()
  data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
  return data, predictor.load(folder / f"{kind}.npz", whole=True)


def predicted(folder, module, loaded, **options):
  """The answers of predict by their size."""
  inputs = [Input(str(folder / "photo.png"))]
  ((_, answers),) = module.answers(loaded, inputs, [3, 6], batch_size=1, **options)
  return {str(answer.size): answer for answer in answers}


@pytest.mark.full
def test_masks_are_those_of_predict_at_the_files_own_resolution(folder, save_kind):
  save_kind(folder, "masks")
  data, loaded = content_of(folder, "masks")
  answers = data["photos"][0]["answers"]
  wanted = predicted(folder, masks, loaded)
  assert data["kind"] == "masks"
  for size, answer in wanted.items():
    picture = base64.b64decode(answers[size]["overlay"].partition(",")[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture))), answer.mask)
    assert (
      answers[size]["classes"]
      == json.loads(masks.as_json(answer, masks.Targets({}, {})))["classes"]
    )
    assert answers[size]["agrees"] == np.mean(answer.mask == wanted["6"].mask)
  assert answers["3"]["agrees"] < 1 == answers["6"]["agrees"]


@pytest.mark.full
def test_boxes_are_those_of_predict_in_pixels_of_the_file(folder, save_kind):
  save_kind(folder, "boxes")
  data, loaded = content_of(folder, "boxes")
  (photo,) = data["photos"]
  assert photo["window"] == [32, 48, 0, 0, 48, 48]  # padded below
  for size, answer in predicted(folder, boxes, loaded).items():
    shown = photo["answers"][size]["boxes"]
    assert [{k: v for k, v in one.items() if k != "colour"} for one in shown] == json.loads(
      boxes.as_json(answer, {})
    )["detections"]
    assert shown


def test_a_mask_says_its_classes_and_how_far_it_is_from_the_finest(tmp_path, save_kind):
  kind = kinds.of(predictor.load(save_kind(tmp_path, "masks"), whole=True))
  photo = kinds.Photo("a", np.zeros((2, 2, 3), np.float32))
  coarse = kind.answer(photo, np.eye(3, dtype=np.float32)[[[0, 2], [2, 2]]])
  fine = kind.answer(photo, np.eye(3, dtype=np.float32)[[[0, 1], [2, 2]]])
  said = kind.as_json(coarse, fine)
  assert [(one["name"], one["share"]) for one in said["classes"]] == [
    ("<b>bold</b>", 0.75),
    ("dog", 0.25),
  ]
  assert said["agrees"] == 0.75


def test_boxes_are_placed_by_the_window_of_the_file_that_is_shown(tmp_path, save_kind):
  kind = kinds.of(predictor.load(save_kind(tmp_path, "boxes"), whole=True))
  origin = np.array([32, 48, 0, 0, 48, 48], np.float32)
  photo = kinds.Photo("a", np.zeros((24, 24, 3), np.float32), origin=origin)
  output = np.array([[0.5, 0.25, 0.5, 0.25, -9, 2, -9], [0.5, 0.9, 0.5, 0.1, 9, 9, 9]], np.float32)
  ((one,),) = kind.as_json(kind.answer(photo, output), None).values()  # the other is in the padding
  assert (one["name"], one["box"]) == ("Löwe", [12, 6, 36, 18])
  assert re.fullmatch("#[0-9a-f]{6}", one["colour"])


def test_the_first_images_of_an_evaluation_have_one_shape():
  images = np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 9, 3)), np.ones((2, 8, 8, 3))
  masks_ = [1, 1], [1, 1], [0, 1]
  batches = [{"image": a, "_mask": b} for a, b in zip(images, masks_, strict=True)]
  photos = command._first_of(batches, 9)
  assert [photo.image.max() for photo in photos] == [0, 0, 1]
  assert len(command._first_of(batches, 1)) == 1


def test_masks_of_more_classes_than_a_palette_has_are_in_colours():
  mask = np.array([[0, 299]], np.uint16)
  picture = kinds._picture(mask, 300)
  assert picture.mode == "RGB"
  assert picture.getpixel((0, 0)) != picture.getpixel((1, 0))


@pytest.mark.parametrize(
  ("kind", "option", "problem"),
  [
    ("masks", "--names=cat", "knows its own classes; leave --names out"),
    ("masks", "--vectors=v.npz", "--vectors=v.npz is for detectors"),
    ("boxes", "--names=cat", "leave --names out"),
  ],
)
def test_what_a_model_has_no_use_for(folder, save_kind, tmp_path, capsys, kind, option, problem):
  file = save_kind(tmp_path, kind)
  given = ["demo", file, "--static", tmp_path / "page", "--images", folder / "photo.png", option]
  assert cli.main([str(one) for one in given]) == 2
  assert problem in capsys.readouterr().err
