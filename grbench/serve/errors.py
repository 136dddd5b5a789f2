"""Errors that a client sees: an HTTP status and one line."""

from __future__ import annotations


class RefusedError(Exception):
    """A request is refused. The message is one line that names the field and what is allowed."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(" ".join(message.split()))  # a name that the client gave may have line breaks
        self.status, self.retry_after_s = status, retry_after_s


def invalid(message: str) -> RefusedError:
    """Return the error for input that is not as documented."""
    return RefusedError(400, message)
