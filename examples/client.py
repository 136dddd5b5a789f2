"""Ask a server of `grbench serve`, with the typed client.

    grbench serve engine=hstu model=hstu_tiny          # in another shell
    python examples/client.py [URL]

The client needs NumPy and the standard library. docs/SERVING.md has the same call with curl and with Triton's client.
"""

from __future__ import annotations

import sys

import numpy as np

from grengines.api import Request
from grengines.remote.client import Client, ServerError


def main(url: str) -> None:
    """Rank four items for a user, then show how a user's new events are sent alone."""
    request = Request(
        request_id=0,
        user_id=7,
        history_items=np.array([10, 11, 12, 13]),
        history_actions=np.array([1, 1, 0, 1]),
        history_weights=np.array([0.8, 0.6, 1.0, 0.4], np.float32),
        history_timestamps=np.array([100, 160, 220, 300]),
        num_seen=0,
        candidates=np.array([50, 51, 52, 53]),
        timestamp=360,
        arrival_s=0.0,
        deadline_ms=0.0,
    )
    client = Client(url)
    try:
        client.wait_until_ready(timeout_s=30)
        answers = client.rank([request], deadline_ms=1000)
        version = client.append(request, version=0)
    except ServerError as e:
        sys.exit(f"{e}")
    best = np.argsort(-answers.scores[0][:, 0])
    print("best first:", request.candidates[best].tolist())
    print(f"answered by {answers.parameters['strategy']} in {answers.parameters['compute_ms']} ms")
    print(f"the server has {version} events of user {request.user_id}")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    main(url) if url.startswith("http") else sys.exit(__doc__)
