"""What is known of each prompt: whole counts of successes and failures, batch by batch."""

from collections.abc import Sequence

from stores.store import Store


class Beliefs:
    """The counts that batches of trajectories committed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def history(self, batches: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
        """The (successes, failures) of each prompt in each batch that counted it.

        Args:
            batches: Keys of trajectories, oldest first; one listed twice counts once.

        Returns:
            Counts by prompt_uid, in the order of `batches`. A batch that did not roll a prompt out adds nothing to it.

        Raises:
            Missing: a batch is not in the store.
        """
        history: dict[str, list[tuple[int, int]]] = {}
        for _, uid, successes, failures in self._store.catalog.counts(batches):
            history.setdefault(uid, []).append((successes, failures))
        return history
