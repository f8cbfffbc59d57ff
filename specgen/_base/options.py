"""Reading the options of a plugin's factory: what is declared is checked, what is not declared is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from specgen.errors import InvalidRequest, PluginError, SpecgenError, UnknownName

OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)
MadeT = TypeVar("MadeT")
FactoryT = TypeVar("FactoryT", bound=Callable[..., object])

_DECLARED = "specgen_options"


def takes_options(fields: type[msgspec.Struct]) -> Callable[[FactoryT], FactoryT]:
    """Declare the options of a drafter's factory, a function or a class, as the struct that it reads them with: an
    engine then checks them before it loads a model, and not only when it builds the drafter."""

    def declare(factory: FactoryT) -> FactoryT:
        setattr(factory, _DECLARED, fields)
        return factory

    return declare


def made(owner: str, options: Mapping[str, object], make: Callable[[], MadeT], *, param: str) -> MadeT:
    """What a plugin's factory makes of options. Raises InvalidRequest naming `owner` ("drafter 'echo'") where it
    refuses them by an error of Python's own, as for a keyword that it does not have; specgen's errors come through."""
    try:
        return make()
    except SpecgenError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{owner} refuses {dict(options)!r}: {error}", param=param) from error
    except Exception as error:  # a plugin's code may raise anything
        message = f"{owner} cannot be made of {dict(options)!r}: {type(error).__name__}: {error}"
        raise PluginError(message) from error


def declared_options(factory: Callable[..., object]) -> type[msgspec.Struct] | None:
    """What `takes_options` said of a factory; None where nothing is declared."""
    return getattr(factory, _DECLARED, None)


def read_options(owner: str, options: Mapping[str, object], fields: type[OptionsT]) -> OptionsT:
    """The options of `owner` ("drafter 'echo'"), as the struct `fields` declares them, ranges by `msgspec.Meta`.

    Raises UnknownName for an option that is not declared, InvalidRequest for a value that does not fit, and what the
    struct's own `__post_init__` raises of that kind.
    """
    for name in options:
        if name not in fields.__struct_fields__:
            raise UnknownName(f"option of {owner}:", name, fields.__struct_fields__, param=name)
    try:
        return msgspec.convert(dict(options), fields)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequest):
            raise error.__cause__ from None
        expected, _, place = str(error).partition(" - at `$.")
        name = place.removesuffix("`")
        given = options.get(name, dict(options))
        raise InvalidRequest(f"{owner}: {name} is {given!r}; {expected}", param=name) from None
