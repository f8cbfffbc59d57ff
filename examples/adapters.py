"""LoRA adapters: load them, mix them in one batch, swap one while the engine runs."""

from pathlib import Path

import specgen
from specgen.demo_model import demo_model

FOLDER = Path(__file__).parents[1] / "adapters"
QUESTION = [{"role": "user", "content": "What is the capital of Spain?"}]

with specgen.Engine.from_pretrained(demo_model(), adapters={"root": FOLDER}) as engine:
    engine.adapters.load("json", "json-answers")
    engine.adapters.load("voice", "pirate", pinned=True)
    # Rows of all three share each forward.
    streams = [engine.stream(QUESTION, adapter=name, max_tokens=32) for name in (None, "json", "voice")]
    for stream in streams:
        print(stream.results()[0].text)
    running = engine.stream(QUESTION, adapter="voice", max_tokens=32)
    engine.adapters.reload("voice", "json-answers")
    # What ran keeps the revision it began with; what comes now gets the new one.
    print(running.results()[0].text == streams[2].results()[0].text)
    print("swapped:", engine.generate(QUESTION, adapter="voice", max_tokens=32).text == streams[1].results()[0].text)
    engine.adapters.unload("voice")
    print([f"{info.name} {info.revision} on the {info.place}" for info in engine.adapters.list()])
