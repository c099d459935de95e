"""A run's progress: one line with the time left that fits the terminal; elsewhere a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

# Seconds between two lines where there is no terminal to redraw.
QUIET_INTERVAL = 20.0
# Seconds of which the pace is taken; a step may take a minute.
PACE_OF = 600.0
BAR = 24, 8  # columns at most and at least
SHORTEST_TITLE = 12  # columns


class ProgressLine:
    """One line that is redrawn where there is a terminal; elsewhere a plain line now and then."""

    def __init__(self, title: str, total: int, done: int, enabled: bool) -> None:
        self._console = Console(stderr=True)
        self._live = enabled and self._console.is_terminal
        self._plain = enabled and not self._live
        self._last, self._done, self._total, self._title = 0.0, done, total, title
        self._start, self._first = time.monotonic(), done
        line = _Line(self._console)
        self._bar = Progress(line, console=self._console, disable=not self._live, speed_estimate_period=PACE_OF)
        self._task = self._bar.add_task(title, total=total, completed=done, notes=())

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def advance(self, notes: Sequence[str] | None = None) -> None:
        """One step on; notes: what is known of it, the most important first, if there is anything new."""
        self._done += 1
        self._bar.advance(self._task)
        if notes is not None:
            self._bar.update(self._task, notes=notes)
            self._maybe_print(notes)

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._live or self._plain:
            self._console.print(f"{self._title} {line}", highlight=False, soft_wrap=True)

    def tell(self, note: str) -> None:
        """Says what goes on between two steps; at once on a terminal only."""
        self._bar.update(self._task, notes=[note])
        self._bar.refresh()

    def _maybe_print(self, notes: Sequence[str]) -> None:
        now = time.monotonic()
        if self._plain and (now - self._last > QUIET_INTERVAL or self._done == self._total):
            self._last = now
            pace = (now - self._start) / max(1, self._done - self._first)
            left = time_left(pace * (self._total - self._done))
            line = " ".join([self._title, f"{self._done}/{self._total}", f"eta {left}", *notes])
            self._console.print(line, highlight=False, soft_wrap=True)


class _Line(ProgressColumn):
    """The whole line as one column, made anew for the terminal's present width."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        counts = [f"{task.completed:.0f}/{task.total:.0f}", f"eta {time_left(task.time_remaining)}"]
        share = task.completed / task.total if task.total else 1.0
        return Text(fitted(task.description, share, [*counts, *task.fields["notes"]], self._console.width))


def fitted(title: str, share: float, parts: Sequence[str], width: int) -> str:
    """A title, a bar filled to `share` and the parts in `width` columns.

    Where not all fit, the bar is left out first, then the title is shortened for the first five parts, then the last
    parts are left out.
    """
    room = max(SHORTEST_TITLE, width - len(" ".join(parts[:5])) - 1)
    if len(title) > room:
        title = title[: room - 1] + "…"
    while len(parts) > 1 and len(" ".join([title, *parts])) > width:
        parts = parts[:-1]
    free = width - len(" ".join([title, *parts])) - 1
    most, least = BAR
    if free < least:
        return " ".join([title, *parts])[:width]
    length = min(most, free)
    filled = round(share * length)
    return " ".join([title, "━" * filled + "─" * (length - filled), *parts])


def time_left(seconds: float | None) -> str:
    """`0:12:34`, `3d 07:46`, or dashes where it is not known yet."""
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}" if days else f"{hour}:{minute:02}:{second:02}"
