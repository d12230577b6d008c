"""`flexivit serve` as a process with a socket: real signals, real slow clients."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from flexivit_jax.serving import client as client_lib

for package in ("httpx", "python_multipart", "starlette", "uvicorn"):
  pytest.importorskip(package)
pytestmark = pytest.mark.slow


@pytest.fixture
def served(debug_run):
  """(process, address) of a server that is ready."""
  command = [sys.executable, "-m", "flexivit_jax", "serve", str(debug_run), "--seqhw", "2,4"]
  options = ["--port", "0", "--read_s", "1", "--batches", "16", "--max_wait_ms", "1500"]
  process = subprocess.Popen(
    [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    address = process.stdout.readline().split()[-1]
    for _ in range(600):
      if status(f"{address}/ready") == 200:
        break
      time.sleep(0.1)
    yield process, address
  finally:
    process.kill()
    process.communicate()


def status(url):
  try:
    with urllib.request.urlopen(url, timeout=10) as answer:
      return answer.status
  except urllib.error.HTTPError as e:
    return e.code


def metrics(address):
  with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
    return answer.read().decode()


def connect(address):
  host, port = address.removeprefix("http://").split(":")
  return socket.create_connection((host, int(port)), timeout=20)


def test_sigterm_answers_what_was_taken_and_ends_with_0(served, red):
  process, address = served
  client = client_lib.Client(address)
  assert client.predict(red, seqhw=2, top_k=1)["seqhw"] == 2
  with pytest.raises(client_lib.ServerError, match="seqhw=3 is not served"):
    client.predict(red, seqhw=3)
  assert "flexivit_compilations_after_ready 0.0" in metrics(address)
  # On an open connection a request comes after the signal.
  with connect(address) as kept, concurrent.futures.ThreadPoolExecutor(8) as pool:
    asked = [pool.submit(client.predict, red, seqhw=4) for _ in range(8)]
    while 'flexivit_queue_images{lane="predict 4"} 8.0' not in metrics(address):
      time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.05)
    kept.sendall(b"GET /sizes HTTP/1.1\r\nHost: x\r\n\r\n")
    refused = kept.recv(4096).decode().lower()
    assert " 503 " in refused and "connection: close" in refused
    assert [one.result()["seqhw"] for one in asked] == [4] * 8
  assert process.wait(20) == 0
  assert process.stderr.read() == ""


def test_slow_clients_end_and_others_are_answered(served, red):
  _, address = served
  slow = [connect(address) for _ in range(40)]
  for i, one in enumerate(slow):  # nothing at all; half a head; half a body
    if i % 3 == 1:
      one.sendall(b"POST /predict?seqhw=2 HTTP/1.1\r\nHost:")
    elif i % 3 == 2:
      one.sendall(b"POST /predict?seqhw=2 HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc")
  assert client_lib.Client(address).predict(red, seqhw=2)["seqhw"] == 2
  begin = time.monotonic()
  for i, one in enumerate(slow):
    try:
      said = one.recv(4096)
    except ConnectionResetError:
      said = b""
    one.close()
    assert said.startswith(b"HTTP/1.1 408") if i % 3 == 2 else said == b""
  assert time.monotonic() - begin < 5
  assert client_lib.Client(address).predict(red, seqhw=2)["seqhw"] == 2


def test_bytes_that_are_no_http_end_their_connection_alone(served, red):
  process, address = served
  head = b"POST /predict?seqhw=2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
  for raw in (b"\0\1\2\r\n\r\n", head + b"5\r\nabcde\r\nzz\r\n", head + b"-1\r\n"):
    with connect(address) as one:
      one.sendall(raw)
      assert one.recv(4096).startswith(b"HTTP/1.1 400")
  assert client_lib.Client(address).predict(red, seqhw=2)["seqhw"] == 2
  os.kill(process.pid, signal.SIGTERM)
  assert process.wait(20) == 0
  assert process.stderr.read() == ""
