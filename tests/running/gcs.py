"""A stand-in for the XML interface of Google Cloud Storage, on loopback and in memory.

No package has a server that obstore's client can write to (docs/buckets.md), so this answers as Google's documentation
says: objects with generations, `x-goog-if-generation-match`, ranges, listings. It can fail some requests before or
after they are carried out.
"""

import hashlib
import json
import random
import threading
import urllib.parse
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

import pytest


class Server:
  """One bucket, named "bucket".

  Attributes:
    objects: {name: (content, generation)}.
    share: of the requests that fail, with 503.
    failed: how many did.
  """

  def __init__(self, seed=0):
    self.objects, self.share, self.failed, self.generation = {}, 0.0, 0, 0
    rng, lock, outer = random.Random(seed), threading.Lock(), self

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def answer(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        bucket, _, name = url.path[1:].partition("/")
        with lock:
          fails = rng.random() < outer.share
          outer.failed += fails
          if fails and rng.random() < 0.5:
            self.send(503)
            return
          if bucket != "bucket":
            found = (404, b"<Error><Code>NoSuchBucket</Code></Error>", {})
          elif not name:
            found = (200, outer.listing(dict(urllib.parse.parse_qsl(url.query))), {})
          else:
            call = getattr(outer, self.command.lower().replace("head", "get"))
            found = call(urllib.parse.unquote(name), content, self.headers)
        self.send(503) if fails else self.send(*found)

      do_GET = do_HEAD = do_PUT = do_DELETE = answer  # noqa: N815

      def send(self, status, content=b"", headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
          self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
          self.wfile.write(content)

      def log_message(self, *args):
        del args

    self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
    self._thread.start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()

  def put(self, name, content, headers):
    """A generation of 0 is that of an object that is not there."""
    wanted = headers.get("x-goog-if-generation-match")
    if wanted is not None and int(wanted) != self.objects.get(name, (b"", 0))[1]:
      return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
    self.generation += 1
    self.objects[name] = content, self.generation
    return 200, b"", self.about(name)

  def get(self, name, _, headers):
    if name not in self.objects:
      return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
    content, about = self.objects[name][0], self.about(name)
    if "Range" not in headers:
      return 200, content, about
    start, end = map(int, headers["Range"].removeprefix("bytes=").split("-"))
    about["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return 206, content[start : end + 1], about

  def delete(self, name, *_):
    found = self.objects.pop(name, None)
    return (204, b"", {}) if found else self.get(name, b"", {})

  def about(self, name):
    content, generation = self.objects[name]
    tag = hashlib.md5(content).hexdigest()
    return {
      "ETag": f'"{tag}"',
      "x-goog-generation": str(generation),
      "Last-Modified": formatdate(usegmt=True),
    }

  def listing(self, query):
    entries = "".join(
      f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size>"
      f"<LastModified>2026-11-28T00:00:00.000Z</LastModified><ETag>{self.about(name)['ETag']}</ETag></Contents>"
      for name, (content, _) in sorted(self.objects.items())
      if name.startswith(query.get("prefix", ""))
    )
    return f"<ListBucketResult>{entries}</ListBucketResult>".encode()


@pytest.fixture(name="gcs")
def gcs_fixture(tmp_path, monkeypatch):
  """The stand-in; the environment that leads to it, with a cache folder of its own."""
  server = Server()
  key = {"gcs_base_url": server.url, "disable_oauth": True}
  key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
  (tmp_path / "key.json").write_text(json.dumps(key))
  monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "key.json"))
  monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)  # which allows a server without encryption
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "cache"))
  yield server
  server.close()
