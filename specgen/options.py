"""Reading the options of a plugin's factory: what is declared is checked, what is not declared is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from specgen.errors import InvalidRequest, UnknownName

OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)


def read_options(owner: str, options: Mapping[str, Any], fields: type[OptionsT]) -> OptionsT:
    """The options of `owner` ("drafter 'echo'"), as the struct `fields` declares them, ranges by `msgspec.Meta`.

    Raises UnknownName for an option that is not declared, InvalidRequest for a value that does not fit.
    """
    for name in options:
        if name not in fields.__struct_fields__:
            raise UnknownName(f"option of {owner}:", name, fields.__struct_fields__, param=name)
    try:
        return msgspec.convert(dict(options), fields)
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at `$.")
        name = place.removesuffix("`")
        given = options.get(name, dict(options))
        raise InvalidRequest(f"{owner}: {name} is {given!r}; {expected}", param=name) from None
