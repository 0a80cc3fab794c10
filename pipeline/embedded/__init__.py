"""The embedded default: a real, small arithmetic problem and a policy for it, made on the spot on a CPU.

What is made here is written as an ordinary Hugging Face checkpoint and ordinary prompt tables; every later step loads
them as it would load a model by name and a dataset folder. Nothing outside this folder knows about it.
"""
