"""Work under a time limit: what takes too long is told, keeps its place, and gives it back when it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from specgen._base.timed_threads import TimedThreads
from specgen.errors import Overloaded


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end, whatever happens."""
    found = threading.Event()
    yield found
    found.set()


def test_what_is_in_time_answers_or_raises_as_it_is() -> None:
    threads = TimedThreads("t", 30.0)
    assert threads.run(lambda: threading.current_thread().name) == "t"
    with pytest.raises(ZeroDivisionError):
        threads.run(lambda: 1 // 0)


def test_what_takes_too_long_keeps_its_place_until_it_ends(gate: threading.Event) -> None:
    threads = TimedThreads("t", 0.05, places=2)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            threads.run(gate.wait)
    with pytest.raises(Overloaded, match="2 others have taken too long"):
        threads.run(int)
    gate.set()
    while threads._running:
        threading.Event().wait(0.001)
    assert threads._late == 0
    assert TimedThreads.run(threads, lambda: 5) == 5


def test_one_who_waits_for_a_place_is_told_when_all_are_late(gate: threading.Event) -> None:
    """And does not wait its own time out."""
    threads = TimedThreads("t", 30.0, places=1)
    running = threading.Thread(target=lambda: threads.run(gate.wait))
    running.start()
    while not threads._running:
        threading.Event().wait(0.001)
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(threads.run(lambda: 7)))
    waiting.start()
    gate.set()
    waiting.join()
    running.join()
    assert answers == [7]
