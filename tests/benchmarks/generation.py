"""Collection through the engine on vLLM, against calling vLLM itself with the same requests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import numpy as np

from pipeline.embedded.warm_start import untrained_policy
from pipeline.generation import Request, Sampling
from pipeline.policy import Policy
from tests.benchmarks.measure import Row, ratio
from tests.benchmarks.policies import SMOLLM2, llama

SUBJECT = "generation"


def measure(small: bool) -> Iterator[Row]:
    """Yield the throughput through us by that of vLLM called directly, for a tiny policy and for one of 135 M."""
    if importlib.util.find_spec("vllm") is None:
        yield Row(SUBJECT, "tokens a second through our engine / vLLM called directly", None, bar=">= 0.95")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    tiny = untrained_policy(0)
    yield _row("a policy of 335 k parameters", tiny, prompts=20 if small else 200, prompt=8, tokens=16)
    if not small:
        large = Policy(llama(SMOLLM2).model, tiny.tokenizer, context=256)
        yield _row("SmolLM2-135M's shape", large, prompts=16, prompt=64, tokens=24)


def _row(name: str, policy: Policy, *, prompts: int, prompt: int, tokens: int) -> Row:
    from pipeline.generation import vllm

    engine = vllm.VllmGenerate(sequences=64)
    engine.load(policy)
    rng, n = np.random.default_rng(0), 8
    asked = [Request(str(i), tuple(rng.integers(2, 27, prompt).tolist()), n, 0) for i in range(prompts)]
    sampling = Sampling(max_new_tokens=tokens)
    parameters = [vllm._parameters(request, sampling, (1,)) for request in asked]
    inputs = [vllm._prompt(request) for request in asked]

    def ours() -> int:
        engine._llm.reset_prefix_cache()
        return sum(len(tokens) for group in engine(asked, sampling) for tokens in group.completion_ids)

    def direct() -> int:
        engine._llm.reset_prefix_cache()
        made = engine._llm.generate(inputs, parameters, use_tqdm=False)
        return sum(len(completion.token_ids) for output in made for completion in output.outputs)

    assert ours() == direct()  # the same seeds: the same tokens
    value = ratio(direct, ours, pairs=3 if prompts < 50 else 21)
    engine.close()
    return Row(SUBJECT, f"tokens a second through our engine / vLLM called directly, {name}", value, bar=">= 0.95",
               note=f"{prompts} prompts of {prompt} tokens x {n} x {tokens}, the same seeds and tokens")  # fmt: skip
