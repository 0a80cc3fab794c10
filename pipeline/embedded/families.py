"""Task families of the embedded default.

Numbers are written least significant digit first and in fixed width: a carry is then known before the digit that needs
it, which is what lets a policy of 335 k parameters learn them in a minute. A prompt has at most 9 characters, an answer
at most 5.

=========  ===============================================  ==================================
family     prompt                                           at the warm start
=========  ===============================================  ==================================
easy       3-digit addition without carry                   mostly solved
easysub    3-digit subtraction without borrow               mostly solved
add, sub   the same with a carry or borrow                  learnable; the validation families
chain      three 2-digit terms                              nearly hopeless
mul        3 by 2 digits                                    hopeless
rev, sort  five letters reversed, sorted                    learnable, off the validation families
nmod       ``add`` or ``sub`` labelled with the policy's    wrong label that the policy hits
           own most frequent wrong answer
noisy      ``add`` or ``sub`` with the carries left out     wrong label that it hardly hits
=========  ===============================================  ==================================
"""

from __future__ import annotations

import numpy as np

LETTERS = "abcdefghi"
ALPHABET = "0123456789+-*=RS" + LETTERS
TARGETS = ("add", "sub")
TRAINING_MIX = {"easy": 3.0, "easysub": 2.5, "add": 1.2, "sub": 1.2, "chain": 1.2, "rev": 1.2, "sort": 0.8}


def example(family: str, rng: np.random.Generator) -> tuple[str, str]:
    """Draw one prompt of ``family`` and its true answer.

    Raises:
        ValueError: the family is unknown.
    """
    if family in ("add", "easy"):
        a, b = _pair(rng, carries=family == "add")
        return f"{_low_first(a, 3)}+{_low_first(b, 3)}=", _low_first(a + b, 4)
    if family in ("sub", "easysub"):
        a, b = _pair(rng, carries=family == "sub", subtract=True)
        return f"{_low_first(a, 3)}-{_low_first(b, 3)}=", _low_first(a - b, 3)
    if family == "chain":
        terms = rng.integers(10, 100, 3).tolist()
        return "+".join(_low_first(t, 2) for t in terms) + "=", _low_first(sum(terms), 3)
    if family == "mul":
        a, b = int(rng.integers(100, 1000)), int(rng.integers(10, 100))
        return f"{_low_first(a, 3)}*{_low_first(b, 2)}=", _low_first(a * b, 5)
    if family in ("rev", "sort"):
        word = "".join(rng.choice(list(LETTERS), 5))
        return (f"R{word}=", word[::-1]) if family == "rev" else (f"S{word}=", "".join(sorted(word)))
    raise ValueError(f"family = {family!r} is unknown")


def without_carry(prompt: str) -> str:
    """Return the answer that drops every carry (or borrow) of an ``add`` or ``sub`` prompt: a wrong label."""
    a, b = prompt[:3], prompt[4:7]
    if prompt[3] == "+":
        return "".join(str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True)) + "0"
    return "".join(str((int(x) - int(y)) % 10) for x, y in zip(a, b, strict=True))


def distinct(family: str, count: int, rng: np.random.Generator, taken: set[str]) -> list[tuple[str, str]]:
    """Draw ``count`` examples whose prompts are not in ``taken``, and add them to it."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        prompt, answer = example(family, rng)
        if prompt not in taken:
            taken.add(prompt)
            found.append((prompt, answer))
    return found


def _pair(rng: np.random.Generator, *, carries: bool, subtract: bool = False) -> tuple[int, int]:
    """Draw two 3-digit numbers, the first the larger if subtracting, with or without a carry (borrow)."""
    while True:
        a, b = (int(n) for n in rng.integers(100, 1000, 2))
        if subtract:
            a, b = max(a, b), min(a, b)
            carry = any(int(x) < int(y) for x, y in zip(str(a), str(b), strict=True))
        else:
            carry = any(int(x) + int(y) > 9 for x, y in zip(str(a), str(b), strict=True))
        if carry == carries:
            return a, b


def _low_first(number: int, width: int) -> str:
    return str(number).zfill(width)[::-1]
