"""How far a conversion is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Optional, TextIO


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


class Progress:
    def __init__(self, total: int, stream: Optional[TextIO] = None, quiet: bool = False):
        self._total = max(total, 1)
        self._done = 0
        self._began = time.monotonic()
        self._shown = self._began
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._tty = self._stream.isatty()
        self._lock = threading.Lock()
        self._width = 0

    def add(self, count: int, what: str) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._quiet or now - self._shown < (0.1 if self._tty else 5.0):
                return
            self._shown = now
            share = min(1.0, self._done / self._total)
            speed = self._done / max(now - self._began, 1e-6)
            rest = (self._total - self._done) / max(speed, 1.0)
            text = (
                f"{100 * share:3.0f} %  {size_text(self._done)} of {size_text(self._total)}, {size_text(speed)}/s, "
                f"{rest:.0f} s to go  {what}"
            )
            if self._tty:
                bar = "#" * int(24 * share)
                self._draw(f"[{bar:<24}] {text}"[:120])
            else:
                print(text, file=self._stream, flush=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            if self._quiet:
                return
            if self._tty:
                self._draw("")
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        with self._lock:
            if self._tty and not self._quiet:
                self._draw("")

    def _draw(self, text: str) -> None:
        print("\r" + text.ljust(self._width) + ("\r" if not text else ""), end="", file=self._stream, flush=True)
        self._width = len(text)
