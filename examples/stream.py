"""Text as it comes, with asyncio: two answers at once from one engine."""

import asyncio

import specgen
from specgen.demo_model import demo_model


async def answer(engine: specgen.Engine, question: str) -> None:
    """Print each piece of the answer; leaving the block early would cancel it."""
    async with engine.stream([{"role": "user", "content": question}], max_tokens=32) as stream:
        async for output in stream:
            print(f"{question[:12]} | {output.text!r}")


async def main() -> None:
    """Ask two questions side by side; their rows share the forwards."""
    with specgen.Engine.from_pretrained(demo_model()) as engine:
        await asyncio.gather(answer(engine, "Say hello."), answer(engine, "Count from 1 to 9."))


asyncio.run(main())
