"""specgen itself, by the same protocol as the others. Eager and compiled engines are processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

ONE = ("off", "on")
MANY = ONE
_SPECULATION = {"off": "off", "on": "auto"}


class Peer:
    """An engine with room for the largest batch."""

    def __init__(self, model: Path, home: Path, options: dict[str, Any]) -> None:
        import torch

        from specgen import Engine

        torch.set_num_threads(options["threads"])
        self._runs = count()
        self.engine = Engine.from_pretrained(
            model,
            dtype=options["dtype"],
            compile=options["compile"],
            kv_tokens=options["kv_tokens"],
            max_num_seqs=options["streams"],
            prefix_cache=False,
            **({} if options["drafters"] is None else {"drafters": options["drafters"]}),
        )
        if options["compile"] and not self.engine.target.compiled:
            raise RuntimeError("its forward did not compile; the log says why")

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, setting: str, clock: Any) -> None:
        """Greedy, to the end token or the budget."""
        options: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "speculation": _SPECULATION[setting]}
        # Nobody drafts from what was said when the same prompt came before.
        options["cache_salt"] = str(next(self._runs))
        if len(prompts) == 1:
            for output in self.engine.stream(list(prompts[0]), **options):
                clock.note(0, output.tokens)
            return
        for row, result in enumerate(self.engine.generate([list(ids) for ids in prompts], **options)):
            clock.note(row, result.ids)
