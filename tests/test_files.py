"""Where things are cached, and small files that are whole or not there."""

import pathlib

import jax
import pytest

from flexivit_jax import files
from flexivit_jax.devices import compilation
from flexivit_jax.errors import UserError


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.delenv("FLEXIVIT_CACHE", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert files.cache_folder() == tmp_path / ".cache" / "flexivit_jax"
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert files.cache_folder() == tmp_path / "xdg" / "flexivit_jax"
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "mine"))
  assert files.cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, before):
  file = tmp_path / "a.json"
  if before:
    files.write(file, before)
  (tmp_path / "a.json.tmp").symlink_to("/dev/full")
  with pytest.raises(UserError, match=rf"^{file} cannot be written: No space left on device\.$"):
    files.write(file, "new")
  assert (file.read_text() if file.exists() else None) == before
  assert not (tmp_path / "a.json.tmp").is_symlink()
  files.write(file, "new")
  assert file.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_without_a_home_folder_the_cache_is_an_error_that_says_what_to_set(monkeypatch, tmp_path):
  def unknown(_):
    raise RuntimeError("Could not determine home directory.")

  for name in ("FLEXIVIT_CACHE", "XDG_CACHE_HOME", "HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
  with pytest.raises(UserError, match=r"~/.cache is none; set FLEXIVIT_CACHE"):
    files.cache_folder()
  assert compilation.keep_programs() is None or jax.config.values["jax_compilation_cache_dir"]
  monkeypatch.undo()
  monkeypatch.delenv("FLEXIVIT_CACHE", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
  assert files.cache_folder() == tmp_path / ".cache" / "flexivit_jax"
  monkeypatch.setenv("FLEXIVIT_CACHE", "~nobody-of-this-name/x")
  with pytest.raises(UserError, match="set FLEXIVIT_CACHE"):
    files.cache_folder()
