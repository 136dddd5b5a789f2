"""LoadGen's accuracy mode: each response carries the answer, and the answers are read back from LoadGen's own log.

The log must have every request's answer bit for bit as the engine gave it. Figures that are computed from the log are
then those of what a client of the engine receives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg
import numpy as np
import numpy.typing as npt

from grbench.scenarios.batcher import Ticket, Watch
from grengines.api import Request
from grengines.numerics import IncorrectError

LOG = "mlperf_log_accuracy.json"
Answer = npt.NDArray[Any]  # scores [candidates, tasks] of an engine that ranks, else items


class AccuracyRun:
    """The data set of one accuracy run, the answers on their way to LoadGen, and those that the engine gave."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._batch: list[Answer] = []
        self._given: dict[int, list[Answer]] = {}  # by request ID; multi stream repeats some to fill its last query

    def watching(self, watch: Watch) -> Watch:
        """Return a watch that calls `watch` and keeps a copy of each answer."""

        def both(requests: Sequence[Request], result: Any, size: int) -> None:
            watch(requests, result, size)
            answers = result.items if hasattr(result, "items") else result.scores
            self._batch = [np.array(answer, order="C") for answer in answers]
            for request, answer in zip(requests, self._batch, strict=True):
                self._given.setdefault(request.request_id, []).append(answer)

        return both

    def responses(self, tickets: Sequence[Ticket]) -> list[lg.QuerySampleResponse]:
        """Return the responses to the batch that was watched last.

        LoadGen copies the data before QuerySamplesComplete returns. The arrays live longer than that.
        """
        return [
            lg.QuerySampleResponse(ticket.key, answer.ctypes.data, answer.nbytes)
            for ticket, answer in zip(tickets, self._batch, strict=True)
        ]

    def logged(self, folder: Path) -> list[Answer]:
        """Return the answer to each request from LoadGen's log. Raises IncorrectError for one that was not given."""
        log = folder / LOG
        try:
            rows = json.loads(log.read_text())
        except (OSError, json.JSONDecodeError) as e:
            raise IncorrectError(f"{log}: LoadGen has not written its whole accuracy log ({e})") from e
        found: dict[int, Answer] = {}
        for row in rows:
            request, data = self.requests[row["qsl_idx"]], bytes.fromhex(row["data"])
            same = [answer for answer in self._given.get(request.request_id, []) if answer.tobytes() == data]
            if not same:
                raise IncorrectError(
                    f"{log}: sample {row['qsl_idx']} (user {request.user_id}) has {len(data)} bytes that are not the "
                    "engine's answer"
                )
            found[row["qsl_idx"]] = np.frombuffer(data, same[0].dtype).reshape(same[0].shape)
        if len(found) < len(self.requests):
            raise IncorrectError(f"{log}: it has answers to {len(found)} of the {len(self.requests)} requests")
        return [found[index] for index in range(len(self.requests))]
