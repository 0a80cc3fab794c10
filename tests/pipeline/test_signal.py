"""Signals: in parts as in whole groups."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.advantages import has_signal
from pipeline.signal import Signals

rollouts = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.integers(0, 9)))


@given(rollouts, st.integers(1, 4))
def test_parts_say_what_whole_groups_say(rows, size):
    """Taken a few at a time, each prompt is seen, has a signal and its tokens as its whole group has."""
    found = Signals(6)
    for start in range(0, len(rows), size):
        prompt, reward, tokens = (np.array(column) for column in zip(*rows[start : start + size], strict=True))
        found.add(prompt, reward.astype(np.float32), tokens)
    for prompt in range(6):
        group = [(reward, tokens) for p, reward, tokens in rows if p == prompt]
        assert found.seen[prompt] == bool(group)
        assert found.signal[prompt] == (has_signal(np.array([r for r, _ in group])) if group else False)
        assert found.tokens[prompt] == sum(tokens for _, tokens in group)
