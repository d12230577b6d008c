"""What files beside weights state: how images are prepared, mean and std, names of classes. It is used, or said."""

import json
import pathlib
import shutil

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file

from flexivit_jax import data, errors, trees, weights
from flexivit_jax.weights import description, stated
from flexivit_jax.weights.timm import images as timm_images
from flexivit_jax.weights.transformers import images as transformers_images

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def hub(tmp_path, timm_state_dict):
  """Writes a folder of timm: 32x32 pixels, 7 classes."""

  def write(pretrained=None, name="model.safetensors", drop=(), **top):
    path = tmp_path / "hub"
    path.mkdir(exist_ok=True)
    save_file(timm_state_dict(), path / name)
    cfg = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "num_classes": 7}
    cfg = {k: v for k, v in (cfg | (pretrained or {})).items() if k not in drop}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4}}
    (path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg} | top))
    return path

  return write


def notes(record):
  return [n for n in record["notes"] if "checksums" not in n]


@pytest.mark.parametrize(
  ("record", "size", "side"),
  [({}, None, 240), ({"image_size": [48, 48]}, None, 48), ({"image_size": [48, 48]}, 96, 96)],
)
def test_weights_that_state_nothing_get_squashed_images(record, size, side):
  assert weights.preparation(record, size) == f"decode|resize({side})|value_range(-1, 1)"


def test_a_run_prepares_its_images_as_its_evaluation_did_and_at_no_other_size():
  record = {"pp": "decode|resize(24)|value_range(-1, 1)", "source": {"file": "run"}}
  assert weights.preparation(record) == record["pp"]
  with pytest.raises(errors.UserError, match="--image_size=48: run says"):
    weights.preparation(record, 48)


def test_each_note_is_printed_once_and_to_stderr(capsys):
  weights.print_notes({"notes": ["One.", "Two.", "One."]})
  assert capsys.readouterr() == ("", "note: One.\nnote: Two.\n")
  weights.print_notes({})


SHORTER = "resize_small({}, method='pil_{}', rounding='down')|central_crop(32, 'even', fill=0)"


@pytest.mark.parametrize(
  ("pretrained", "want"),
  [
    ({}, SHORTER.format(36, "bicubic")),  # floor(32 / 0.875)
    ({"crop_pct": None, "interpolation": None, "crop_mode": None}, SHORTER.format(36, "bicubic")),
    ({"crop_pct": 0.9, "interpolation": "bilinear"}, SHORTER.format(35, "bilinear")),
    ({"crop_pct": 1, "interpolation": "lanczos"}, SHORTER.format(32, "lanczos")),
    ({"crop_pct": 1.0, "crop_mode": "squash"}, "resize(32, method='pil_bicubic')"),
    (
      {"crop_pct": 0.5, "crop_mode": "squash", "interpolation": "nearest"},
      "resize(64, method='pil_nearest')|central_crop(32, 'even', fill=0)",
    ),
    (
      {"crop_mode": "border"},
      "resize_keep(36, 'contain', method='pil_bicubic')|central_crop(32, 'even', fill=[124, 116, 104])",
    ),
    ({"test_input_size": [3, 64, 64], "test_crop_pct": 0.5}, SHORTER.format(36, "bicubic")),
  ],
)
def test_timms_config_says_how_images_are_prepared(hub, pretrained, want):
  *_, record = weights.load_with_record(hub(pretrained))
  assert record["pp"] == f"decode|{want}|value_range(-1, 1)" == weights.preparation(record)
  assert not any("config.json" in n for n in notes(record))


def test_another_size_is_prepared_with_the_same_part_of_the_image(hub):
  *_, record = weights.load_with_record(hub({"crop_pct": 0.9}))
  record = json.loads(json.dumps(record))
  want = SHORTER.format(71, "bicubic").replace("(32", "(64")
  assert weights.preparation(record, 64) == f"decode|{want}|value_range(-1, 1)"
  wide = weights.preparation(record, (32, 64))
  assert "resize_keep" in wide or "resize_small(35" in wide


@pytest.mark.parametrize(
  ("pretrained", "note"),
  [
    ({"crop_pct": "0.9"}, "crop_pct in hub/config.json is '0.9'"),
    ({"crop_pct": -1}, "crop_pct in hub/config.json is -1"),
    ({"crop_pct": True}, "crop_pct in hub/config.json is True"),
    ({"crop_mode": "fancy"}, "crop_mode in hub/config.json is 'fancy', not one of center, squash"),
    ({"interpolation": "random"}, "interpolation in hub/config.json is 'random'"),
    ({"interpolation": ["bicubic"]}, "interpolation in hub/config.json is ['bicubic']"),
    ({"input_size": [3, 64, 64]}, "input_size in hub/config.json is [3, 64, 64]; the weights are"),
    ({"mean": None}, "hub/config.json has no mean: timm's default"),
    ({"mean": [0.4, 0.6], "std": 0.5}, "mean in hub/config.json is [0.4, 0.6], and the kernel"),
    ({"label_names": ["a", "b"]}, "label_names of hub/config.json is not used: it has 2 names"),
    ({"label_names": [1] * 7}, "label_names of hub/config.json is not used: expected a name"),
    ({"label_names": {"0": "a", "2": "b"}}, "label_names of hub/config.json is not used"),
    ({"label_names": "ant"}, "label_names of hub/config.json is not used: expected a name"),
  ],
)
def test_what_cannot_be_used_is_said_and_the_default_taken(hub, pretrained, note):
  *_, record = weights.load_with_record(hub(pretrained))
  assert any(n.startswith(note) for n in notes(record)), notes(record)
  assert "central_crop(32" in record["pp"] and "class_names" not in record


def test_input_size_holds_where_timms_model_takes_any(hub):
  path = hub({"input_size": [3, 64, 64], "fixed_input_size": False})
  *_, record = weights.load_with_record(path)
  assert "central_crop(64" in record["pp"] and record["image_size"] == [32, 32]


@pytest.mark.parametrize("place", ["top", "pretrained_cfg", "numbers", "labels"])
def test_names_of_classes_are_read_from_each_place_that_timm_knows(hub, place):
  numbered = {str(i): name for i, name in reversed(list(enumerate(NAMES)))}
  said = {
    "top": dict(label_names=NAMES),
    "pretrained_cfg": dict(pretrained={"label_names": NAMES}),
    "numbers": dict(label_names=numbered, label_descriptions={"ant": "an insect"}),
    "labels": dict(pretrained={"labels": NAMES}),
  }[place]
  *_, record = weights.load_with_record(hub(**said))
  assert record["class_names"] == NAMES
  if place == "numbers":
    assert record["class_descriptions"] == ["an insect", *NAMES[1:]]


FILES = ["model.safetensors", "best.safetensors", "model.npz"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_means_what_the_config_beside_it_says(hub, name, timm_state_dict):
  path = hub(label_names=NAMES)
  model, want, whole = weights.load_with_record(path)
  if name.endswith(".npz"):
    np.savez(path / name, **timm_state_dict())
  elif name != "model.safetensors":
    shutil.copy(path / "model.safetensors", path / name)
  same, params, record = weights.load_with_record(path / name)
  assert same == model
  jax.tree.map(np.testing.assert_array_equal, params, want)
  for key in ("pp", "class_names", "input", "folded_input", "images"):
    assert record[key] == whole[key]
  assert record["input"]["from"] == "hub/config.json" and record["source"]["file"] == name


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize(
  ("change", "why"),
  [
    (dict(num_classes=1000), "num_classes is 1000, and the weights have 7"),
    (dict(model_args={"num_heads": 4, "embed_dim": 64}), "width is 64, and the weights have 32"),
    (dict(model_args={"num_heads": 4, "depth": 12}), "depth is 12, and the weights have 2"),
  ],
)
def test_a_config_of_another_model_is_named_and_not_used(hub, name, change, why):
  path = hub(name=name, **change)
  model, _, record = weights.load_with_record(path / name, num_heads=4)
  assert model.num_classes == 7 and "pp" not in record and "folded_input" not in record
  unused, assumed = notes(record)[-2:]
  assert unused.startswith(f"The config.json beside {name} is not used: ") and why in unused
  assert assumed.startswith(f"Nothing beside {name} says the input's mean and std: 0.5 and 0.5 are")


def test_the_standard_file_of_a_model_that_no_flexivit_is_stays_refused(hub):
  path = hub(architecture="vit_base_patch16_rope_224")
  for what in (path, path / "model.safetensors"):
    with pytest.raises(errors.UserError, match="is no plain ViT"):
      weights.load(what)
  shutil.copy(path / "model.safetensors", path / "other.safetensors")
  *_, record = weights.load_with_record(path / "other.safetensors", num_heads=4)
  assert any("is not used" in n and "is no plain ViT" in n for n in notes(record))


@pytest.mark.parametrize("content", ["{", "[1]", "", '{"architecture": '])
def test_a_damaged_config_is_one_line_that_names_it(hub, content):
  path = hub()
  (path / "config.json").write_text(content)
  for what in (path, path / "model.safetensors"):
    with pytest.raises(errors.UserError, match=r"hub/config\.json.*JSON") as error:
      weights.load(what)
    assert "\n" not in str(error.value)


def test_a_file_alone_says_what_is_assumed_and_the_advice_works(hub, tmp_path):
  file = pathlib.Path(shutil.copy(hub() / "model.safetensors", tmp_path))
  model, params, record = weights.load_with_record(file, num_heads=4)
  assert "read model.safetensors with --mean and --std" in notes(record)[-1]
  lines = description.describe(model, params, record)
  assert any(line.startswith("input         assumed mean 0.5, std 0.5; give") for line in lines)
  *_, record = weights.load_with_record(file, num_heads=4, mean=MEAN, std=STD)
  assert record["input"] == {"mean": MEAN, "std": STD, "from": "given"} and notes(record) == []


def test_inspect_prints_input_preparation_and_classes_with_the_file_that_says_them(hub):
  lines = description.describe(*weights.load_with_record(hub(label_names=NAMES)))
  assert "input         mean 0.485,0.456,0.406, std 0.229,0.224,0.225 (hub/config.json)" in lines
  want = "prepared      shorter side to 36 pixels, bicubic, centre 32x32 (hub/config.json)"
  assert want in lines
  assert "classes       ant, bee, cat, dog, eel, ... (7 in all)" in lines


@pytest.mark.parametrize("model_type", ["vit", None])
def test_a_config_of_a_file_with_other_names_is_said_not_to_be_used(hub, model_type):
  path = hub()
  content = {"model_type": model_type, "architectures": ["ViTModel"]} if model_type else {}
  if content:
    (path / "config.json").write_text(json.dumps(content))
    file = path / "model.safetensors"
  else:
    _, params, _ = weights.load_with_record(path)
    arrays = {f"params/{k}": np.asarray(v) for k, v in trees.flatten(params).items()}
    file = path / "big_vision.npz"
    np.savez(file, **arrays)
  *_, record = weights.load_with_record(file, num_heads=4)
  assert any(
    n.endswith("is not used: the arrays of the file have other names.") for n in notes(record)
  )


@pytest.mark.parametrize(
  ("images", "want"),
  [
    ({}, "resize_small(32, method='pil_bicubic', rounding='down')|central_crop(32, 'even', fill=0)"),
    ({"resize_mode": "squash", "interpolation": "bilinear"}, "resize(32, method='pil_bilinear')"),
    ({"resize_mode": "longest"}, "resize_keep(32, 'contain', method='pil_bicubic')|"),
  ],
)  # fmt: skip
def test_open_clips_config_beside_a_file_is_used(hub, tmp_path, images, want):
  file = shutil.copy(hub() / "model.safetensors", tmp_path / "open_clip_model.safetensors")
  config = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": images}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
  model, _, record = weights.load_with_record(file, num_heads=4)
  assert model.gelu == "quick" and record["pp"].startswith(f"decode|{want}")
  assert record["folded_input"]["mean"] == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)
  assert record["input"]["from"].endswith("open_clip_config.json") and notes(record) == []
  (tmp_path / "open_clip_config.json").write_text("{")
  with pytest.raises(errors.UserError, match=r"open_clip_config\.json cannot be read as JSON"):
    weights.load(file, num_heads=4)


def test_one_channel_takes_the_mean_of_three_as_timm_does():
  read = timm_images.read("x", {}, {"mean": [0.3, 0.6, 0.9], "std": [0.1, 0.2, 0.3]}, (8, 8), 1)
  assert read.mean == pytest.approx((0.6,)) and read.std == pytest.approx((0.2,))
  assert len(read.notes) == 2 and "its mean is taken, as in timm" in read.notes[0]


def processor(tmp_path, settings, family="vit", native=(32, 32), name="preprocessor_config.json"):
  (tmp_path / name).write_text(json.dumps(settings))
  return transformers_images.read(tmp_path, family, native, 3)


CROP = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
  ("settings", "want"),
  [
    ({"size": {"height": 32, "width": 32}, "resample": 2}, "resize(32, method='pil_bilinear')"),
    ({"size": {"height": 32, "width": 32}, "resample": 3}, "resize(32, method='pil_bicubic')"),
    ({"size": 32, "feature_extractor_type": "ViTFeatureExtractor"}, "resize(32, method='pil_bilinear')"),
    ({"size": [32, 32], "resample": 0}, "resize(32, method='pil_nearest')"),
    ({"size": 32, "resample": "lanczos"}, "resize(32, method='pil_lanczos')"),
    (
      {"size": 40, "resample": 1, "image_processor_type": "DeiTImageProcessorFast"} | CROP,
      "resize(40, method='pil_lanczos')|central_crop(32, 'down', fill=0)",
    ),
    (
      {"size": {"shortest_edge": 40}, "resample": 5} | CROP,
      "resize_small(40, method='pil_hamming', rounding='down')|central_crop(32, 'down', fill=0)",
    ),
    (
      {"size": 40, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
      "resize_small(40, method='pil_bicubic', rounding='down')|central_crop(32, 'down', fill=0)",
    ),
    ({"size": 32, "resample": 4, "do_center_crop": None}, "resize(32, method='pil_box')"),
  ],
)  # fmt: skip
def test_transformers_processor_says_how_images_are_prepared(tmp_path, settings, want):
  images = processor(tmp_path, settings)
  assert images.stated.operations() == want and images.notes == []
  nested = {"image_processor": settings, "processor_class": "CLIPProcessor"}
  other = processor(tmp_path, nested, name="processor_config.json")
  assert other.stated.operations() == want
  assert other.where == f"{tmp_path.name}/processor_config.json"


@pytest.mark.parametrize(
  ("settings", "note"),
  [
    ({"size": {"longest_edge": 32}}, "size in .* not understood: images are squashed to 32x32"),
    ({"size": {"height": "32", "width": 32}}, "size in .* not understood"),
    ({"size": 10**9}, "size in .* not understood"),
    ({"size": 32, "do_center_crop": True, "crop_size": "32"}, "crop_size in .* not understood"),
    ({"size": 32, "resample": 9}, "resample in .* is 9, no filter of Pillow: bilinear"),
    ({"size": 32, "resample": True}, "resample in .* is True"),
    ({"size": 32, "do_resize": False}, "has do_resize=false: an image of 32x32 pixels is taken"),
    ({"size": {"shortest_edge": 32}}, "has no crop: the centre is cut out"),
    ({"size": 64}, "makes images of 64x64 pixels, and the model is for 32x32, for which"),
    ({"size": 32, "image_processor_type": "OwnImageProcessor"}, "'OwnImageProcessor', which is not"),
    ({"size": 32, "do_pad": True}, "do_pad in .* is not used"),
    ({"size": 32, "image_mean": [0.5], "image_std": [0.5]}, "mean and std of 1 channels, and the"),
  ],
)  # fmt: skip
def test_what_of_a_processor_cannot_be_followed_is_said(tmp_path, settings, note):
  images = processor(tmp_path, settings)
  assert len(images.notes) == 1
  with pytest.raises(AssertionError, match=note):
    raise AssertionError(images.notes[0])
  assert images.stated.hw == (32, 32)
  data.parse(images.stated.pp())


def test_dinov2_gets_images_of_the_size_that_its_processor_makes(tmp_path):
  images = processor(tmp_path, {"size": {"shortest_edge": 256}}, "dinov2", (518, 518))
  assert images.stated.hw == (224, 224) and images.notes == []


@pytest.mark.parametrize("content", ["{", "[1]", '{"image_processor": 3}'])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_damaged_settings_are_one_line_that_names_the_file(tmp_path, name, content):
  if name == "preprocessor_config.json" and "image_processor" in content:
    content = "3"
  (tmp_path / name).write_text(content)
  with pytest.raises(errors.UserError, match=name) as error:
    transformers_images.read(tmp_path, "vit", (32, 32), 3)
  assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=60)
@given(
  resize=st.sampled_from(["squash", "shorter", "cover", "contain"]),
  pct=st.sampled_from([0.5, 0.875, 0.9, 0.95, 1.0, 1.2]),
  side=st.integers(8, 40),
  hw=st.tuples(st.integers(1, 70), st.integers(1, 70)),
  name=st.sampled_from(stated.FILTERS),
)
def test_any_statement_makes_images_of_its_size_and_comes_back_from_a_record(
  resize, pct, side, hw, name
):
  statement = stated.Stated((16, 16), resize, (16, 16), (pct, pct), f"pil_{name}", "even", 0, "x")
  statement = statement.at((side, side))
  record = json.loads(json.dumps(stated.keep(statement)))
  assert stated.of_record(record) == statement
  pp = weights.preparation(record)
  image = data.parse(pp)({"image": np.zeros((*hw, 3), np.uint8)}, None)["image"]
  assert image.shape == (side, side, 3) and image.dtype == np.float32


@pytest.mark.parametrize(
  "images", [3, {}, {"hw": 3}, dict.fromkeys(stated.Stated._fields), [1]]
)  # fmt: skip
def test_a_record_that_says_nonsense_of_images_is_passed_over(images):
  record = {"images": images, "source": {"file": "x"}, "image_size": [8, 8]}
  assert weights.preparation(record) == "decode|resize(8)|value_range(-1, 1)"
