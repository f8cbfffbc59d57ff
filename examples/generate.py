"""One prompt, one answer, several tokens per forward."""

import specgen
from specgen.demo_model import demo_model

with specgen.Engine.from_pretrained(demo_model()) as engine:
    result = engine.generate(
        [{"role": "user", "content": "Repeat three times: the cat sat on the mat."}], max_tokens=48
    )
    print(result.text)
    print(f"{len(result.ids)} tokens in {result.stats.num_spec_steps} forwards")
