"""The drafter "eagle" from its options: the head says by itself whether it drafts level by level or all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from specgen import DrafterSetup, InvalidRequest, pack_linears, read_options
from specgen_eagle.borrowed import lender
from specgen_eagle.checkpoint import load_head
from specgen_eagle.drafter import WINDOW, Eagle, Halves
from specgen_eagle.parallel_drafter import ParallelEagle, ParallelHalves

_WIDTH, _PARALLEL_WIDTH = 10, 6


class EagleOptions(msgspec.Struct, frozen=True):
    """path: folder of the head, required. depth of the tree; of a parallel head at most its own. width: nodes grown per
    depth, and children of each; by default 10, of a parallel head 6, as it grows them whether or not they are wanted.
    window: entries of a text, the last ones, that the head reads when it is first asked, or asked again after long."""

    path: Any = None
    depth: Annotated[int, msgspec.Meta(ge=1, le=16)] = 8
    width: Annotated[int, msgspec.Meta(ge=1, le=16)] | None = None
    window: Annotated[int, msgspec.Meta(ge=64)] = WINDOW


def eagle(setup: DrafterSetup) -> Eagle:
    """The factory. Raises InvalidRequest or DrafterMismatch for a head that cannot draft for the target, by name."""
    options = read_options("drafter 'eagle'", setup.options, EagleOptions)
    if options.path is None:
        raise InvalidRequest("drafter 'eagle' needs the option path: the folder of a head", param="path")
    if setup.target is None:
        raise InvalidRequest("drafter 'eagle' needs the target's model, to share its embeddings", param="path")
    head = load_head(Path(options.path), setup.target)
    lending = lender(head, setup.target.get_output_embeddings())
    pack_linears(head)
    embeddings = setup.target.get_input_embeddings().weight
    if head.config.parallel > 1:
        halves = ParallelHalves(head, embeddings, options.width or _PARALLEL_WIDTH, options.depth, lending)
        drafter: Eagle = ParallelEagle(halves, options.window)
    else:
        drafter = Eagle(Halves(head, embeddings, options.width or _WIDTH, lending), options.depth, options.window)
    drafter.halves.compile(setup.compile_rows)
    return drafter
