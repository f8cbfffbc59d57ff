"""When requests go out: so many at once (closed loop), or so many a second whatever becomes of them (open loop)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from specgen.loadtest.client import Sample

Ask = Callable[[str], Awaitable[Sample]]


async def closed_loop(ask: Ask, prompts: Sequence[str], concurrency: int) -> list[Sample]:
    """Each of `concurrency` clients sends its next prompt when it has its answer. Samples in the prompts' order."""
    samples: dict[int, Sample] = {}
    waiting = iter(enumerate(prompts))

    async def work() -> None:
        for number, prompt in waiting:
            samples[number] = await ask(prompt)

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(prompts)))))
    return [samples[number] for number in range(len(prompts))]


async def open_loop(ask: Ask, prompts: Sequence[str], rate: float, seed: int) -> list[Sample]:
    """Requests of a Poisson process of `rate` a second. Samples in the prompts' order."""
    waits = random.Random(seed)
    sent: list[asyncio.Task[Sample]] = []
    for prompt in prompts:
        sent.append(asyncio.ensure_future(ask(prompt)))
        await asyncio.sleep(waits.expovariate(rate))
    return list(await asyncio.gather(*sent))
