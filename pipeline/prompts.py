"""Pools of prompts from data sets, files and reasoning-gym, as ``Prompts`` with a stable identity.

The only door to ``datasets``.
"""

from __future__ import annotations

import difflib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.gym import PREFIX, gym_rows
from pipeline.messages import has_images, images_of, plain_text
from pipeline.records import Prompts
from pipeline.rows import rows_to_prompts

COLUMN_KEYS = ("path", "prompt", "images", "ground_truth", "ability", "data_source", "verifier", "template")
FOLDER_KEYS = ("config", "split")
GYM_KEYS = ("path", "size", "seed", "settings", "data_source", "verifier", "template")


def load_prompts(source: Mapping[str, Any]) -> Prompts:
    """Load a pool of prompts.

    Args:
        source: where the prompts are and how to read them; keys that are None count as absent.
            ``path``: a Hugging Face data set folder, a ``save_to_disk`` folder, a ``.parquet``, ``.jsonl`` or ``.json``
            file, or ``reasoning-gym/<task>``. ``config``, ``split`` (default train): of a folder.
            ``prompt``: column, a string or a list of messages (default prompt).
            ``images``: column, the images for the parts without one and for ``<image>`` in texts (default: column
            images, if there is one).
            ``ground_truth``: column; ``a.b`` reaches into a struct (default: the first present of
            ``pipeline.rows.GROUND_TRUTHS``).
            ``data_source``: column or literal (default: column data_source, else the file's stem).
            ``ability``: column (default: column ability, else the data source).
            ``verifier``: spec (default exact); a JSON column reward_spec or verifier of the rows wins.
            ``template``: text with one ``{prompt}``, put around a string prompt or the last user message.
            ``size``, ``seed`` (default 0), ``settings``: of a reasoning-gym task.

    Returns:
        The prompts in the order of the source, repeats included.

    Raises:
        ValueError: a key, a column or a row is not usable; the message names it and the remedy.
        FileNotFoundError: nothing is at ``path``.
    """
    source = {key: value for key, value in source.items() if value is not None}
    path = source.get("path")
    if not isinstance(path, str | Path) or not str(path):
        raise ValueError(
            f"a source of prompts needs 'path' (a data set folder, a file or {PREFIX}<task>); got {source}"
        )
    if str(path).startswith(PREFIX):
        _check_keys(source, GYM_KEYS)
        return rows_to_prompts(gym_rows(source), {key: source[key] for key in ("path", "template") if key in source})
    _check_keys(source, COLUMN_KEYS + (FOLDER_KEYS if Path(path).is_dir() else ()))
    return rows_to_prompts(_rows(Path(path), source), source)


def check_seed_ranges(sources: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> None:
    """Refuse reasoning-gym sources of one task that share items: item i of a task is made from seed + i.

    Args:
        sources: the sources of a run, by name or in a list.

    Raises:
        ValueError: two ranges [seed, seed + size) of one task overlap; the message names both.
    """
    named = sources.items() if isinstance(sources, Mapping) else ((f"source {i}", s) for i, s in enumerate(sources))
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for name, source in named:
        if str(source.get("path", "")).startswith(PREFIX):
            first = int(source.get("seed") or 0)
            ranges.setdefault(str(source["path"]), []).append((first, first + int(source.get("size") or 0), str(name)))
    for task, spans in ranges.items():
        spans.sort(key=lambda span: span[0])
        for (a, a_end, one), (b, b_end, other) in itertools.pairwise(spans):
            if b < a_end:
                spans_text = f"{one!r} (seeds {a} to {a_end - 1}) and {other!r} (seeds {b} to {b_end - 1})"
                raise ValueError(
                    f"{spans_text} of {task} share items, since item i is made from seed + i; "
                    f"set the seed of {other!r} to {a_end} or more"
                )


def render(messages: str, tokenizer: Any, chat: bool, uid: str = "") -> list[int]:
    """Return the token ids of a prompt, ready for a completion.

    Args:
        messages: canonical JSON of the messages.
        tokenizer: a Hugging Face tokenizer.
        chat: through the chat template; else the plain text, with whatever special tokens the tokenizer puts in front.
        uid: names the prompt in errors.

    Raises:
        ValueError: ``chat`` without a chat template, or a prompt with images, which no engine here can take.
    """
    refuse_images(messages, uid)
    turns: list[dict[str, Any]] = json.loads(messages)
    turns = [{**turn, "content": plain_text(turn["content"])} for turn in turns]
    if not chat:
        return [int(i) for i in tokenizer("\n\n".join(turn["content"] for turn in turns)).input_ids]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat = true, but this tokenizer has no chat template; set chat = false or use a chat model")
    prefilled = turns[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=not prefilled, continue_final_message=prefilled, return_dict=False
    )
    return [int(i) for i in ids]


def refuse_images(messages: str, uid: str = "") -> None:
    """Refuse a prompt with images, before rollouts are sampled from it or a gradient is taken of them.

    Args:
        messages: canonical JSON of the messages.
        uid: names the prompt in the error.

    Raises:
        ValueError: it holds an image.
    """
    if has_images(messages):
        turns = json.loads(messages)
        raise ValueError(
            f"prompt {uid or repr(plain_text(turns[-1]['content'])[:80])} holds {len(images_of(turns))} image(s): "
            "rollouts and gradients here take text alone; leave such rows out of the pool to train or to score by "
            "gradients, or draw stages at random (flows.steps.shuffle) and export them (flows.export) to a trainer "
            "that takes images"
        )


def _check_keys(source: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in source:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {list(known)}"
            raise ValueError(
                f"key {key!r} = {source[key]!r} has no meaning for prompts from {str(source['path'])!r}; {hint}"
            )
    if str(source.get("template", "{prompt}")).count("{prompt}") != 1:
        raise ValueError(f"template = {source['template']!r} must contain {{prompt}} exactly once")


def _rows(path: Path, source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file or a folder."""
    if path.is_dir():
        return _folder_rows(path, source.get("config"), source.get("split"))
    if not path.is_file():
        raise FileNotFoundError(
            f"path = {str(path)!r} is neither a file nor a folder; name a data set that is on this machine "
            f"(hf download --repo-type dataset NAME --local-dir FOLDER), or {PREFIX}<task>"
        )
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return list(parquet.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a JSON string may hold U+2028
        return [_json(line, f"line {i} of {str(path)!r}") for i, line in enumerate(lines, 1) if line.strip()]
    rows = _json(path.read_text(encoding="utf-8"), str(path)) if path.suffix == ".json" else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"path = {str(path)!r} must be a .parquet or .jsonl file, or a .json file with a list of objects"
        )
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        raise ValueError(f"{where} is not JSON: {err}") from err


def _folder_rows(path: Path, config: str | None, split: str | None) -> list[dict[str, Any]]:
    """Return the rows of a folder: written by ``save_to_disk``, or with data files and perhaps a card."""
    import datasets

    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if not saved:  # streamed, and with a cache of its own: no copy is left that could be stale next time
        with tempfile.TemporaryDirectory() as cache:
            data = datasets.load_dataset(str(path), config, split=split or "train", streaming=True, cache_dir=cache)
            return list(data.decode(False))  # images stay the bytes that they are
    if config is not None:
        raise ValueError(
            f"config = {config!r} has no meaning for {str(path)!r}, which save_to_disk wrote; leave it out"
        )
    data = datasets.load_from_disk(str(path))
    splits = data if isinstance(data, datasets.DatasetDict) else {str(data.split or split or "train"): data}
    wanted = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if wanted not in splits:
        raise ValueError(f"split = {wanted!r} is not in {str(path)!r}; it has {sorted(splits)}")
    return list(splits[wanted].to_iterable_dataset().decode(False))
