"""What arrives is what the server has, bit for bit, or nothing: connections break, files change, servers err."""

import hashlib
import io
import pathlib
import resource
import shutil
import socket
import stat
import struct
import threading

import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.weights import download

pytestmark = pytest.mark.faults

CONTENT = b"PK" + np.random.default_rng(0).bytes(998)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def fetch(site, tmp_path):
  """Fetches the file of the site."""
  site.content = CONTENT

  def call(**options):
    options = {"folder": tmp_path / "cache", "progress": io.StringIO(), "pause": 0.0} | options
    return download.fetch(f"{site.url}/there/w.npz", **options)

  return call


def partial(tmp_path):
  return next((tmp_path / "cache").glob("*/w.npz.part"), None)


def test_a_file_arrives_whole_with_its_hash_beside_it(site, fetch, tmp_path):
  path = fetch()
  assert path.read_bytes() == CONTENT and path.name == "w.npz"
  beside = sorted(p.name for p in path.parent.iterdir())
  assert beside == ["w.npz", "w.npz.sha256"]
  assert path.with_name("w.npz.sha256").read_text() == f"{SHA256}  w.npz\n"
  assert [p for p, _ in site.requests] == ["/there/w.npz"] and site.asked == [None]
  for folder in (path.parent, tmp_path / "cache"):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("cut", [1, 500, 999])
def test_the_rest_is_asked_for_after_the_connection_broke(site, fetch, cut):
  site.cuts = [cut]
  assert fetch(sha256=SHA256).read_bytes() == CONTENT
  assert site.asked == [None, f"bytes={cut}-"]
  assert site.requests[1][1]["If-Range"] == '"1"'


def test_a_later_call_goes_on_where_the_earlier_one_gave_up(site, fetch, tmp_path):
  site.cuts = [600, 0, 0, 0]
  with pytest.raises(UserError, match=r"expected 1000 bytes, got 600; tried 4 times.*resumes"):
    fetch()
  assert len(site.requests) == 4 and partial(tmp_path).read_bytes() == CONTENT[:600]
  assert fetch().read_bytes() == CONTENT
  assert site.asked[4:] == ["bytes=600-"] and partial(tmp_path) is None


def test_last_modified_does_where_there_is_no_strong_etag(site, fetch):
  date = "Wed, 21 Oct 2015 07:28:00 GMT"
  site.cuts, site.etag, site.headers = [500], 'W/"1"', {"Last-Modified": date}
  site.if_range = False
  assert fetch().read_bytes() == CONTENT
  assert site.asked == [None, "bytes=500-"] and site.requests[1][1]["If-Range"] == date


def test_without_a_version_a_part_is_not_gone_on_with(site, fetch):
  site.cuts, site.etag = [500], None
  assert fetch().read_bytes() == CONTENT
  assert site.asked == [None, None]


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("size", [300, 1000, 3000])
def test_halves_of_two_versions_are_never_joined(site, fetch, size, honest):
  site.cuts = [500, 0, 0, 0]
  with pytest.raises(UserError, match="got 500"):
    fetch()
  # A server that is not honest sends the rest of the new version, or says that there is none.
  site.content, site.etag, site.if_range = CONTENT[::-1] * 3, '"2"', honest
  site.content = site.content[:size]
  assert fetch().read_bytes() == site.content
  assert site.asked[4:] == ["bytes=500-"] + [None] * (not honest)


def test_a_server_that_knows_no_ranges_sends_all_again(site, fetch):
  site.cuts, site.ranges = [500], False
  assert fetch().read_bytes() == CONTENT
  assert site.asked == [None, "bytes=500-"]


def test_a_range_that_is_another_than_asked_for_is_not_used(site, fetch):
  site.cuts, site.headers = [500], {"Content-Range": "bytes 400-999/1000"}
  assert fetch().read_bytes() == CONTENT
  assert site.asked == [None, "bytes=500-", None]


def test_a_length_that_is_wrong_is_an_error_that_says_both(site, fetch, tmp_path):
  site.headers, site.ranges = {"Content-Length": 1234}, False
  with pytest.raises(UserError, match=r"w.npz: expected 1234 bytes, got 1000; tried 4 times"):
    fetch()
  assert not list(tmp_path.rglob("w.npz"))


def test_a_file_of_which_no_length_is_known_is_refused(site, fetch):
  site.headers = {"Content-Length": None}
  with pytest.raises(UserError, match="does not say how long the file is"):
    fetch()


@pytest.mark.parametrize("cuts", [[], [300]])
def test_chunks_need_no_length(site, fetch, cuts):
  site.chunked, site.cuts = True, cuts
  assert fetch().read_bytes() == CONTENT


def test_a_wrong_hash_is_an_error_and_leaves_nothing(site, fetch, tmp_path):
  wrong = "0" * 64
  with pytest.raises(UserError, match=f"has the sha256 {SHA256}, expected {wrong}; it was deleted"):
    fetch(sha256=wrong)
  assert not [p for p in tmp_path.rglob("*") if p.is_file()]
  assert fetch(sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(
  ("kind", "content"),
  [
    ("text/html; charset=utf-8", CONTENT),
    ("application/xml", CONTENT),
    ("application/octet-stream", b"\n <!DOCTYPE html><html>Log in</html>"),
    ("application/octet-stream", b"<?xml version='1.0'?><Error/>"),
  ],
)
def test_a_page_instead_of_the_file_is_an_error_and_leaves_nothing(
  site, fetch, tmp_path, kind, content
):
  site.cuts = [500, 0, 0, 0]
  with pytest.raises(UserError, match="tried 4 times"):
    fetch()
  site.kind, site.content, site.etag = kind, content, '"2"'
  with pytest.raises(UserError, match=r"expected a file, got a page \("):
    fetch()
  assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_file_that_begins_like_a_page_is_none(site, fetch):
  header = b"{}".ljust(ord("<"))
  site.content = struct.pack("<Q", len(header)) + header
  assert fetch().read_bytes() == site.content


def test_a_file_that_is_packed_on_its_way_is_refused(site, fetch):
  site.headers = {"Content-Encoding": "gzip"}
  with pytest.raises(UserError, match=r"got it packed \(gzip\)"):
    fetch()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_file_that_is_not_there_is_an_error_at_once(site, fetch, status):
  site.statuses = [status]
  with pytest.raises(UserError, match=f"w.npz: the server answers {status} .*, expected the file"):
    fetch()
  assert len(site.requests) == 1


def test_a_server_that_is_busy_is_asked_again(site, fetch):
  site.statuses = [503, 429, 500]
  assert fetch().read_bytes() == CONTENT
  site.statuses = [503] * 4
  with pytest.raises(UserError, match="answers 503 Service Unavailable; tried 4 times"):
    fetch(folder=pathlib.Path(fetch().parent, "other"))


def test_the_pause_doubles(site, fetch, monkeypatch):
  pauses = []
  monkeypatch.setattr(download.time, "sleep", pauses.append)
  site.statuses = [503] * 3
  fetch(pause=0.5)
  assert pauses == [0.5, 1.0, 2.0]


def test_a_cached_file_is_used_without_any_request(site, fetch):
  path = fetch()
  assert fetch() == path and fetch(sha256=SHA256) == path
  assert len(site.requests) == 1


@pytest.mark.parametrize("sha256", [None, SHA256])
@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"\0", b""])
def test_a_cached_file_that_is_damaged_is_found(site, fetch, damaged, sha256):
  path = fetch(sha256=sha256)
  path.write_bytes(damaged)
  with pytest.raises(UserError, match=rf"w.npz is not what was .* expected {SHA256}. Delete it"):
    fetch(sha256=sha256)
  path.unlink()
  assert fetch(sha256=sha256).read_bytes() == CONTENT and len(site.requests) == 2


def test_a_cached_file_whose_hash_is_gone_is_not_trusted(site, fetch):
  path = fetch()
  path.with_name("w.npz.sha256").unlink()
  with pytest.raises(UserError, match=r"expected not known. Delete it"):
    fetch()
  assert fetch(sha256=SHA256) == path


def test_equal_names_of_other_addresses_are_kept_apart(site, fetch, tmp_path):
  first = fetch()
  site.content = CONTENT[::-1]
  second = download.fetch(f"{site.url}/w.npz", folder=tmp_path / "cache", progress=io.StringIO())
  assert first.name == second.name and first.read_bytes() != second.read_bytes()


def test_two_at_once_fetch_it_once(site, fetch):
  results = []
  threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(set(results)) == 1 and len(results) == 4 and len(site.requests) == 1


def test_too_little_room_is_an_error_before_anything_is_written(site, fetch, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=999)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(UserError, match=r"it takes 0.0 MB more, 0.0 MB are free. Make room, or set"):
    fetch()
  assert partial(tmp_path).read_bytes() == b""


def test_a_disk_that_becomes_full_is_an_error_and_what_arrived_is_kept(site, fetch, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
  try:
    with pytest.raises(UserError, match=r"w.npz cannot be kept in .*: File too large"):
      fetch()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert partial(tmp_path).read_bytes() == CONTENT[:700]
  assert fetch().read_bytes() == CONTENT and site.asked[1] == "bytes=700-"


def test_a_cache_that_is_no_folder_is_an_error(fetch, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"cannot be kept in .*: Not a directory.*FLEXIVIT_CACHE"):
    fetch(folder=tmp_path / "file" / "cache")


def test_no_network_is_an_error_at_once(tmp_path, monkeypatch):
  monkeypatch.setenv("NO_PROXY", "*")
  monkeypatch.setattr(download.time, "sleep", pytest.fail)
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{s.getsockname()[1]}/w.npz"
    with pytest.raises(UserError, match=r"cannot be reached: .*refused. Is there a network"):
      download.fetch(url, folder=tmp_path)


def test_a_server_that_falls_silent_is_not_waited_for(site, fetch, monkeypatch):
  monkeypatch.setattr(download, "_TIMEOUT", 0.2)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/w.npz"
    with pytest.raises(UserError, match=r"the connection broke: TimeoutError.*; tried 4 times"):
      download.fetch(url, folder=fetch().parent, pause=0.0)


@pytest.mark.parametrize(
  "url",
  [
    "ftp://h/w.npz",
    "file:///w.npz",
    "w.npz",
    "https:///w.npz",
    "https://h",
    "https://h/",
    "https://h/..",
    "https://h/a b.npz",
    "https://h/é.npz",
    "https://h/a\n.npz",
  ],
)
def test_other_addresses_are_refused(url, tmp_path):
  with pytest.raises(UserError, match="is no address of a file; expected https://HOST"):
    download.fetch(url, folder=tmp_path)
  assert not list(tmp_path.iterdir())


def test_redirects_are_followed_but_not_to_other_schemes(site, fetch, tmp_path):
  site.statuses, site.headers = [302], {"Location": f"{site.url}/elsewhere"}
  assert fetch().read_bytes() == CONTENT
  assert [p for p, _ in site.requests] == ["/there/w.npz", "/elsewhere"]
  site.statuses, site.headers = [302], {"Location": "ftp://127.0.0.1/w.npz"}
  with pytest.raises(UserError, match=r"leads to ftp://127.0.0.1/w.npz, which is not safe"):
    fetch(folder=tmp_path / "other")


def test_progress_is_one_line_on_a_terminal_and_two_elsewhere(site, fetch, tmp_path, monkeypatch):
  monkeypatch.setattr(download, "_CHUNK", 400_000)
  site.content = bytes(1_000_000)
  file = io.StringIO()
  fetch(progress=file)
  first, last = file.getvalue().splitlines()
  assert first == f"fetching {site.url}/there/w.npz, 1.0 MB" and last == "w.npz: 1.0 MB in 0 s"
  clock = iter(range(100))
  monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
  terminal = Terminal()
  fetch(progress=terminal, folder=tmp_path / "other")
  *moving, end = terminal.getvalue().split("\r")[1:]
  assert [line.split(",")[0] for line in moving[:2]] == [
    "w.npz: 0.4 MB of 1.0 MB",
    "w.npz: 0.8 MB of 1.0 MB",
  ]
  assert "MB/s" in moving[0] and "s left" in moving[0]
  assert end.startswith("w.npz: 1.0 MB in ") and terminal.getvalue().count("\n") == 1


def test_a_resumed_download_says_so(site, fetch):
  site.cuts, file = [500], io.StringIO()
  fetch(progress=file)
  assert ", from 0.0 MB on\n" in file.getvalue() and len(file.getvalue().splitlines()) == 4
