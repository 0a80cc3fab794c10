"""Every kind of source gives the same kind of prompts, and says what is wrong with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.gym import HASH_SEEDED
from pipeline.prompts import check_seed_ranges, load_prompts, render
from pipeline.records import prompt_uid
from pipeline.verifiers import gold_completion, verify

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{i} + 1 =", "answer": str(i + 1), "ability": "sum", "prompt_uid": "theirs"} for i in range(6)]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return {"path": str(path)}


@pytest.fixture(params=["parquet", "jsonl", "json", "folder", "card", "saved", "saved_splits"])
def source(request, tmp_path):
    """ROWS in each kind of place, with the keys that reading it takes."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data, kind = datasets.Dataset.from_list(ROWS), request.param
    file = tmp_path / f"sums.{kind}"
    match kind:
        case "jsonl":
            return write_jsonl(file, ROWS)
        case "json":
            file.write_text(json.dumps(ROWS))
        case "parquet":
            data.to_parquet(file)
        case "folder":
            file = tmp_path / "sums"
            data.to_parquet(file / "test.parquet")
            return {"path": str(file), "split": "test", "data_source": None}
        case "card":
            file = tmp_path / "sums"
            data.to_parquet(file / "data" / "stage_01" / "train.parquet")
            (file / "README.md").write_text(
                "---\nconfigs:\n- config_name: stage_01\n  data_files: data/stage_01/train.parquet\n---\n"
            )
            return {"path": str(file), "config": "stage_01"}
        case "saved":
            file = tmp_path / "sums"
            data.save_to_disk(file)
        case "saved_splits":
            file = tmp_path / "sums"
            datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(file)
    return {"path": str(file)}


def test_every_source_gives_the_same_prompts(source, capfd):
    """Files, folders and saved data sets give the same prompts, with identities of our own, silently."""
    prompts = load_prompts(source)
    assert prompts.ground_truth == tuple(str(i + 1) for i in range(6))
    assert prompts.messages[0] == '[{"content":"0 + 1 =","role":"user"}]'
    assert set(prompts.data_source) == {"sums"}
    assert set(prompts.ability) == {"sum"}
    assert set(prompts.verifier) == {'{"id":"exact"}'}
    assert prompts.prompt_uid[0] == prompt_uid(prompts.messages[0], "1", "sums")
    assert capfd.readouterr() == ("", "")


def test_identity_does_not_depend_on_order(tmp_path):
    """Reordering a source permutes its prompts and changes none of them."""
    one = load_prompts(write_jsonl(tmp_path / "a.jsonl", ROWS) | {"data_source": "sums"})
    two = load_prompts(write_jsonl(tmp_path / "b.jsonl", ROWS[::-1]) | {"data_source": "sums"})
    assert one.prompt_uid == two.prompt_uid[::-1]
    assert len(set(one.prompt_uid)) == 6


def test_saved_split_is_chosen_and_checked(tmp_path):
    """A saved data set gives the split that is asked for, and names those it has."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"dev": data.select([0, 1]), "test": data.select([2])}).save_to_disk(tmp_path / "d")
    assert len(load_prompts({"path": str(tmp_path / "d"), "split": "dev"})) == 2
    with pytest.raises(ValueError, match=r"'train'.*'dev', 'test'"):
        load_prompts({"path": str(tmp_path / "d")})
    with pytest.raises(ValueError, match="config = 'x'"):
        load_prompts({"path": str(tmp_path / "d"), "config": "x"})


@pytest.mark.parametrize(("task", "settings"), [("chain_sum", {"max_terms": 3}), ("countdown", None)])
def test_reasoning_gym_scores_its_own_answers(task, settings):
    """A reasoning-gym source gives prompts whose verifier accepts their own answer, the same ones each time."""
    source = {"path": f"reasoning-gym/{task}", "size": 4, "seed": 7, "settings": settings}
    prompts = load_prompts(source)
    assert len(prompts) == 4
    assert prompts == load_prompts(source)
    assert prompts.take([1]).prompt_uid == load_prompts(source | {"seed": 8, "size": 1}).prompt_uid
    assert set(prompts.data_source) == {f"reasoning-gym/{task}"}
    for text, truth in zip(prompts.verifier, prompts.ground_truth, strict=True):
        spec = json.loads(text)
        assert spec["threshold"] == 0.99
        assert spec["entry"]["answer"] == truth
        assert verify(spec, truth, gold_completion(spec, truth)).verdict == "correct"


def test_reasoning_gym_verifier_can_be_chosen():
    """Keys of ``verifier`` refine the reasoning-gym verifier; another id replaces it."""
    source = {"path": "reasoning-gym/chain_sum", "size": 1, "data_source": "prompt", "template": "Q: {prompt}"}
    refined = load_prompts(source | {"verifier": {"extract": "answer_tags", "threshold": 0.5}})
    assert json.loads(refined.verifier[0])["extract"] == "answer_tags"
    assert json.loads(refined.verifier[0])["threshold"] == 0.5
    assert refined.data_source == ("prompt",)
    assert json.loads(refined.messages[0])[0]["content"].startswith("Q: ")
    assert load_prompts(source | {"verifier": {"id": "numeric"}}).verifier == ('{"id":"numeric"}',)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "reasoning-gym/chain_sums", "size": 1}, "did you mean one of .*'chain_sum'"),
        ({"path": "reasoning-gym/chain_sum"}, "size = None"),
        ({"path": "reasoning-gym/chain_sum", "size": 1, "split": "train"}, "'split' = 'train' has no meaning"),
        ({"path": "reasoning-gym/arc_agi", "size": 1}, "once kept as JSON"),
        ({"path": "reasoning-gym/propositional_logic", "size": 1}, "without an answer"),
        ({"path": "reasoning-gym/composite", "size": 1}, "Must specify at least one dataset; mend"),
        ({"path": "reasoning-gym/chain_sum", "size": 1, "settings": {"terms": 2}}, "'terms': 2.*terms.*; mend"),
        ({}, "needs 'path'"),
    ],
)
def test_reasoning_gym_source_that_cannot_work(source, message):
    """A reasoning-gym source that cannot work fails with the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


@pytest.fixture(scope="module")
def under_hash_seeds() -> list[list[str]]:
    """The columns of each hash-seeded task as text, made in two processes with different hash seeds."""
    program = (
        "from pipeline.prompts import load_prompts\n"
        f"for task in {HASH_SEEDED}:\n"
        "    print(load_prompts({'path': f'reasoning-gym/{task}', 'size': 6, 'seed': 3}).columns())\n"
    )
    return [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for hash_seed in (1, 2)
    ]


@pytest.mark.parametrize("task", HASH_SEEDED)
def test_hash_seeded_tasks_are_the_same_under_every_hash_seed(task, under_hash_seeds):
    """A task whose entries change with the hash seed gives the same prompts in processes with different ones."""
    found = {lines[HASH_SEEDED.index(task)] for lines in under_hash_seeds}
    assert len(found) == 1
    prompts = load_prompts({"path": f"reasoning-gym/{task}", "size": 6, "seed": 3})
    assert found == {str(prompts.columns())}
    for text, truth in zip(prompts.verifier, prompts.ground_truth, strict=True):
        assert verify(json.loads(text), truth, gold_completion(json.loads(text), truth)).verdict == "correct"


@pytest.mark.parametrize("task", ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"])
def test_tasks_without_an_answer_are_refused(task):
    """A task that has no answer of its own has nothing to check its verifier with, and is refused by name."""
    with pytest.raises(ValueError, match=rf"reasoning-gym/{task}' makes entries without an answer"):
        load_prompts({"path": f"reasoning-gym/{task}", "size": 1})


@pytest.mark.parametrize("task", ["arc_agi", "rearc"])
def test_tasks_that_json_breaks_are_refused(task):
    """A task that scores its own answer otherwise once it was kept as JSON is refused with both scores."""
    with pytest.raises(ValueError, match=rf"reasoning-gym/{task}' scores its own answer 1\.0, but 0\.05 once kept"):
        load_prompts({"path": f"reasoning-gym/{task}", "size": 1})


def test_neighbouring_seeds_share_items_and_are_refused():
    """Items 1 to 4 of seed 7 are items 0 to 3 of seed 8, which is why seeds closer than the size are refused."""
    one, other = ({"path": "reasoning-gym/chain_sum", "size": 5, "seed": seed} for seed in (7, 8))
    assert load_prompts(one).messages[1:] == load_prompts(other).messages[:-1]
    with pytest.raises(ValueError, match=r"set the seed of 'validation' to 12 or more"):
        check_seed_ranges({"train": one, "validation": other})
    check_seed_ranges({"train": one, "validation": other | {"seed": 12}})


def test_verl_and_conversations_and_row_verifiers(tmp_path):
    """Rows of verl read as they are: messages, a ground truth in a struct, numbers as text, a verifier per row."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?\u2028"}]
    row = {"prompt": messages, "reward_model": {"style": "rule", "ground_truth": 4}, "data_source": "verl"}
    rows = [row, row | {"reward_spec": '{"id": "numeric"}'}, row | {"reward_spec": {"method": "rule"}}]
    prompts = load_prompts(write_jsonl(tmp_path / "a.jsonl", rows) | {"template": "{prompt} A:"})
    assert prompts.ground_truth == ("4",) * 3
    assert prompts.data_source == prompts.ability == ("verl",) * 3
    assert prompts.verifier == ('{"id":"exact"}', '{"id":"numeric"}', '{"id":"exact"}')
    said = json.loads(prompts.messages[0])
    assert [turn["content"] for turn in said] == ["Be brief.", "2 + 2?\u2028 A:"]


def test_template_is_literal(tmp_path):
    """A template is inserted around the prompt as it is, braces and all."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "{x}", "answer": "1"}]) | {"template": "{} {prompt}\n"}
    assert json.loads(load_prompts(source).messages[0])[0]["content"] == "{} {x}\n"


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([], {}, "there are no prompts"),
        (
            [{"question": "q", "gold": "1"}],
            {},
            r"lacks column\(s\) prompt, one of .*'solution'.*it has \['question', 'gold'\]",
        ),
        ([{"prompt": "q", "gold": "1"}], {"ground_truth": "golds"}, r"lacks column\(s\) golds"),
        ([{"prompt": "q", "answer": "1"}], {"ability": "skill"}, r"lacks column\(s\) skill"),
        ([{"prompt": "q", "answer": "1"}, {"prompt": " ", "answer": "1"}], {}, "row 1 of .* has an empty prompt"),
        ([{"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": None}], {}, "row 1 of .* has no answer"),
        ([{"prompt": "q", "answer": "1"}, {"answer": "1"}], {}, "row 1 of .* the prompt must be text"),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}],
            {},
            "row 0 .* or an image must be there",
        ),
        (
            [{"prompt": [{"role": "system", "content": "s"}], "answer": "1"}],
            {"template": "{prompt}"},
            "no user message",
        ),
        ([{"prompt": "q", "answer": "1", "verifier": "exact"}], {}, "row 0 .* is not JSON"),
        ([{"prompt": "q", "answer": "1", "verifier": "{}"}], {}, "row 0 .* with an 'id'"),
        ([{"prompt": "q", "answer": "1"}], {"template": "none"}, "exactly once"),
        ([{"prompt": "q", "answer": "1"}], {"promt": "q"}, "did you mean 'prompt'"),
        ([{"prompt": "q", "answer": "1"}], {"split": "train"}, "has no meaning"),
    ],
)
def test_unusable_rows_and_keys_are_named(tmp_path, rows, keys, message):
    """A column, a row or a key that cannot be used is named, with what to do."""
    with pytest.raises(ValueError, match=message):
        load_prompts(write_jsonl(tmp_path / "a.jsonl", rows) | keys)


def test_files_that_cannot_be_read(tmp_path):
    """A missing file, a broken one and one of another kind say so."""
    with pytest.raises(FileNotFoundError, match="hf download"):
        load_prompts({"path": str(tmp_path / "absent.parquet")})
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    with pytest.raises(ValueError, match=r"must be a \.parquet or \.jsonl"):
        load_prompts({"path": str(tmp_path / "a.csv")})
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": "1"}\n{oops}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is not JSON"):
        load_prompts({"path": str(tmp_path / "a.jsonl")})


def test_overlapping_seed_ranges_are_refused():
    """Two sources of one task that share items are refused by name; ranges that only touch are not."""
    train = {"path": "reasoning-gym/chain_sum", "seed": 0, "size": 100}
    with pytest.raises(ValueError, match=r"'train' \(seeds 0 to 99\) and 'val' .*seed of 'val' to 100"):
        check_seed_ranges({"val": train | {"seed": 99}, "train": train})
    with pytest.raises(ValueError, match=r"source 0.*source 1"):
        check_seed_ranges([train, {"path": train["path"], "size": 1}])
    other = train | {"path": "reasoning-gym/gcd"}
    check_seed_ranges({"train": train, "val": train | {"seed": 100}, "gcd": other, "file": {"path": "a.jsonl"}})


class Tokenizer:
    """Encodes characters, with 1 in front; its chat template is a marker per turn."""

    chat_template = "yes"

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [1, *map(ord, text)]})()

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt, continue_final_message, return_dict):
        assert tokenize
        assert not return_dict
        assert add_generation_prompt != continue_final_message
        return [7 * (turn["role"] == "user") for turn in turns] + [9] * add_generation_prompt


def test_render_gives_plain_token_ids():
    """A prompt is rendered as a list of ints, as text or through the chat template."""
    messages = '[{"content":"a","role":"system"},{"content":"b","role":"user"}]'
    assert render(messages, Tokenizer(), chat=False) == [1, 97, 10, 10, 98]
    assert render(messages, Tokenizer(), chat=True) == [0, 7, 9]
    prefilled = '[{"content":"b","role":"user"},{"content":"a","role":"assistant"}]'
    assert render(prefilled, Tokenizer(), chat=True) == [7, 0]


def test_chat_without_a_template_is_refused():
    """A base model's tokenizer cannot render a chat, and the error says what to set."""
    tokenizer = Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat = false"):
        render('[{"content":"b","role":"user"}]', tokenizer, chat=True)
