"""Ranges that stand beside a struct's fields are checked in one way."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import numpy as np
import pytest
from msgspec import Meta

from specgen._base.ranges import check_ranges
from specgen.errors import InvalidRequest


class Options(msgspec.Struct, frozen=True, kw_only=True):
    count: Annotated[int, Meta(ge=1)] = 1
    some: Annotated[int, Meta(ge=0, le=9)] | None = None
    seconds: Annotated[float, Meta(gt=0)] = 1.0
    share: Annotated[float, Meta(ge=0, le=1)] | None = None
    flag: bool = False
    how: bool | Literal["late"] = False
    maybe: bool | None = None
    name: str = "its own business"

    def __post_init__(self) -> None:
        check_ranges(self, owner="of.")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 0, "of.count is 0; it must be a whole number, at least 1"),
        ("count", 1.0, "of.count is 1.0; it must be a whole number, at least 1"),
        ("count", True, "of.count is True; it must be a whole number, at least 1"),
        ("count", None, "of.count is None; it must be a whole number, at least 1"),
        ("some", 10, "of.some is 10; it must be a whole number, 0 to 9"),
        ("seconds", 0, "of.seconds is 0; it must be a finite number above 0"),
        ("seconds", math.inf, "of.seconds is inf; it must be a finite number above 0"),
        ("seconds", 10**400, "it must be a finite number above 0"),
        ("share", 1.5, "of.share is 1.5; it must be a finite number from 0 to 1"),
        ("share", "half", "of.share is 'half'; it must be a finite number from 0 to 1"),
        ("flag", 1, "of.flag is 1; choices: True, False"),
        ("how", "never", "of.how is 'never'; choices: True, False, 'late'"),
        ("maybe", 0, "of.maybe is 0; choices: True, False, None"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_may_be(field: str, value: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Options(**{field: value})  # type: ignore[arg-type]
    assert message in str(refused.value)
    assert refused.value.param == field


def test_what_fits_stays_and_numpys_numbers_become_pythons() -> None:
    made = Options(count=np.int64(3), some=9, seconds=np.float32(0.5), share=0, how="late", maybe=True)  # type: ignore[arg-type]
    assert made == Options(count=3, some=9, seconds=0.5, share=0, how="late", maybe=True)
    assert (type(made.count), type(made.seconds)) == (int, float)
