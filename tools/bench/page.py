"""From the slider to the answer: milliseconds on the demo page of a server that runs (`flexivit serve --demo`).

python tools/bench/page.py http://127.0.0.1:8000 photo.jpg --csv results/demo_page.csv

A headless Chromium is given the photo, and as soon as its first answer stands there the slider moves to another size:
`cold`, while the page still asks for all sizes in turn. It moves there again once all are known: `warm`. The time is
from the slider's event to the frame that shows the new five classes, `--repeats` times for each size.
"""

import argparse
import pathlib
import shutil
import statistics
from typing import Any

from flexivit_jax import cli, errors
from flexivit_jax.evaluators import results

COLUMNS = ("patch", "tokens", "cold_ms", "cold_worst_ms", "warm_ms", "warm_worst_ms")
_PATIENCE_MS = 120_000
# Milliseconds until the list of classes was written anew and drawn. Given: the stop, and whether the move waits until
# the list has the first answer of a photo.
_MOVE = """([to, waits]) => { window.moved = new Promise((done) => {
  const top = document.getElementById("top"), slider = document.getElementById("size");
  let begin = 0;
  const move = () => { begin = performance.now(); slider.value = to; slider.dispatchEvent(new Event("input")); };
  new MutationObserver((_, observer) => {
    if (!begin) return move();
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - begin)));
  }).observe(top, {childList: true});
  if (!waits) move();
}); }"""
_STAND = """(at) => { const slider = document.getElementById("size");
  slider.value = at; slider.dispatchEvent(new Event("input")); }"""
_ALL_KNOWN = "[...document.querySelectorAll('#all tr')].every((row) => row.lastChild.textContent)"


def measure(page: Any, photo: str, to: int, stops: int) -> tuple[float, float]:
  """Returns the milliseconds of a move to stop `to` for a photo just given, and once all is known."""
  other = 0 if to else stops - 1
  page.evaluate(_STAND, other)
  page.wait_for_function("!document.getElementById('top').getAttribute('aria-busy')")
  page.evaluate(_MOVE, [to, True])
  page.set_input_files("#file", photo)
  cold = page.evaluate("window.moved")
  page.wait_for_function(_ALL_KNOWN)
  page.evaluate(_STAND, other)
  page.wait_for_timeout(50)
  page.evaluate(_MOVE, [to, False])
  return cold, page.evaluate("window.moved")


def rows(url: str, photo: str, repeats: int) -> list[dict[str, Any]]:
  """Measures each stop of the slider `repeats` times, in turn."""
  from playwright.sync_api import sync_playwright

  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    raise errors.UserError("No Chromium is installed; on Debian: apt-get install chromium.")
  with sync_playwright() as started:
    browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
    page = browser.new_context(bypass_csp=True).new_page()
    page.set_default_timeout(_PATIENCE_MS)
    page.goto(url)
    sizes = page.evaluate("DEMO.sizes")
    measure(page, photo, 1, len(sizes))  # the first photo loads what Chromium loads once
    found = [
      [measure(page, photo, at, len(sizes)) for at in range(len(sizes))] for _ in range(repeats)
    ]
    browser.close()
  return [row(size, [one[at] for one in found]) for at, size in enumerate(sizes)]


def row(size: dict[str, Any], times: list[tuple[float, float]]) -> dict[str, Any]:
  """One size: medians and the slowest, of (cold, warm) in ms."""
  cold, warm = zip(*times, strict=True)
  values = (statistics.median(cold), max(cold), statistics.median(warm), max(warm))
  shown = [f"{value:.0f}" for value in values]
  return dict(zip(COLUMNS, (size["patch"], size["tokens"], *shown), strict=True))


def main() -> None:
  """Measures, prints, writes."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("url")
  p.add_argument("photo")
  p.add_argument("--repeats", type=int, default=5)
  p.add_argument("--csv", type=pathlib.Path, help="the file to add the rows to")
  args = p.parse_args()
  found = rows(args.url, args.photo, args.repeats)
  for one in found:
    print(*(f"{name} {value}" for name, value in one.items()), sep="  ")
  if args.csv:
    results.append_csv(args.csv, found)


if __name__ == "__main__":
  cli.tool(main)
