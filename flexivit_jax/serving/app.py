"""The routes: POST /predict and /embed, GET /sizes, /healthz, /ready, /metrics."""

import asyncio
import contextlib
import functools
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple, final

import numpy as np
import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from flexivit_jax import errors
from flexivit_jax.budget.cascade import Cascade
from flexivit_jax.inference import cascades, picture_files, predictions, texts
from flexivit_jax.serving import asked, cascading, choice, limits, pictures
from flexivit_jax.serving.asked import Asked
from flexivit_jax.serving.choice import Policy
from flexivit_jax.serving.engine import Answer, BrokenError, Engine, LateError
from flexivit_jax.serving.limits import Limits, RefusedError
from flexivit_jax.serving.metrics import Metrics
from flexivit_jax.serving.queues import FullError, Lane, Queues
from flexivit_jax.serving.served import Served
from flexivit_jax.serving.times import Times
from flexivit_jax.sizes import SeqHw, size_text
from flexivit_jax.trees import Json

_LOG = logging.getLogger(__name__)
# The page loads nothing from elsewhere, and sends nothing elsewhere.
_PAGES_MAY = (
  "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
  "connect-src 'self'"
)
_NAMES_KEPT = 256  # lists of names whose embeddings are kept


class Settings(NamedTuple):
  """How a server runs.

  Attributes:
    batches: of how many images there are programs.
    what: the routes, of `served.WHAT`.
    max_wait_s: how long an image waits for others.
    queue: images that may wait in each queue.
    threads: that decode images.
    token: of requests; "": none is needed.
    limits: of requests.
    page: HTML at /, which asks for images as the model sees them at /prepared; "": there is none.
  """

  batches: tuple[int, ...] = (1, 4)
  what: tuple[str, ...] = ("predict", "embed")
  max_wait_s: float = 0.005
  queue: int = 32
  threads: int = 2
  token: str = ""
  limits: Limits = Limits()
  page: str = ""


@final
class Server:
  """A model behind HTTP: `app` is the ASGI application.

  `draining` refuses what comes from now on; `open` are the requests that are not yet answered; `failure` is what ended
  the start, None while there is nothing.
  """

  def __init__(
    self, served: Served, policy: Policy, settings: Settings, cascade: Cascade | None = None
  ):
    self.served, self.policy, self.settings, self.cascade = served, policy, settings, cascade
    self.metrics, self.times = Metrics(), Times()
    self.draining, self.open = False, 0
    self.failure: BaseException | None = None
    self._memory = limits.Memory(settings.limits.all_bytes)
    self._decoding = futures.ThreadPoolExecutor(settings.threads, thread_name_prefix="decode")
    self._decodes = 0
    self._classes: Callable[[Sequence[str], str], texts.Names] | None = None
    what = tuple(one for one in served.what if one in settings.what)
    keys = [(one, size, n) for one in what for size in policy.sizes for n in settings.batches]
    queues = Queues(
      settings.batches, self._seconds, max_wait=settings.max_wait_s, length=settings.queue
    )
    self.engine = Engine(served.program, keys, served.shape, queues, self.times, self.metrics)
    routes = [
      Route(f"/{one}", self._guarded(one, functools.partial(self._compute, one)), methods=["POST"])
      for one in what
    ]
    routes += [
      Route("/sizes", self._guarded("sizes", self._sizes)),
      Route("/metrics", self._guarded("metrics", self._metrics)),
      Route("/healthz", self._healthz),
      Route("/ready", self._ready),
    ]
    if settings.page:
      prepared = self._guarded("prepared", self._prepared)
      routes += [Route("/", self._page), Route("/prepared", prepared, methods=["POST"])]
    handlers: Any = {HTTPException: _http_error, Exception: _internal_error}
    self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
    self.app.router.redirect_slashes = False

  # --- the routes ---

  async def _compute(self, what: str, request: Request) -> Response:
    """Answers a request for classes or features."""
    begin = time.monotonic()
    if not self.engine.ready.is_set():
      raise RefusedError(
        503, "the programs are still compiled", {"Retry-After": "5", **limits.CLOSE}
      )
    towers = self.served.names is not None
    wish = asked.parse(
      what, request.query_params, self.policy.sizes, self.settings.batches, towers=towers,
      pictures=self.served.pictures is not None,
    )  # fmt: skip
    with self._memory.body() as held:
      body = await limits.read(request, self.settings.limits, self._memory, held)
      encoded, several = limits.split(request, body, self.settings.limits)
      del body
      images = await self._decoded(encoded)
      origins = (
        [self.served.pictures.origin(one) for one in encoded] if self.served.pictures else []
      )
    deadline = begin + wish.deadline_s
    work = asyncio.ensure_future(self._answers(what, wish, images, deadline, origins))
    answers = await _unless_gone(request, work)
    if time.monotonic() > deadline:
      self.metrics.late.labels("answered late").inc()
    return JSONResponse({"images": answers} if several else answers[0])

  async def _decoded(self, encoded: Sequence[bytes]) -> list[np.ndarray]:
    """Decodes images in the threads for it, of which no more wait than in a queue."""
    if self._decodes + len(encoded) > self.settings.queue:
      raise RefusedError(429, "too many images are decoded", {"Retry-After": "1"})
    loop = asyncio.get_running_loop()
    self._decodes += len(encoded)
    try:
      decode = functools.partial(limits.decode, self.served.prepare, limits=self.settings.limits)
      work = [loop.run_in_executor(self._decoding, decode, one) for one in encoded]
      done = await asyncio.gather(*work, return_exceptions=True)
    finally:
      self._decodes -= len(encoded)
    for number, image in enumerate(done):
      if isinstance(image, RefusedError) and len(done) > 1:
        raise RefusedError(image.status, f"image {number}: {image.text}", image.headers)
      if isinstance(image, BaseException):
        raise image
      if image.shape != self.served.shape:
        raise RefusedError(400, f"image {number} {_other_shape(image.shape, self.served.shape)}")
    return [image for image in done if not isinstance(image, BaseException)]

  async def _answers(
    self,
    what: str,
    wish: Asked,
    images: Sequence[np.ndarray],
    deadline: float,
    origins: Sequence[pictures.Origin] = (),
  ) -> list[Json]:
    classes, loop = await self._texts(wish), asyncio.get_running_loop()
    if wish.cascade:
      cascade, scores = self._cascade(wish, classes)
      lane = cascading.first_lane(cascade)
      ask = functools.partial(cascading.answer, self.engine, cascade, scores)
    else:
      lane = self._lane(what, wish, len(images), deadline)
      ask = functools.partial(self.engine.answer, lane)
    self._check_room(lane, len(images), deadline)
    waits = [asyncio.ensure_future(ask(image, deadline)) for image in images]
    try:
      answers = await asyncio.gather(*waits)
    finally:
      for wait in waits:
        wait.cancel()
    said = [self._as_json(answer, what, wish, classes) for answer in answers]
    if self.served.pictures is None:
      return said
    drawn = zip(origins, (answer.output for answer in answers), strict=True)
    work = [
      loop.run_in_executor(self._decoding, self.served.pictures.answer, *one) for one in drawn
    ]
    return [one | picture for one, picture in zip(said, await asyncio.gather(*work), strict=True)]

  async def _texts(self, wish: Asked) -> texts.Names | None:
    """The classes of a request that names them."""
    if wish.names is None or self._classes is None:
      return None
    classes = self._classes
    return await self.engine.on_device(lambda: classes(wish.names or (), wish.templates))

  def _cascade(self, wish: Asked, classes: texts.Names | None) -> tuple[Cascade, cascades.Scores]:
    if self.cascade is None:
      raise errors.UserError("this server has no cascade; it starts with one by --cascade FILE")
    return self.cascade, cascading.scores_of(self.cascade, classes, wish.templates)

  def _lane(self, what: str, wish: Asked, images: int, deadline: float) -> Lane:
    """Where the images of a request wait: at its size, or at one that is chosen for it."""
    if wish.size is not None:
      return Lane(what, wish.size, wish.batch)
    now = time.monotonic()

    def finish(size: SeqHw, batch: int | None) -> float:
      return self.engine.queues.finish(Lane(what, size, batch), images, now)

    found = choice.chosen(self.policy, wish.budget, finish, now, deadline)
    if found is None:
      raise LateError
    if found.degraded:
      self.metrics.degraded.labels(str(size_text(found.size))).inc()
    return Lane(what, found.size, found.batch)

  def _check_room(self, lane: Lane, images: int, deadline: float) -> None:
    """Refuses what would be late, and what a queue has no room for: all images of a request, or none."""
    now, queues = time.monotonic(), self.engine.queues
    if queues.finish(lane, images, now) > deadline:
      raise LateError
    if queues.room(lane) < images:
      raise FullError(max(0.0, queues.finish(lane, 0, now) - now))

  def _as_json(self, answer: Answer, what: str, wish: Asked, classes: texts.Names | None) -> Json:
    said: Json = {
      "seqhw": answer.lane.size, "batch": answer.batch,
      "ms": round(answer.ms, 3), "wait_ms": round(answer.wait_ms, 3),
    }  # fmt: skip
    if what == "embed":
      return said | {"embedding": [float(str(value)) for value in answer.output]}
    if self.served.pictures is not None:
      return said  # what is in it takes its time
    if what == "relevance":
      return said | {"relevance": answer.output.tolist()}
    output, names = answer.output, self.served.classes
    if classes is not None:
      output, names = classes.probabilities(output), classes.names
    top = predictions.most_likely(output, names, min(wish.top_k, len(names)))
    return said | {"top": [predictions.class_as_json(*one) for one in top]}

  async def _sizes(self, request: Request) -> Response:
    """What there is to choose from: the sizes, and the rows of the profile."""
    del request
    profile = self.policy.profile
    known: Json = {
      "model": self.served.name,
      "seqhw": [size_text(size) for size in self.policy.sizes],
      "batches": list(self.settings.batches),
      "accuracy_floor": self.policy.floor,
    }
    if profile is not None:
      rows = [row._asdict() | {"size": size_text(row.size)} for row in profile.rows]
      known |= {"device": profile.device, "metric": dict(profile.metric), "rows": rows}
    return JSONResponse(known)

  async def _page(self, request: Request) -> Response:
    del request
    return HTMLResponse(self.settings.page, headers={"Content-Security-Policy": _PAGES_MAY})

  async def _prepared(self, request: Request) -> Response:
    """The image of a request as the model sees it."""
    with self._memory.body() as held:
      body = await limits.read(request, self.settings.limits, self._memory, held)
      encoded, _ = limits.split(request, body, self.settings.limits)
      del body
      image, *_ = await self._decoded(encoded)
    return Response(picture_files.png(image), media_type="image/png")

  async def _metrics(self, request: Request) -> Response:
    del request
    kind = prometheus_client.CONTENT_TYPE_LATEST
    return Response(self.metrics.text(), headers={"Content-Type": kind})

  async def _healthz(self, request: Request) -> Response:
    """Whether the process is to be left alive."""
    del request
    return PlainTextResponse(
      "ok" if self.failure is None else "failed", 200 if self.failure is None else 500
    )

  async def _ready(self, request: Request) -> Response:
    """Whether requests are to be sent here."""
    del request
    ready = self.engine.ready.is_set() and not self.draining and self.failure is None
    return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)

  # --- around them ---

  def _guarded(
    self, route: str, answer: Callable[[Request], Awaitable[Response]]
  ) -> Callable[[Request], Awaitable[Response]]:
    """Counts requests; refuses those without the token, and all while draining; turns errors into responses."""

    async def guarded(request: Request) -> Response:
      self.open += 1
      try:
        response = await self._response(answer, request)
      finally:
        self.open -= 1
      self.metrics.requests.labels(route, str(response.status_code)).inc()
      if self.draining:
        response.headers.update(limits.CLOSE)
      return response

    return guarded

  async def _response(
    self, answer: Callable[[Request], Awaitable[Response]], request: Request
  ) -> Response:
    try:
      self._check_token(request)
      if self.draining:
        raise RefusedError(503, "the server is stopping", limits.CLOSE)
      return await answer(request)
    except RefusedError as e:
      return _error(e.status, e.text, e.headers)
    except FullError as e:
      seconds = min(max(1, math.ceil(e.retry_after)), 60)
      return _error(429, "the queue is full", {"Retry-After": str(seconds)})
    except LateError:
      self.metrics.late.labels("refused").inc()
      return _error(504, "the deadline cannot be met; nothing was computed")
    except BrokenError as e:
      return _error(500, str(e))
    except errors.UserError as e:
      return _error(400, str(e), limits.CLOSE)
    except ClientDisconnect:
      return Response(status_code=499)  # nobody reads it

  def _check_token(self, request: Request) -> None:
    if not self.settings.token:
      return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(
      token.strip().encode("latin-1", "replace"), self.settings.token.encode()
    )
    if scheme.lower() != "bearer" or not same:
      raise RefusedError(401, "no valid token", {"WWW-Authenticate": "Bearer", **limits.CLOSE})

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    """Compiles and runs batches beside the event loop's other work, from the start to the end of the application."""
    del app
    work = asyncio.ensure_future(self.engine.run(self._compile_texts))
    work.add_done_callback(self._ended)
    try:
      yield
    finally:
      work.cancel()
      self.engine.close()
      self._decoding.shutdown(wait=False, cancel_futures=True)

  def _ended(self, work: "asyncio.Future[None]") -> None:
    if not work.cancelled() and work.exception() is not None:
      self.failure = work.exception()

  def _compile_texts(self) -> None:
    """In the device's thread: the text tower, by names that are embedded once."""
    if self.served.names is not None:
      classes = self.served.names()
      classes(("a", "b"), "name")
      self._classes = functools.lru_cache(_NAMES_KEPT)(classes)

  def _seconds(self, lane: Lane, batch: int) -> float:
    return self.times.safe((lane.what, lane.size, batch))


def _other_shape(got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
  (h, w), (high, wide) = got[:2], wanted[:2]
  return f"is {h} x {w} pixels as the model sees it; this server takes {high} x {wide}: cut it to these proportions"


async def _unless_gone(request: Request, work: "asyncio.Future[list[Json]]") -> list[Json]:
  """Returns what a request waits for; a client that hangs up cancels it."""
  gone = asyncio.ensure_future(_disconnected(request))
  try:
    both: set[asyncio.Future[Any]] = {work, gone}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      raise ClientDisconnect
    return work.result()
  finally:
    gone.cancel()
    work.cancel()


async def _disconnected(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
  return JSONResponse({"error": text}, status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
  del request
  return _error(error.status_code, str(error.detail), {**(error.headers or {}), **limits.CLOSE})


async def _internal_error(request: Request, error: Exception) -> Response:
  """The traceback goes to the log of the server alone."""
  del request, error
  return _error(500, "internal error", limits.CLOSE)
