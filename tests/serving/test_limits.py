"""What strangers send: too much, too slowly, or nonsense. Every answer is one line of JSON, and the server goes on."""

import asyncio
import io
import itertools
import struct
import zlib

import pytest
from PIL import Image

for package in ("httpx", "python_multipart", "starlette", "uvicorn"):
  pytest.importorskip(package)

BOUNDARY = "multipart/form-data; boundary=xx"


def chunk(name, content):
  return (
    struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
  )


def bomb(width=60_000, height=60_000):
  """A PNG whose header says a billion pixels; hardly anything follows."""
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


def files(red):
  """Bodies that are no image, or not a whole one."""
  yield from (
    b"",
    b"\0",
    b"{}",
    b"GIF89a",
    b"\xff\xd8\xff",
    b"<svg></svg>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
  )
  yield from (
    red[:60],
    red[: len(red) // 2],
    red[:-1][::-1],
    red[:33] + b"\0" * 40,
    bomb(),
    bomb(0, 5),
  )
  yield red.replace(b"IHDR", b"IHDX")


def forms(red):
  """Bodies of forms that have no images as they should."""
  part = b'--xx\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n%b\r\n'
  yield from (b"--xx--", b"--xx\r\n", b"--yy\r\n\r\n--yy--\r\n", b"\r\n" * 50)
  yield part % red  # no end
  yield part.replace(b'; filename="a"', b"") % b"text" + b"--xx--"
  yield part.replace(b"Content-Disposition", b"X" * 5000) % red + b"--xx--"
  yield (part % red) * 5 + b"--xx--"  # more than four
  yield part % red + part % b"no image" + b"--xx--"


QUERIES = (
  "seqhw=3", "seqhw=0", "seqhw=-1", "seqhw=x", "seqhw=4x", "seqhw=99999999999999999999", "seqhw=2&seqhw=4", "seqhw=",
  "size=4", "budget=fast", "budget=latency_ms=-1", "budget=", "seqhw=2&budget=latency_ms=9", "batch=4",
  "seqhw=2&batch=3", "seqhw=2&batch=x", "seqhw=2&top_k=0", "seqhw=2&top_k=1e9", "seqhw=2&top_k=٣", "deadline_ms=0",
  "seqhw=2&deadline_ms=nan", "seqhw=2&deadline_ms=-1", "seqhw=2&deadline_ms=inf", "seqhw=2&deadline_ms=x",
  "seqhw=2&cascade=1", "cascade=2", "cascade=1", "seqhw=2&names=a,b", "seqhw=2&templates=/etc/passwd", "%00=%ff", "",
)  # fmt: skip


def check(answer):
  """One line of JSON that says why, and nothing of the server's insides."""
  assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
  assert [*answer.json()] == ["error"] and len(answer.json()["error"]) < 600
  for inside in ("Traceback", "File ", "site-packages", "/work", "/home", "/root", " object at 0x"):
    assert inside not in answer.text


async def test_malformed_requests_are_refused_and_the_next_is_answered(model, serving, red):
  async with serving(model, limits={"images": 4}) as (server, client):
    model.ran.clear()
    for route, query in itertools.product(("predict", "embed"), QUERIES):
      check(await client.post(f"/{route}?{query}", content=red))
    raw = "image/png", "application/octet-stream", ""
    for kind, body in itertools.product(raw, files(red)):
      check(await client.post("/predict?seqhw=2", content=body, headers={"Content-Type": kind}))
    for kind in ("text/html", "application/json", "multipart/mixed", "\xff", "x" * 3000):
      headers = {"Content-Type": kind.encode("latin-1")}
      check(await client.post("/predict?seqhw=2", content=red, headers=headers))
    for kind in (
      BOUNDARY,
      BOUNDARY[:-2],
      "multipart/form-data",
      BOUNDARY + "x" * 900,
      BOUNDARY + "; charset=\xff",
    ):
      for body in [*forms(red), *files(red)]:
        headers = {"Content-Type": kind.encode("latin-1")}
        check(await client.post("/predict?seqhw=2", content=body, headers=headers))
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
      assert (await client.request(method, "/predict")).status_code == 405
    for path in ("/", "/predict/", "/../etc/passwd", "/predict%00", "/x" * 500):
      assert (await client.post(path, content=red)).status_code in (404, 405)
    assert model.ran == []
    assert (await client.post("/predict?seqhw=2", content=red)).status_code == 200
    assert server.open == 0 and server._memory.held == 0


async def test_a_body_is_refused_while_it_is_read(model, serving):
  sent = []

  async def endless():
    for i in range(10_000):
      sent.append(i)
      yield b"x" * 1000

  async with serving(model, limits={"body_bytes": 50_000}) as (server, client):
    answer = await client.post("/predict?seqhw=2", content=endless())
    check(answer)
    assert answer.status_code == 413 and answer.headers["Connection"] == "close"
    declared = await client.post("/predict?seqhw=2", content=b"x" * 50_001)
    assert declared.status_code == 413 and server._memory.held == 0


async def test_a_body_that_comes_slowly_is_408(model, serving):
  async def slow():
    yield b"x"
    await asyncio.sleep(10)

  async with serving(model, limits={"read_s": 0.05}) as (_, client):
    answer = await client.post("/predict?seqhw=2", content=slow())
    assert (answer.status_code, answer.headers["Connection"]) == (408, "close")


async def test_all_bodies_together_have_a_limit(model, serving, red):
  release = asyncio.Event()

  async def held():
    yield red
    await release.wait()

  async with serving(model, limits={"all_bytes": len(red) + 10}) as (server, client):
    first = asyncio.ensure_future(client.post("/predict?seqhw=2", content=held()))
    while not server._memory.held:
      await asyncio.sleep(0.001)
    assert (await client.post("/predict?seqhw=2", content=red)).status_code == 429
    release.set()
    assert (await first).status_code == 200
    assert (await client.post("/predict?seqhw=2", content=red)).status_code == 200


async def test_pixels_are_counted_before_they_are_decoded(model, serving, encoded, monkeypatch):
  decoded = []
  load = Image.Image.load
  monkeypatch.setattr(
    "PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self.size) or load(self)
  )
  async with serving(model, limits={"pixels": 100}) as (_, client):
    decoded.clear()
    for body in (bomb(), bomb(30_000, 1), encoded(hw=(11, 10))):
      answer = await client.post("/predict?seqhw=2", content=body)
      check(answer)
      assert "max_pixels=100" in answer.text
    assert decoded == []


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
async def test_usual_formats_are_read(model, serving, encoded, kind):
  async with serving(model, batches=(1,), what=("embed",)) as (_, client):
    answer = await client.post("/embed?seqhw=2", content=encoded((250, 250, 250), kind=kind))
    assert answer.json()["embedding"] == pytest.approx([1.18] * 3, abs=0.01)


def test_a_document_is_refused_without_a_look_inside():
  from flexivit_jax.data import images
  from flexivit_jax.errors import UserError

  buffer = io.BytesIO()
  Image.new("RGB", (9, 9)).save(buffer, "EPS")
  with pytest.raises(UserError, match="EPS"):
    images.check_photo(buffer.getvalue(), max_pixels=1000)
