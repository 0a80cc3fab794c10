"""Gradients: cosines as NumPy has them, up to half precision, and no row that means nothing."""

import hashlib
import itertools

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import Damaged, Missing, gradients, index, open_store
from stores.gradients import row_ids
from stores.store import Store

NAMES = {"policy": "policy-0", "projection": "sparse-0", "objective": "grpo"}


@given(rows=st.integers(0, 40), dim=st.integers(1, 70), queries=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_cosines_are_those_of_numpy(
    tmp_path_factory: pytest.TempPathFactory, rows: int, dim: int, queries: int, seed: int
) -> None:
    """Cosines and rows, in the order written, differ from the double-precision ones by half-precision rounding only."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, dim)).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, (rows, 1))
    features = features.astype(np.float32)
    targets = rng.normal(size=(queries, dim)).astype(np.float32) * 100
    uids = [f"prompt-{number}" for number in rng.permutation(rows)]
    store = open_store(tmp_path_factory.mktemp("store"))
    store.gradients.write("key", uids, features, NAMES)

    wide, far = features.astype(np.float64), targets.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    found, cosines = store.gradients.search("key", targets)
    assert found == uids and cosines.shape == (rows, queries) and cosines.dtype == np.float32
    np.testing.assert_allclose(cosines, unit @ (far / np.linalg.norm(far, axis=1, keepdims=True)).T, atol=1e-3)

    again, stored, norms = store.gradients.read("key")
    assert again == uids and stored.shape == (rows, dim) and stored.dtype == norms.dtype == np.float32
    np.testing.assert_allclose(stored, unit, rtol=2**-10, atol=1e-7)
    np.testing.assert_allclose(norms, np.linalg.norm(wide, axis=1), rtol=1e-6)
    assert store.meta("key") == NAMES | {"rows": rows, "dim": dim}


def test_rows_beyond_one_block_keep_their_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding block by block gives every row its own uid."""
    monkeypatch.setattr(index, "BLOCK", 7)
    features = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    uids = [f"prompt-{row}" for row in range(50)]
    store.gradients.write("key", uids, features, NAMES)
    found, cosines = store.gradients.search("key", features)
    assert found == uids
    np.testing.assert_array_equal(cosines.argmax(axis=0), np.arange(50))
    np.testing.assert_allclose(np.diag(cosines), 1.0, atol=1e-3)


def test_the_index_is_what_faiss_searches(store: Store) -> None:
    """FAISS itself, given the file, finds the same prompts by id and the same cosines."""
    features = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    uids = [f"prompt-{row}" for row in range(30)]
    store.gradients.write("key", uids, features, NAMES)
    _, cosines = store.gradients.search("key", features[:1])
    index = faiss.read_index(str(store.file("key", "gradients", "index.faiss")))
    unit = features[:1] / np.linalg.norm(features[:1])
    scores, ids = index.search(unit, 30)
    position = {number: row for row, number in enumerate(row_ids(uids).tolist())}
    np.testing.assert_allclose(scores[0], [cosines[position[number], 0] for number in ids[0].tolist()], atol=1e-5)


def test_the_same_rows_are_the_same_bytes(store: Store) -> None:
    """A generation written twice is one object."""
    features = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    for key in ("one", "two"):
        store.gradients.write(key, [str(row) for row in range(30)], features, NAMES)
    assert store.get("one").files == store.get("two").files


def test_ids_are_the_first_63_bits() -> None:
    """An id is the SHA-256 of the uid, without its sign bit."""
    number = int(hashlib.sha256(b"prompt").hexdigest()[:16], 16) >> 1
    assert row_ids(["prompt"]).tolist() == [number]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "'b' are not finite"),
        (np.inf, "'b' are not finite"),
        (0.0, "'b' are all zero"),
        (3e38, "'b' are not finite or too long"),
    ],
)
def test_rows_without_a_direction_are_refused(store: Store, value: float, message: str) -> None:
    """The first prompt whose row is not finite or zero is named, and nothing is committed."""
    features = np.ones((3, 4), np.float32)
    features[1:] = value
    with pytest.raises(ValueError, match=message):
        store.gradients.write("key", ["a", "b", "c"], features, NAMES)
    assert not store.done("key")


def test_two_rows_of_a_prompt_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uid that is there twice is named; so are two uids with one id."""
    with pytest.raises(ValueError, match="'a' is there twice"):
        store.gradients.write("key", ["a", "b", "a"], np.ones((3, 4), np.float32), NAMES)
    monkeypatch.setattr(gradients.hashlib, "sha256", lambda _: hashlib.md5(b"same"))
    with pytest.raises(ValueError, match="'b' has the same id as 'a'"):
        row_ids(["a", "b"])


@pytest.mark.parametrize(("name", "value"), list(itertools.product(NAMES, ["", None])))
def test_an_unnamed_generation_is_refused(store: Store, name: str, value: object) -> None:
    """Policy, projection and objective name a generation; each is needed."""
    with pytest.raises(ValueError, match=f"meta\\['{name}'\\]"):
        store.gradients.write("key", ["a"], np.ones((1, 4), np.float32), NAMES | {name: value})


@pytest.mark.parametrize(
    "features", [np.ones(3, np.float32), np.ones((3, 4)), np.ones((3, 0), np.float32), np.ones((2, 4), np.float32)]
)
def test_other_shapes_are_refused(store: Store, features: np.ndarray) -> None:
    """Features are float32 (prompts, dim) with a row for each uid."""
    with pytest.raises(ValueError, match="features"):
        store.gradients.write("key", ["a", "b", "c"], features, NAMES)


@pytest.mark.parametrize("queries", [np.ones((1, 3)), np.ones(4), np.zeros((1, 4)), np.full((1, 4), np.nan)])
def test_queries_without_a_direction_are_refused(store: Store, queries: np.ndarray) -> None:
    """Queries have the rows' dim, are finite and not zero."""
    store.gradients.write("key", ["a"], np.ones((1, 4), np.float32), NAMES)
    with pytest.raises(ValueError, match="queries"):
        store.gradients.search("key", queries.astype(np.float32))


def test_the_reader_cannot_be_made_to_allocate(store: Store) -> None:
    """A file with the right digest and a hostile header is Damaged, and the reader's limit is restored."""
    store.gradients.write("key", ["a"], np.ones((1, 4), np.float32), NAMES)
    data = bytearray(store.file("key", "gradients", "index.faiss").read_bytes())
    place = data.rfind((1).to_bytes(8, "little"))  # the length of the list of ids
    data[place : place + 8] = (2**38).to_bytes(8, "little")
    rows = store.file("key", "gradients", "rows.parquet")
    store.record("hostile", "gradients", store.meta("key"), {"index.faiss": bytes(data), "rows.parquet": rows})
    limit = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(Damaged, match="cannot be read"):
        store.gradients.read("hostile")
    assert faiss.get_deserialization_vector_byte_limit() == limit


def test_rows_of_another_index_are_refused(store: Store) -> None:
    """An index and a list of rows that do not belong together are Damaged."""
    for key, uids in (("one", ["a", "b"]), ("two", ["b", "a"])):
        store.gradients.write(key, uids, np.eye(2, 4, dtype=np.float32), NAMES)
    files = {
        "index.faiss": store.file("one", "gradients", "index.faiss"),
        "rows.parquet": store.file("two", "gradients", "rows.parquet"),
    }
    store.record("mixed", "gradients", store.meta("one"), files)
    with pytest.raises(Damaged, match="disagree"):
        store.gradients.read("mixed")


def test_rows_are_what_faiss_decodes(store: Store) -> None:
    """Rows come back bit for bit as FAISS has them, numbers below half precision's normal range and zeros included."""
    rng = np.random.default_rng(0)
    features = (rng.choice([-1, 1], (70, 33)) * 10.0 ** rng.uniform(-9, 0, (70, 33))).astype(np.float32)
    features[:, 5] = 0
    store.gradients.write("key", [str(row) for row in range(70)], features, NAMES)
    index = faiss.read_index(str(store.file("key", "gradients", "index.faiss")))
    _, rows, _ = store.gradients.read("key")
    np.testing.assert_array_equal(rows, index.index.reconstruct_n(0, 70))
    assert (np.abs(rows[rows != 0]) < 2.0**-14).any()


def test_rows_in_another_precision_are_refused(store: Store) -> None:
    """A file with the right digest and shape that holds single precision is Damaged."""
    store.gradients.write("key", ["a", "b"], np.eye(2, 4, dtype=np.float32), NAMES)
    other = faiss.IndexIDMap2(faiss.IndexFlatIP(4))
    other.add_with_ids(np.eye(2, 4, dtype=np.float32), row_ids(["a", "b"]))
    rows = store.file("key", "gradients", "rows.parquet")
    files = {"index.faiss": faiss.serialize_index(other).tobytes(), "rows.parquet": rows}
    store.record("single", "gradients", store.meta("key"), files)
    with pytest.raises(Damaged, match="half precision"):
        store.gradients.read("single")


def test_tombstones_leave_rows_out_for_those_who_name_them(store: Store) -> None:
    """Readers under a tombstone see the other rows, unchanged; others, and other shards, see all."""
    rows = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    for name, part in (("one", slice(0, 3)), ("two", slice(3, 6))):
        store.gradients.write(name, [str(row) for row in range(6)][part], rows[part], NAMES)
    store.gradients.drop("dead", ["one"], ["1", "4", "absent"])
    whole, norms = store.gradients.read("one")[1:]
    uids, unit, lengths = store.gradients.read("one", ["dead"])
    assert uids == ["0", "2"]
    np.testing.assert_array_equal(unit, whole[[0, 2]])
    np.testing.assert_array_equal(lengths, norms[[0, 2]])
    assert store.gradients.read("two", ["dead"])[0] == ["3", "4", "5"]
    for queries in (rows[:1], rows[:3]):
        found, cosines = store.gradients.search("one", queries, ["dead"])
        assert found == ["0", "2"]
        np.testing.assert_array_equal(cosines, store.gradients.search("one", queries)[1][[0, 2]])
    with pytest.raises(Missing):
        store.gradients.read("one", ["absent"])
    with pytest.raises(ValueError, match="names 'gradients', not 'tombstones'"):
        store.gradients.read("one", ["two"])


def test_compaction_keeps_every_bit(store: Store) -> None:
    """A compacted shard has the surviving rows of its shards, in order, to the bit; the old ones can then go."""
    rows = np.random.default_rng(1).normal(size=(9, 16)).astype(np.float32)
    uids = [str(row) for row in range(9)]
    for name, part in (("one", slice(0, 4)), ("two", slice(4, 4)), ("three", slice(4, 9))):
        store.gradients.write(name, uids[part], rows[part], NAMES)
    store.gradients.drop("dead", ["one", "three"], ["2", "8"])
    store.gradients.compact("whole", ["one", "two", "three"], ["dead"])
    before = [store.gradients.read(name, ["dead"]) for name in ("one", "two", "three")]
    for name in ("one", "two", "three"):
        store.catalog.retire(name)
    found, unit, norms = store.gradients.read("whole")
    assert found == ["0", "1", "3", "4", "5", "6", "7"]
    np.testing.assert_array_equal(unit, np.concatenate([part[1] for part in before]))
    np.testing.assert_array_equal(norms, np.concatenate([part[2] for part in before]))
    assert store.meta("whole") == NAMES | {"rows": 7, "dim": 16}


def test_only_shards_of_one_generation_are_compacted(store: Store) -> None:
    """No shard, shards of two generations, and a prompt in two shards are refused."""
    rows = np.eye(2, 8, dtype=np.float32)
    store.gradients.write("one", ["a", "b"], rows, NAMES)
    store.gradients.write("again", ["b", "c"], rows, NAMES)
    store.gradients.write("other", ["d", "e"], rows, NAMES | {"policy": "policy-1"})
    for shards in ([], ["one", "other"]):
        with pytest.raises(ValueError, match="one generation"):
            store.gradients.compact("key", shards)
    with pytest.raises(ValueError, match="uid 'b' is there twice"):
        store.gradients.compact("key", ["one", "again"])
    assert not store.done("key")
