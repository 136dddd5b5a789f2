"""Facts of what a trained ranker has not seen, as metadata of its weights file: its figures may be of nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

_LAST_EVENTS, _SEEN_UNTIL = "without_last_events", "seen_until"


@dataclass(frozen=True)
class HeldOut:
    """Facts of what the training left out.

    last_events: the events that leaving one out predicts (protocol.py). seen_until: time of the last request that was
    trained on or chose the epoch, in seconds on the clock of the events; None if the file does not say it.
    """

    last_events: bool = False
    seen_until: int | None = None

    @classmethod
    def of(cls, weights: str | Path) -> HeldOut:
        """Read it from a weights file. A file that cannot be read says nothing; the engine has the words for it."""
        try:
            with safe_open(str(weights), framework="np") as f:
                metadata = f.metadata() or {}
        except (SafetensorError, OSError):
            return cls()
        until = metadata.get(_SEEN_UNTIL, "")
        return cls(metadata.get(_LAST_EVENTS) == "true", int(until) if until.lstrip("-").isdecimal() else None)

    def metadata(self) -> dict[str, str]:
        """Return it as the file has it."""
        until = {} if self.seen_until is None else {_SEEN_UNTIL: str(self.seen_until)}
        return {_LAST_EVENTS: str(self.last_events).lower(), **until}


def doubt_of_lists(weights: str | None) -> str:
    """Return why lists that a ranker orders cannot be evaluated: it may know the events to find; else ""."""
    if weights is None or HeldOut.of(weights).last_events:
        return ""
    return (
        f"model.weights={weights}: the file does not say that each user's last events, which are to be found, were "
        "left out of its training; train it again with `grbench train task=rank`"
    )
