"""All that the command line says besides text: on stderr, as a live line on a terminal and as few lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

EVERY_S = 10.0  # between two lines on progress where stderr is not a terminal


class Terminal:
    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._live: Progress | None = None

    def say(self, line: str) -> None:
        self.clear()
        self._console.print(line)

    def ask(self) -> str | None:
        """A line from stdin, None at its end."""
        if sys.stdin.isatty():
            self._console.print("> ", end="")
        try:
            return input()
        except EOFError:
            return None

    def clear(self) -> None:
        """Takes away the live line, before text appears."""
        if self._live:
            self._live.stop()
            self._live = None

    def meter(self, what: str, unit: str = "") -> Callable[[int, int], None]:
        """A `progress(done, total)` that shows how far `what` is and how long it will take; total 0: not known."""
        first: tuple[float, int] | None = None
        told = -math.inf

        def progress(done: int, total: int) -> None:
            nonlocal first, told
            amount = f"{done / 1e6:.0f}/{total / 1e6:.0f} MB" if unit == "B" else f"{done}/{total} {unit}"
            now = time.monotonic()
            first = first or (now, done)
            if self._console.is_terminal:
                self._show(what, amount, done, total)
            elif now - told >= EVERY_S and done < total:
                told = now
                rate = (done - first[1]) / (now - first[0]) if now > first[0] else 0
                self.say(f"{what}: {amount}" + (f", {(total - done) / rate:.0f} s left" if rate else ""))
            if total and done >= total:
                self.clear()
                first, told = None, -math.inf  # for the next time

        return progress

    def busy(self, what: str) -> None:
        """Says what is going on and cannot be measured."""
        if self._console.is_terminal:
            self._show(what, "", 0, 0)
        else:
            self.say(what)

    def compiling(self, program: str, seconds: float | None) -> None:
        """Says what is being compiled, as `stream` reports it."""
        if seconds is None:
            self.busy(f"compiling {program}")
        else:
            self.clear()

    def _show(self, what: str, amount: str, done: int, total: int) -> None:
        if self._live is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
            )
            self._live = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._live.add_task(what, amount=amount, total=None)
            self._live.start()
        self._live.update(self._live.task_ids[0], description=what, amount=amount, completed=done, total=total or None)
