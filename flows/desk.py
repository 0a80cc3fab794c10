"""What every step of a run needs at hand: settings, store, verifiers, progress, and the policy that was used last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import Config
from flows.engines import Engines
from flows.pool import Pool, read_pool, read_prompts
from flows.progress import Advance, Reporter
from flows.windows import Windows
from pipeline.records import keyed_seed

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.features import Projection
    from pipeline.policy import Policy
    from pipeline.records import Prompts
    from pipeline.rewards import VerifierPool
    from stores.store import Store

Report = Callable[[str, int, tuple[int, str, str]], None]
"""Takes the name of an arm, the number of a stage, and (step, policy, evaluation) of its newest checkpoint."""


class Desk:
    """The run's settings and open resources.

    Args:
        config: the settings, with the seed of this run.
        folder: the run directory.
        store: where artifacts are kept.
        verifiers: scores completions; None where nothing is sampled.
        reporter: shows progress.
        windows: what others see of the run, and what they decide.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        store: Store,
        verifiers: VerifierPool | None,
        reporter: Reporter,
        windows: Windows | None = None,
    ) -> None:
        self.config, self.folder, self.store = config, folder, store
        self._verifiers, self.reporter, self.windows = verifiers, reporter, windows or Windows()
        self.engines = Engines(self)
        self.advance: Advance = lambda n, note="": None  # of the bar that is on show
        self.report: Report = lambda arm, stage, checkpoint: None  # to the trackers of ``report_to``
        self._prompts: dict[tuple[str, str], Prompts] = {}
        self._picked: tuple[tuple[str, tuple[str, ...]], Prompts] | None = None  # the stage that is trained on
        self._pools: dict[str, Pool] = {}
        self._held: tuple[str, Policy, Any] | None = None
        self.projections: dict[str, Projection] = {}  # by the name of their space

    def seed(self, *identity: object) -> int:
        """Return a seed for one purpose of this run."""
        return keyed_seed(self.config.seed, *identity)

    def load(self, key: str) -> Policy:
        """Return the policy of a key, from memory where it was used last."""
        if self._held is None or self._held[0] != key:
            self._held = None  # before loading the next: two large policies may not fit
            self._held = (key, self._read(key), None)
        return self._held[1]

    def take(self, key: str) -> tuple[Policy, Any]:
        """Return the policy of a key, and its optimizer where that is still in memory, to be changed by the caller."""
        policy = self.load(key)
        assert self._held is not None
        optimizer, self._held = self._held[2], None
        return policy, optimizer

    def hold(self, key: str, policy: Policy, optimizer: Any) -> None:
        """Keep a policy in memory under the key that it was stored by."""
        self._held = (key, policy, optimizer)

    @property
    def verifiers(self) -> VerifierPool:
        """What scores completions."""
        assert self._verifiers is not None, "this desk samples nothing"
        return self._verifiers

    def rest(self) -> None:
        """Give memory back, an accelerator's too, before a wait of hours; what is needed again is loaded again."""
        self.let_go()
        self.engines.close()

    def prompts(self, data: str, split: str) -> Prompts:
        """Return the eligible prompts of one split (``pool``, ``test`` or the name of a validation set)."""
        if (data, split) not in self._prompts:
            self._prompts[data, split] = read_prompts(self.store, data, split)
        return self._prompts[data, split]

    def of_pool(self, data: str, uids: Sequence[str]) -> Prompts:
        """Return some prompts of the eligible pool, in the order asked for; the others' texts are not kept.

        Raises:
            KeyError: a uid is not in the eligible pool; the message names it.
        """
        key = (data, tuple(uids))
        if self._picked is None or self._picked[0] != key:
            found = (
                self.prompts(data, "pool")
                if (data, "pool") in self._prompts
                else read_prompts(self.store, data, "pool", uids)
            )
            self._picked = (key, found.take(found.rows_of(uids)))
        return self._picked[1]

    def splits(self, data: str) -> dict[str, int]:
        """Return the number of eligible prompts of each split, in the order in which they were read."""
        return self._pool(data).splits

    def validation(self, data: str) -> list[str]:
        """Return the names of the validation sets."""
        return [split for split in self.splits(data) if split not in ("pool", "test")]

    def pool(self, data: str) -> pa.Array:
        """Return the prompt_uids of the eligible pool, in its order, as a column of strings."""
        return self._pool(data).eligible

    def excluded(self, data: str) -> tuple[pa.Array, pa.Array]:
        """Return the prompts of the pool that were left out when it was read, and the reason of each."""
        return self._pool(data).out, self._pool(data).reason

    def _pool(self, data: str) -> Pool:
        if data not in self._pools:
            self._pools[data] = read_pool(self.store, data)
        return self._pools[data]

    @property
    def adapter(self) -> dict[str, Any] | None:
        """What a fresh LoRA adapter depends on; None for training all parameters."""
        lora = self.config.policy.lora
        return {**lora.model_dump(), "seed": self.seed("adapter") % 2**32} if lora else None

    @cached_property
    def chat_template(self) -> str:
        """The Jinja text that stands in for the tokenizer's chat template; empty for the tokenizer's own."""
        return read_template(self.config.policy.chat_template)

    @property
    def rendering(self) -> bool | str:
        """What the tokens of a prompt depend on besides the prompt and the tokenizer."""
        return self.chat_template or self.config.policy.chat

    def open_base(self, checkpoint: str | Path, adapter: Path | None = None) -> Policy:
        """Load a full checkpoint by folder or name, with a stored adapter, or a fresh one where the settings ask."""
        from pipeline.policy import load_policy

        return load_policy(checkpoint, device=self.config.policy.device, **self.loading(adapter))

    def loading(self, adapter: Path | None) -> dict[str, Any]:
        """Return how a checkpoint is loaded, wherever it goes: arguments of ``load_policy`` and ``load_sharded``."""
        settings, fresh = self.config.policy, self.adapter if adapter is None else None
        return {
            "adapter": adapter,
            "lora": fresh,
            "seed": fresh["seed"] if fresh else 0,
            "dtype": settings.dtype,
            "attention": settings.attention,
            "checkpointing": settings.checkpointing,
            "context": settings.context_length,
            "chat_template": self.chat_template,
        }

    def source(self, key: str) -> tuple[str | Path, Path | None]:
        """Return the folder or name of the full checkpoint that the policy of a key starts from, and its adapter."""
        base = self.store.meta(key).get("adapter_of")
        return (self._place(base), self.store.checkpoints.folder(key)) if base else (self._place(key), None)

    def outline(self, key: str) -> Policy:
        """Return the policy of a key with shapes in the place of weights, and without a tokenizer."""
        from pipeline.policy import Policy
        from pipeline.pretrained import skeleton

        checkpoint, adapter = self.source(key)
        how = {name: value for name, value in self.loading(adapter).items() if name in ("lora", "dtype", "attention")}
        return Policy(skeleton(checkpoint, adapter=adapter, **how), None)

    def let_go(self) -> None:
        """Forget the policy in memory and its optimizer: other processes need the room."""
        self._held = None

    def _read(self, key: str) -> Policy:
        return self.open_base(*self.source(key))

    def _place(self, key: str) -> str | Path:
        """Return the folder or name that a full checkpoint is loaded from."""
        return self.store.meta(key).get("checkpoint") or self.store.checkpoints.folder(key)


def read_template(setting: str) -> str:
    """Return a chat template that is given as text or as the file that holds it.

    Raises:
        FileNotFoundError: it is neither.
    """
    if not setting or "{" in setting:
        return setting
    if not Path(setting).is_file():
        raise FileNotFoundError(
            f"policy.chat_template = {setting!r} is neither a file nor Jinja text (which has braces); mend the path"
        )
    return Path(setting).read_text(encoding="utf-8")


def fingerprint(folder: Path) -> dict[str, str]:
    """Return what tells a checkpoint folder from another: a digest a file, of the ends alone where it is large."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest, size = hashlib.sha256(), path.stat().st_size
        with path.open("rb") as file:
            digest.update(file.read(1 << 24))
            file.seek(max(0, size - (1 << 24)))
            digest.update(file.read() + str(size).encode())
        digests[str(path.relative_to(folder))] = digest.hexdigest()
    return digests
