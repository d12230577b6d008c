"""The class lists are what they say; the tool makes them from its sources."""

import subprocess
import sys

import numpy as np
import pytest

from flexivit_jax.data import label_maps
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

# WordNet id: (ImageNet-1k class, ImageNet-21k class); line numbers, less one, of timm 1.0.31's
# imagenet_synsets.txt and imagenet21k_goog_synsets.txt.
BY_HAND = {
  "n01440764 tench": (0, 359),
  "n02123045 tabby": (281, 2397),
  "n04398044 teapot": (849, 11137),
  "n15075141 toilet tissue": (999, 21817),
}
# Read by hand in ObjectNet's objectnet_to_imagenet_1k.json.
FOLDERS = {
  "banana": (954,),
  "chair": (423, 559, 765),  # barber chair, folding chair, rocking chair
  "full_sized_towel": (434,),  # bath towel
  "stuffed_animal": (850,),  # teddy
  "t-shirt": (610,),
}
SIZES = {
  "i1k_a": (1000, 200),
  "i1k_r": (1000, 200),
  "i1k_objectnet": (1000, 125),
  "i21k_i1k": (21843, 999),
  "i21k_i1k_a": (21843, 199),
  "i21k_i1k_r": (21843, 200),
  "i21k_i1k_objectnet": (21843, 124),
}


@pytest.mark.parametrize("name", label_maps.LABEL_MAPS)
def test_columns_are_different_classes_of_the_model(name):
  chosen = label_maps.label_map(name)
  columns = label_maps.columns(name)
  assert (chosen.model_classes, len(columns)) == SIZES[name]
  # Both orders are those of the WordNet ids, so that each map is increasing; hence also injective.
  assert (np.diff(columns) > 0).all() and columns[0] >= 0 and columns[-1] < chosen.model_classes


@pytest.mark.parametrize("name", label_maps.LABEL_MAPS)
def test_labels_stay_in_step_with_the_columns(name):
  """The k-th column is the logit of the class that is the k-th label that stays, in both numberings of the labels."""
  chosen = label_maps.label_map(name)
  whole = label_maps.label_map("i21k_i1k")
  i21k = dict(zip(whole.labels[1000], whole.columns, strict=True))
  for num_classes, of_labels in chosen.labels.items():
    own = label_maps.columns(f"i1k_{name.split('_')[-1]}") if num_classes < 1000 else range(1000)
    classes = [own[k] for k in of_labels]
    assert list(chosen.columns) == (
      [i21k[c] for c in classes] if name.startswith("i21k") else classes
    )


def test_classes_read_by_hand():
  chosen = label_maps.label_map("i21k_i1k")
  found = dict(zip(chosen.labels[1000], chosen.columns, strict=True))
  for i1k, i21k in BY_HAND.values():
    assert found[i1k] == i21k
  assert set(range(1000)) - set(found) == {850}  # teddy bear
  # The first three wnids of imagenet_a_synsets.txt and imagenet_r_synsets.txt, found in imagenet_synsets.txt.
  assert label_maps.columns("i1k_a")[:3] == (6, 11, 13)
  assert label_maps.columns("i1k_r")[:3] == (1, 2, 4)
  assert 850 in label_maps.columns("i1k_a") and 850 not in label_maps.columns("i1k_r")


def test_objectnets_folders():
  folders = label_maps.objectnet()
  assert len(folders) == 113 and list(folders) == sorted(folders)
  assert {name: folders[name] for name in FOLDERS} == FOLDERS
  classes = [c for of_folder in folders.values() for c in of_folder]
  assert len(classes) == len(set(classes)) == 125


def test_categories_of_cue_conflicts():
  categories = label_maps.cue_conflict()
  assert len(categories) == 16 and list(categories) == sorted(categories)
  classes = [c for of_category in categories.values() for c in of_category]
  assert len(classes) == len(set(classes)) == 207
  assert min(classes) >= 0 and max(classes) < 1000
  assert all(list(c) == sorted(c) for c in categories.values())
  # Read by hand in human_categories.py; tabby is 281, as above, alarm clock 409 as in ObjectNet's list.
  assert categories["airplane"] == (404,) and categories["elephant"] == (385, 386)
  assert categories["cat"][0] == 281 and categories["clock"] == (409, 530, 892)
  assert (len(categories["bird"]), len(categories["dog"])) == (49, 109)


def test_an_unknown_name_is_an_error():
  with pytest.raises(UserError, match=r"Unknown label map 'i1k_q'; known: i1k_a, .*Did you mean"):
    label_maps.label_map("i1k_q")


# --- the tool ---

SOURCES = {
  "timm/imagenet_synsets.txt": "n1\nn2\nn4\nn6\nn7\n",
  "timm/imagenet21k_goog_synsets.txt": "n0\nn1\nn2\nn3\nn4\nn5\nn7\n",
  "timm/imagenet_a_synsets.txt": "n2\nn6\n",
  "timm/imagenet_a_indices.txt": "1\n3\n",
  "timm/imagenet_r_synsets.txt": "n1\nn4\n",
  "timm/imagenet_r_indices.txt": "0\n2\n",
  "timm/imagenet_synset_to_lemma.txt": "n0\tx\nn1\tcup\nn2\tcrane\nn4\tcrane\nn6\tmug, beaker\nn7\tjug\n",
  "objectnet/folder_to_objectnet_label.json": '{"the_jug": "Jug", "a_cup": "Cup (any)", "hat": "Hat"}',
  "objectnet/objectnet_to_imagenet_1k.json": '{"Jug": "jug", "Cup (any)": "mug, beaker; cup"}',
}


def make(repository, folder, changes=(), out="out"):
  for path, text in {**SOURCES, **dict(changes)}.items():
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_text(text)
  (folder / out).mkdir()
  given = ["--timm", folder / "timm", "--objectnet", folder / "objectnet", "--out", folder / out]
  command = [sys.executable, repository / "tools" / "maintain" / "make_label_maps.py", *given]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  return run, {path.name: path.read_text() for path in (folder / out).iterdir()}


def test_the_tool_makes_the_lists(repository, tmp_path):
  run, files = make(repository, tmp_path)
  assert files == {
    "i21k_i1k.txt": "1\n2\n4\n-1\n6\n",
    "i1k_a.txt": "1\n3\n",
    "i1k_r.txt": "0\n2\n",
    "objectnet.json": '{\n"a_cup": [0, 3],\n"the_jug": [4]\n}\n',
  }
  assert "Class 3 (n6) is not in ImageNet-21k: -1" in run.stdout


@pytest.mark.parametrize(
  ("path", "text", "message"),
  [
    ("timm/imagenet_a_indices.txt", "1\n2\n", "disagree"),
    ("timm/imagenet_r_synsets.txt", "n4\nn1\n", "disagree"),
    ("timm/imagenet_synsets.txt", "n1\nn2\nn4\nn4\nn7\n", "an id twice"),
    (
      "objectnet/objectnet_to_imagenet_1k.json",
      '{"Jug": "jug", "Hat": "jug"}',
      "belongs to two of ObjectNet",
    ),
    ("objectnet/objectnet_to_imagenet_1k.json", '{"Jug": "crane"}', "KeyError: 'crane'"),
  ],
)
def test_the_tool_refuses_contradictions(repository, tmp_path, path, text, message):
  run, _ = make(repository, tmp_path, {path: text})
  assert run.returncode and message in run.stderr
