"""The drafter "eagle" from its options: the head says by itself whether it drafts level by level or all at once."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor

from specgen import DrafterSetup, InvalidRequest, pack_linears, read_options
from specgen_eagle.checkpoint import load_head
from specgen_eagle.context_vocab import lender
from specgen_eagle.drafter import Eagle, Halves
from specgen_eagle.options import EagleOptions
from specgen_eagle.parallel_drafter import ParallelEagle, ParallelHalves

_WIDTH, _PARALLEL_WIDTH = 10, 6


def eagle(setup: DrafterSetup) -> Eagle:
    """The factory. Raises InvalidRequest or DrafterMismatch for a head that cannot draft for the target, by name."""
    options = read_options("drafter 'eagle'", setup.options, EagleOptions)
    if setup.target is None:
        raise InvalidRequest("drafter 'eagle' needs the target's model, to share its embeddings", param="path")
    head = load_head(Path(options.path), setup.target)
    lending = lender(head, setup.target.get_output_embeddings())
    pack_linears(head)
    embeddings = cast(Tensor, setup.target.get_input_embeddings().weight)
    if head.config.parallel > 1:
        halves = ParallelHalves(head, embeddings, options.width or _PARALLEL_WIDTH, options.depth, lending)
        drafter: Eagle = ParallelEagle(halves, options.window)
    else:
        drafter = Eagle(Halves(head, embeddings, options.width or _WIDTH, lending), options.depth, options.window)
    drafter.halves.compile(setup.compile_rows)
    return drafter
