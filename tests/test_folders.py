"""Where things are cached."""

from flexivit_jax import folders


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.delenv("FLEXIVIT_CACHE", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert folders.cache_folder() == tmp_path / ".cache" / "flexivit_jax"
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert folders.cache_folder() == tmp_path / "xdg" / "flexivit_jax"
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "mine"))
  assert folders.cache_folder() == tmp_path / "mine"
