"""Which files are meant by what stands on a command line."""

import os

import pytest
from hypothesis import given, strategies as st

from flexivit_jax.data.inputs import find_images

pytestmark = pytest.mark.faults


@pytest.fixture
def tree(tmp_path, monkeypatch):
  """A folder as people have them."""
  monkeypatch.chdir(tmp_path)
  for name in (
    "a/2.jpg", "a/10.PNG", "a/b/1.jpg", "a/notes.txt", "a/.hidden.jpg", "a/.git/x.jpg", "a/@eaDir/t.jpg",
    "a/Thumbs.db", "a/x.jpg/y.png", "scans [2]/1.jpg", "scans [2]/2.tif", "what?.jpg", "[1].jpg", "1.jpg",
  ):  # fmt: skip
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
  (tmp_path / "empty.jpg").mkdir()
  return tmp_path


def paths(*names, notes=None):
  found = find_images(names, (lambda text: None) if notes is None else notes.append)
  assert all(i.error is None for i in found), found
  return [i.path for i in found]


def test_names_are_in_the_order_of_the_command_line_and_folders_are_sorted(tree):
  below = ["a/10.PNG", "a/2.jpg", "a/b/1.jpg", "a/x.jpg/y.png"]
  assert paths("1.jpg", "a", "1.jpg") == ["1.jpg", *below, "1.jpg"]
  assert paths("a/") == below
  assert paths(tree / "a") == [str(tree / name) for name in below]


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    ("a/*.jpg", ["a/2.jpg", "a/x.jpg/y.png"]),  # a folder that matches stands for its images
    ("a/**/*.jpg", ["a/2.jpg", "a/b/1.jpg"]),
    ("**/1.jpg", ["1.jpg", "a/b/1.jpg", "scans [2]/1.jpg"]),
    ("a/**/b/*", ["a/b/1.jpg"]),
    ("a/*", ["a/10.PNG", "a/2.jpg", "a/b/1.jpg", "a/x.jpg/y.png"]),
    ("a/**", ["a/10.PNG", "a/2.jpg", "a/b/1.jpg", "a/x.jpg/y.png"]),
    ("a/*.txt", ["a/notes.txt"]),  # asked for by its suffix
    ("a/.hid*", ["a/.hidden.jpg"]),
    ("?.jpg", ["1.jpg"]),
    ("[12].jpg", ["1.jpg"]),
    ("scans [2]/*", ["scans [2]/1.jpg", "scans [2]/2.tif"]),  # the folder's own name is no pattern
    ("scans [2]/**/*.jpg", ["scans [2]/1.jpg"]),
    ("scans [[]2]/*.jpg", ["scans [2]/1.jpg"]),
  ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_pattern_stands_for_what_matches(tree, pattern, expected, absolute):
  at = (lambda name: str(tree / name)) if absolute else (lambda name: name)
  assert paths(at(pattern)) == [at(name) for name in expected]


@pytest.mark.parametrize("name", ["what?.jpg", "[1].jpg"])
def test_a_file_of_just_this_name_is_no_pattern(tree, name):
  assert paths(name) == [name]


@pytest.mark.parametrize(
  ("name", "error"),
  [
    ("nothing.jpg", "no such file or directory"),
    ("a/2.jpg/x", "not a directory"),
    ("x" * 300, "file name too long"),
    ("*.webp", "no file matches this pattern"),
    ("**/*.webp", "no file matches this pattern"),
    ("nowhere/**", "no file matches this pattern"),
    ("empty.jpg", "no images below this folder"),
    ("", "the name is empty"),
  ],
)
def test_what_stands_for_no_file_is_named_with_its_reason_beside_the_others(tree, name, error):
  first, bad, last = find_images(["1.jpg", name, "a/2.jpg"])
  assert (first.path, first.error, last.path, last.error) == ("1.jpg", None, "a/2.jpg", None)
  assert bad.path == name and bad.error.startswith(error)


@pytest.mark.parametrize("name", ["a", "a/*", "a/**"])
def test_files_that_are_left_out_are_counted(tree, name):
  notes = []
  paths(name, notes=notes)
  assert len(notes) == 1 and "left out" in notes[0] and "1 file that is no image" in notes[0]


def test_links_that_lead_back_are_followed_once(tree):
  for i in range(3):
    (tree / "a" / f"up{i}").symlink_to(tree / "a")
    (tree / "a" / "b" / f"back{i}").symlink_to("..")
  assert len(paths("a/**/*.jpg")) == 2 and len(paths("a")) == 4


def test_the_home_folder_is_known_in_quotes(tree, monkeypatch):
  monkeypatch.setenv("HOME", str(tree / "a"))
  assert paths("~/b/*.jpg") == [str(tree / "a/b/1.jpg")]
  (tree / "~").mkdir()
  (tree / "~/own.jpg").write_bytes(b"")
  assert paths("~") == ["~/own.jpg"]


NAMES = st.text("ab.*?[]!-\n, \"'\\é\udcff", min_size=1, max_size=8).filter(lambda s: s.strip("."))


@given(name=NAMES)
def test_any_file_is_found_by_its_name_and_in_its_folder(tmp_path_factory, name):
  folder = tmp_path_factory.mktemp("names")
  path = os.path.join(folder, name)
  with open(path, "wb"):
    pass
  assert paths(path) == [path]
  os.rename(path, f"{path}.jpg")
  visible = [] if name.startswith(".") else [f"{path}.jpg"]
  assert [i.path for i in find_images([folder]) if i.error is None] == visible
