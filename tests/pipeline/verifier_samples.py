"""Verifiers that behave well or badly on purpose: workers of ``VerifierPool`` import them by name."""

import itertools
import os
import re
import signal
import sys
import time


def echo(completion, ground_truth, spec):
    print("noise on stdout")
    print("noise on stderr", file=sys.stderr)
    return completion == ground_truth


def share(completion, ground_truth, spec):
    return float(completion)


def undecided(completion, ground_truth, spec):
    return None


def hang(completion, ground_truth, spec):
    while completion == "hang":
        time.sleep(1)
    return True


def misbehave(completion, ground_truth, spec):
    match completion:
        case "raise":
            raise RuntimeError("on purpose")
        case "exit":
            sys.exit(3)
        case "die":
            os._exit(3)
        case "text":
            return "not a number"
        case "nan":
            return float("nan")
    return True


def hang_in_c(completion, ground_truth, spec):
    match completion:
        case "regex":
            return re.fullmatch(r"(a+)+", "a" * 60 + "b") is not None
        case "loop in C":
            return sum(itertools.repeat(1, 10**15)) == 0
        case "deaf":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            return re.fullmatch(r"(a+)+", "a" * 60 + "b") is not None
    return True
