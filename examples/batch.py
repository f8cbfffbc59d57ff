"""Many prompts at once, each with its own settings: rows of all of them share each forward."""

import specgen
from specgen.demo_model import demo_model

REQUESTS = [
    ("Say hello.", {"temperature": 0.0}),
    ("Name a fruit.", {"temperature": 0.9, "top_p": 0.9, "seed": 1}),
    ("Name a fruit.", {"temperature": 0.9, "top_p": 0.9, "seed": 2}),
    ("Count from 1 to 20.", {"repetition_penalty": 1.1, "stop": ["7"]}),
    ("Repeat: the cat sat on the mat.", {"speculation": "off"}),
]

with specgen.Engine.from_pretrained(demo_model()) as engine:
    streams = [
        engine.stream([{"role": "user", "content": prompt}], max_tokens=24, **options) for prompt, options in REQUESTS
    ]
    for (prompt, options), stream in zip(REQUESTS, streams, strict=True):
        print(f"{prompt} {options}\n    {stream.results()[0].text!r}")
    # Where all settings are the same, a list of prompts is enough.
    print([result.text for result in engine.generate(["One, two,", "A, B,"], max_tokens=8)])
