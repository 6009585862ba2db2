"""Being asked to go away: SIGTERM, which schedulers send before they take a machine."""

from __future__ import annotations

import os
import signal
import sys

# EX_TEMPFAIL of sysexits.h: nothing is wrong, start again with --resume.
STATUS = 75


class Preemption:
    """Notes SIGTERM. From `training` to `done` the step at work may end; at other times the process ends at once."""

    def __init__(self):
        self.asked = self._training = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def __call__(self) -> bool:
        """Whether the process was asked to go away."""
        return self.asked

    def training(self) -> None:
        """From now on somebody looks whether it was asked."""
        self._training = True

    def done(self) -> None:
        """From now on nobody does."""
        self._training = False

    def _on_signal(self, number, frame):
        if not self._training or self.asked:
            # Not through exceptions, which code that happens to run might catch.
            sys.stdout.flush()
            os._exit(STATUS)
        self.asked = True
