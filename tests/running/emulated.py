"""An emulated bucket: moto's server of S3 on loopback, and a proxy in front of it that fails some requests."""

import contextlib
import http.client
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints

MISSING = [name for name in ("obstore", "moto", "flask") if importlib.util.find_spec(name) is None]
needed = pytest.mark.skipif(
  bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -r requirements-buckets.txt"
)
_ENVIRONMENT = {
  "AWS_ACCESS_KEY_ID": "test",
  "AWS_SECRET_ACCESS_KEY": "test",
  "AWS_REGION": "us-east-1",
  "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def server():
  """Starts the server with a bucket named "bucket"; yields its address."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
  url = f"http://127.0.0.1:{port}"
  env = {**os.environ, "PYTHONWARNINGS": "ignore"}
  with subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
  ) as process:
    try:
      for _ in range(600):
        with contextlib.suppress(OSError):
          request = urllib.request.Request(f"{url}/bucket", method="PUT")
          urllib.request.urlopen(request, timeout=10).close()
          break
        assert process.poll() is None, "moto's server has ended"
        time.sleep(0.1)
      yield url
    finally:
      process.kill()


def environment(url: str, cache: object) -> dict[str, str]:
  """Environment variables of a process that uses the server, with a cache folder of its own."""
  return {**_ENVIRONMENT, "AWS_ENDPOINT_URL": url, "FLEXIVIT_CACHE": str(cache)}


def content(run):
  """What of a run must not depend on where it is: arrays, rows without times, results."""
  times = ("step_s", "images_per_s", "data_wait")
  found = []
  for folder in (run / "checkpoints", run / "best"):
    checkpoints = Checkpoints(folder, read_only=True)
    for step in sorted(checkpoints._manager.all_steps()):
      checkpoints.verify_arrays(step)
      found.append((folder.name, step, checkpoints.verify(step).arrays, checkpoints.record(step)))
    checkpoints.close()
  found += [
    {k: v for k, v in row.items() if k not in times}
    for row in metrics_writer.read_rows(run / "metrics.jsonl")
  ]
  results = json.loads((run / "eval.json").read_text())["rows"]
  found += [[row[k] for k in ("seqhw", "loss", "top1", "n")] for row in results]
  return [*found, (run / "config.json").read_text()]


class Failing:
  """A proxy that fails some requests, before or after they reach the server: an answer may be lost.

  Attributes:
    share: of the requests that fail.
    status: of their answer.
    only: method and part of the path of those that may fail.
    failed: how many did.
    delay_s: seconds before each request goes on, as a bucket takes for its first byte.
    requests: how many came.
    objects: path -> (ETag, content) of objects of which it answers requests for ranges itself: moto takes milliseconds
      of a core for each.
  """

  def __init__(self, url: str, seed: int = 0):
    self.share, self.status, self.only, self.failed = 0.0, 503, ("", ""), 0
    self.delay_s, self.requests = 0.0, 0
    self.objects: dict[str, tuple[str, bytes]] = {}
    rng, lock, outer = random.Random(seed), threading.Lock(), self
    host = url.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def range_of(self, tag: str, content: bytes) -> None:
        start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[start : end + 1]
        self.send_response(206)
        self.send_header("ETag", tag)
        self.send_header("Last-Modified", self.date_time_string())
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

      def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method, part = outer.only
        with lock:
          fails = rng.random() < outer.share and method in self.command and part in self.path
          before = rng.random() < 0.5
          outer.failed += fails
          outer.requests += 1
        time.sleep(outer.delay_s)
        if self.command == "GET" and "Range" in self.headers and self.path in outer.objects:
          self.range_of(*outer.objects[self.path])
          return
        status, headers, content = outer.status, [], b"<Error><Code>SlowDown</Code></Error>"
        if not (fails and before):
          connection = http.client.HTTPConnection(host, timeout=60)
          connection.request(self.command, self.path, body, dict(self.headers))
          answer = connection.getresponse()
          got = answer.read()
          if not fails:
            status, headers, content = answer.status, answer.getheaders(), got
          connection.close()
        self.send_response(status)
        length = str(len(content))
        for key, value in headers:
          if key.lower() == "content-length":
            length = value  # of a HEAD
          elif key.lower() not in ("transfer-encoding", "connection", "date", "server"):
            self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
          self.wfile.write(content)

      do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

      def log_message(self, *args: object) -> None:
        del args

    class Server(ThreadingHTTPServer):
      def handle_error(self, *args: object) -> None:
        del args  # a client that was killed

    self._server = Server(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
    self._thread.start()

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


@pytest.fixture(scope="module", name="server")
def server_fixture():
  """The address of an emulated server, one for the tests of a module."""
  with server() as url:
    yield url


@pytest.fixture(name="proxy")
def proxy_fixture(server, monkeypatch, tmp_path):
  """Requests to that server, of which some can be made to fail; the environment that leads to it."""
  proxy = Failing(server)
  for key, value in environment(proxy.url, tmp_path / "cache").items():
    monkeypatch.setenv(key, value)
  yield proxy
  proxy.close()
