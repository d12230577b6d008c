"""The demo page: what is in it, and that the answers are those of predict."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.demo import content
from flexivit_jax.inference import predictions, predictor

NAMES = ["a", "</script><b>b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_small):
  folder = tmp_path_factory.mktemp("demo")
  save_small(folder, NAMES)
  rng = np.random.default_rng(0)
  (folder / "photos").mkdir()
  for i in range(3):
    Image.fromarray(rng.integers(0, 256, (26, 30, 3), np.uint8)).save(folder / f"photos/{i}.png")
  return folder


def data_of(page):
  text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
  return json.loads(text)


@pytest.fixture(scope="module")
def page(folder):
  args = ["demo", folder / "model.npz", "--static", folder / "page", "--images", folder / "photos"]
  assert cli.main([str(arg) for arg in args]) in (None, 0)
  return (folder / "page" / "index.html").read_text()


def test_answers_are_those_of_predict_at_each_size(folder, page):
  shown = data_of(page)
  assert [one["key"] for one in shown["sizes"]] == ["2", "4"]
  files = sorted((folder / "photos").iterdir())
  for size in (2, 4):
    rows = predictions.predict(files, folder / "model.npz", size, batch_size=1)
    for row, photo in zip(rows, shown["photos"], strict=True):
      top = photo["answers"][str(size)]["top"]
      assert [one["name"] for one in top] == [name for _, name, _ in row.top]
      assert [one["probability"] for one in top] == pytest.approx([p for *_, p in row.top])
      relevance = np.array(photo["answers"][str(size)]["relevance"])
      assert relevance.shape == (size, size)
      assert relevance.max() == 1


def test_sizes_say_what_they_cost(folder):
  loaded = predictor.load(folder / "model.npz")
  coarse, fine = content.about(loaded.model, "m", (24, 24, 3), [4, 2])["sizes"]
  assert (coarse["tokens"], fine["tokens"]) == (4, 16)
  assert (coarse["patch"], fine["grid"]) == ("12", [4, 4])
  assert coarse["gflops"] < fine["gflops"]


def test_the_page_loads_nothing_and_names_cannot_end_its_script(page):
  assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
  assert "@import" not in page
  assert data_of(page)["photos"][0]["answers"]["2"]["top"]  # parsed, names and all
  assert "</script><b>" not in page


@pytest.mark.parametrize(
  ("options", "problem"),
  [
    (["--number=0"], "--number=0; expected 1 or more"),
    ([], "has no evaluation to take images of; give --images"),
    (["--images", "none.png"], "none.png"),
  ],
)
def test_what_there_is_no_page_of(folder, tmp_path, capsys, options, problem):
  given = ["demo", str(folder / "model.npz"), "--static", str(tmp_path / "page"), *options]
  assert cli.main(given) == 2
  assert problem in capsys.readouterr().err
  assert not (tmp_path / "page").exists()


def test_a_file_in_the_place_of_the_folder(folder, tmp_path, capsys):
  (tmp_path / "page").write_text("")
  given = [
    "demo",
    folder / "model.npz",
    "--static",
    tmp_path / "page",
    "--images",
    folder / "photos",
  ]
  assert cli.main([str(one) for one in given]) == 2
  assert "is a file; expected a folder" in capsys.readouterr().err
