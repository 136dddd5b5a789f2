"""The memory of a server: what it keeps of users, calls and reloads has a bound."""

from __future__ import annotations

import gc
import types
from collections import deque
from typing import Any

import numpy as np
import pytest
from helpers.serving import TINY, Serving, serving

from grbench.serve import server
from grbench.serve import service as services
from grbench.serve import strategy as strategies
from grengines.cache import policies

FEW, CALLS = 8, 60
SHARED = types.ModuleType | type | types.CodeType | types.FrameType  # they lead to all objects of the process


def containers(root: object) -> list[tuple[Any, int]]:
    """The containers that an object leads to, each with its length. Of a function it follows what it is bound to."""
    seen, left, found = {id(root)}, [root], []
    while left:
        one = left.pop()
        if isinstance(one, dict | list | set | deque):
            found.append((one, len(one)))
        bound = isinstance(one, types.FunctionType)
        others = [one.__closure__, one.__defaults__, one.__kwdefaults__] if bound else gc.get_referents(one)
        for other in others:
            if id(other) not in seen and not isinstance(other, SHARED):
                seen.add(id(other))
                left.append(other)
    return found


def call_as(running: Serving, first: int) -> None:
    """Call as users that nobody has seen: ranks and appends that are answered, and calls that are refused."""
    for user in range(first, first + CALLS):
        tokens = np.arange(user, user + 10) % 500
        call = {"USER_IDS": np.array([user]), "TOKEN_LENGTHS": np.array([10]), "TOKENS": tokens}
        assert running.infer(call | {"NUM_CANDIDATES": np.array([4])})[0] == 200
        assert running.infer(call | {"NUM_CANDIDATES": np.array([11])})[0] == 400
        events = [{"name": "TOKENS", "datatype": "INT64", "shape": [10], "data": tokens.tolist()}]
        append = {"inputs": events, "parameters": {"user_id": user, "version": 0}}
        assert running.call(f"/v2/models/{running.model}/append", append)[0] == 200
        assert running.call(f"/v2/models/other_{user}/infer", {"inputs": events})[0] == 404


def test_users_and_calls_leave_nothing_beyond_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each user is new, and the reference judges each answer. A container without a bound would grow by each."""
    made: list[services.Service] = []

    class Seen(services.Service):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            made.append(self)

    monkeypatch.setattr(server, "Service", Seen)
    monkeypatch.setattr(strategies, "KNOWN_USERS", FEW)
    monkeypatch.setattr(services, "KEPT_LATENCIES", FEW)
    monkeypatch.setattr(policies.WhileItPays.__init__, "__defaults__", (FEW,))  # remembered users, of a million
    words = [
        "cache=lru",
        "cache.memory_gb=0.002",
        f"serve.state_users={FEW}",
        "serve.gate_share=1",
        "serve.gate_load=1",
    ]
    with serving("engine=hstu", *TINY, *words) as running:
        call_as(running, 1000)
        before = containers(made[0])
        call_as(running, 1000 + CALLS)
        judged = running.metric("grbench_gate_error_count")
    grown = [str(one)[:200] for one, length in before if len(one) >= length + CALLS / 4]
    assert not grown, f"{CALLS} users and calls more left these longer"
    assert judged > CALLS / 2, "the reference has judged few answers, so this says nothing about what it keeps"
    assert len(before) > 500, "it has looked at few containers"
