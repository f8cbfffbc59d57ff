"""`specgen generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from specgen.cli import options
from specgen.cli.acceptance_summary import Tally, report
from specgen.cli.loading import has_chat_template, open_engine
from specgen.cli.terminal import note, write

if TYPE_CHECKING:
    from specgen.engine.stream import Stream
    from specgen.types import Prompt, Result

_ADAPTER = "adapter"


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt, or - to read it from stdin.")],
    model: options.Model = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Through the chat template or as it is. Default: if there is one."),
    ] = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    speculation: options.Speculation = "auto",
    draft_model: options.DraftModel = None,
    drafters: options.Drafters = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    max_context: options.MaxContext = None,
    kv_tokens: options.KVTokens = None,
    gguf_file: options.GgufFile = None,
    adapter: options.Adapter = None,
    any_base: options.AnyBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, at the end.")] = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes, the figures to stderr."""
    params = options.sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
        speculation=speculation,
        adapter=adapter and _ADAPTER,
    )
    if adapter is not None:
        _check_adapter(adapter)
    text, tally = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt, Tally()
    with open_engine(
        model,
        dtype=dtype,
        device=device,
        draft_model=draft_model,
        drafters=drafters,
        max_context=max_context,
        kv_tokens=kv_tokens,
        gguf_file=gguf_file,
        params=params,
    ) as engine:
        if adapter is not None:
            engine.adapters.load(_ADAPTER, adapter, any_base=any_base)
        as_chat = has_chat_template(engine) if chat is None else chat
        asked: Prompt = [{"role": "user", "content": text}] if as_chat else text
        with tally.timing(), engine.stream(asked, params) as stream:
            result = stream.results()[0] if as_json else _written(stream)
    tally.add(result)
    _finish(result, tally, as_json=as_json)


def _check_adapter(path: str) -> None:
    """Raise AdapterRefused, before a model is loaded, for a folder that holds no adapter."""
    from specgen.lora.peft_files import check_folder

    check_folder(path)


def _written(stream: Stream) -> Result:
    for output in stream:
        write(output.text, end="")
    write("")
    return stream.results()[0]


def _finish(result: Result, tally: Tally, *, as_json: bool) -> None:
    if not as_json:
        return note(f"{tally}; finish: {result.finish_reason}; seed: {result.seed}")
    import msgspec

    write(msgspec.json.format(msgspec.json.encode(report(result, tally)), indent=2).decode())
