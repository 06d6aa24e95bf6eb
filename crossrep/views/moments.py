"""When something was, so that its age counts the time a machine slept."""

from __future__ import annotations

import math
import time
from typing import NamedTuple


class Moment(NamedTuple):
    """A moment by two clocks; `age` is the greater of what they say.

    time.monotonic() stands still while the machine sleeps (Linux, macOS). The wall clock does not, is set right when a paused virtual
    machine goes on, and is what stores note; but it may be set back, which the other one never is. CLOCK_BOOTTIME would be one clock
    instead of two, but Linux alone has it, and a paused virtual machine stops it too. Set forward, the wall clock shows ages too great:
    a reader may be ended for nothing then. The other error is a deleted key that is answered for ever.
    """

    wall: float  # time.time(), seconds since 1970
    awake: float  # time.monotonic(), seconds

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time(), time.monotonic())

    @property
    def age(self) -> float:
        """Seconds since then."""
        return max(time.time() - self.wall, time.monotonic() - self.awake)


NEVER = Moment(-math.inf, -math.inf)
