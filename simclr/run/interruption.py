"""Being asked to stop: signals are noted, not acted upon, so that the run saves and leaves between two steps.

SIGTERM and SIGUSR1 are what schedulers send before they end a job, SIGINT is Ctrl-C, SIGHUP a terminal that was closed.
Any of them, on any rank, once or several times, means the same.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

EXIT_SAVED = 75
"""Exit status of a run that was asked to stop and has saved: start it again to go on. EX_TEMPFAIL of sysexits.h.
Launchers do not hand it on; status.json tells the same."""

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
if sys.platform != "win32":  # which has no others
    SIGNALS += (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):  # noqa: N818  it is no error
    """The run was asked to stop, and has saved all that it had done."""


class Signals:
    """Notes the first signal that asks this process to stop; without :meth:`install` there is never one.

    Attributes:
        received: Its number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """Note signals from now on, to the end of the process: nothing cuts off saving. From the main thread only.

        SIGHUP stays ignored where it is, which is what `nohup` does.
        """
        for number in SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def ignore(self) -> None:
        """Ignore signals from now on: this process is about to end, with a status that none may change."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
