"""Messages: what is said to a policy, as text or as parts (text and images), and what makes them the same.

A message is ``{"role", "content"}``; content is text, or a list of parts in one spelling, whatever the row had:

    {"type": "text", "text": "..."}
    {"type": "image", "image": "<path, URL or data URL>", "sha256": "<of the bytes>"}

An image is identified by the SHA-256 of its bytes where they are at hand (bytes, data URLs, local files), so that
moving a file changes nothing and another picture under the same name is another prompt; by its URL elsewhere, because
nothing is fetched, and then ``sha256`` is absent.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PLACEHOLDER = "<image>"
"""Where a text with images beside it in a column of their own has one, as verl's data sets do."""

MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}

Message = dict[str, Any]


def read_messages(prompt: Any, images: Sequence[Any], template: str | None, where: str, folder: Path) -> list[Message]:
    """Return a prompt as messages, with the template applied to the (last) thing that the user says.

    Args:
        prompt: text, or messages whose content is text or a list of parts.
        images: of a column of their own, for the places that wait for one, in order.
        template: text with one ``{prompt}``; None for none.
        where: names the row in errors.
        folder: where a path that is not found from here is looked for.

    Raises:
        ValueError: this is no prompt, it is empty, or an image is not there; the message has ``where``.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(_is_message(item) for item in prompt):
        got = str(prompt)[:200]
        raise ValueError(
            f"{where}: the prompt must be text, or messages with a text role and a content of text or of parts, and "
            f"nothing else; got {got}"
        )
    waiting = list(images)
    messages = [
        {"role": item["role"], "content": _content(item["content"], waiting, bool(images), where, folder)}
        for item in prompt
    ]
    if waiting:
        raise ValueError(
            f"{where} has {len(images)} image(s), of which {len(waiting)} have no place in its prompt: write "
            f"{PLACEHOLDER} or a part of type 'image' where each belongs"
        )
    if not any(_text(m["content"]).strip() or images_of([m]) for m in messages):
        raise ValueError(f"{where} has an empty prompt; fill it in, or leave the row out")
    if template is not None:
        _put_around(messages, template, where)
    return messages


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the parts of some messages that are images, in order."""
    return [p for m in messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] == "image"]


def has_images(messages: str) -> bool:
    """Return whether one of some messages, given as canonical JSON, holds an image."""
    return '"image"' in messages and bool(images_of(json.loads(messages)))


def is_plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether every content is text and none a list of parts."""
    return all(isinstance(message["content"], str) for message in messages)


def plain_text(content: str | Sequence[Mapping[str, Any]], *, naming: bool = True) -> str:
    """Return content as text: an image is ``<image ...>`` with its identity, or nothing where it is not named."""
    if isinstance(content, str):
        return content
    said = [_name(p) if p["type"] == "image" else p["text"] for p in content if naming or p["type"] == "text"]
    return "\n".join(said)


def identity(messages: str) -> str:
    """Return what of some messages makes them the same: an image with a digest counts by that, not by its place.

    Args:
        messages: canonical JSON of the messages; text alone comes back as it is.
    """
    if '"sha256":' not in messages:  # in a text the quotes are escaped
        return messages
    turns = json.loads(messages)
    for part in images_of(turns):
        if "sha256" in part:
            del part["image"]  # type: ignore[attr-defined]
    return json.dumps(turns, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def for_trainers(messages: Sequence[Message]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Return messages as trainers read them: every content a list of parts, and the images beside them, in order.

    An image is ``{"bytes", "path"}``, one of them None, which is how ``datasets`` stores one.
    """
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append({**message, "content": [{"type": p["type"], "text": p.get("text")} for p in parts]})
    found = [str(part["image"]) for part in images_of(messages)]
    return turns, [
        {"bytes": _decoded(x), "path": None} if x.startswith("data:") else {"bytes": None, "path": x} for x in found
    ]


def _is_message(item: Any) -> bool:
    """Return whether an item is a message: what else it carries (tool calls) must be null."""
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        return False
    if not isinstance(item.get("content"), str | list):
        return False
    return not _filled(item[key] for key in item if key not in ("role", "content"))


def _filled(values: Iterable[Any]) -> bool:
    return any(value is not None and value != [] for value in values)


def _content(content: str | list[Any], waiting: list[Any], split: bool, where: str, folder: Path) -> Any:
    if isinstance(content, str):
        if not split or PLACEHOLDER not in content:
            return content
        texts = content.split(PLACEHOLDER)
        content = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            content += [{"type": "image"}, {"type": "text", "text": text}]
        content = [part for part in content if part["type"] == "image" or part["text"]]
    return [_part(part, waiting, where, folder) for part in content]


def _part(part: Any, waiting: list[Any], where: str, folder: Path) -> dict[str, str]:
    """Return one part in our spelling; a table fills the fields that a part lacks with null."""
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
    kind = given.pop("type", None)
    if kind == "text" and list(given) == ["text"] and isinstance(given["text"], str):
        return {"type": "text", "text": given["text"]}
    if kind in ("image", "image_url"):
        given.pop("sha256", None)  # made anew from what is there
        place = next((k for k in ("image", "image_url", "url", "path", "bytes", "base64") if k in given), None)
        image = given.pop(place) if place else None
        image = (
            image["url"] if place == "image_url" and isinstance(image, Mapping) and list(image) == ["url"] else image
        )
        image = f"data:;base64,{image}" if place == "base64" else image
        if image is None and waiting:
            image = waiting.pop(0)
        if not given and image is not None:
            return {"type": "image", **_image(image, where, folder)}
    raise ValueError(
        f"{where}: a part must be {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': path, URL or bytes}}, "
        f"or an image must be there for it; got {str(part)[:200]}"
    )


def _image(image: Any, where: str, folder: Path) -> dict[str, str]:
    """Return where an image is, and the digest of its bytes where they are at hand."""
    if isinstance(image, Mapping) and set(image) <= {"bytes", "path"}:
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        kind = next((name for magic, name in MAGIC.items() if image.startswith(magic)), "application/octet-stream")
        return {"image": f"data:{kind};base64,{base64.b64encode(image).decode()}", "sha256": _digest(image)}
    if not isinstance(image, str) or not image:
        raise ValueError(f"{where}: an image must be a path, a URL or bytes, not {type(image).__name__}")
    if image.startswith("data:"):
        try:
            return {"image": image, "sha256": _digest(_decoded(image))}
        except ValueError as error:
            raise ValueError(
                f"{where}: image {image[:60]!r}... is no base64 data URL ({error}); give bytes, a path or a URL"
            ) from error
    local = image.removeprefix("file://")
    if "://" in local:
        return {"image": image}
    found = next((path for path in (Path(local), folder / local) if path.is_file()), None)
    if found is None:
        raise ValueError(f"{where}: there is no image at {image!r}; mend the path, or give the bytes or a URL")
    return {"image": str(found), "sha256": _digest(found.read_bytes())}


def _put_around(messages: list[Message], template: str, where: str) -> None:
    last = next((message for message in reversed(messages) if message["role"] == "user"), None)
    if last is None:
        raise ValueError(f"{where} has no user message to put the template around; leave template out")
    if isinstance(last["content"], str):
        last["content"] = template.replace("{prompt}", last["content"])
        return
    texts = [part for part in last["content"] if part["type"] == "text"]
    if not texts:
        raise ValueError(f"{where} has no text to put the template around; leave template out")
    texts[-1]["text"] = template.replace("{prompt}", texts[-1]["text"])


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return plain_text(content, naming=False)


def _name(part: Mapping[str, Any]) -> str:
    return f"<image {part['sha256'][:16] if 'sha256' in part else part['image']}>"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decoded(url: str) -> bytes:
    """Return the bytes of a data URL."""
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("it does not begin with data:...;base64,")
    return base64.b64decode(body, validate=True)
