"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from specgen.engine.stream import Stream
from specgen.types import StepOutput


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, StepOutput]]:
    """(place of the stream, output) as they come. Raises what a stream raises."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    waiting = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                yield place, output
                waiting[asyncio.ensure_future(anext(streams[place]))] = place
    finally:
        for task in waiting:
            task.cancel()
