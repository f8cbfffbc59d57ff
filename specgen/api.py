"""The Python API: an `Engine` around a model, and one-line helpers."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from specgen.adapters import EngineAdapters
from specgen.config import EngineConfig
from specgen.constraint import Constraints, ConstraintSetup
from specgen.context.pipeline import ContextPipeline
from specgen.draft.drafter import Drafter, DrafterSetup
from specgen.engine import Counters, EngineCore, Load
from specgen.errors import UnknownName
from specgen.kv.stored import CacheOptions
from specgen.log import Log
from specgen.model.calibration import calibration_ids
from specgen.model.compiled import compile_rows
from specgen.model.loading import load_model, load_tokenizer
from specgen.model.target import Target
from specgen.params import SamplingParams, not_followed
from specgen.plugins import Plugins, load_plugins
from specgen.prefixes import EnginePrefix
from specgen.requests import Prepared, RequestBuilder, model_ends, with_options
from specgen.response_cache import ResponseCache
from specgen.runner import Runner
from specgen.stream import Stream, gather
from specgen.torch_state import plain_torch
from specgen.types import Prompt, Result

log = Log("specgen.engine")


class Engine:
    """A model that generates several tokens per forward, for many callers at once.

    Thread-safe: one thread of its own runs the model. Use it as a context manager, or `close()` it.

        engine = Engine.from_pretrained("path/to/model")
        result = engine.generate([{"role": "user", "content": "Hello"}], max_tokens=64)

    `options` are the fields of `EngineConfig`, and `draft_model` for a smaller model; or give `config` instead.
    `adapters` loads, reloads and unloads LoRA adapters. `prefix` pins, saves and loads the prefix cache. `responses`
    has the response cache's `stats` and `clear()`.
    Raises UnsupportedModel, DrafterMismatch, PluginError or InvalidRequest when something does not fit.
    """

    @plain_torch()
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        config: EngineConfig | None = None,
        plugins: Plugins | None = None,
        **options: Any,
    ) -> None:
        self.config = EngineConfig.chosen(config, options)
        self.plugins = plugins or load_plugins()
        self.tokenizer = tokenizer
        self.model = model
        self._draft_targets: list[Target] = []
        self.target = self._target(model, tokenizer, self.config.kv_tokens, self._invariant())
        self._core = EngineCore(
            self.target,
            self._drafters(),
            max_running=self.config.max_running,
            max_prompt_rows=self.config.max_prompt_rows,
            prefix_cache=_cache_options(self.config),
            compile=self.config.compile,
            adapters=self.config.adapters,
        )
        self.responses = ResponseCache(self.config.response_cache_bytes, self.config.response_cache_seconds)
        self._runner = Runner(self._core, self.plugins, self.responses)
        self.adapters = EngineAdapters(self._core, self.config.adapters, self._draft_targets, self._runner)
        self._builder = RequestBuilder(
            tokenizer,
            model.generation_config,
            self.target.vocab_size,
            self.target.context_length,
            self.target.device,
            ContextPipeline.build(self.config.context, self.plugins.collect("context_stages"), tokenizer),
            self._core.drafting,
            self.plugins.collect("logits_processors"),
            Constraints(
                self.plugins.collect("constraints"),
                ConstraintSetup(tokenizer, self.target.vocab_size, model_ends(model.generation_config, tokenizer)),
            ),
            self.adapters.named,
            self.config.speculation,
        )
        self._core.drafting.check_names(self.config.speculation)
        if ignored := not_followed(model.generation_config):
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
        quantization_config: Any = None,
        model_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Engine:
        """Load a model and its tokenizer and wrap them.

        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or a torch dtype.
        device: where to put it; an accelerator if there is one.
        quantization_config: transformers' own, such as `TorchAoConfig`: how the weights are quantised while loading.
        model_options: anything else for transformers' `from_pretrained`. Code that comes with a model runs only with
        `trust_remote_code=True` among them.
        """
        chosen = {} if quantization_config is None else {"quantization_config": quantization_config}
        chosen |= model_options or {}
        loaded = load_model(model, dtype=dtype, device=device, **chosen)
        return cls(loaded, load_tokenizer(model, trust_remote_code=bool(chosen.get("trust_remote_code"))), **options)

    def generate(self, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Any:
        """Continue one prompt, or many at once, and wait for the end.

        prompt: text, a list of messages (`{"role": ..., "content": ...}`), a list of token ids, or a list of those.
        options: the fields of `SamplingParams`; or give `params` instead.
        Returns a `Result` for one prompt and a list of them for several; with n > 1 a list of n for each prompt.
        Raises InvalidRequest before anything runs. If a sequence fails on the way the others are cancelled at once, and
        what a processor or criterion of the request raised is raised as it is, anything else as RequestFailed.
        Raises WouldDeadlock on the engine's own thread, as do `stream` and `start`.
        """
        self._runner.check_process()
        params = with_options(params, options)
        many = _is_batch(prompt)
        prompts = list(prompt) if many else [prompt]
        built = [self._builder.build(one, params, copies=len(prompts) > 1) for one in prompts]
        streams = self._runner.submit(*built)
        try:
            results = gather(streams)
        finally:
            for stream in streams:
                stream.cancel()
        each: list[Any] = [found if params.n > 1 else found[0] for found in results]
        return each if many else each[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Stream:
        """Continue one prompt and hand out what each step adds: iterate over it with `for` or `async for`."""
        self._runner.check_process()
        params = with_options(params, options)
        (stream,) = self._runner.submit(self._builder.build(prompt, params, copies=False))
        # An engine that only its stream holds must not be closed by the collector before the stream ends.
        stream.owner = self
        return stream

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Prepared:
        """Check and tokenise one prompt without running it; `start` runs it. For servers, whose event loop must not
        wait for a chat template, and who look at a prompt's length first."""
        self._runner.check_process()
        return self._builder.build(prompt, with_options(params, options), copies=False)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt has behind the context stages."""
        return list(self._builder.encode(prompt))

    def start(self, *prepared: Prepared) -> list[Stream]:
        """Run what was prepared, all in time for the same step, each once; a stream for each, as from `stream`."""
        return self._runner.submit(*prepared)

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

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _drafters(self) -> dict[str, Drafter]:
        offered = self.plugins.collect("drafters")
        setup = DrafterSetup(
            self.target.vocab_size, self.tokenizer, load_model=self._load_draft_model, target=self.target.model
        )
        if self.config.compile is True and self.target.why_not_compiled() is None:
            setup = replace(setup, compile_rows=compile_rows)
        built = {}
        for name, options in self.config.drafters.items():
            if name not in offered:
                raise UnknownName("drafter", name, offered, param="drafters")
            built[name] = offered[name](replace(setup, options=options))
        return built

    def _load_draft_model(self, source: str | Path | PreTrainedModel) -> tuple[Target, Any]:
        tokenizer = load_tokenizer(source)
        if not isinstance(source, PreTrainedModel):
            source = load_model(source, dtype=self.target.model.dtype, device=self.target.device)
        # What a drafter rounds changes no text.
        drafter = self._target(source, tokenizer, self.target.pool.capacity, invariant=False)
        drafter.compile(self.config.compile)
        self._draft_targets.append(drafter)
        return drafter, tokenizer

    def _target(self, model: PreTrainedModel, tokenizer: Any, kv_tokens: int | None, invariant: bool | None) -> Target:
        formats = self.plugins.collect("kv_formats")
        if self.config.kv_format not in formats:
            raise UnknownName("KV format", self.config.kv_format, formats, param="kv_format")
        return Target(
            model,
            kv_tokens=kv_tokens,
            max_context=self.config.max_context,
            kv_format=formats[self.config.kv_format](),
            calibration=calibration_ids(tokenizer),
            invariant=invariant,
            cpu_kernels=self.config.cpu_kernels,
            gpu_kernels=self.config.gpu_kernels,
            gpu_graphs=self.config.gpu_graphs,
        )

    def _invariant(self) -> bool | None:
        """Not by itself where the forward is exchanged on the way."""
        return False if self.config.compile == "background" else self.config.invariant


def _cache_options(config: EngineConfig) -> CacheOptions | None:
    if not config.prefix_cache:
        return None
    return CacheOptions(config.prefix_cache_bytes, config.host_cache_bytes, config.disk_cache, config.disk_cache_bytes)


def wrap(model: PreTrainedModel, tokenizer: Any = None, **options: Any) -> Engine:
    """An engine around a model that is loaded already. `options` as in `Engine`. The model stays the caller's, but its
    weights must stay as they are: the engine has packed copies and cached what they said."""
    return Engine(model, tokenizer, **options)


_Weights: TypeAlias = tuple[tuple[int, int], ...]
_latest: list[tuple[Engine, _Weights]] = []
_making = threading.RLock()
_inherited: list[object] = []


def _leave_to_parent() -> None:
    """In a forked child: engines of the parent have no thread here, and another thread may have held the lock."""
    global _making  # noqa: PLW0603
    _making = threading.RLock()
    # Not let go: memory on a device is the parent's too.
    _inherited.extend(_latest)
    _latest.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def engine_of(model: PreTrainedModel, tokenizer: Any = None) -> Engine:
    """The engine that the one-line helpers use for `model`: made once, kept until they are called for another model or
    its weights have changed, as by an update of a training. A change through `Tensor.data` cannot be seen."""
    weights = _weights(model)
    engine = _kept(model, weights, tokenizer)
    if engine is None:
        with _making:
            # Another thread may have made it meanwhile.
            engine = _kept(model, weights, tokenizer) or wrap(model, tokenizer)
            _latest[:] = [(engine, weights)]
    return engine


def _kept(model: PreTrainedModel, weights: _Weights, tokenizer: Any) -> Engine | None:
    for engine, those in _latest:
        if engine.model is model and those == weights and tokenizer in (None, engine.tokenizer):
            return engine
    return None


def _weights(model: PreTrainedModel) -> _Weights:
    """Where a model's weights are, and how often each was written to."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def generate(model: PreTrainedModel, prompt: Any, *, tokenizer: Any = None, **options: Any) -> Result | Any:
    """`Engine.generate` for a model at hand, with an engine that is kept until another model is used."""
    return engine_of(model, tokenizer).generate(prompt, **options)


def _is_batch(prompt: Any) -> bool:
    """Whether `prompt` is a list of prompts: its items are texts or lists."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)
