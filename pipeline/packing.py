r"""Rollouts of one prompt packed into one row, so that the prompt is computed once for all its completions.

    row       [ padding | prompt | completion 1 | completion 2 | ... ]
    position  completion tokens count on from the prompt's end, each completion anew
    mask      a token sees the prompt and the earlier tokens of its own completion, and nothing else

Each completion's log-probabilities, and the prompt's gradient, are those of separate rows up to rounding. With few-shot
prompts and short answers the work falls by nearly the number of rollouts. A completion that does not fit beside others
in ``ROW_TOKENS`` gets a row of its own, which is the ordinary layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.policy import Policy
from pipeline.records import Rollouts

ROW_TOKENS = 1024  # the mask of a row has this many squared entries: 4 MiB in float32


@dataclass(frozen=True)
class Row:
    """One packed row: rollouts of one prompt.

    Attributes:
        prompt: index of the prompt in its batch.
        rollouts: rows of the ``Rollouts`` that are packed here.
        tokens: length of the row without padding.
    """

    prompt: int
    rollouts: tuple[int, ...]
    tokens: int


def pack(rollouts: Rollouts) -> list[Row]:
    """Return the rows that hold all ``rollouts``, prompt after prompt in order of first appearance.

    Raises:
        ValueError: two rollouts of one prompt_uid were asked with different tokens.
    """
    rows = []
    for prompt, (uid, members) in enumerate(rollouts.groups().items()):
        asked = rollouts.prompt_ids[members[0]]
        if any(not np.array_equal(rollouts.prompt_ids[i], asked) for i in members):
            raise ValueError(
                f"prompt {uid}: its rollouts hold different prompt_ids; they were made with another template"
            )
        held: list[int] = []
        length = len(asked)
        for i in members:
            size = len(rollouts.completion_ids[i])
            if held and length + size > ROW_TOKENS:
                rows.append(Row(prompt, tuple(held), length))
                held, length = [], len(asked)
            held.append(i)
            length += size
        rows.append(Row(prompt, tuple(held), length))
    return rows


def passes(rows: Sequence[Row], micro_tokens: int) -> Iterator[list[list[Row]]]:
    """Yield whole prompts as lists of backward passes of at most ``micro_tokens`` padded tokens.

    As many whole prompts as fit share one pass; a prompt that does not fit comes alone, in several passes.
    """
    start = 0
    while start < len(rows):
        stop = start
        while stop < len(rows):
            end = _end_of_prompt(rows, stop)
            if stop > start and _area(rows[start:end]) > micro_tokens:
                break
            stop = end
        chunk = list(rows[start:stop])
        per_pass = len(chunk) if _area(chunk) <= micro_tokens else max(1, micro_tokens // max(r.tokens for r in chunk))
        yield [chunk[i : i + per_pass] for i in range(0, len(chunk), per_pass)]
        start = stop


def packed_logps(policy: Policy, rollouts: Rollouts, rows: Sequence[Row]) -> Float[Tensor, "rollouts tokens"]:
    """Return the log-probability of each completion token, 0 beyond a completion's end, in float32.

    Rollouts are in the order of ``rows``. Log-probabilities are at the temperature that the rollouts were sampled at.

    Raises:
        ValueError: the rollouts were sampled at more than one temperature.
    """
    members = [i for row in rows for i in row.rollouts]
    temperatures = {rollouts.temperature[i] for i in members}
    if len(temperatures) != 1:
        raise ValueError(f"rollouts were sampled at temperatures {sorted(temperatures)}; score them one at a time")
    layout = _layout(rollouts, rows, policy.pad_id)
    window = getattr(policy.model.config, "sliding_window", None)
    if window and layout.input_ids.shape[1] > window:
        raise ValueError(f"a row of {layout.input_ids.shape[1]} tokens exceeds the model's sliding window of {window}")
    device = policy.device
    minimum = torch.finfo(policy.model.dtype).min
    mask = torch.zeros(layout.seen.shape, dtype=policy.model.dtype).masked_fill_(~layout.seen, minimum)
    logits = policy.model(
        input_ids=layout.input_ids.to(device),
        attention_mask=mask.unsqueeze(1).to(device),
        position_ids=layout.positions.to(device),
        logits_to_keep=layout.keep,
        use_cache=False,
    ).logits
    taken = logits[layout.row.to(device), layout.source.to(device)].float() / (temperatures.pop() or 1.0)
    logp = torch.log_softmax(taken, dim=-1).gather(1, layout.target.to(device)[:, None]).squeeze(1)
    tokens = max(len(rollouts.completion_ids[i]) for i in members)
    out = torch.zeros(len(members), tokens, device=device)
    return out.index_put((layout.rollout.to(device), layout.token.to(device)), logp)


@dataclass(frozen=True)
class _Layout:
    input_ids: Tensor  # (rows, length)
    positions: Tensor  # (rows, length)
    seen: Tensor  # (rows, length, length), which tokens a token attends to
    keep: int  # how many of the last positions need logits
    row: Tensor  # of each completion token: its row,
    source: Tensor  # the kept position whose logits predict it,
    target: Tensor  # its id,
    rollout: Tensor  # its rollout, counted in the order of the rows,
    token: Tensor  # and its index in the completion


def _layout(rollouts: Rollouts, rows: Sequence[Row], pad_id: int) -> _Layout:
    width = max(len(rollouts.prompt_ids[row.rollouts[0]]) for row in rows)
    length = width + max(row.tokens - len(rollouts.prompt_ids[row.rollouts[0]]) for row in rows)
    ids = np.full((len(rows), length), pad_id)
    positions = np.zeros((len(rows), length), int)
    segment = np.full((len(rows), length), -1)  # -1 padding, 0 prompt, 1.. completions
    index: list[tuple[int, int, int, int, int]] = []
    count = 0
    for r, row in enumerate(rows):
        asked = rollouts.prompt_ids[row.rollouts[0]]
        ids[r, width - len(asked) : width] = asked
        positions[r, width - len(asked) : width] = np.arange(len(asked))
        segment[r, width - len(asked) : width] = 0
        at = width
        for number, i in enumerate(row.rollouts, start=1):
            said = rollouts.completion_ids[i]
            end = at + len(said)
            ids[r, at:end], segment[r, at:end] = said, number
            positions[r, at:end] = len(asked) + np.arange(len(said))
            index += [(r, 0 if t == 0 else at - width + t, int(x), count, t) for t, x in enumerate(said)]
            at, count = end, count + 1
    order = np.arange(length)
    same = segment[:, :, None] == segment[:, None, :]
    prompt = (segment[:, None, :] == 0) & (segment[:, :, None] >= 0)
    seen = (same | prompt) & (order[:, None] >= order[None, :])
    columns = torch.tensor(index, dtype=torch.long).reshape(-1, 5).T
    return _Layout(
        torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(seen), length - width + 1, *columns
    )


def _area(rows: Sequence[Row]) -> int:
    return len(rows) * max(row.tokens for row in rows)


def _end_of_prompt(rows: Sequence[Row], start: int) -> int:
    end = start + 1
    while end < len(rows) and rows[end].prompt == rows[start].prompt:
        end += 1
    return end
