"""Trajectories: rollouts come back as written, with their counts, and nothing that cannot be trained on gets in."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import Conflict, Damaged, open_store
from stores.store import Store
from stores.trajectories import SCHEMA, count

ROOT = Path(__file__).parents[2]
Rollouts = Callable[..., dict[str, list[Any]]]
ROW = st.tuples(
    st.text(min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-50, 0, width=32)), max_size=4),
    st.text(max_size=10),
    st.sampled_from(["correct", "incorrect", "unscorable", "error", "timeout", "truncated"]),
)


@given(rows=st.lists(ROW, max_size=8))
@settings(max_examples=20, deadline=None)
def test_rollouts_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]) -> None:
    """Every column comes back as written, token ids and log-probabilities to the bit, also of an empty shard."""
    store = open_store(tmp_path_factory.mktemp("store"))
    columns: dict[str, list[Any]] = {
        "prompt_uid": [uid for uid, *_ in rows],
        "sample": list(range(len(rows))),
        "policy": ["p"] * len(rows),
        "step": [2] * len(rows),
        "prompt_ids": [[1, 2]] * len(rows),
        "completion_ids": [[token for token, _ in tokens] for _, tokens, *_ in rows],
        "logp_old": [[logp for _, logp in tokens] for _, tokens, *_ in rows],
        "temperature": [0.5] * len(rows),
        "finish_reason": ["stop"] * len(rows),
        "seed": [2**62] * len(rows),
        "text": [text for *_, text, _ in rows],
        "reward": [-1.0] * len(rows),
        "verdict": [verdict for *_, verdict in rows],
    }
    store.trajectories.write("key", columns, {})
    found = store.trajectories.read(["key"])
    assert list(found) == list(SCHEMA)
    for name in SCHEMA:
        assert [row.tolist() if isinstance(row, np.ndarray) else row for row in found[name]] == columns[name]
    assert store.catalog.counts(["key"]) == [("key", *row) for row in count(columns["prompt_uid"], columns["verdict"])]


def test_shards_come_in_the_order_of_keys(store: Store, rollouts: Rollouts) -> None:
    """Shards are concatenated in the order given, with only the columns asked for, in that order."""
    for seed in range(3):
        store.trajectories.write(f"shard-{seed}", rollouts(seed), {"seed": seed})
    found = store.trajectories.read(["shard-2", "shard-0"], ["verdict", "completion_ids"])
    assert list(found) == ["verdict", "completion_ids"]
    assert found["verdict"] == rollouts(2)["verdict"] + rollouts(0)["verdict"]
    assert all(row.dtype == np.int32 and row.flags.writeable for row in found["completion_ids"])
    assert store.trajectories.read([], ["text"]) == {"text": []}
    assert store.meta("shard-1") == {"seed": 1, "rows": 12}


def test_arrays_and_lists_are_the_same_bytes(store: Store, rollouts: Rollouts) -> None:
    """The same rollouts as lists or as arrays, of any whole or float type, are one object."""
    columns = rollouts(0)
    arrays = columns | {
        "completion_ids": [np.array(row, np.int64) for row in columns["completion_ids"]],
        "logp_old": [np.array(row, np.float32) for row in columns["logp_old"]],
        "reward": np.array(columns["reward"], np.float32),
        "sample": np.array(columns["sample"]),
    }
    store.trajectories.write("lists", columns, {})
    store.trajectories.write("arrays", arrays, {})
    assert store.get("lists").files == store.get("arrays").files


def test_the_file_is_encoded_as_promised(store: Store, rollouts: Rollouts) -> None:
    """zstd everywhere, byte planes for log-probabilities, dictionaries for what repeats, a schema version."""
    store.trajectories.write("key", rollouts(0), {})
    file = pq.ParquetFile(store.file("key", "trajectories", "rollouts.parquet"))
    group = file.metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "BYTE_STREAM_SPLIT" in columns["logp_old.list.element"].encodings
    assert {name for name, column in columns.items() if column.has_dictionary_page} == {
        *("prompt_uid", "policy", "finish_reason", "verdict"),
        *("prompt_ids.list.element", "completion_ids.list.element"),
    }
    assert file.schema_arrow.metadata[b"schema_version"] == b"1"
    assert {name: file.schema_arrow.field(name).type for name in ("sample", "seed", "text")} == {
        name: SCHEMA[name] for name in ("sample", "seed", "text")
    }


@pytest.mark.parametrize("name", list(SCHEMA))
def test_a_missing_column_is_named(store: Store, rollouts: Rollouts, name: str) -> None:
    """Every column is needed."""
    columns = rollouts(0)
    del columns[name]
    with pytest.raises(ValueError, match=f"lacks \\['{name}'\\]"):
        store.trajectories.write("key", columns, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": [0] * 12}, "unknown.*'extra'"),
        ({"text": ["x"]}, "unequal lengths"),
        ({"reward": [None] * 12}, "'reward' has 12 rows of None"),
        ({"step": [0.5] * 12}, "'step'"),
        (
            {"completion_ids": [[1]] * 12, "logp_old": [[-1.0]] * 11 + [[]]},
            "0 numbers for the 1 .* row 11, prompt prompt-3",
        ),
        (
            {"completion_ids": [[1, 2]] * 12, "logp_old": [[-1.0, 0]] * 11 + [[0, float("nan")]]},
            "finite in row 11, prompt",
        ),
        (
            {"completion_ids": [[]] + [[1]] * 11, "logp_old": [[], [float("-inf")]] + [[0.0]] * 10},
            "finite in row 1, prompt",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    store: Store, rollouts: Rollouts, change: dict[str, Any], message: str
) -> None:
    """Unknown, uneven, empty, mistyped or not finite: refused with the column and the row, and nothing is committed."""
    with pytest.raises(ValueError, match=message):
        store.trajectories.write("key", rollouts(0) | change, {})
    assert not store.done("key")


def test_unknown_columns_cannot_be_read(store: Store) -> None:
    """Asking for a column that no shard has names it."""
    with pytest.raises(ValueError, match="'rewards'"):
        store.trajectories.read([], ["rewards"])


def test_other_rollouts_under_a_key_are_a_conflict(store: Store, rollouts: Rollouts) -> None:
    """A shard does not change, and neither do its counts."""
    store.trajectories.write("key", rollouts(0), {})
    before = store.beliefs.history(["key"])
    with pytest.raises(Conflict, match=r"rollouts\.parquet"):
        store.trajectories.write("key", rollouts(1), {})
    assert store.beliefs.history(["key"]) == before


def test_a_shard_in_parts_is_the_shard_in_one(
    store: Store, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that go to several files read as one shard, with one set of counts; none at all is an empty shard."""
    parts = [rollouts(seed) for seed in range(5)]
    whole = {name: [value for part in parts for value in part[name]] for name in SCHEMA}
    store.trajectories.write("whole", whole, {})
    monkeypatch.setattr("stores.trajectories.FILE_BYTES", 1)
    store.trajectories.write_all("parts", iter(parts), {})
    assert sorted(store.get("parts").files) == [f"rollouts.{n:05d}.parquet" for n in range(1, 5)] + ["rollouts.parquet"]
    one, many = (store.trajectories.read([key]) for key in ("whole", "parts"))
    for name in SCHEMA:
        assert all(np.array_equal(a, b) for a, b in zip(one[name], many[name], strict=True))
    counts = [[row[1:] for row in store.catalog.counts([key])] for key in ("whole", "parts")]
    assert counts[0] == counts[1] and store.meta("parts") == store.meta("whole") == {"rows": len(whole["seed"])}
    store.trajectories.write_all("none", iter([]), {})
    assert store.trajectories.read(["none"])["text"] == [] and store.meta("none") == {"rows": 0}


def test_a_bad_part_leaves_nothing(store: Store, rollouts: Rollouts) -> None:
    """When the second part cannot be kept, or cannot be made, the shard is not there, and no temporary is left."""

    def parts() -> Iterator[dict[str, list[Any]]]:
        yield rollouts(0)
        raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="the engine died"):
        store.trajectories.write_all("key", parts(), {})
    with pytest.raises(ValueError, match="lacks"):
        store.trajectories.write_all("key", [rollouts(0), {"text": []}], {})
    assert not store.done("key") and not list(store.objects.temporaries.iterdir())


def test_only_the_columns_asked_for_are_read(local: Store, rollouts: Rollouts) -> None:
    """A scan reads the bytes of its columns and no text: a file whose text is damaged on the disk still gives rewards."""
    columns = rollouts(0, samples=1000)
    local.trajectories.write("key", columns, {})
    path = local.file("key", "trajectories", "rollouts.parquet")
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        text = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "text")
        start, size = text.dictionary_page_offset or text.data_page_offset, text.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\0" * size
    path.chmod(0o644)
    path.write_bytes(content)
    local.objects._verified[local.get("key").files["rollouts.parquet"].digest] = local.objects._stamp(path)
    assert local.trajectories.read(["key"], ["reward", "prompt_uid"])["reward"] == columns["reward"]
    with pytest.raises(Damaged):
        local.trajectories.read(["key"], ["text"])


PEAK = """
import resource, sys
from pathlib import Path
from stores import open_store
store, parts = open_store(Path(sys.argv[1])), int(sys.argv[2])
def part(number):
    n = 2048
    return dict(prompt_uid=[f"{number}-{i // 8}" for i in range(n)], sample=list(range(n)), policy=["p"] * n, step=[0] * n,
                prompt_ids=[[1] * 64] * n, completion_ids=[[i] * 64 for i in range(n)], logp_old=[[-i / n] * 64 for i in range(n)],
                temperature=[1.0] * n, finish_reason=["stop"] * n, seed=[number] * n, text=[f"text {i} " * 20 for i in range(n)],
                reward=[0.0] * n, verdict=["correct"] * n)
store.trajectories.write_all("key", (part(number) for number in range(parts)), {})
rows = sum(len(found["reward"]) for found in store.trajectories.scan(["key"], ["reward", "completion_ids"]))
assert rows == 2048 * parts, rows
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_shard(tmp_path: Path, torture: int) -> None:
    """Writing and scanning ten times the rollouts takes the same memory, but for the counts of their prompts."""
    peaks = []
    for parts in (4, 40 if torture == 1 else 489):  # 489 x 2,048 is a million
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(parts)), str(parts)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))
    assert peaks[1] - peaks[0] < 60_000 + 1.2 * (
        parts * 256
    )  # KiB: a row of counts takes about 1 KiB while it is written
