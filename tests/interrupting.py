"""Press Ctrl-C at a chosen line, while a call runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def in_mlx_or_library(frame: FrameType) -> bool:
    return frame.f_globals["__name__"].partition(".")[0] in ("mlx", "mlx_modswap")


def interrupt_at(
    line: int, call: Callable[[], Any], counts: Callable[[FrameType], bool] = in_mlx_or_library
) -> bool:
    """Interrupt a call before a line, and return whether it came so far.

    The lines are counted in the order in which they run, in the frames that ``counts`` accepts.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not counts(frame):
            return None
        count += event == "line"
        if count == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracing)
    return False
