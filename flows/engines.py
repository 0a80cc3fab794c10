"""Which engine makes a policy's rollouts, and how it gets that policy's weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flows.config import SERVER_SETTINGS, VLLM_SETTINGS

if TYPE_CHECKING:
    from flows.desk import Desk
    from pipeline.generation import Generate, Sampling
    from pipeline.policy import Policy


class Engines:
    """The engine that the settings name, for the policies of one desk.

    A server keeps the weights that it was started with: it makes the rollouts of the checkpoint that a run starts from,
    and Transformers those of what is trained from it.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._vllm: Any = None
        self._server: Any = None
        self._holds: tuple[str, int] | None = None  # what the weights in vLLM are those of

    def name(self, policy: str) -> str:
        """Return the engine that makes the rollouts of a policy."""
        return self._desk.config.generation.engine if self._is_the_start(policy) else self.trained

    @property
    def trained(self) -> str:
        """The engine that makes the rollouts of a policy that is being trained."""
        chosen = self._desk.config.generation.engine
        return "transformers" if chosen == "server" else chosen

    def identity(self, engine: str) -> dict[str, str]:
        """Return the part of a key that says which engine drew: nothing for Transformers, as keys always were.

        Engines sample from the same distribution with other random numbers, so their rollouts are others.
        """
        return {} if engine == "transformers" else {"engine": engine}

    @contextmanager
    def of(self, key: str, version: int = 0) -> Iterator[Generate]:
        """Give the engine with the weights of a policy; on leaving, vLLM gives an accelerator's memory back.

        Args:
            key: of the policy.
            version: 0 for the policy as it is stored under the key, else the step at which it is being trained.
        """
        from pipeline.generation.agreement import Checked
        from pipeline.generation.transformers import TransformersGenerate

        policy, name = self._desk.load(key), self.name(key)
        if name == "transformers":
            yield TransformersGenerate(policy, batch_tokens=self._desk.config.policy.batch_tokens)
        elif name == "server":
            yield Checked(self._connect(policy), policy, f"the server at {self._desk.config.generation.url}")
        else:
            engine = self._vllm = self._vllm or self._make()
            fresh = self._holds != (key, version)
            if fresh:
                self._holds = None
                engine.load(policy)
                self._holds = (key, version)
            try:
                yield Checked(engine, policy, "vLLM") if fresh else engine
            finally:
                engine.sleep()

    def close(self) -> None:
        """Stop what was started; what is asked for later is started again."""
        for engine in (self._vllm, self._server):
            if engine is not None:
                engine.close()
        self._vllm = self._server = self._holds = None

    def sampling(self, **changes: Any) -> Sampling:
        """Return the sampling distribution of the settings, with changes."""
        from pipeline.generation import Sampling

        return Sampling(**self._desk.config.sampling.model_dump() | changes)

    def _is_the_start(self, key: str) -> bool:
        store = self._desk.store
        return store.done(key) and "start" not in store.meta(key)

    def _make(self) -> Any:
        from pipeline.generation.vllm import VllmGenerate

        config = self._desk.config
        self._desk.reporter.line("  starting vLLM")
        if config.policy.lora and config.policy.dtype != "float32":
            warnings.warn(
                f"vLLM gets the adapter merged into weights of policy.dtype = {config.policy.dtype!r}, whose rounding "
                "takes most of a small update away, so that it samples from nearly the weights of the start: use "
                "generation.engine = 'transformers', or policy.dtype = 'float32', or a larger train.lr than "
                f"{config.train.lr:g}",
                stacklevel=2,
            )
        return VllmGenerate(
            dtype=config.policy.dtype,
            device=config.policy.device,
            **config.generation.model_dump(include=set(VLLM_SETTINGS)),
        )

    def _connect(self, policy: Policy) -> Any:
        from pipeline.generation.server import ServerGenerate

        if self._server is None:
            settings = self._desk.config.generation.model_dump(include=set(SERVER_SETTINGS))
            self._server = ServerGenerate(policy=policy, **settings)
        return self._server
