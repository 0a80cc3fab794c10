"""What a store can answer besides the data: damaged, missing, in conflict."""


class StoreError(Exception):
    """A store cannot do what was asked; the message names the file or key and the remedy."""


class Unreachable(StoreError):
    """A database or a bucket does not answer, or a disk refuses: it may pass, and the step may be repeated."""


class Damaged(StoreError):
    """A file is not, byte for byte, what the catalog says it is."""


class Missing(StoreError, KeyError):
    """A key or an object is not in the store."""

    def __str__(self) -> str:
        """The message itself: `KeyError` would show it quoted."""
        return Exception.__str__(self)


class Conflict(StoreError):
    """A key is taken by different content."""


class Fenced(StoreError):
    """A lease is held by somebody else, or was taken over: nothing is committed."""
