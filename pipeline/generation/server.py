"""A ``Generate`` on a running ``vllm serve``: the completions endpoint, with token ids in and token ids out.

The door to ``httpx``. Start the server with ``--logprobs-mode processed_logprobs``, so that what it reports is the
distribution that it sampled from. It keeps the weights that it was started with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx
import numpy as np

from pipeline.generation import Group, Request, Sampling
from pipeline.generation.endings import check_room, end_tokens, first_seed, own_ends
from pipeline.policy import Policy

TROUBLE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""What a request is sent again for: the connection, never the server's answer."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new try


class ServerError(RuntimeError):
    """The server could not be reached, refused a request, or answered what makes no group."""


class Unreachable(ServerError):
    """The server does not answer: it may pass."""


class ServerGenerate:
    """Sampling from a server's model.

    Args:
        url: of the server, such as ``http://host:8000``.
        policy: what is served; says which tokens end a completion, and how many there may be.
        model: the name it is served under; empty: the only one there is.
        concurrent: prompts that are asked for at once.
        key_variable: environment variable that holds the API key; the key itself is neither kept nor shown.
        timeout: seconds that the completions of one prompt may take.

    Raises:
        ServerError: the server is not there, or serves no such model.
        ValueError: the tokenizer has no end token.
    """

    def __init__(
        self,
        url: str,
        policy: Policy,
        *,
        model: str = "",
        concurrent: int = 64,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 600.0,
    ) -> None:
        self.url, self.context = url.rstrip("/").removesuffix("/v1"), policy.context_length
        self.tokenizer, self._own_ends = policy.tokenizer, own_ends(policy)
        self.concurrent, self.key_variable, self.timeout = concurrent, key_variable, timeout
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=10.0, pool=None), limits=httpx.Limits(max_connections=concurrent)
        )
        self.model = self._served(model)

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Complete ``requests``, yielding each group as the server answers; at most ``concurrent`` are under way.

        After a failure nothing more is asked; what is under way is yielded as it ends, and then the first error raised.

        Raises:
            ServerError: the server could not be reached or refused; the message names prompt, address and remedy.
            ValueError: a prompt and its completion exceed the context.
        """
        check_room(requests, sampling, self.context)
        ends = end_tokens(self.tokenizer, self._own_ends, sampling.stop)
        waiting, running = list(reversed(requests)), set[Future[Group]]()
        failed: BaseException | None = None
        with ThreadPoolExecutor(self.concurrent) as threads:
            try:
                while waiting or running:
                    while waiting and len(running) < self.concurrent:
                        running.add(threads.submit(self._complete, waiting.pop(), sampling, ends))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        failed = failed or future.exception()
                    if failed:
                        waiting.clear()
                    yield from [future.result() for future in done if not future.exception()]
                if failed:
                    raise failed
            finally:
                for future in running:
                    future.cancel()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _complete(self, request: Request, sampling: Sampling, ends: tuple[int, ...]) -> Group:
        asked = request.n if sampling.temperature else 1  # greedy completions of a prompt are all the same
        body = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "n": asked,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature else 1.0,
            "max_tokens": sampling.max_new_tokens,
            "seed": first_seed(request),
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # the end token is among ``ends``
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
        }
        answer = self._ask("POST", "/v1/completions", f"prompt {request.prompt_uid}", body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != asked:
            raise ServerError(f"prompt {request.prompt_uid}: {self.url} made {len(choices)} completions of {asked}")
        return self._group(request, choices * (request.n // asked))

    def _group(self, request: Request, choices: Sequence[dict[str, Any]]) -> Group:
        if any(choice.get("token_ids") is None for choice in choices):
            raise ServerError(
                f"{self.url} returns no token ids: it is no vllm serve, or one before 0.10; text alone cannot be "
                "trained on, because it may not be the tokens that were sampled"
            )
        ids = [[int(token) for token in choice["token_ids"]] for choice in choices]
        logp = [np.asarray(choice["logprobs"]["token_logprobs"], np.float32) for choice in choices]
        reasons = [str(choice["finish_reason"]) for choice in choices]
        for tokens, values, reason in zip(ids, logp, reasons, strict=True):
            if len(tokens) != len(values) or not np.isfinite(values).all() or reason not in ("stop", "length"):
                raise ServerError(
                    f"prompt {request.prompt_uid}: {self.url} answered {len(tokens)} tokens with {len(values)} log-"
                    f"probabilities, ended by {reason!r}; each token needs a finite one"
                )
        return Group(request, ids, logp, reasons)

    def _served(self, model: str) -> str:
        names = [entry["id"] for entry in self._ask("GET", "/v1/models", "the list of models")["data"]]
        if (model and model not in names) or (not model and len(names) != 1):
            raise ServerError(f"generation.model = {model!r}, and {self.url} serves {names}: name one of them")
        return model or str(names[0])

    def _ask(self, method: str, path: str, what: str, body: dict[str, Any] | None = None) -> Any:
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for number, pause in enumerate((*WAITS, None)):
            try:
                response = self._client.request(method, self.url + path, json=body, headers=headers)
                break
            except TROUBLE as error:
                if pause is None:
                    raise Unreachable(
                        f"{what}: {self.url} cannot be reached after {number + 1} tries ({type(error).__name__}: "
                        f"{error}): start the server, or mend generation.url"
                    ) from None
                time.sleep(pause)
            except httpx.TimeoutException as error:
                raise Unreachable(
                    f"{what}: {self.url} did not answer within {self.timeout:g} s ({type(error).__name__}): raise "
                    "generation.timeout, or ask for fewer or shorter completions"
                ) from None
        if response.status_code in (401, 403):
            raise ServerError(
                f"{what}: {self.url} refuses the key ({response.status_code}): put the right one into the environment "
                f"variable {self.key_variable}"
            )
        if response.status_code != 200:
            raise ServerError(f"{what}: {self.url} answered {response.status_code}: {response.text[:500]}")
        return response.json()
