"""Predicted output: an edit repeats most of what is there, so the old text is a good draft of the new one."""

import specgen
from specgen.demo_model import demo_model

CODE = """class Point:
    # A point in the plain.
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def length(self):
        return (self.x ** 2 + self.y ** 2) ** 0.5
"""
MESSAGES = [{"role": "user", "content": f"Remove the comment and print the class again:\n\n```python\n{CODE}```"}]

with specgen.Engine.from_pretrained(demo_model()) as engine:
    plain = engine.generate(MESSAGES, max_tokens=61, temperature=0.0, speculation="off")
    # It need not be right: the comment is still in it. The walk keeps what the model says and drops the rest.
    result = engine.generate(MESSAGES, max_tokens=61, temperature=0.0, prediction=f"```python\n{CODE}```")
    print(result.text)
    print(f"{plain.stats.num_spec_steps} forwards without drafts, {result.stats.num_spec_steps} with")
    print("identical:", result.ids == plain.ids)
