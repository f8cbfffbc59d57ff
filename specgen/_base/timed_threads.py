"""Work under a time limit, on threads of its own.

A thread cannot be killed: one that takes too long keeps its place until it ends, and there are only so many places.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar

from specgen.errors import Overloaded

T = TypeVar("T")


class TimedThreads:
    """Runs functions for at most `seconds` each, `places` of them at once. Any thread may ask."""

    def __init__(self, name: str, seconds: float, places: int | None = None) -> None:
        self.seconds = seconds
        # What runs on and on takes no more than half of a machine that has several.
        self.places = places or max(2, min(4, (os.cpu_count() or 1) // 2))
        self._name = name
        self._changed = threading.Condition()
        self._running = 0
        self._late = 0

    def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises. Raises TimeoutError once it has taken too long, and Overloaded where all
        places are taken by what has taken too long, or none is free in time."""
        self._take_place()
        answer: Future[T] = Future()
        context = copy_context()
        work = threading.Thread(target=context.run, args=(self._work, function, answer), name=self._name, daemon=True)
        try:
            work.start()
        except RuntimeError:  # the system has no thread left
            self._leave_place()
            raise Overloaded(f"no thread can be started for {self._name}") from None
        try:
            return answer.result(self.seconds)
        except TimeoutError:
            with self._changed:
                if not answer.done():
                    self._late += 1
                    answer.add_done_callback(self._forgive)
                    self._changed.notify_all()
            if answer.done():
                return answer.result()
            raise

    def _take_place(self) -> None:
        deadline = time.monotonic() + self.seconds
        with self._changed:
            while self._running >= self.places:
                left = deadline - time.monotonic()
                if self._late >= self.places or not self._changed.wait(max(0.0, left)):
                    raise Overloaded(f"{self._running} others have taken too long in {self._name} and still run")
            self._running += 1

    def _work(self, function: Callable[[], T], answer: Future[T]) -> None:
        try:
            answer.set_result(function())
        except BaseException as error:  # it is the asker's
            answer.set_exception(error)
        finally:
            self._leave_place()

    def _leave_place(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def _forgive(self, _: Future[Any]) -> None:
        with self._changed:
            self._late -= 1
