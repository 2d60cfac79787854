"""This rank among the others: it tells how far it is, notices who does not go on, and agrees with all when to stop.

What notices a fault, and when:

    another rank dies            the exchange of the next step fails at once: its connection was closed
    another rank stands still    collectives give up after the timeout
    this rank stands still       its watchdog ends it after the timeout and a few seconds, with all threads' stacks

So it is while training, measuring and saving. A start, the first step of each size of view, which may compile, and a
disk have START_SECONDS.

Each rank writes its step into the ranks' common store every second, which is how a survivor can name who is missing.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from simclr.distributed import SideChannel, is_lost_peer, rank, store, world_size
from simclr.run import launch
from simclr.run.interruption import Signals

START_SECONDS = 600.0
"""How long ranks wait for each other, and for themselves, where nothing tells whether work goes on: reading data for
the first time, compiling, a disk that is asked to have written a checkpoint."""

EXIT_STOOD_STILL = 70
"""Exit status of a rank that its watchdog has ended. EX_SOFTWARE of sysexits.h."""

_REPORT_SECONDS = 1.0
_MARGIN_SECONDS = 3.0  # so that a rank that waits in vain for another reports that, rather than itself


class LostPeerError(RuntimeError):
    """Another rank has died or stands still. The message names it, as far as can be known."""


@dataclass(frozen=True)
class _Heard:
    """What a rank last told."""

    number: int
    """Counts its reports: where it does not grow, the rank is dead or stopped."""
    step: int
    doing: str
    left: str = ""
    """Why it has left, if it has."""


class Peers:
    """Agrees with the other ranks when to stop, and notices when one is lost: see the top of this file.

    Made and closed by all ranks together; also in a world of one, for its watchdog.

    Args:
        timeout_seconds: See :class:`simclr.config.TrainConfig`; it holds from the first step on.
        signals: What asks this rank to stop.
    """

    def __init__(self, *, timeout_seconds: float, signals: Signals) -> None:
        self._timeout, self._signals = timeout_seconds, signals
        self._before_exit: Callable[[str], None] = lambda reason: None
        with launch.saying_who_is_awaited():  # the hosts meet anew, for messages of their own
            self._channel = SideChannel(datetime.timedelta(seconds=START_SECONDS))
        self._store = store()
        self._limit = START_SECONDS
        self._kind: object = None
        self._heartbeats = 0  # of the training thread; that they go on is what the watchdog watches
        self._now = _Heard(0, 0, "starting")
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value (numbers, text, dicts of them), in rank order, on every rank."""
        return self._channel.gather(value)

    def step_taken(self, step: int) -> str:
        """Tell that ``step`` steps are taken; return who was asked to stop by what, the same on every rank, or "".

        A signal is answered one step later: see :meth:`simclr.distributed.SideChannel.vote`.
        """
        self._tell("training", step)
        self._set_limit(self._timeout)
        received = self._signals.received
        agreed = self._channel.vote(received * world_size() + rank() if received else 0)
        if not agreed:
            return ""
        number, asked = divmod(agreed, world_size())
        return signal.Signals(number).name + (f" on rank {asked}" if world_size() > 1 else "")

    def expect(self, kind: object) -> None:
        """Say what kind of steps comes next: the first one of another kind may compile, and has START_SECONDS.

        Every rank must say the same.
        """
        if kind != self._kind:
            self._kind = kind
            self._set_limit(START_SECONDS)

    def working(self, doing: str) -> None:
        """Tell that ``doing`` goes on, and wait until all ranks have come as far. For long work, after each part.

        Not by torch's ``monitored_barrier``: there only rank 0 gives up after the timeout, and the others wait for ever
        for a rank 0 that stands still.
        """
        self._tell(doing)
        self._channel.gather(None)

    def wait_until(self, is_done: Callable[[], bool], doing: str) -> None:
        """Wait until ``is_done`` holds on every rank, for up to START_SECONDS, while the ranks stay in touch.

        Args:
            is_done: Waits for a moment itself. Where it never holds, the watchdog ends the process.
            doing: What is waited for.
        """
        started = time.monotonic()
        while not all(self._channel.gather(int(is_done()))):
            if time.monotonic() < started + START_SECONDS:
                self._tell(doing)

    @contextlib.contextmanager
    def explain_lost_ranks(self, before_exit: Callable[[str], None] = lambda reason: None) -> Iterator[None]:
        """Tell the others why this rank leaves, if it does, and name the rank that is lost, if that is why.

        Args:
            before_exit: Called with a reason before the watchdog ends this process.

        Raises:
            LostPeerError: In place of an error of a collective call.
        """
        self._before_exit = before_exit
        try:
            yield
        except LostPeerError:
            raise
        except Exception as error:
            if not is_lost_peer(error):
                self.leave(f"{type(error).__name__}: {error}")
                raise
            message = f"rank {rank()} ends after step {self._now.step}, {self._now.doing}: {self.describe_loss()}"
            self.leave(message)
            raise LostPeerError(message) from error

    def describe_loss(self) -> str:
        """Say which ranks are missing, after a moment in which those that live report once more."""
        before = self._heard()
        if before:
            time.sleep(2.2 * _REPORT_SECONDS)
        after = self._heard()
        if not after:
            return "the host of the ranks' common store, rank 0 or the launcher, is gone or stands still"
        missing, others = [], []
        for number in range(world_size()):
            heard = after.get(number)
            if heard is None:
                missing.append(f"rank {number} was never heard of")
            elif heard.left:
                others.append(f"rank {number} has left at step {heard.step}: {heard.left}")
            elif number in before and before[number].number == heard.number:
                missing.append(f"rank {number} is dead or stopped: last heard of at step {heard.step}, {heard.doing}")
            elif number != rank():
                others.append(f"rank {number} lives, at step {heard.step}, {heard.doing}")
        return "; ".join([*missing, *others]) or "all other ranks live"

    def leave(self, reason: str) -> None:
        """Tell the others why this rank does not go on."""
        self._now = _Heard(self._now.number + 1, self._now.step, self._now.doing, left=reason[:500])
        self._report()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._watchdog.join()

    def _set_limit(self, seconds: float) -> None:
        if self._limit != seconds:
            self._limit = seconds
            self._channel.set_timeout(datetime.timedelta(seconds=seconds))

    def _tell(self, doing: str, step: int | None = None) -> None:
        self._heartbeats += 1
        self._now = _Heard(self._now.number, self._now.step if step is None else step, doing)

    # ------------------------------------------------------------------------------------------ in the thread

    def _watch(self) -> None:
        self._report()  # so that a rank that is lost within a second was heard of
        heartbeats, seconds = self._heartbeats, 0.0  # those in which this thread ran: a stopped process may go on
        while not self._closed.wait(_REPORT_SECONDS):
            self._now = _Heard(self._now.number + 1, self._now.step, self._now.doing, self._now.left)
            self._report()
            if heartbeats != self._heartbeats:
                heartbeats, seconds = self._heartbeats, 0.0
            seconds += _REPORT_SECONDS
            if seconds > self._limit + _MARGIN_SECONDS:
                self._end_process(seconds)

    def _end_process(self, seconds: float) -> None:
        message = (
            f"rank {rank()} has stood still for {seconds:.0f} s after step {self._now.step}, {self._now.doing}: "
            "ended by its watchdog (--timeout-seconds)"
        )

        def tell() -> None:
            with contextlib.suppress(Exception):
                print(f"{message}; its threads, most recent call first:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
            with contextlib.suppress(Exception):
                self.leave(message)
            with contextlib.suppress(Exception):
                self._before_exit(message)

        telling = threading.Thread(target=tell, name="telling", daemon=True)
        telling.start()
        telling.join(2.0)  # it may be the disk or the reader of the output that stands still
        os._exit(EXIT_STOOD_STILL)

    def _report(self) -> None:
        self._use_store(lambda store: store.set(f"peers/{rank()}", json.dumps(vars(self._now))))

    def _heard(self) -> dict[int, _Heard]:
        heard: dict[int, _Heard] = {}

        def read(store: Any) -> None:
            for number in range(world_size()):
                if store.check([f"peers/{number}"]):
                    heard[number] = _Heard(**json.loads(store.get(f"peers/{number}")))

        self._use_store(read)
        return dict(heard)

    def _use_store(self, use: Callable[[Any], object]) -> None:
        """Use the store in a thread that is given up after a second: calls wait for ever where its host is stopped."""
        if self._store is None:
            return

        def used() -> None:
            with contextlib.suppress(RuntimeError):  # its host is gone; the next collective fails for that
                use(self._store)

        thread = threading.Thread(target=used, name="store", daemon=True)
        thread.start()
        thread.join(1.0)
        if thread.is_alive():
            self._store = None
