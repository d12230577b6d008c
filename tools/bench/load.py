"""Load on a server that runs (`flexivit serve`): requests at random times, whatever it answers.

python tools/bench/load.py http://127.0.0.1:8000 photos --capacity 40 --loads 0.5,0.8,1.2,2 --seconds 60 \
  --query deadline_ms=250 --name "sizes by deadline" --csv results/serving.csv
python tools/bench/load.py http://127.0.0.1:8000 photos --query seqhw=15 --measure
python tools/bench/load.py http://127.0.0.1:8000 photos --query seqhw=8 --abuse 10000 --slow 100 --rate 15 \
  --seconds 600 --pid PID

Open loop: arrivals are a Poisson process of a fixed seed; a request is sent at its time even if none is answered, and
its time counts from then. --measure prints the capacity: images a second for 8 clients, each of which waits for its
answer. With --abuse malformed requests and slow clients come in between, and the memory of the server is read every
half minute. Standard library alone.
"""

import argparse
import asyncio
import collections
import csv
import json
import pathlib
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from flexivit_jax import cli, errors

COLUMNS = (
  "server", "load", "offered", "answered", "p50_ms", "p99_ms", "full", "refused", "late", "in_time", "sizes", "batch",
)  # fmt: skip
_PATIENCE = 120.0  # seconds for an answer


class Reply(NamedTuple):
  """What became of a request: its status (0: none), seconds since it was due, and the answer."""

  status: int
  seconds: float
  answer: dict


class Target(NamedTuple):
  """Where requests go."""

  host: str
  port: int
  path: str


# --- requests ---


async def post(target: Target, body: bytes, head: str = "") -> tuple[int, dict]:
  """Sends one request on a connection of its own; (0, {}) where there is no whole answer."""
  try:
    reader, writer = await asyncio.open_connection(target.host, target.port)
  except OSError:
    return 0, {}
  try:
    lines = f"POST {target.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{head}\r\n"
    writer.write(lines.encode("latin-1") + body)
    return _parsed(await asyncio.wait_for(reader.read(), _PATIENCE))
  except (OSError, TimeoutError):
    return 0, {}
  finally:
    writer.close()


def _parsed(raw: bytes) -> tuple[int, dict]:
  head, _, content = raw.partition(b"\r\n\r\n")
  if head.startswith(b"HTTP/1.1 100 "):  # Expect: 100-continue; the answer follows
    return _parsed(content)
  if not head.startswith(b"HTTP/1.1 "):
    return 0, {}
  try:
    return int(head.split()[1]), json.loads(content)
  except ValueError:
    return int(head.split()[1]), {}


async def poisson(rate: float, seconds: float, seed: int, call: Callable[[int], Awaitable]) -> list:
  """Calls at the times of a Poisson process and returns all results; no call waits for another."""
  draw, due = random.Random(seed), 0.0
  tasks: list[asyncio.Future] = []
  begin = time.perf_counter()
  while (due := due + draw.expovariate(rate)) < seconds:
    await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
    tasks.append(asyncio.ensure_future(call(len(tasks))))
  return list(await asyncio.gather(*tasks))


async def timed(target: Target, body: bytes) -> Reply:
  """One request and its seconds."""
  begin = time.perf_counter()
  status, answer = await post(target, body)
  return Reply(status, time.perf_counter() - begin, answer)


async def capacity(target: Target, bodies: Sequence[bytes], seconds: float, clients: int) -> float:
  """Images a second of clients that send the next one when the last is answered."""
  end, done = time.perf_counter() + seconds, 0

  async def client(first: int) -> None:
    nonlocal done
    number = first
    while time.perf_counter() < end:
      status, _ = await post(target, bodies[number % len(bodies)])
      done += status == 200
      number += clients

  begin = time.perf_counter()
  await asyncio.gather(*(client(i) for i in range(clients)))
  return done / (time.perf_counter() - begin)


# --- tables ---


def row(
  name: str, load: float, rate: float, seconds: float, replies: Sequence[Reply], deadline: float
) -> dict[str, object]:
  """One line of the table; shares are percent of all requests, `sizes` and `batch` of those answered."""
  count, total = collections.Counter(reply.status for reply in replies), len(replies)
  done = [reply for reply in replies if reply.status == 200]
  late = sum(reply.seconds > deadline for reply in done)
  times = sorted(1e3 * reply.seconds for reply in done)
  sizes = collections.Counter(reply.answer["seqhw"] for reply in done)
  percent = lambda n: round(100 * n / max(total, 1), 1)  # noqa: E731
  if other := {status: n for status, n in count.items() if status not in (200, 429, 504)}:
    print(f"other answers: {other}", flush=True)
  return {
    "server": name,
    "load": load,
    "offered": round(rate, 1),
    "answered": round(len(done) / seconds, 1),
    "p50_ms": round(statistics.median(times)) if done else "",
    "p99_ms": round(times[min(len(times) - 1, int(0.99 * len(times)))]) if done else "",
    "full": percent(count[429]),
    "refused": percent(count[504]),
    "late": percent(late),
    "in_time": percent(len(done) - late),
    "sizes": " ".join(f"{size}:{100 * n / len(done):.0f}" for size, n in sorted(sizes.items())),
    "batch": round(statistics.mean(r.answer["batch"] for r in done), 1) if done else "",
  }  # fmt: skip


async def loads(args: argparse.Namespace, target: Target, bodies: Sequence[bytes]) -> None:
  """Runs each load and prints or writes its row."""
  deadline = args.deadline_ms / 1e3
  rows = []
  for load in args.loads:
    rate = load * args.capacity
    replies = await poisson(
      rate, args.seconds, args.seed, lambda i: timed(target, bodies[i % len(bodies)])
    )
    rows.append(row(args.name, load, rate, args.seconds, replies, deadline))
    print(rows[-1], flush=True)
    await asyncio.sleep(2)
  if args.csv:
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
      if new:
        writer.writeheader()
      writer.writerows(rows)


# --- abuse ---


def malformed(draw: random.Random, image: bytes) -> tuple[str, bytes, str]:
  """(path, body, more lines of the head) of a request that no client of good will sends."""
  paths = [
    "/predict?seqhw=8",
    "/predict?seqhw=0",
    "/predict?x=1",
    "/embed?top_k=2",
    "/nix",
    "/predict?%00=%ff",
  ]
  paths += [
    "/predict?deadline_ms=nan",
    "/predict?names=a",
    "/predict?budget=",
    "/predict?seqhw=8&seqhw=8",
  ]
  cut = draw.randrange(len(image))
  bodies = [
    b"",
    b"\0" * 1000,
    image[:cut],
    image[cut:],
    b"%PDF-1.4",
    b"GIF89a" + image[:cut],
    draw.randbytes(cut),
  ]
  bodies += [
    b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
    + image[:cut]
    + b"\r\n--x--"
  ]
  heads = ["", "Content-Type: text/html\r\n", "Content-Type: multipart/form-data; boundary=x\r\n"]
  heads += [
    "Content-Type: multipart/form-data\r\n",
    "Content-Type: image/png\r\n",
    "Expect: 100-continue\r\n",
  ]
  heads += [
    "Transfer-Encoding: chunked\r\n",
    "Content-Length: 99999999999\r\n",
    f"X: {'y' * 20000}\r\n",
    "\r\n\r\n",
  ]
  return draw.choice(paths), draw.choice(bodies), draw.choice(heads)


async def slow_client(target: Target, draw: random.Random) -> bool:
  """Sends a byte now and then, until the server ends it (True) or a minute is over."""
  text = f"POST {target.path} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n" + "x" * 5000
  start = draw.randrange(200)
  reader, writer = await asyncio.open_connection(target.host, target.port)
  try:
    writer.write(text[:start].encode())
    for letter in text[start : start + 120]:
      await asyncio.sleep(0.5)
      writer.write(letter.encode())
      if reader.at_eof() or writer.is_closing():
        return True
    return False
  except OSError:
    return True
  finally:
    writer.close()


async def abuse(args: argparse.Namespace, target: Target, bodies: Sequence[bytes]) -> None:
  """Malformed requests, slow clients and good ones at the same time; prints memory, and what became of each kind."""
  draw, said = random.Random(args.seed), collections.Counter[int]()

  async def bad() -> None:
    for _ in range(args.abuse // 8):
      path, body, head = malformed(draw, bodies[draw.randrange(len(bodies))])
      said[(await post(target._replace(path=path), body, head))[0]] += 1

  async def memory() -> None:
    begin = time.perf_counter()
    while (passed := time.perf_counter() - begin) < args.seconds:
      print(
        f"{passed:.0f} s: {resident_mb(args.pid):.0f} MB, {sum(said.values())} malformed",
        flush=True,
      )
      await asyncio.sleep(30)

  slow = asyncio.gather(*(slow_client(target, draw) for _ in range(args.slow)))
  work = asyncio.gather(*(bad() for _ in range(8)), memory())
  good = await poisson(
    args.rate, args.seconds, args.seed, lambda i: timed(target, bodies[i % len(bodies)])
  )
  await work
  ended = await slow
  print(
    f"malformed: {dict(sorted(said.items()))}; slow clients that were ended: {sum(ended)} of {len(ended)}"
  )
  print(row("good requests", 0, args.rate, args.seconds, good, float("inf")))
  print(f"at the end {resident_mb(args.pid):.0f} MB", flush=True)


def resident_mb(pid: int) -> float:
  """Memory of a process."""
  pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
  return pages * 4096 / 1e6


def main() -> None:
  """Runs what the arguments say."""
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument("url")
  p.add_argument("images", type=pathlib.Path, help="a folder; the first 64 files below it")
  p.add_argument("--query", default="", help="of all requests")
  p.add_argument(
    "--capacity", type=float, default=10.0, help="images a second that are a load of 1"
  )
  p.add_argument(
    "--loads", type=lambda text: [float(n) for n in text.split(",")], default=[0.5, 0.8, 1.2, 2.0]
  )
  p.add_argument("--seconds", type=float, default=60.0)
  p.add_argument(
    "--deadline_ms", type=float, default=float("inf"), help="answers that take longer are late"
  )
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--name", default="")
  p.add_argument("--csv", type=pathlib.Path)
  p.add_argument("--measure", action="store_true", help="print the capacity")
  p.add_argument("--abuse", type=int, default=0, help="how many malformed requests")
  p.add_argument("--slow", type=int, default=0, help="how many slow clients")
  p.add_argument("--rate", type=float, default=10.0, help="good requests a second beside them")
  p.add_argument("--pid", type=int, help="of the server")
  args = p.parse_args()
  url = urlsplit(args.url)
  if url.hostname is None or url.port is None:
    raise errors.UserError(f"{args.url!r}; expected an address, e.g. http://127.0.0.1:8000")
  target = Target(url.hostname, url.port, f"/predict?{args.query}")
  bodies = [f.read_bytes() for f in sorted(args.images.rglob("*")) if f.is_file()][:64]
  if not bodies:
    raise errors.UserError(f"{args.images} has no files.")
  if args.measure:
    print(f"{asyncio.run(capacity(target, bodies, args.seconds, 8)):.1f} images/s")
  elif args.abuse:
    asyncio.run(abuse(args, target, bodies))
  else:
    asyncio.run(loads(args, target, bodies))


if __name__ == "__main__":
  cli.tool(main)
