"""What some KV formats need to know of a model's keys before the first is written: their mean over a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from specgen.kv.pool import KVPool
from specgen.model.cache_keyword import cache_of
from specgen.model.checks.architecture import Architecture, context_limit
from specgen.types import AnyTokenizer

_TEXT = """The harbour lies quiet in the early morning. Boats that left at three are coming back, and the first \
lorries wait by the market hall. "How much did you get?" asks the woman with the ledger. About 240 kilos, mostly \
herring; the rest is cod. She writes it down, multiplies 240 by 3.20 and says: 768, minus fees. In the office a \
clerk types the numbers into a table: {"date": "2021-05-14", "boat": "Margit", "kilos": 240}. Later in the day a \
programme adds them:

def total(rows):
    return sum(row["kilos"] for row in rows if row["kilos"] > 0)

Scientists have looked at such records for a hundred years. They found that the stock follows the temperature of the \
water with a delay of about four years, because young fish need that long to grow. Therefore the law limits the catch: \
first by size, secondly by season, and finally by boat. Is that fair? Opinions differ. Some argue that small towns \
cannot live on 1,500 tonnes a year; others say there will be nothing left unless everyone holds back. Once upon a time \
the sea seemed endless. My grandfather used to tell us how he could walk across the bay on the backs of the fish, and \
we believed him. Please remember three things: check the weather, bring warm clothes, and never go out alone."""
_RANDOM_IDS = 256


def calibration_ids(tokenizer: AnyTokenizer | None) -> Sequence[int]:
    """The ids of a text of many kinds, or none without a tokenizer."""
    return tokenizer.encode(_TEXT) if tokenizer is not None else ()


@torch.inference_mode()
def centre_keys(pool: KVPool, model: PreTrainedModel, ids: Sequence[int], architecture: Architecture) -> None:
    """Tell each layer's store the mean key over `ids`, or over ids from all over the vocabulary if there are none."""
    if not ids:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(architecture.vocab_size, (_RANDOM_IDS,), generator=generator).tolist()
    ids = ids[: context_limit(model)]
    output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
    for layer, store in zip(cache_of(output).layers, architecture.stores, strict=True):
        if store is not None and layer.keys is not None:
            pool.layers[store].centre(layer.keys[0].float().mean(dim=1))
