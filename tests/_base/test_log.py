"""An event that cannot be written costs nothing but itself."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from specgen._base.log import Log


@pytest.fixture(params=[OSError(28, "no space left"), TypeError("an option of rich that is not there")], ids=repr)
def raised(request: pytest.FixtureRequest) -> Iterator[Exception]:
    """What a processor of the application's raises."""

    def process(*_: Any) -> Any:
        raise request.param

    structlog.configure(processors=[process])
    yield request.param
    structlog.reset_defaults()


def test_who_logs_goes_on_and_stderr_is_told(raised: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    Log("specgen.here").exception("a file cannot be read", file="x")
    assert capsys.readouterr().err == f"specgen.here: the event 'a file cannot be read' cannot be logged: {raised!r}\n"


@pytest.mark.usefixtures("raised")
@pytest.mark.parametrize("closed", [True, False])
def test_who_logs_goes_on_without_stderr_too(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr if closed else None)
    Log("specgen.here").warning("a file cannot be read")
