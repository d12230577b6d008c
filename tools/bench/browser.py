"""The model in a browser alone, by onnxruntime-web: milliseconds an image, beside onnxruntime itself and a server.

flexivit export vit.safetensors vit_onnx --to=onnx --image_size=240 --seqhw=5,8,10,15,20,30
npm pack onnxruntime-web && tar xzf onnxruntime-web-*.tgz
flexivit serve vit.safetensors --seqhw 5,8,10,15,20,30
python tools/bench/browser.py vit_onnx package --server http://127.0.0.1:8000 --csv results/browser.csv

A headless Chromium loads WebAssembly (SIMD) and the graphs from a server of its own, which sends the headers that
threads need. Logits are compared with onnxruntime's. `load_ms` is from nothing to the first session, on the same
machine; `mb` what a browser loads of one size. Of `flexivit serve` the time is of a whole request with a PNG. It needs
onnxruntime and requirements-browser.txt.
"""

import argparse
import base64
import functools
import http.server
import pathlib
import shutil
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flexivit_jax import cli, errors
from flexivit_jax.commands import options
from flexivit_jax.demo.in_browser import SCRIPTS
from flexivit_jax.evaluators import results
from flexivit_jax.inference import picture_files
from flexivit_jax.weights.export import onnx

COLUMNS = ("way", "patch", "tokens", "median_ms", "p90_ms", "largest_difference", "load_ms", "mb")
_PAGE = (
  b"<!doctype html><meta charset=utf-8><link rel=icon href=data:,><title>onnxruntime-web</title>"
)
_OPEN = """async ([threads, first]) => {
  const begin = performance.now();
  const ort = window.ort = await import("/package/dist/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = "/package/dist/";
  window.held = new Uint8Array(await (await fetch("/onnx/weights.bin")).arrayBuffer());
  window.session = (graph) => ort.InferenceSession.create("/onnx/" + graph,
    {executionProviders: ["wasm"], externalData: [{path: "weights.bin", data: window.held}]});
  const opened = await window.session(first);
  const ms = performance.now() - begin;
  await opened.release();
  return [ms, window.crossOriginIsolated];
}"""
_RUN = """async ([graph, text, shape, rounds]) => {
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const image = new window.ort.Tensor("float32", new Float32Array(bytes.buffer), shape);
  const session = await window.session(graph), times = [];
  let output;
  for (let i = 0; i < rounds + 3; i++) {
    const begin = performance.now();
    output = (await session.run({image})).logits.data;
    times.push(performance.now() - begin);
  }
  await session.release();
  return [times.slice(3), [...output]];
}"""


class _Handler(http.server.SimpleHTTPRequestHandler):
  """The two folders, and a page that may use threads."""

  extensions_map = {  # noqa: RUF012  # as in the class above it
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    "": "application/binary",
  }

  def __init__(self, *args: Any, folders: dict[str, pathlib.Path], **kwargs: Any):
    self._folders = folders
    super().__init__(*args, **kwargs)

  def translate_path(self, path: str) -> str:
    _, top, *rest = path.split("/")
    known = top in self._folders and ".." not in rest
    return str(self._folders[top].joinpath(*rest)) if known else "/nowhere"

  def end_headers(self) -> None:
    self.send_header("Cross-Origin-Opener-Policy", "same-origin")
    self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
    super().end_headers()

  def do_GET(self) -> None:
    if self.path != "/":
      return super().do_GET()
    self.send_response(200)
    self.send_header("Content-Type", "text/html")
    self.end_headers()
    self.wfile.write(_PAGE)

  def log_message(self, *args: Any) -> None:
    del args


def in_browser(
  browser: Any, url: str, threads: int, graphs: Sequence[str], image: np.ndarray, rounds: int
) -> tuple[float, list[tuple[list[float], np.ndarray]]]:
  """Returns the milliseconds of loading, and of each graph the milliseconds of answers and the last one's logits."""
  page = browser.new_page()
  page.set_default_timeout(600_000)
  page.goto(url)
  loading, isolated = page.evaluate(_OPEN, [threads, graphs[0]])
  if threads > 1 and not isolated:
    raise errors.UserError("The page is not isolated, so that it has no threads.")
  text = base64.b64encode(image.tobytes()).decode()
  found = [page.evaluate(_RUN, [graph, text, list(image.shape), rounds]) for graph in graphs]
  page.close()
  return loading, [(times, np.asarray(output, np.float32)) for times, output in found]


def timed(call: Callable[[], Any], rounds: int) -> list[float]:
  """Returns the milliseconds of `rounds` calls, after three."""
  times = []
  for _ in range(rounds + 3):
    begin = time.perf_counter()
    call()
    times.append((time.perf_counter() - begin) * 1e3)
  return times[3:]


def natively(path: pathlib.Path, threads: int) -> tuple[float, Any]:
  """Returns the milliseconds of opening a graph in onnxruntime, and its session."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  begin = time.perf_counter()
  session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
  return (time.perf_counter() - begin) * 1e3, session


def row(way: str, patch: int, tokens: int, times: Sequence[float], **more: Any) -> dict[str, Any]:
  """One row of the table, of milliseconds."""
  p90 = np.percentile(times, 90)
  known = {"median_ms": f"{statistics.median(times):.1f}", "p90_ms": f"{p90:.1f}"}
  return (
    {name: "" for name in COLUMNS} | {"way": way, "patch": patch, "tokens": tokens} | known | more
  )


def _threads(number: int) -> str:
  return "1 thread" if number == 1 else f"{number} threads"


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
  """Measures every way at every size, the sizes of a way one after the other."""
  missing = [one for one in SCRIPTS if not (args.package / "dist" / one).is_file()]
  if missing:
    raise errors.UserError(
      f"{args.package}/dist has no {missing[0]}; expected the package onnxruntime-web."
    )
  from playwright.sync_api import sync_playwright

  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    raise errors.UserError("No Chromium is installed; on Debian: apt-get install chromium.")
  record = onnx.read_record(args.onnx)
  sizes, height = record["sizes"], record["image_shape"][0]
  graphs = [onnx.name_of(size) for size in sizes]
  image = np.random.default_rng(0).uniform(-1, 1, (1, *record["image_shape"])).astype(np.float32)
  sent = picture_files.png(image[0])
  shown = [(height // size, size * size) for size in sizes]
  found, exact = [], {}
  for threads in args.threads:
    for size, graph, known in zip(sizes, graphs, shown, strict=True):
      opening, session = natively(args.onnx / graph, threads)
      (exact[size],) = session.run(None, {"image": image})
      times = timed(functools.partial(session.run, None, {"image": image}), args.rounds)
      found.append(
        row(f"onnxruntime with {_threads(threads)}", *known, times, load_ms=f"{opening:.0f}")
      )
  handler = functools.partial(_Handler, folders={"package": args.package, "onnx": args.onnx})
  files = [args.package / "dist" / one for one in SCRIPTS]
  with (
    http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
    sync_playwright() as started,
  ):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
    for threads in args.threads:
      url = f"http://127.0.0.1:{server.server_port}/"
      loading, answers = in_browser(browser, url, threads, graphs, image, args.rounds)
      for size, graph, known, (times, logits) in zip(sizes, graphs, shown, answers, strict=True):
        held = [*files, args.onnx / "weights.bin", args.onnx / graph]
        found.append(
          row(
            f"browser with {_threads(threads)}", *known, times,
            largest_difference=f"{np.abs(logits - exact[size][0]).max():.1e}",
            load_ms=f"{loading:.0f}", mb=f"{sum(one.stat().st_size for one in held) / 1e6:.1f}",
          )
        )  # fmt: skip
    browser.close()
    server.shutdown()
  for size, known in zip(sizes, shown, strict=True) if args.server else ():
    url = f"{args.server}/predict?seqhw={size}"
    found.append(row("server", *known, timed(functools.partial(_posted, url, sent), args.rounds)))
  return found


def _posted(url: str, body: bytes) -> None:
  headers = {"Content-Type": "image/png"}
  with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
    response.read()


def main() -> None:
  """Measures, prints, writes."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument(
    "onnx", type=pathlib.Path, help="the folder that `flexivit export --to=onnx` wrote"
  )
  p.add_argument("package", type=pathlib.Path, help="the folder of the package onnxruntime-web")
  p.add_argument("--server", default="", help="the address of `flexivit serve` of the same model")
  p.add_argument("--threads", type=options.whole_numbers, default=(1, 2), metavar="N,N")
  p.add_argument("--rounds", type=int, default=20)
  p.add_argument("--csv", type=pathlib.Path, help="the file to add the rows to")
  args = p.parse_args()
  found = measure(args)
  for one in found:
    print(*(f"{name} {value}" for name, value in one.items()), sep="  ")
  if args.csv:
    results.append_csv(args.csv, found)


if __name__ == "__main__":
  cli.tool(main)
