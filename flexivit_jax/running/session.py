"""What keeps a run alive, behind one object: signals, watchdog, folder, other processes, ledger, rows, checkpoints.

Nobody must read this to change what is trained.
"""

import contextlib
import functools
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np

from flexivit_jax import errors, storage
from flexivit_jax.config import Section
from flexivit_jax.running import (
  bucket_run,
  distributed,
  peers,
  processes,
  run_folder,
  signals,
  signs,
  wandb_run,
)
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.running.gathered import Gathered
from flexivit_jax.running.ledger import Ledger
from flexivit_jax.running.metrics_writer import MetricsWriter
from flexivit_jax.trees import Json, Params, Tree

Held = TypeVar("Held")
Batch = dict[str, np.ndarray]
Saver = Checkpoints | Gathered


class Session:
  """One start of a run, from `start`.

  Attributes:
    workdir: the run folder; of a run in a bucket its copy on this machine, which of several processes only the first
      has.
    name: the last part of its path, also of "." and of a path that ends with "..".
    first: whether this is process 0, which writes the folder.
    stop: whether a signal has come.
    watchdog: ends a run that stands still.
    ledger: where the wall time goes.
    peers: heartbeats of the other processes; None: there are none.
    checkpoints, writer: RUN/checkpoints and the rows of metrics; after `open`.
  """

  ledger: Ledger
  checkpoints: Saver
  writer: MetricsWriter

  def __init__(
    self,
    workdir: pathlib.Path,
    stack: contextlib.ExitStack,
    stop: signals.Stop,
    begun: float,
    hang_after: object,
    bucket: "_Bucket | None" = None,
  ):
    self.workdir, self.stop, self._stack, self._begun = workdir, stop, stack, begun
    self.name = pathlib.Path(os.path.abspath(workdir)).name
    self.first = jax.process_index() == 0
    self.peers: peers.Peers | None = None
    self._bucket = bucket
    self._apart = bucket is not None and bucket.signs is not None
    self._opened = False
    # The config is not checked yet: a limit that is none is refused in a moment.
    limit = hang_after if isinstance(hang_after, int | float) and hang_after > 0 else None
    self.watchdog = signals.Watchdog(
      limit,
      note,
      tick=lambda: self.peers.tick() if self.peers else None,
      blame=lambda: self.peers.blame() if self.peers else "",
      leave_word=lambda reason: self.peers.leave_word(reason) if self.peers else None,
    )
    stack.enter_context(contextlib.closing(self.watchdog))

  def hold(self, held: contextlib.AbstractContextManager[Held]) -> Held:
    """Enters a context, which ends with the session."""
    return self._stack.enter_context(held)

  def closing(self, checkpoints: Saver) -> Saver:
    """Holds checkpoints; that a save failed is only a line where something else has ended the run."""
    return self.hold(_closing(checkpoints, self.ledger))

  def take_folder(self) -> None:
    """Takes the folder for this run, begins the ledger, and listens to the other processes' heartbeats.

    Raises:
      UserError: another run has the folder; some processes see another one by its name.
    """
    processes.take(self.workdir, self._stack, shared=not self._apart)
    self.ledger = Ledger(self.workdir / "ledger.json" if self.first else None, self._begun)
    self._stack.push(self._write_ledger)
    self.peers = processes.heartbeats(self._bucket.signs if self._apart else self.workdir)

  def reader(self) -> Checkpoints:
    """Opens RUN/checkpoints to read them; of processes without a common folder the first alone finds any."""
    return Checkpoints(self.workdir / "checkpoints", read_only=True, own=self._apart)

  def restore(
    self, checkpoints: Checkpoints, step: int, params: Params, state: Tree
  ) -> tuple[Params, Tree, Json]:
    """Restores a step that process 0 has verified; processes without a common folder fetch and verify their own copy.

    Args:
      checkpoints: from `reader`.
      step: of the checkpoint.
      params, state: see `Checkpoints.restore`.

    Raises:
      UserError: see `Checkpoints.restore`; also of another process's copy.
    """
    if not self._apart:
      return checkpoints.restore(step, params, state, verified=True)

    def own() -> tuple[Params, Tree, Json]:
      if self.first:
        return checkpoints.restore(step, params, state, verified=True)
      copy = bucket_run.fetched(self._bucket.url, bucket_run.checkpoint(step))
      with contextlib.closing(Checkpoints(copy / "checkpoints", read_only=True, own=True)) as read:
        return read.restore(step, params, state)

    return distributed.each(own, f"its copy of the checkpoint of step {step}")

  def saver(self, name: str, *, keep: int | None, key: str | None = None) -> Saver:
    """Opens RUN/`name` to save checkpoints there; see `Checkpoints`, whose `name` is the key."""
    of = Gathered if self._apart else Checkpoints
    return self.closing(of(self.workdir / name, keep=keep, name=key))

  def open(
    self,
    settings: Section,
    *,
    keep: int | None,
    step: int,
    resumed: bool,
    wandb: Section | None = None,
  ) -> None:
    """Opens what the run writes. Whatever can refuse a start has passed; until here nothing in the folder has changed.

    Args:
      settings: the config.
      keep: see `Checkpoints`.
      step: the step that the run begins or resumes at; later rows of an earlier start are dropped.
      resumed: there is a checkpoint of that step.
      wandb: arguments of `wandb_run.open_run`; None: no Weights & Biases.
    """
    self._opened = True
    self.checkpoints = self.saver("checkpoints", keep=keep)
    others = {}
    if wandb is not None:
      opening = functools.partial(wandb_run.open_run, self.workdir, settings, resumed)
      others["Weights & Biases"] = functools.partial(opening, **wandb)
    self.writer = self.hold(
      MetricsWriter(self.workdir, restored_step=step, writing=self.first, others=others)
    )

  def check(self) -> None:
    """Raises a UserError if a save in the background has failed, here or into a bucket."""
    self.checkpoints.check()
    if self._bucket is not None and self._bucket.mirror is not None:
      self._bucket.mirror.check()

  def next(self, step: int, batches: Iterator[Batch], number: int) -> tuple[Batch, float]:
    """Returns the batch of a step, and the seconds that it was awaited.

    Args:
      step: of which the batch is. From now on the other processes see this one at it.
      batches: of the data.
      number: how many of these the step takes, as one.

    Raises:
      Stopped: a signal came while the first one was awaited.
    """
    begun = time.perf_counter()
    with self.watchdog.data(), self.ledger.of("data wait"):
      batch = next_batch(batches, number, self.stop)
    if self.peers is not None:
      # Before the first wait for others: a process that is a step behind is the one they wait for.
      self.peers.step = step
    return batch, time.perf_counter() - begun

  def _write_ledger(self, kind: object, error: BaseException | None, trace: object) -> None:
    """Writes it at the end, but not of a start that was refused."""
    del kind, trace
    if self._opened or not isinstance(error, errors.UserError):
      self.ledger.write()


@contextlib.contextmanager
def start(
  settings: Section, workdir: pathlib.Path, *, hang_after: object, begun: float | None = None
) -> Iterator[Session]:
  """Begins a run: from here on signals are obeyed, and a run that stands still ends.

  Args:
    settings: the config. All processes have to have the same.
    workdir: the run folder, or the address of one in a bucket.
    hang_after: seconds without a heartbeat after which the process ends; None: never.
    begun: `time.perf_counter()` from when on the run's time is counted; default: now.

  Raises:
    UserError: processes of other configs; a folder that cannot be one; a logger that is not installed.
  """
  begun = time.perf_counter() if begun is None else begun
  several, bucket = distributed.is_on(), None
  with contextlib.ExitStack() as stack:
    try:
      stop = stack.enter_context(signals.catch(distributed.preempted if several else None))
      with stop.interruptible():
        processes.agree_on_config(settings)
        if url := storage.address(workdir):
          run_folder.check_bucket(url)
          bucket = _Bucket(url)
          stack.enter_context(bucket.opened())
        folder = bucket_run.folder_of(url) if url else workdir
        session = Session(folder, stack, stop, begun, hang_after, bucket)
        run_folder.check_path(folder, several=several and bucket is None)
        if settings.get("wandb") is not None:
          distributed.on_first(wandb_run.check, "its package wandb")
      yield session
    except Exception as error:
      if several:
        if bucket is not None:
          bucket.abandon(error)
        processes.abandon(error, workdir)
      raise


class _Bucket:
  """The bucket of a run. Of several processes the first copies its folder there, and the others have no folder.

  Args:
    url: the address of the run.

  Attributes:
    url: the address.
    mirror: on the only process, and on process 0.
    signs: heartbeats of several processes, while they need no file system; None: there is one process.
  """

  def __init__(self, url: str):
    self.url = url
    self.mirror: bucket_run.Mirror | None = None
    self._own = contextlib.ExitStack()
    self._ending = threading.Lock()
    self.signs: signs.InService | None = None
    if distributed.is_on():
      service, index, count = distributed.service(), jax.process_index(), jax.process_count()
      self.signs = signs.InService(service, index, count, self._heed)

  @contextlib.contextmanager
  def opened(self) -> Iterator[None]:
    """Opens it on process 0; at the end the others wait until all is copied.

    Raises:
      UserError: see `bucket_run.opened`; on all processes.
    """

    def enter() -> None:
      self.mirror = self._own.enter_context(bucket_run.opened(self.url))

    distributed.on_first(enter, self.url)
    try:
      yield
    except BaseException as error:
      about = (type(error), error, error.__traceback__)
      distributed.on_first(lambda: bool(self._own.__exit__(*about)), self.url)
      raise
    else:
      distributed.on_first(self._own.close, self.url)
    finally:
      if self.signs is not None:
        self.signs.close()

  def abandon(self, error: Exception) -> NoReturn:
    """Ends this one of several processes; see `processes.abandon`."""
    assert self.signs is not None
    processes.abandon(error, self.signs, lambda: self._finish(str(error)))

  def _heed(self, word: signs.Word) -> None:
    """Ends this process because another one has ended with an error."""
    print(
      f"flexivit: error: process {jax.process_index()}: process {word.process} has ended: {word.reason:.500}",
      file=sys.stderr,
      flush=True,
    )
    self._finish(word.reason)
    self.signs.wait_until_read()
    os._exit(word.code)

  def _finish(self, reason: str) -> None:
    """Copies what is left, and releases the lock; an error that was told is not told again."""
    with (
      self._ending
    ):  # the main thread and that of `signs` may come here; the second waits for the first
      try:
        self._own.close()
      except errors.UserError as e:
        if str(e) != reason:
          print(str(e), file=sys.stderr, flush=True)


def next_batch(batches: Iterator[Batch], number: int, stop: signals.Stop) -> Batch:
  """Concatenates the next `number` batches. Interruptible only before the first one, so that none is lost."""
  with stop.interruptible():
    first = next(batches)
  if number == 1:
    return first
  several = [first, *(next(batches) for _ in range(number - 1))]
  return {key: np.concatenate([batch[key] for batch in several]) for key in first}


@contextlib.contextmanager
def _closing(checkpoints: Saver, ledger: Ledger) -> Iterator[Saver]:
  try:
    yield checkpoints
  except BaseException:
    try:
      with ledger.of("checkpoints"):
        checkpoints.close()
    except errors.UserError as e:
      note(str(e))
    raise
  with ledger.of("checkpoints"):
    checkpoints.close()


def note(message: str) -> None:
  """Prints a progress line to stderr, on process 0 only."""
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)
