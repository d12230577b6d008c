"""`tools/bench/load.py` sends requests at their times, and counts what became of them."""

import asyncio
import random
import runpy

import pytest


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "bench" / "load.py"))


def test_requests_are_sent_at_the_times_of_the_seed_whether_or_not_others_are_answered(tool):
  async def slow(number):
    await asyncio.sleep(0.1)
    return number

  first = asyncio.run(tool["poisson"](500, 0.2, 3, slow))
  assert first == asyncio.run(tool["poisson"](500, 0.2, 3, slow))
  assert first == list(range(len(first))) and 60 < len(first) < 140


def test_a_row_counts_every_request_once(tool):
  reply = tool["Reply"]
  replies = [reply(200, i / 100, {"seqhw": 4 if i < 5 else 8, "batch": 2}) for i in range(1, 11)]
  replies += [reply(429, 0.01, {})] * 6 + [reply(504, 0.01, {})] * 4
  row = tool["row"]("a", 0.5, 10.0, 2.0, replies, 0.085)
  assert {
    "answered": 5.0,
    "p50_ms": 55,
    "p99_ms": 100,
    "full": 30.0,
    "refused": 20.0,
  }.items() <= row.items()
  assert {"late": 10.0, "in_time": 40.0, "sizes": "4:40 8:60", "batch": 2}.items() <= row.items()
  assert tuple(row) == tool["COLUMNS"]
  assert tool["row"]("a", 1, 1, 1, [], 1)["answered"] == 0


def test_malformed_requests_are_the_same_for_a_seed(tool):
  made = [tool["malformed"](random.Random(i % 50), b"image" * 9) for i in range(100)]
  assert made[:50] == made[50:] and len({*made}) > 40
