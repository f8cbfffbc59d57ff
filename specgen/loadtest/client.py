"""Asks an OpenAI server, ours or another, for streams and notes when what comes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from aiohttp import ClientError, ClientSession

_ENOUGH = 200


@dataclass(slots=True)
class Sample:
    """One request. Seconds by `time.perf_counter`; `arrivals` of chunks with text. tokens: as the server counts them.

    error: what went wrong, "" if nothing did. acceptance: committed tokens per forward, where the server tells it.
    """

    started: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    acceptance: float | None = None
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.arrivals[0] - self.started

    @property
    def per_token(self) -> float:
        """Seconds per token behind the first text; 0 where there is only one."""
        later = self.tokens - 1
        return (self.arrivals[-1] - self.arrivals[0]) / later if later > 0 else 0.0

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Client:
    """Chats with one server. fields: what each request holds besides its prompt."""

    def __init__(self, session: ClientSession, url: str, fields: Mapping[str, object], key: str | None = None) -> None:
        self._session = session
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def ask(self, prompt: str) -> Sample:
        """Send one prompt and read its answer to the end. What fails is in the sample."""
        sample = Sample(time.perf_counter())
        body = {**self._fields, "messages": [{"role": "user", "content": prompt}]}
        try:
            async with self._session.post(self._url, json=body, headers=self._headers) as answer:
                if answer.status != 200:
                    sample.error = f"{answer.status}: {(await answer.text())[:_ENOUGH]}"
                else:
                    async for line in answer.content:
                        _take(sample, line)
        except (ClientError, TimeoutError, ValueError) as error:
            sample.error = f"{type(error).__name__}: {error}"[:_ENOUGH]
        sample.ended = time.perf_counter()
        if not sample.error and not sample.arrivals:
            sample.error = "no text came"
        return sample


def _take(sample: Sample, line: bytes) -> None:
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return
    event = msgspec.json.decode(line[6:])
    if error := event.get("error"):
        sample.error = str(error.get("message", error))[:_ENOUGH]
    for choice in event.get("choices") or ():
        if choice.get("delta", {}).get("content"):
            sample.arrivals.append(time.perf_counter())
    if usage := event.get("usage"):
        sample.tokens, sample.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    metrics = (event.get("metrics") or {}).get("speculative_decoding")
    if metrics:
        sample.acceptance = metrics["mean_acceptance_length"]
