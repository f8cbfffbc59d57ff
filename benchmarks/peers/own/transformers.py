"""transformers: `generate` with what it has to be quicker, and continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ONE = ("generate", "static", "lookup 10", "lookup 3", "assisted")
MANY = ("generate", "continuous")
_PAGE = 256


class Peer:
    """One model for all settings."""

    def __init__(self, model: Path, home: Path, options: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        self.torch: Any = torch
        self.lib: Any = transformers
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model: Any = load(model, dtype=options["dtype"]).eval()
        self.draft: Any = load(options["draft_model"], dtype=options["dtype"]) if options["draft_model"] else None
        # Of one length for all prompts, so that its forward is compiled once; transformers' own would grow with them.
        self.longest: int = options["longest"] + options["tokens"]
        self.blocks: int = options["kv_tokens"] // _PAGE + options["streams"]
        eos = self.model.generation_config.eos_token_id
        self.stops: list[int] = list(eos) if isinstance(eos, list) else [eos]

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, setting: str, clock: Any) -> None:
        """Greedy, to the end token or the budget."""
        if setting == "continuous":
            self._continuous(prompts, tokens, clock)
        elif len(prompts) > 1:
            self._padded(prompts, tokens, clock)
        else:
            ids = self.torch.tensor([prompts[0]])
            mask = self.torch.ones_like(ids)
            self._generate(ids, mask, tokens, streamer=_streamer(clock), **self._options(setting))

    def _generate(self, ids: Any, mask: Any, tokens: int, **options: Any) -> Any:
        return self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=self.stops[0],
            **options,
        )

    def _options(self, setting: str) -> dict[str, Any]:
        if setting == "static":
            cache = self.lib.StaticCache(config=self.model.config, max_cache_len=self.longest)
            config = self.lib.CompileConfig(mode="default")
            config._compile_all_devices = True  # else only on accelerators
            return {"past_key_values": cache, "compile_config": config}
        if setting == "assisted":
            return {"assistant_model": self.draft}
        kind, _, most = setting.partition(" ")
        return {"prompt_lookup_num_tokens": int(most)} if kind == "lookup" else {}

    def _padded(self, prompts: Sequence[Sequence[int]], tokens: int, clock: Any) -> None:
        """A batch, padded on the left; what follows an end token is padding too."""
        width = max(map(len, prompts))
        ids = self.torch.tensor([[self.stops[0]] * (width - len(row)) + list(row) for row in prompts])
        mask = self.torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        output = self._generate(ids, mask, tokens)
        for row, new in enumerate(output[:, width:].tolist()):
            end = next((place for place, token in enumerate(new, 1) if token in self.stops), len(new))
            clock.note(row, new[:end])

    def _continuous(self, prompts: Sequence[Sequence[int]], tokens: int, clock: Any) -> None:
        """Continuous batching, its manager made for each batch as `generate_batch` does it."""
        config = self.lib.GenerationConfig(
            do_sample=False, max_new_tokens=tokens, eos_token_id=self.stops, pad_token_id=self.stops[0]
        )
        # Told how much it needs: else it takes most of the memory, and minutes to fill it.
        room = self.lib.ContinuousBatchingConfig(num_blocks=self.blocks, allow_block_sharing=False)
        outputs = self.model.generate_batch(
            inputs=[list(ids) for ids in prompts], generation_config=config, continuous_batching_config=room
        )
        for row, output in enumerate(outputs.values()):
            clock.note(row, output.generated_tokens)


def _streamer(clock: Any) -> Any:
    """Hands tokens to the clock; the first call brings the prompt."""
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        prompt_seen = False

        def put(self, value: Any) -> None:
            if self.prompt_seen:
                clock.note(0, value.reshape(-1).tolist())
            self.prompt_seen = True

        def end(self) -> None:
            pass

    return Streamer()
