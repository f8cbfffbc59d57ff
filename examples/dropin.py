"""A program that calls `model.generate` keeps its code: one argument more, the same tokens."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specgen
from specgen.demo_model import demo_model

path = demo_model()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
inputs = tokenizer("To be, or not to be, that is the question. To be, or not", return_tensors="pt")

plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
drafted = model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=specgen.custom_generate)
print(tokenizer.decode(drafted[0]))
print("identical:", torch.equal(plain, drafted))
