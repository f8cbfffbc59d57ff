"""Reading a drafter's options: whole numbers with a default and a range, unknown names refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specgen.errors import InvalidRequest, UnknownName


def read(drafter: str, options: Mapping[str, Any], known: Mapping[str, tuple[int, int, int]]) -> dict[str, int]:
    """The options with defaults filled in; `known` maps a name to (default, least, most).

    Raises UnknownName for a name that is not known, InvalidRequest for a value outside the range.
    """
    values = {name: default for name, (default, _, _) in known.items()}
    for name, value in options.items():
        if name not in known:
            raise UnknownName(f"option of drafter {drafter!r}:", name, known)
        _, least, most = known[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InvalidRequest(f"drafter {drafter!r}: {name} is {value!r}; it must be {least} to {most}", param=name)
        values[name] = value
    return values
