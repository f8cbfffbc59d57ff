"""The options of the drafter "eagle", apart from what drafts: they are read before a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from specgen import InvalidRequest

WINDOW = 256


class EagleOptions(msgspec.Struct, frozen=True):
    """path: folder of the head, required. depth of the tree; of a parallel head at most its own. width: nodes grown per
    depth, and children of each; by default 10, of a parallel head 6, as it grows them whether or not they are wanted.
    window: entries of a text, the last ones, that the head reads when it is first asked, or asked again after long."""

    path: Any = None
    depth: Annotated[int, msgspec.Meta(ge=1, le=16)] = 8
    width: Annotated[int, msgspec.Meta(ge=1, le=16)] | None = None
    window: Annotated[int, msgspec.Meta(ge=64)] = WINDOW

    def __post_init__(self) -> None:
        if self.path is None:
            raise InvalidRequest("drafter 'eagle' needs the option path: the folder of a head", param="path")
        if not (Path(self.path) / "config.json").is_file():
            raise InvalidRequest(f"{self.path} holds no head: there is no config.json", param="path")
