"""Prompts with images: one spelling whatever the row had, an identity that follows the picture, nothing lost."""

import base64
import hashlib
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decontaminate import find_contaminated, find_duplicates
from pipeline.messages import for_trainers, identity, images_of, plain_text
from pipeline.prompts import load_prompts, render
from pipeline.records import canonical, prompt_uid


def png(colour: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")
DATA = "data:image/png;base64," + base64.b64encode(RED).decode()
DIGEST = hashlib.sha256(RED).hexdigest()
URL = "https://example.org/a.png"


def load(tmp_path, rows, **source):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts({"path": str(file), **({"data_source": "seen"} | source)})


def asked(content, **row):
    return {"prompt": [{"role": "user", "content": content}], "answer": "2", **row}


def parts(prompts, row=0):
    return json.loads(prompts.messages[row])[-1]["content"]


@pytest.mark.parametrize(
    "image",
    [
        {"type": "image", "image": DATA},
        {"type": "image", "base64": base64.b64encode(RED).decode()},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "url": None},
        {"type": "image_url", "image_url": {"url": DATA}},
        {"type": "image_url", "image_url": DATA, "text": None},
    ],
)
def test_an_image_is_known_by_its_bytes_however_it_is_written(tmp_path, image):
    """Bytes, data URLs and files of one picture give one prompt_uid, and each keeps where it is."""
    (tmp_path / "a.png").write_bytes(RED)
    text = {"type": "text", "text": "How many?"}
    plain = load(tmp_path, [asked([{"type": "image", "image": DATA}, text])])
    prompts = load(tmp_path, [asked([image, text])])
    assert prompts.prompt_uid == plain.prompt_uid
    (picture,) = images_of(json.loads(prompts.messages[0]))
    assert picture["sha256"] == DIGEST
    assert picture["image"] == str(tmp_path / "a.png") or picture["image"].endswith(base64.b64encode(RED).decode())
    assert parts(prompts)[1] == text


def test_another_picture_another_prompt(tmp_path):
    """The same file name with another picture is another prompt; the same picture elsewhere is not."""
    row, uids = [asked([{"type": "image", "image": "a.png"}])], []
    for picture in (RED, BLUE, RED):
        (tmp_path / "a.png").write_bytes(picture)
        uids.append(load(tmp_path, row).prompt_uid)
    assert uids[0] == uids[2] != uids[1]


def test_a_url_is_known_by_itself(tmp_path):
    """Nothing is fetched: a URL is its own identity, and travels as it is."""
    one, other = load(tmp_path, [asked([{"type": "image", "url": u}]) for u in (URL, URL + "?2")]).prompt_uid
    assert one != other
    assert parts(load(tmp_path, [asked([{"type": "image", "url": URL}])])) == [{"type": "image", "image": URL}]


@pytest.mark.parametrize(
    "content",
    [
        "<image>How many<image>?",
        [{"type": "image"}, {"type": "text", "text": "How many"}, {"type": "image"}, {"type": "text", "text": "?"}],
    ],
)
def test_images_of_a_column_go_where_they_are_waited_for(tmp_path, content):
    """Images of a column of their own take their places in order, in texts and in parts."""
    column = [DATA, {"bytes": None, "path": "b.png"}]
    (tmp_path / "b.png").write_bytes(BLUE)
    prompts = load(tmp_path, [asked(content, images=column)])
    assert [p["type"] for p in parts(prompts)] == ["image", "text", "image", "text"]
    assert [p.get("sha256") for p in parts(prompts)] == [DIGEST, None, hashlib.sha256(BLUE).hexdigest(), None]


def test_a_text_that_says_image_is_left_alone(tmp_path):
    """Without images beside it, a text with ``<image>`` in it is that text."""
    assert parts(load(tmp_path, [asked("what is <image>?", images=[])])) == "what is <image>?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asked([{"type": "image", "image": "nowhere.png"}]), r"row 0 .*no image at 'nowhere\.png'"),
        (asked([{"type": "video", "video": URL}]), "row 0 .*a part must be.*'video'"),
        (asked([{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]), "row 0 .*not dict"),
        (asked([{"type": "image", "image": URL, "min_pixels": 5}]), "row 0 .*a part must be.*min_pixels"),
        (asked("<image>?", images=[DATA, DATA]), r"row 0 .* has 2 image\(s\), of which 1 have no place"),
        (asked("<image><image>?", images=[DATA]), "row 0 .*or an image must be there"),
        (asked([{"type": "image", "image": "data:image/png,abc"}]), "row 0 .*no base64 data URL"),
        (asked([{"type": "text", "text": " "}]), "row 0 .*empty prompt"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, row, message):
    """A part that cannot be carried whole, an image that is not there, one too many or too few: refused by row."""
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [row])


def test_a_template_goes_around_the_text(tmp_path):
    """A template is put around the last text of the last user message; the images stay where they are."""
    prompts = load(
        tmp_path,
        [asked([{"type": "text", "text": "How many?"}, {"type": "image", "url": URL}])],
        template="Q: {prompt} A:",
    )
    assert parts(prompts)[0] == {"type": "text", "text": "Q: How many? A:"}
    assert parts(prompts)[1] == {"type": "image", "image": URL}


@given(st.text(), st.text())
def test_the_identity_of_text_is_what_it_was(text, other):
    """Messages of text alone are hashed as they are, whatever they say."""
    messages = canonical([{"role": "user", "content": text}, {"role": "assistant", "content": '{"sha256":"' + other}])
    assert identity(messages) == messages
    expected = hashlib.sha256(canonical([messages, "1", "d"]).encode()).hexdigest()[:32]
    assert prompt_uid(messages, "1", "d") == expected


def test_duplicates_are_told_apart_by_their_pictures(tmp_path):
    """One question about two pictures is two prompts, near as their texts are; about one picture in two places, one."""
    text = {"type": "text", "text": "How many objects are left of the small brown cylinder in this picture?"}
    (tmp_path / "a.png").write_bytes(RED)
    rows = [
        asked([{"type": "image", "image": DATA}, text]),
        asked([{"type": "image", "image": "data:;base64," + base64.b64encode(BLUE).decode()}, text]),
        asked([{"type": "image", "image": "a.png"}, text], data_source="elsewhere"),
    ]
    rows = [{"data_source": "seen", **row} for row in rows]
    prompts = load(tmp_path, rows, data_source="data_source")
    for near in (None, 0.5):
        assert set(find_duplicates(prompts, near)) == {max(prompts.prompt_uid[0], prompts.prompt_uid[2])}
        assert set(find_contaminated(prompts.take([0, 1]), {"test": prompts.take([2])}, near)) == {
            prompts.prompt_uid[0]
        }


def test_an_engine_for_text_says_what_it_cannot_take(llama, tmp_path):
    """Rendering a prompt with images for an engine that takes text alone names the prompt and the remedy."""
    prompts = load(tmp_path, [asked([{"type": "image", "url": URL}, {"type": "text", "text": "1+1="}])])
    with pytest.raises(ValueError, match=rf"prompt {prompts.prompt_uid[0]} holds 1 image.*leave such rows out"):
        render(prompts.messages[0], llama.tokenizer, False, prompts.prompt_uid[0])


def test_parts_of_text_alone_are_rendered_as_text(llama, tmp_path):
    """A list of text parts is no image: every engine takes it, as its texts."""
    prompts = load(tmp_path, [asked([{"type": "text", "text": "1+1="}])])
    assert render(prompts.messages[0], llama.tokenizer, False) == llama.tokenizer("1+1=").input_ids
    assert plain_text(parts(prompts)) == "1+1="


@pytest.mark.parametrize("kind", ["card", "saved", "parquet"])
def test_images_of_a_data_set_stay_the_bytes_that_they_are(tmp_path, kind):
    """Images that ``datasets`` would decode and encode anew come through byte for byte."""
    import datasets

    datasets.disable_progress_bars()
    features = {
        "prompt": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "answer": datasets.Value("string"),
    }
    rows = [{"prompt": "<image>?", "images": [{"bytes": RED, "path": None}], "answer": "1"}]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    place = tmp_path / ("set.parquet" if kind == "parquet" else "set")
    data.save_to_disk(place) if kind == "saved" else data.to_parquet(
        place if kind == "parquet" else place / "train.parquet"
    )
    (picture,) = images_of(json.loads(load_prompts({"path": str(place)}).messages[0]))
    assert picture == {"type": "image", "image": DATA, "sha256": DIGEST}


def test_a_bundle_brings_images_back_as_they_were(tmp_path):
    """Prompts with images, exported as a bundle and loaded again, are the same prompts, as ``datasets`` reads them too."""
    import datasets

    from flows.export import with_images
    from stores.bundles import write_bundle

    datasets.disable_progress_bars()
    rows = [
        asked([{"type": "image", "image": DATA}, {"type": "text", "text": "How many?"}]),
        asked([{"type": "text", "text": "And here?"}, {"type": "image", "url": URL}]),
    ]
    prompts = load(tmp_path, rows)
    n = len(prompts)
    stage = {
        "prompt_uid": list(prompts.prompt_uid),
        "prompt": [json.loads(m) for m in prompts.messages],
        "solution": list(prompts.ground_truth),
        "ground_truth": list(prompts.ground_truth),
        "data_source": list(prompts.data_source),
        "ability": list(prompts.ability),
        "reward_spec": list(prompts.verifier),
        "stage": [0] * n,
        "rank": list(range(n)),
        "n_obs": [8] * n,
        "policy_id": ["p"] * n,
    }
    control = {**stage, "prompt": [[{"role": "user", "content": "text alone"}]] * n}
    with_images([stage, control])
    write_bundle(tmp_path / "export", [stage], [control], {"prompt_uid": ["a"], "reason": ["selected"]}, {}, "# card\n")
    again = load_prompts({"path": str(tmp_path / "export"), "config": "stage_00"})
    assert again.columns() == prompts.columns()
    loaded = datasets.load_dataset(
        str(tmp_path / "export"), "stage_00", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[0]["images"] == [{"bytes": RED, "path": None}]
    assert loaded[1]["prompt"][0]["content"] == [{"type": "text", "text": "And here?"}, {"type": "image", "text": None}]
    shown = loaded.select([0]).cast_column("images", datasets.List(datasets.Image()))[0]["images"][0]
    assert shown.size == (2, 2)
    beside = load_prompts({"path": str(tmp_path / "export"), "config": "control_00"})
    assert json.loads(beside.messages[0])[0]["content"] == [{"type": "text", "text": "text alone"}]


def test_trainers_get_parts_and_images_in_order():
    """Every content becomes parts without their images, which stand beside them in order."""
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "image", "image": URL}, {"type": "text", "text": "?"}]},
    ]
    assert for_trainers(messages) == (
        [
            {"role": "system", "content": [{"type": "text", "text": "Look."}]},
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]},
        ],
        [{"bytes": None, "path": URL}],
    )


def test_a_store_keeps_prompts_with_images(tmp_path):
    """Prompts with images come out of the store as they went in, bytes and all."""
    from pipeline.records import Prompts
    from stores import open_store

    prompts = load(tmp_path, [asked([{"type": "image", "image": DATA}, {"type": "text", "text": "?"}]), asked("1+1")])
    store = open_store(tmp_path / "store")
    key = store.key("prompts", columns=prompts.columns())
    store.tables.write(key, "prompts", prompts.columns(), {})
    assert Prompts.of(open_store(tmp_path / "store").tables.read(key)) == prompts
