"""The options that commands share, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from specgen.sampling.params import SamplingParams

Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="PATH", help="Model folder or name. Default: the demo model.")
]
DraftModel = Annotated[str | None, typer.Option(metavar="PATH", help="A smaller model that drafts.")]
Drafters = Annotated[
    str | None, typer.Option(metavar="A,B", help="Drafters, merged into one tree. Default: the engine's.")
]
Speculation = Annotated[str, typer.Option(metavar="auto|off|JSON", help="How to draft; the text stays the same.")]
Dtype = Annotated[
    str, typer.Option(metavar="NAME", help="auto (the checkpoint's), float32, bfloat16, float16 or float64.")
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where to run. Default: the accelerator if there is one.")
]
GgufFile = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of a GGUF file in the folder or repository that is the model.")
]
MaxContext = Annotated[
    int | None, typer.Option(metavar="N", help="Most tokens of a text with its prompt. Default: the model's own limit.")
]
KVTokens = Annotated[
    int | None,
    typer.Option("--kv-tokens", metavar="N", help="Tokens of the KV pool. Default: a quarter of available memory."),
]
KVFormatName = Annotated[
    str | None, typer.Option("--kv-format", metavar="NAME", help="How keys and values are kept. Default: native.")
]
Adapter = Annotated[str | None, typer.Option(metavar="PATH", help="The folder of a LoRA adapter to run under.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Take an adapter that was made for a model of another name.")]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Most new tokens.")]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="0 is greedy. Default: what the model's own config says.")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Keep the likeliest tokens of this total probability.")
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help="Keep this many of the likeliest tokens.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help="Drop tokens below this share of the likeliest one's probability."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable, whatever drafts.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text. May be given several times.")
]


def drafter_list(text: str | None) -> list[str] | None:
    """`a,b` as names."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def sampling(*, speculation: str, stop: list[str] | None, **options: object) -> SamplingParams:
    """`SamplingParams` from what the user wrote. Raises InvalidRequest, before a model is loaded."""
    from specgen.sampling.params import SamplingParams

    return SamplingParams.of({**options, "stop": stop or [], "speculation": read_speculation(speculation)})


def read_speculation(text: str) -> str | Mapping[str, object]:
    """`auto` and `off` as they are, anything else as a JSON object."""
    import msgspec

    from specgen.errors import InvalidRequest

    if not text.lstrip().startswith("{"):
        return text
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"speculation is {text!r}, which is not JSON: {error}", param="speculation") from None
