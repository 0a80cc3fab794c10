"""A verifier for tests that re-score: workers import it by name."""


def same_start(completion, ground_truth, spec):
    """Whether the first character is right."""
    return completion[:1] == ground_truth[:1]
