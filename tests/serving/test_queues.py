"""The queues of the server by a clock that the test turns."""

import math

import pytest
from hypothesis import given, strategies as st

from flexivit_jax.serving.queues import FullError, Lane, Queues

COARSE, FINE, PINNED = Lane("predict", 4), Lane("predict", 8), Lane("predict", 8, 4)
LANES = (COARSE, FINE, PINNED)
BATCHES = (1, 2, 4)


def seconds(lane, batch):
  return (1.0 if lane.size == 4 else 3.0) * (0.5 + 0.5 * batch)


def queues(max_wait=2.0, length=5):
  return Queues(BATCHES, seconds, max_wait=max_wait, length=length)


def images(batch):
  return [row.image for row in batch.rows]


def test_a_batch_starts_when_it_is_full():
  all_queues = queues()
  for i in range(4):
    assert all_queues.take(0.0) is None
    all_queues.offer(COARSE, i, 0.0)
  batch = all_queues.take(0.0)
  assert (batch.lane, batch.batch, images(batch)) == (COARSE, 4, [0, 1, 2, 3])


def test_a_batch_starts_when_its_first_image_has_waited_in_the_program_that_is_quickest():
  all_queues = queues()
  all_queues.offer(COARSE, "a", 0.0)
  all_queues.offer(COARSE, "b", 1.0)
  assert all_queues.wake() == 2.0
  assert all_queues.take(1.999) is None
  batch = all_queues.take(2.0)
  assert (batch.batch, images(batch)) == (2, ["a", "b"])


def test_a_large_program_that_would_be_half_empty_does_not_run():
  """Four images take 3.6 times as long as one."""
  all_queues = Queues((1, 4), lambda lane, n: 1.0 if n == 1 else 3.6, max_wait=0.0, length=9)
  for i in range(7):
    all_queues.offer(COARSE, i, 0.0)
  assert all_queues.finish(COARSE, 0, 0.0) == 3.6 + 3
  assert [all_queues.take(0.0).batch for _ in range(4)] == [4, 1, 1, 1]


def test_a_batch_starts_when_a_deadline_is_near():
  all_queues = queues()
  all_queues.offer(COARSE, "slow", 0.0)
  all_queues.offer(COARSE, "fast", 0.0, deadline=3.0)
  begin = 3.0 - seconds(COARSE, 4)
  assert begin - 0.01 < all_queues.wake() < begin
  batch = all_queues.take(all_queues.wake())
  assert images(batch) == ["fast", "slow"]


def test_a_batch_is_no_larger_than_its_deadlines_allow():
  all_queues = queues()
  all_queues.offer(FINE, "near", 0.0, deadline=3.5)  # A batch of one takes 3, of two 4.5.
  all_queues.offer(FINE, "other", 0.0)
  assert images(all_queues.take(0.0)) == ["near"]
  assert images(all_queues.take(2.0)) == ["other"]


def test_a_pinned_queue_has_batches_of_one_size():
  all_queues = queues()
  all_queues.offer(PINNED, 0, 0.0)
  assert all_queues.take(2.0).batch == 4


def test_a_full_queue_says_when_to_come_back_and_others_have_room():
  all_queues = queues(length=2)
  for i in range(2):
    all_queues.offer(FINE, i, 0.0)
  with pytest.raises(FullError) as error:
    all_queues.offer(FINE, 2, 0.0)
  assert error.value.retry_after == seconds(FINE, 2)
  assert (all_queues.room(FINE), all_queues.room(COARSE)) == (0, 2)
  all_queues.offer(FINE, 2, 0.0, again=True)
  assert all_queues.room(FINE) == 0


def test_what_would_be_late_is_taken_out_before_it_starts():
  all_queues = queues()
  all_queues.offer(FINE, "late", 0.0, deadline=4.0)
  all_queues.offer(FINE, "there is time", 0.0, deadline=99.0)
  assert all_queues.expired(1.0) == []
  assert [row.image for row in all_queues.expired(1.01)] == ["late"]
  assert images(all_queues.take(2.0)) == ["there is time"]


def test_the_finish_counts_what_runs_and_what_waits():
  all_queues = queues()
  assert all_queues.finish(FINE, 1, 10.0) == 10.0 + seconds(FINE, 1)
  all_queues.offer(COARSE, 0, 0.0)
  all_queues.take(10.0)
  for _ in range(4):
    all_queues.offer(FINE, 0, 10.0)
  wanted = 10.0 + seconds(COARSE, 1) + seconds(FINE, 4) + seconds(FINE, 1)
  assert all_queues.finish(FINE, 1, 10.0) == wanted
  all_queues.done()
  assert all_queues.finish(FINE, 1, 11.0) == wanted + 1.0 - seconds(COARSE, 1)


def test_what_nobody_waits_for_is_removed_once():
  all_queues = queues()
  rows = [all_queues.offer(COARSE, i, 0.0) for i in range(3)]
  assert all_queues.remove(COARSE, rows[1])
  assert not all_queues.remove(COARSE, rows[1])
  assert images(all_queues.take(9.0)) == [0, 2]


EVENTS = st.lists(
  st.tuples(
    st.sampled_from(LANES),
    st.floats(0, 3),  # seconds since the one before
    st.one_of(st.just(math.inf), st.floats(0, 20)),  # until the deadline
    st.booleans(),  # hangs up at the next event
  ),
  max_size=40,
)


@given(EVENTS, st.floats(0, 4), st.integers(1, 6))
def test_every_image_starts_once_in_time_or_is_told(events, max_wait, length):
  """One device, whose batches take as long as predicted; it is asked whenever it is free and at `wake`."""
  all_queues = queues(max_wait, length)
  now, free, at = 0.0, 0.0, 0.0
  started, late, refused, removed, came = {}, set(), set(), set(), {}

  def run(until):
    """Turns the clock, and starts what starts."""
    nonlocal now, free
    while True:
      now = max(now, free)
      if now > until:
        return
      all_queues.done()
      late.update(row.image for row in all_queues.expired(now))
      batch = all_queues.take(now)
      if batch is None:
        now = all_queues.wake()
        if now > until:
          return
        continue
      assert 1 <= len(batch.rows) <= batch.batch
      least = seconds(batch.lane, batch.batch) / len(batch.rows)
      for n in all_queues.sizes(batch.lane):  # no smaller one is quicker
        assert n >= batch.batch or seconds(batch.lane, n) / min(n, len(batch.rows)) >= least
      for row in batch.rows:
        assert row.image not in started
        started[row.image] = now
        assert now + seconds(batch.lane, batch.batch) <= row.deadline
      free = now + seconds(batch.lane, batch.batch)

  for number, (lane, gap, patience, hangs_up) in enumerate(events):
    at += gap
    run(at)
    try:
      came[number] = (lane, at, all_queues.offer(lane, number, at, at + patience))
    except FullError as e:
      refused.add(number)
      assert e.retry_after > 0
    if (
      hangs_up
      and number - 1 in came
      and all_queues.remove(came[number - 1][0], came[number - 1][2])
    ):
      removed.add(number - 1)
    assert all(count <= length for _, count in all_queues.lengths())
    now = max(at, free)
  run(1e9)
  assert {*started} | late | refused | removed == set(range(len(events)))
  assert len(started) + len(late) + len(refused) + len(removed) == len(events)
  for lane in LANES:  # without deadlines, first come first served
    own = [n for n in sorted(started) if events[n][0] == lane and math.isinf(events[n][2])]
    assert [started[n] for n in own] == sorted(started[n] for n in own)
