"""What of a JSON Schema llguidance does not keep exactly: it reads numbers as float64 and counts a repeated name twice.

Bounds are moved inward to what it can hold, so that no text breaks the schema; what cannot be mended is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from specgen import InvalidRequest

_EXACT = 2**53
"""Up to it every whole number is a float64."""
_LARGEST = 2**63 - 1024
"""The largest float64 that is an int64."""
_UPPER = ("maximum", "exclusiveMaximum")
_LOWER = ("minimum", "exclusiveMinimum")
_VALUES = ("const", "enum", "multipleOf")
_ANNOTATIONS = ("default", "examples", "example", "x-guidance")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that hold schemas by name: their keys are no keywords."""


def kept_exactly(schema: Any) -> Any:
    """The schema with bounds that are exact. Raises InvalidRequest for what cannot be kept; changes nothing."""
    if isinstance(schema, list):
        return [kept_exactly(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    _refuse_free_names(schema)
    return {key: _keyword(key, value) for key, value in schema.items()}


def _keyword(key: str, value: Any) -> Any:
    if key in _ANNOTATIONS:
        return value
    if key in _VALUES:
        _refuse_inexact(key, value)
        return value
    if key in (*_UPPER, *_LOWER):
        return _inward(key, value) if _is_number(value) and abs(value) > _EXACT else value
    if key in _NAMED and isinstance(value, Mapping):
        return {name: kept_exactly(each) for name, each in value.items()}
    return kept_exactly(value)


def _refuse_inexact(key: str, value: Any) -> None:
    if isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            _refuse_inexact(key, each)
    elif isinstance(value, int) and abs(value) > _EXACT:
        raise InvalidRequest(
            f"json_schema: {key} holds {_short(value)}; whole numbers beyond 2**53 are not kept exactly"
        )


def _inward(key: str, bound: float) -> int:
    """The nearest bound that float64 and int64 hold and that lets nothing more through."""
    sign = 1 if key in _UPPER else -1
    if sign * bound < -_LARGEST:
        raise InvalidRequest(f"json_schema: {key} is {_short(bound)}; it must be within 64 bits")
    most = min(sign * bound, _LARGEST)
    near = float(most)
    return sign * int(near if near <= most else math.nextafter(near, -math.inf))


def _refuse_free_names(schema: Mapping[str, Any]) -> None:
    """Where names are free one may come twice, which counts for two."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    names = len(set(map(str, required))) if isinstance(required, list) else 0
    free = schema.get("additionalProperties") is not False or schema.get("patternProperties")
    if free and _is_number(least) and least > max(1, names):
        raise InvalidRequest(
            f"json_schema: minProperties {least} cannot be kept where names are free; "
            "name as many in `required`, or all in `properties` with additionalProperties false"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: float) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
