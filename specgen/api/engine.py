"""The Python API: an `Engine` around a model, and one-line helpers."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack, cast, overload

import torch
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from specgen._base.log import Log
from specgen._base.memory import promise
from specgen._base.options import made
from specgen._base.torch_state import plain_torch
from specgen.api.adapters import EngineAdapters
from specgen.api.prefix import EnginePrefix
from specgen.api.preflight import check_options
from specgen.config import EngineConfig, EngineOptions
from specgen.context.pipeline import ContextPipeline
from specgen.draft.drafter import Drafter, DrafterSetup, LoadedModel
from specgen.draft.features import Wanted
from specgen.engine.core import EngineCore
from specgen.engine.load import Counters, Load
from specgen.engine.request import PreparedRequest
from specgen.engine.request_builder import RequestBuilder, model_ends, with_options
from specgen.engine.response_cache import ResponseCache
from specgen.engine.stream import Stream, agather, gather
from specgen.engine.thread import EngineThread
from specgen.errors import ModelChanged, UnsupportedModel
from specgen.kv.offload.persistence import CacheOptions
from specgen.kv.pool import KVPool
from specgen.model.checks.architecture import context_limit
from specgen.model.forward.compiled import compile_rows
from specgen.model.kv_calibration import calibration_ids
from specgen.model.kv_size import context_of
from specgen.model.loading import check_device, check_model_options, dtype_of, load_model, load_tokenizer, located
from specgen.model.packed import PackedModel, pack_model
from specgen.model.runner import ModelRunner, open_pool, reuse_pool
from specgen.plugins.manager import Plugins, load_plugins
from specgen.sampling.constraint import Constraints, ConstraintSetup
from specgen.sampling.keywords import SamplingOptions
from specgen.sampling.params import SamplingParams, not_followed
from specgen.types import AnyTokenizer, Chat, Prompt, Prompts, Result

log = Log("specgen.engine")


class Engine:
    """A model that generates several tokens per forward, for many callers at once.

    Thread-safe: one thread of its own runs the model. Use it as a context manager, or `close()` it.

        engine = Engine.from_pretrained("path/to/model")
        result = engine.generate([{"role": "user", "content": "Hello"}], max_tokens=64)

    model: a loaded model, or a function that loads it, which is called when all options were found to be sound.
    `options` are the fields of `EngineConfig`, and `draft_model` for a smaller model; or give `config` instead.
    `adapters` loads, reloads and unloads LoRA adapters. `prefix` pins, saves and loads the prefix cache. `responses`
    has the response cache's `stats` and `clear()`.
    Raises UnsupportedModel, DrafterMismatch, PluginError or InvalidRequest when something does not fit.
    """

    @plain_torch()
    def __init__(
        self,
        model: PreTrainedModel | Callable[[], PreTrainedModel],
        tokenizer: AnyTokenizer | None = None,
        *,
        config: EngineConfig | None = None,
        plugins: Plugins | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.config = EngineConfig.chosen(config, options)
        self.plugins = plugins or load_plugins()
        check_options(self.config, self.plugins)
        pipeline = ContextPipeline.build(self.config.context, self.plugins.collect("context_stages"), tokenizer)
        # A module may be called too, and what PEFT and torch.compile wrap around a model is one.
        loads = callable(model) and not isinstance(model, torch.nn.Module)
        loaded = cast(PreTrainedModel, model() if loads else model)
        self.tokenizer = tokenizer
        self._model = loaded
        # Whether others hold the model, who may change it.
        self._shared = True
        promise(self, self.config.host_cache_bytes + self.config.response_cache_bytes)
        self._draft_targets: list[ModelRunner] = []
        packed = self._packed(self._model, batch_invariant=self._own_invariance())
        sizes = {"kv_tokens": self.config.kv_tokens, "max_context": self.config.max_context}
        pool = open_pool(packed, **sizes, calibration=calibration_ids(tokenizer))
        drafters = self._drafters(packed, pool)
        self._layers = Wanted.union(drafter.wanted for drafter in drafters.values()).layers
        self.target = self._target(packed, pool)
        self._core = EngineCore(
            self.target,
            drafters,
            max_num_seqs=self.config.max_num_seqs,
            max_prefill_tokens=self.config.max_prefill_tokens,
            inter_token_seconds=self.config.inter_token_seconds,
            prefix_cache=_cache_options(self.config),
            adapters=self.config.adapters,
        )
        self.responses = ResponseCache(self.config.response_cache_bytes, self.config.response_cache_seconds)
        self._runner = EngineThread(self._core, self.plugins, self.responses)
        self.adapters = EngineAdapters(self._core, self.config.adapters, self._draft_targets, self._runner)
        self._builder = self._request_builder(pipeline)
        if ignored := not_followed(loaded.generation_config):
            log.warning("the model's generation config is not followed in all it says", ignored=ignored)
        self.prefix = EnginePrefix(self._core, self._runner, self._builder)
        # The collector may come by on any thread, with any lock held: it waits for nobody. At the end of the program
        # the runner ends by itself.
        weakref.finalize(self, self._runner.close, wait=0).atexit = False

    @classmethod
    @plain_torch()
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: str | torch.dtype | None = "auto",
        device: str | torch.device | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        gguf_file: str | None = None,
        model_options: Mapping[str, object] | None = None,
        config: EngineConfig | None = None,
        plugins: Plugins | None = None,
        **options: Unpack[EngineOptions],
    ) -> Engine:
        """Load a model and its tokenizer and wrap them. What is wrong with an option is told before weights are read.

        model: a folder, a name, or the path of a GGUF file, which brings its tokenizer. gguf_file: the name of such a
        file in the folder or repository `model`.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or a torch dtype.
        device: where to put it; an accelerator if there is one.
        quantization_config: transformers' own, such as `TorchAoConfig`: how the weights are quantised while loading.
        model_options: anything else for transformers' `from_pretrained`. Code that comes with a model runs only with
        `trust_remote_code=True` among them.
        """
        check_model_options(model_options or {})
        own = {"quantization_config": quantization_config, "gguf_file": gguf_file}
        chosen = {name: value for name, value in own.items() if value is not None} | dict(model_options or {})
        config = EngineConfig.chosen(config, options)
        dtype_of(dtype)
        check_device(device)
        located(model, chosen)
        load = partial(load_model, model, dtype=dtype, device=device, **chosen)
        engine = cls(load, load_tokenizer(model, **chosen), config=config, plugins=plugins)
        engine._shared = False
        return engine

    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Result: ...
    @overload
    def generate(
        self, prompt: Prompts, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> list[Result]: ...
    def generate(
        self, prompt: Prompt | Prompts, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Result | list[Result]:
        """Continue one prompt, or many at once, and wait for the end.

        prompt: text, a list of messages (`{"role": ..., "content": ...}`), a list of token ids, or a list of those.
        options: the fields of `SamplingParams`; or give `params` instead.
        Returns a `Result` for one prompt and a list of them for several; with n > 1 a list of n for each prompt.
        Raises InvalidRequest before anything runs. If a sequence fails on the way the others are cancelled at once, and
        what a processor or criterion of the request raised is raised as it is, anything else as RequestFailed.
        Raises WouldDeadlock on the engine's own thread, as do `stream` and `start`.
        """
        streams, shape = self._submitted(prompt, params, options)
        try:
            return shape(gather(streams))
        finally:
            _cancel(streams)

    @overload
    async def agenerate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Result: ...
    @overload
    async def agenerate(
        self, prompt: Prompts, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> list[Result]: ...
    async def agenerate(
        self, prompt: Prompt | Prompts, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Result | list[Result]:
        """`generate` for asyncio: the same answers. Prompts are tokenised on another thread, so that the loop goes on;
        where the task is cancelled its requests are too."""
        streams, shape = await asyncio.to_thread(self._submitted, prompt, params, options)
        try:
            return shape(await agather(streams))
        finally:
            _cancel(streams)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Stream:
        """Continue one prompt and hand out what each step adds: iterate over it with `for` or `async for`."""
        self._follow()
        params = with_options(params, options)
        (stream,) = self._runner.submit(self._builder.build(prompt, params, copies=False))
        # An engine that only its stream holds must not be closed by the collector before the stream ends.
        stream.owner = self
        return stream

    def prepare(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> PreparedRequest:
        """Check and tokenise one prompt without running it; `start` runs it. For servers, whose event loop must not
        wait for a chat template, and who look at a prompt's length first."""
        self._runner.check_process()
        return self._builder.build(prompt, with_options(params, options), copies=False)

    def warm(self) -> None:
        """Build now what the first constrained request would have built, while every thread waits."""
        self._builder.constraints.warm()

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt has behind the context stages."""
        return list(self._builder.encode(prompt))

    def start(self, *prepared: PreparedRequest) -> list[Stream]:
        """Run what was prepared, all in time for the same step, each once; a stream for each, as from `stream`."""
        self._follow()
        return self._runner.submit(*prepared)

    def is_waiting(self, request_id: str) -> bool:
        """Whether a request is queued and none of it has run, as the engine's thread sees it between two steps."""
        return self._runner.call(lambda: self._core.is_waiting(request_id))

    @property
    def model(self) -> PreTrainedModel:
        """The caller's model, as it was given."""
        self._shared = True
        return self._model

    def refresh(self) -> None:
        """Take the model as it is now: repack its weights, check it as at load, forget what prefix and response cache
        hold, release pins. Requests that still run end with ModelChanged. Loaded adapters stay.

        An engine does so by itself before a request when it sees that the model changed and nothing runs.
        Raises UnsupportedModel where it cannot serve the model any more; then it serves nobody until it can.
        """
        self._runner.call(lambda: self._renew("refresh() was called", ending=True))

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, None while all is well; an engine that has one serves nobody any more."""
        return self._runner.failure

    @property
    def failed_steps(self) -> int:
        """How many steps have failed in a row, the last one included."""
        return self._runner.failed_steps

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        return self._core.load

    @property
    def counters(self) -> Counters:
        """What the engine has done so far, in counts."""
        return self._core.counters

    @property
    def context_length(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        return self.target.context_length

    def check(self) -> None:
        """Wait for the running step and raise RuntimeError if pages, leases or sessions are held by nobody."""
        self._runner.call(self._core.check)

    def close(self) -> None:
        """Cancel what runs and end the engine's thread, waiting for the step that is running; on that thread itself it
        ends behind the step. The model is left as it was."""
        self._runner.close()
        if not self._runner.is_here:
            for target in (self.target, *self._draft_targets):
                target.close()

    def __repr__(self) -> str:
        target, load = self.target, self.load
        kv = f"{target.pool.capacity} tokens of {target.pool.kind.name} KV"
        where = f"{str(target.architecture.dtype).removeprefix('torch.')} on {target.device}"
        return f"<Engine {type(self._model).__name__}, {where}, {kv}, {load.running} running, {load.waiting} waiting>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submitted(
        self, prompt: Prompt | Prompts, params: SamplingParams | None, options: SamplingOptions
    ) -> tuple[list[Stream], Callable[[list[list[Result]]], Result | list[Result]]]:
        """The streams of one prompt or of several, and how their results are returned."""
        self._follow()
        params = with_options(params, options)
        many = _is_batch(prompt)
        prompts = list(cast("list[Prompt]", prompt)) if many else [cast("Prompt", prompt)]
        built = [self._builder.build(one, params, copies=len(prompts) > 1) for one in prompts]

        def shape(found: list[list[Result]]) -> Result | list[Result]:
            each = [results if params.n > 1 else results[0] for results in found]
            return cast("Result | list[Result]", each if many else each[0])

        return self._runner.submit(*built), shape

    def _follow(self) -> None:
        """Look whether the model is what it was, before a request. Raises as `refresh`, and ModelChanged."""
        self._runner.check_process()
        if self._shared and self.target.change() is not None:
            self._runner.call(self._catch_up)

    def _catch_up(self) -> None:
        # Another thread's request may have been first.
        if (change := self.target.change()) is not None:
            self._renew(f"{change} of the model changed", ending=False)

    def _renew(self, why: str, *, ending: bool) -> None:
        """A new target over the pool of the old one. On the engine's thread."""
        if self._core.busy and not ending:
            told = "while requests run under what it was; wait for them, or call engine.refresh(), which ends them"
            raise ModelChanged(f"{why} {told}")
        self._runner.end_all(ModelChanged(f"{why} while this request ran"))
        old = self.target
        packed = self._packed(self._model, batch_invariant=self._own_invariance())
        fresh = self._target(packed, reuse_pool(packed, old.pool, calibration_ids(self.tokenizer)))
        if (fresh.vocab_size, fresh.context_length) != (old.vocab_size, old.context_length):
            sizes = f"{fresh.vocab_size} tokens of vocabulary and {fresh.context_length} of context"
            was = f"{old.vocab_size} and {old.context_length}"
            raise UnsupportedModel(f"the model has {sizes} now, and had {was}; make a new engine")
        self._core.retarget(fresh)
        self.target = fresh
        self.responses.clear()

    def _request_builder(self, pipeline: ContextPipeline) -> RequestBuilder:
        vocab_size, tokenizer = self.target.vocab_size, self.tokenizer
        ends = model_ends(self._model.generation_config, tokenizer, vocab_size)
        setup = ConstraintSetup(tokenizer, vocab_size, ends)
        return RequestBuilder(
            tokenizer=tokenizer,
            model=self._model,
            vocab_size=vocab_size,
            context_length=self.target.context_length,
            device=self.target.device,
            pipeline=pipeline,
            drafters=tuple(self.config.drafters),
            plugin_processors=self.plugins.collect("logits_processors"),
            constraints=Constraints(self.plugins.collect("constraints"), setup, self.config.constraint_seconds),
            adapter_named=self.adapters.named,
            speculation=self.config.speculation,
        )

    def _drafters(self, target: PackedModel, pool: KVPool) -> dict[str, Drafter]:
        offered = self.plugins.collect("drafters")
        load = partial(self._load_draft_model, target, pool)
        setup = DrafterSetup(target.vocab_size, self.tokenizer, load_model=load, target=target.model)
        if self.config.compile is True and target.no_compiled is None:
            setup = replace(setup, compile_rows=compile_rows)
        built = {}
        for name, options in self.config.drafters.items():
            make = partial(offered[name], replace(setup, options=options))
            built[name] = made(f"drafter {name!r}", options, make, param="drafters")
        return built

    def _load_draft_model(self, target: PackedModel, pool: KVPool, source: str | Path | PreTrainedModel) -> LoadedModel:
        tokenizer = load_tokenizer(source)
        if not isinstance(source, PreTrainedModel):
            source = load_model(source, dtype=target.model.dtype, device=target.device)
        longest = context_of(pool.capacity, limit=context_limit(target.model), max_context=self.config.max_context)
        context = min(longest, context_limit(source) or longest)
        # What a drafter rounds changes no text.
        packed = self._packed(source, batch_invariant=False)
        own = open_pool(packed, kv_tokens=pool.capacity, max_context=context, calibration=calibration_ids(tokenizer))
        drafter = ModelRunner(
            packed, own, max_context=context, compile=self.config.compile, graphs=self.config.gpu_graphs
        )
        self._draft_targets.append(drafter)
        return LoadedModel(drafter, tokenizer)

    def _own_invariance(self) -> bool | None:
        # Not by itself where the forward is exchanged on the way.
        return False if self.config.compile == "background" else self.config.batch_invariant

    def _packed(self, model: PreTrainedModel, *, batch_invariant: bool | None) -> PackedModel:
        return pack_model(
            model,
            kv_format=self.plugins.collect("kv_formats")[self.config.kv_format](),
            batch_invariant=batch_invariant,
            cpu_kernels=self.config.cpu_kernels,
            gpu_kernels=self.config.gpu_kernels,
        )

    def _target(self, packed: PackedModel, pool: KVPool) -> ModelRunner:
        return ModelRunner(
            packed,
            pool,
            max_context=self.config.max_context,
            layers=self._layers,
            compile=self.config.compile,
            graphs=self.config.gpu_graphs,
        )


def _cache_options(config: EngineConfig) -> CacheOptions | None:
    if not config.prefix_cache:
        return None
    return CacheOptions(config.prefix_cache_bytes, config.host_cache_bytes, config.disk_cache, config.disk_cache_bytes)


def wrap(model: PreTrainedModel, tokenizer: AnyTokenizer | None = None, **options: Unpack[EngineOptions]) -> Engine:
    """An engine around a model that is loaded already. `options` as in `Engine`. The model stays the caller's: where it
    was changed, by a training for instance, the next request finds the engine refreshed; see `Engine.refresh`."""
    return Engine(model, tokenizer, **options)


def _is_batch(prompt: Prompt | Prompts) -> bool:
    """Whether it is a list or tuple of prompts: its items are texts, lists or chats."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple | Chat)


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()
