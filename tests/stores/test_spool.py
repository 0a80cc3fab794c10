"""The groups that wait on disk: durable, checked, and read back as they were."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from pipeline.records import Rollouts
from stores.spool import Spool


@pytest.fixture
def groups(llama, make_rollouts) -> list[Rollouts]:
    """Three groups."""
    made = make_rollouts(llama)
    return [made.take(rows) for rows in made.groups().values()]


def test_groups_come_back_as_they_were(tmp_path: Path, groups: list[Rollouts]):
    """Every column of every group is read back to the last bit."""
    spool = Spool(tmp_path)
    for group in groups:
        spool.add("key", group.prompt_uid[0], group.columns())
    found = Spool(tmp_path).read("key")
    assert list(found) == [group.prompt_uid[0] for group in groups]
    for group in groups:
        back = Rollouts.of(found[group.prompt_uid[0]])
        assert back.logp_old == tuple(list(x) for x in group.logp_old)
        assert [tuple(c) for c in back.completion_ids] == [tuple(c) for c in group.completion_ids]
        assert (back.reward, back.verdict, back.seed) == (group.reward, group.verdict, group.seed)
    spool.drop("key")
    assert spool.read("key") == {}


def test_a_line_cut_at_any_byte_is_not_there(tmp_path: Path, groups: list[Rollouts]):
    """Cut anywhere in its last line, a file gives the groups before it, and takes new ones behind them."""
    spool = Spool(tmp_path)
    file = spool.file("key")
    spool.add("key", groups[0].prompt_uid[0], groups[0].columns())
    first = len(file.read_bytes())
    spool.add("key", groups[1].prompt_uid[0], groups[1].columns())
    whole = file.read_bytes()
    for cut in range(first, len(whole)):
        file.write_bytes(whole[:cut])
        assert list(spool.read("key")) == [groups[0].prompt_uid[0]]
        assert len(file.read_bytes()) == first
    spool.add("key", groups[2].prompt_uid[0], groups[2].columns())
    assert list(spool.read("key")) == [groups[0].prompt_uid[0], groups[2].prompt_uid[0]]


def test_a_damaged_line_ends_what_is_believed(tmp_path: Path, groups: list[Rollouts]):
    """A changed byte fails its line's checksum; that group and those behind it are asked for again."""
    spool = Spool(tmp_path)
    file = spool.file("key")
    spool.add("key", groups[0].prompt_uid[0], groups[0].columns())
    first = len(file.read_bytes())
    spool.add("key", groups[1].prompt_uid[0], groups[1].columns())
    spool.add("key", groups[2].prompt_uid[0], groups[2].columns())
    data = bytearray(file.read_bytes())
    data[first + 40] ^= 1
    file.write_bytes(data)
    assert list(spool.read("key")) == [groups[0].prompt_uid[0]]


def test_a_full_disk_keeps_the_groups_before(
    tmp_path: Path, groups: list[Rollouts], fail_at: Callable[[int], AbstractContextManager[None]]
):
    """Whichever disk operation fails, what was added before is read, and adding again works."""
    for number in range(1, 8):
        spool = Spool(tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        if number > 4:
            spool.add("key", "first", groups[0].columns())
        with suppress(OSError), fail_at(number - 4 if number > 4 else number):
            spool.add("key", "second", groups[1].columns())
        found = spool.read("key")
        assert "first" in found or number <= 4
        spool.add("key", "second", groups[1].columns())
        assert Rollouts.of(spool.read("key")["second"]).text == groups[1].text
