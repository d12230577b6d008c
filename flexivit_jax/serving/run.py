"""A server on a socket: uvicorn, with limits for slow clients, and a stop that answers what it has taken."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Generator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flexivit_jax import errors
from flexivit_jax.serving.app import Server

_CONNECTIONS = 512  # at the same time; others get 503


def serve(
  server: Server, *, host: str, port: int, drain_s: float, started: Callable[[str], None]
) -> None:
  """Serves until SIGTERM or SIGINT; then what was taken is answered, and new requests get 503.

  A second signal ends the process at once.

  Args:
    server: what is served.
    host, port: where; port 0: a free one.
    drain_s: seconds that the end waits for answers at most.
    started: called with the address when the socket listens.

  Raises:
    UserError: the address cannot be listened at.
    whatever ended the start of the server: a program that cannot be compiled.
  """
  listener = _bound(host, port)
  config = uvicorn.Config(
    server.app,
    http=_protocol(server.settings.limits.read_s),
    ws="none",
    log_level="error",
    access_log=False,
    server_header=False,
    limit_concurrency=_CONNECTIONS,
    timeout_graceful_shutdown=1,
  )
  with listener:
    _Uvicorn(config, server, drain_s, started).run([listener])
  if server.failure is not None:
    raise server.failure


def _bound(host: str, port: int) -> socket.socket:
  try:
    family, kind, _, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind)
    try:
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      listener.bind(address)
    except OSError:
      listener.close()
      raise
  except (OSError, OverflowError) as e:
    why = getattr(e, "strerror", None) or e
    raise errors.UserError(f"--host={host} --port={port} cannot be listened at: {why}.") from e
  return listener


class _Uvicorn(uvicorn.Server):
  """Stops when nothing is open any more; its signals are ours, for uvicorn raises them again at the end."""

  def __init__(
    self, config: uvicorn.Config, server: Server, drain_s: float, started: Callable[[str], None]
  ):
    super().__init__(config)
    self._server, self._drain_s, self._tell, self._until = server, drain_s, started, 0.0

  async def startup(self, sockets: Any = None) -> None:
    await super().startup(sockets)
    if self.started:
      host, port = self.servers[0].sockets[0].getsockname()[:2]
      self._tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")

  async def on_tick(self, counter: int) -> bool:
    server = self._server
    if server.failure is not None:
      return True
    if server.draining and (not server.open or time.monotonic() > self._until):
      return True
    return await super().on_tick(counter)

  @contextlib.contextmanager
  def capture_signals(self) -> Generator[None, None, None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
      loop.add_signal_handler(number, self._drain, number)
    try:
      yield
    finally:
      for number in signals:
        loop.remove_signal_handler(number)

  def _drain(self, number: int) -> None:
    if self._server.draining:
      os._exit(128 + number)
    self._server.draining = True
    self._until = time.monotonic() + self._drain_s


def _protocol(seconds: float) -> type[H11Protocol]:
  """HTTP whose request heads, and readers of answers, must not take longer than this."""

  class Protocol(H11Protocol):
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      self._begin()

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      waits_for_head = self.cycle is None or self.cycle.response_complete
      if not waits_for_head:
        self._end()
      elif self._timer is None:
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
      self._end()
      super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
      """Of bytes that are no HTTP, also in the middle of a body: the application is told that its client is gone."""
      if self.cycle is not None and not self.cycle.response_complete:
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        if self.cycle.response_started:
          self.transport.close()
          return
      super().send_400_response(msg)

    def pause_writing(self) -> None:
      super().pause_writing()
      self._begin()

    def resume_writing(self) -> None:
      super().resume_writing()
      self._end()

    def _begin(self) -> None:
      self._end()
      self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _end(self) -> None:
      if self._timer is not None:
        self._timer.cancel()
        self._timer = None

  return Protocol
