"""The ranges of options, written beside them (`Annotated[int, Meta(ge=1)]`), and the one way to check them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from specgen.errors import InvalidRequest

_NONE = type(None)


def check_ranges(options: msgspec.Struct, *, owner: str = "", param: str | None = None) -> None:
    """Check those fields of a frozen struct that are numbers, flags or choices against their types; other fields are
    the struct's own business. numpy's numbers become Python's.

    owner: what stands before a field's name in messages. param: the parameter that errors name; else the field.
    Raises InvalidRequest naming the field, its value and what it may be.
    """
    for name, allowed in _fields(type(options)).items():
        value = plain(getattr(options, name))
        if not allowed.takes(value):
            raise InvalidRequest(f"{owner}{name} is {value!r}; {allowed}", param=param or name)
        msgspec.structs.force_setattr(options, name, value)


def plain(value: object) -> Any:
    """numpy's and other numbers as Python's own; anything else as it is."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def is_finite(value: float) -> bool:
    """Whether a number is neither infinite nor NaN, nor too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True, slots=True)
class _Choices:
    values: tuple[object, ...]

    def takes(self, value: object) -> bool:
        # 1 is no True.
        return any(type(value) is type(choice) and value == choice for choice in self.values)

    def __str__(self) -> str:
        return f"choices: {', '.join(map(repr, self.values))}"


@dataclass(frozen=True, slots=True)
class _Number:
    """kind: int or float, which takes whole numbers too."""

    kind: type
    meta: Meta
    optional: bool

    def takes(self, value: object) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        low, high = self.meta.ge, self.meta.le
        return (
            is_finite(value)
            and (low is None or value >= low)
            and (self.meta.gt is None or value > self.meta.gt)
            and (high is None or value <= high)
        )

    def __str__(self) -> str:
        low, above, high = self.meta.ge, self.meta.gt, self.meta.le
        if self.kind is int:
            return f"it must be a whole number, {f'at least {low}' if high is None else f'{low} to {high}'}"
        bound = f"from {low:g}" if above is None else f"above {above:g}"
        return f"it must be a finite number {bound}{'' if high is None else f' to {high:g}'}"


@cache
def _fields(struct: type[msgspec.Struct]) -> dict[str, _Choices | _Number]:
    hints = get_type_hints(struct, include_extras=True)
    found = {name: _allowed(hints[name]) for name in struct.__struct_fields__}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def _allowed(hint: Any) -> _Choices | _Number | None:
    """What a type lets a field be; `None` for a type that is no number, flag or choice."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    numbers = [part for part in parts if get_origin(part) is Annotated and get_args(part)[0] in (int, float)]
    if numbers:
        kind, meta = get_args(numbers[0])[:2]
        return _Number(kind, meta, _NONE in parts)
    choices: list[object] = []
    for part in parts:
        if part is bool:
            choices += [True, False]
        elif get_origin(part) is Literal:
            choices += get_args(part)
        elif part is _NONE:
            choices.append(None)
        else:
            return None
    return _Choices(tuple(choices))
