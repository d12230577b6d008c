"""Counters of a server in the format of Prometheus."""

import functools
from typing import final

import jax
import prometheus_client as prometheus

from flexivit_jax.serving.queues import Batch, Lane
from flexivit_jax.sizes import size_text

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_COMPILATION = "/jax/core/compile/backend_compile_duration"
_compilations = [0]  # of this process; JAX lets nobody remove a listener


@functools.cache
def _listen() -> None:
  prometheus.disable_created_metrics()  # times that nobody reads, a line for each counter

  def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    _compilations[0] += event == _COMPILATION

  jax.monitoring.register_event_duration_secs_listener(count)


@final
class Metrics:
  """What is counted, in a registry of its own."""

  def __init__(self) -> None:
    _listen()
    self.registry = prometheus.CollectorRegistry()
    counter = functools.partial(prometheus.Counter, registry=self.registry)
    gauge = functools.partial(prometheus.Gauge, registry=self.registry)
    histogram = functools.partial(prometheus.Histogram, registry=self.registry, buckets=_SECONDS)
    self.requests = counter("flexivit_requests", "Requests that ended", ["route", "status"])
    self.images = counter("flexivit_images", "Images that were computed", ["what", "seqhw"])
    self.late = counter(
      "flexivit_deadlines_missed", "Deadlines missed: refused, or answered late", ["when"]
    )
    self.degraded = counter(
      "flexivit_degraded", "Requests that got a coarser size because of load", ["seqhw"]
    )
    self.queue = gauge("flexivit_queue_images", "Images that wait", ["lane"])
    self.wait = histogram(
      "flexivit_wait_seconds", "From the queue to the device", ["what", "seqhw"]
    )
    self.compute = histogram(
      "flexivit_compute_seconds", "A batch on the device", ["what", "seqhw", "batch"]
    )
    self.filled = counter(
      "flexivit_batches", "Batches, by images in them", ["what", "seqhw", "batch", "filled"]
    )
    self.ready = gauge("flexivit_ready", "1 when every program is compiled")
    self._begin = _compilations[0]
    self._at_ready: int | None = None
    gauge("flexivit_compilations", "Programs compiled or loaded since the start").set_function(
      lambda: _compilations[0] - self._begin
    )
    gauge("flexivit_compilations_after_ready", "Must stay 0").set_function(
      self.compilations_after_ready
    )

  def is_ready(self) -> None:
    """From now on nothing may be compiled."""
    self._at_ready = _compilations[0]
    self.ready.set(1)

  def compilations_after_ready(self) -> int:
    """How many programs were compiled since the server was ready."""
    return 0 if self._at_ready is None else _compilations[0] - self._at_ready

  def ran(self, batch: Batch, now: float, seconds: float) -> None:
    """Counts a batch that began at `now` and took so long."""
    lane, size = batch.lane, str(size_text(batch.lane.size))
    self.images.labels(lane.what, size).inc(len(batch.rows))
    self.compute.labels(lane.what, size, batch.batch).observe(seconds)
    self.filled.labels(lane.what, size, batch.batch, len(batch.rows)).inc()
    for row in batch.rows:
      self.wait.labels(lane.what, size).observe(max(0.0, now - row.arrived))

  def waits(self, lane: Lane, images: int) -> None:
    """Notes the length of a queue."""
    self.queue.labels(lane.name).set(images)

  def text(self) -> bytes:
    """What Prometheus reads."""
    return prometheus.generate_latest(self.registry)
