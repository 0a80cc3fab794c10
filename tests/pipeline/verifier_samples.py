"""Verifiers that behave well or badly on purpose: workers of ``VerifierPool`` import them by name."""

import os
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
