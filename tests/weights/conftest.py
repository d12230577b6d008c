"""A web server on this machine, for tests of downloads: it can be told to misbehave."""

import http.server
import threading

import pytest


class Site:
  """One file at every path, and how it is served; `requests` holds (path, headers) of what was asked."""

  def __init__(self, url):
    self.url, self.requests = url, []
    self.content, self.etag, self.kind = b"", '"1"', "application/octet-stream"
    self.ranges, self.if_range = True, True  # whether these headers are understood
    self.cuts = []  # of one answer after another: after how many bytes the connection ends
    self.statuses = []  # of one answer after another, instead of the file
    self.headers = {}  # more of them, or others; None leaves one out
    self.chunked = False

  @property
  def asked(self):
    """What part of the file each request asked for."""
    return [headers.get("Range") for _, headers in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves `server.site`."""

  def do_GET(self):
    site = self.server.site
    site.requests.append((self.path, dict(self.headers)))
    if site.statuses:
      return self._answer(site.statuses.pop(0), b"", site.headers)
    start = self._start(site)
    if start and start >= len(site.content):
      return self._answer(416, b"", {"Content-Range": f"bytes */{len(site.content)}"})
    size = len(site.content)
    headers = {"Content-Type": site.kind, "ETag": site.etag}
    if start:
      headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
    return self._answer(206 if start else 200, site.content[start:], headers | site.headers)

  def _start(self, site):
    asked = self.headers.get("Range") if site.ranges else None
    if not asked or (site.if_range and self.headers.get("If-Range") != site.etag):
      return 0
    return int(asked.removeprefix("bytes=").removesuffix("-"))

  def _answer(self, status, body, headers):
    site = self.server.site
    self.protocol_version = "HTTP/1.1" if site.chunked else "HTTP/1.0"
    self.send_response(status)
    length = {"Transfer-Encoding": "chunked"} if site.chunked else {"Content-Length": len(body)}
    for name, value in ({**length} | headers).items():
      if value is not None:
        self.send_header(name, str(value))
    self.end_headers()
    if site.chunked:
      body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    self.wfile.write(body[: site.cuts.pop(0)] if site.cuts else body)

  def log_message(self, *args):
    pass


@pytest.fixture
def site(monkeypatch):
  """A server on the loopback interface; nothing else can be reached through a proxy by mistake."""
  monkeypatch.setenv("NO_PROXY", "*")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    server.site = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.site
    server.shutdown()
    thread.join()
