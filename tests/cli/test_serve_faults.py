"""Engines that fail while they serve: requests fall back, wrong engines go out, repaired ones come back; overload."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as tritongrpc
from helpers import faulty_engine
from helpers.faulty_engine import FAULTS, LOSES, POISON, STICKS
from helpers.forks import fork_command, printed_lines
from helpers.serving import TINY, Serving, as_json, serving, tensors_of, tiny_trace, wait_until

from grbench.deployment import Deployment, Step, Strategy
from grbench.serve import controller, options, recovery
from grbench.serve.checked import CheckedEngine
from grbench.serve.costs import Costs, Kind
from grengines import registry

TASK = {"version": 1, "task": "rank"}


@pytest.fixture(scope="module", autouse=True)
def faulty() -> Iterator[None]:
    registry.register(faulty_engine.SPEC)
    yield
    del registry.ENGINES["faulty"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Serving]:
    """A server with two strategies of the same engine, the second one slower. A test breaks them by their labels."""
    words = [*TINY, "engine=faulty"]
    two = [
        Strategy("first", [*words, "engine.label=first"]),
        Strategy("second", [*words, "engine.label=second", "engine.delay_ms=100"]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "FIRST_PAUSE_S", 0.05)
        patch.setattr(recovery, "CALM_S", 0.0)
        patch.setattr(controller, "EXPLORE", 10**9)
        often = ["serve.time_limit_s=3", "serve.gate_share=1", "serve.gate_load=1"]
        with serving(*often, deployment=Deployment(**TASK, strategies=two)) as s:
            yield s


@pytest.fixture(autouse=True)
def repaired(pair: Serving) -> Iterator[None]:
    yield
    FAULTS.clear()
    wait_until(lambda: all(s["state"] == "ready" for s in pair.call("/status")[1]["strategies"]))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return tensors_of(tiny_trace()[1].requests[:1])


def state_of(server: Serving, name: str) -> tuple[str, str]:
    [found] = [s for s in server.call("/status")[1]["strategies"] if s["name"] == name]
    return found["state"], found["why"]


def breaks(server: Serving, tensors: dict[str, np.ndarray], fault: str) -> tuple[str, str, dict[str, Any]]:
    """Break the strategy that answers now; return its name, the other's, and the parameters of the next answer."""
    first = server.infer(tensors)[1]["parameters"]["strategy"]
    FAULTS[first] = fault
    status, answer, _ = server.infer(tensors)
    assert status == 200
    return first, ({"first", "second"} - {first}).pop(), answer["parameters"]


@pytest.mark.parametrize(
    "fault, reason",
    [("raise", "raised"), ("hang", "hung"), ("lose the device", "device"), ("not finite", "wrong")],
)
def test_another_strategy_answers_for_a_broken_one_which_comes_back(
    pair: Serving, tensors: dict[str, np.ndarray], fault: str, reason: str
) -> None:
    right = pair.infer(tensors)[1]["outputs"][0]["data"]
    broken, other, parameters = breaks(pair, tensors, fault)
    assert parameters["strategy"] == other and parameters["reason"] == "fallback"
    assert parameters["fallback_from"] == f"{broken}: {reason}"
    state, why = state_of(pair, broken)
    assert state == "out" and why.startswith(reason)
    labels = {"from": broken, "to": other, "reason": reason}
    assert pair.metric("grbench_fallbacks_total", **labels) == 1
    status, answer, _ = pair.infer(tensors)
    assert status == 200 and answer["parameters"]["strategy"] == other  # it is not asked while it is out
    FAULTS.clear()
    wait_until(lambda: state_of(pair, broken)[0] == "ready")
    assert pair.infer(tensors)[1]["outputs"][0]["data"] == pytest.approx(right, rel=1e-5)


def test_the_live_gate_takes_a_wrong_engine_out(pair: Serving, tensors: dict[str, np.ndarray]) -> None:
    broken, other, parameters = breaks(pair, tensors, "scores of others")
    assert parameters["strategy"] == broken  # its form is right, so only the reference can see it
    wait_until(lambda: pair.infer(tensors)[1]["parameters"]["strategy"] == other)  # a busy gate leaves answers out
    assert "live gate: scores differ from the reference" in state_of(pair, broken)[1]
    assert pair.metric("grbench_gate_wrong_total", strategy=broken) >= 1
    time.sleep(0.3)  # it is tried again, and refused
    assert state_of(pair, broken)[0] == "out"


def test_a_lost_strategy_is_named_while_another_serves(pair: Serving, tensors: dict[str, np.ndarray]) -> None:
    """A rebuilt engine has lost its device, too. It is let in all the same once a rebuild passes."""
    broken, other, _ = breaks(pair, tensors, "lose the device")
    wait_until(lambda: pair.metric("grbench_restart_needed", strategy=broken) == 1)
    state, why = state_of(pair, broken)
    assert state == "out" and why.count("CUDA error") == 2 and "; tried again: " in why
    assert pair.metric("grbench_restart_needed", strategy=other) == 0
    assert [pair.call(f"/v2/health/{name}")[0] for name in ("live", "ready")] == [200, 200]
    assert pair.infer(tensors)[1]["parameters"]["strategy"] == other
    FAULTS.clear()
    wait_until(lambda: state_of(pair, broken)[0] == "ready")
    assert pair.metric("grbench_restart_needed", strategy=broken) == 0
    assert "strategy lost until the process is started again" in [event["event"] for event in pair.events()]


@pytest.mark.parametrize(
    "item, why, limit_s",
    [(LOSES, "(device: RuntimeError: CUDA error", 60.0), (STICKS, "a batch has not ended after ", 0.4)],
)
def test_a_server_that_only_a_restart_brings_back_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: int, why: str, limit_s: float
) -> None:
    """Both strategies try the call that breaks them. A thread that hangs does not keep the process."""
    monkeypatch.setattr(recovery, "FIRST_PAUSE_S", 0.05)
    strategies = "".join(
        f"- name: {name}\n  overrides: [{', '.join([*TINY, 'engine=faulty', f'engine.label={name}'])}]\n"
        for name in ("first", "second")
    )
    file = tmp_path / "two.yaml"
    file.write_text(f"version: 1\ntask: rank\nstrategies:\n{strategies}")
    words = ["serve.port=0", "serve.grpc_port=null", f"serve.time_limit_s={limit_s:g}"]
    process = fork_command(tmp_path, "serve", f"deployment={file}", *words)
    try:
        events = map(json.loads, printed_lines(tmp_path / "err.txt", process))
        server = Serving(next(e for e in events if e["event"] == "listening")["port"], 0, None)  # type: ignore[arg-type]
        next(e for e in events if e["event"] == "ready")
        breaking = {"USER_IDS": [1], "TOKEN_LENGTHS": [3], "TOKENS": [1, 2, item], "NUM_CANDIDATES": [1]}
        status, answer, _ = server.infer({name: np.array(values) for name, values in breaking.items()})
        assert status == 503 and answer["error"].startswith("no strategy answered: ")
        assert process.wait(60) == 1
        rest = list(events)
        [lost] = [e for e in rest if e["event"] == "lost"]
        assert lost["error"].startswith(
            "no strategy serves, and only a new process can; this one ends, start it again: "
        )
        assert lost["error"].count("is out") == lost["error"].count(why) == 2
        assert [e["event"] for e in rest if e["event"] in ("draining", "ended")] == ["draining", "ended"]
    finally:
        process.kill()


def test_nothing_serves_when_all_are_out(pair: Serving, tensors: dict[str, np.ndarray]) -> None:
    FAULTS.update(first="raise", second="raise")
    status, answer, headers = pair.infer(tensors)
    assert status == 503 and headers["retry-after"]
    assert answer["error"].startswith("no strategy answered: ") and answer["error"].count("raised") == 2
    assert pair.infer(tensors)[1]["error"].startswith("no strategy serves: first is out")
    assert pair.call("/v2/health/ready")[0] == 503 and pair.call("/v2/health/live")[0] == 200


def test_a_request_that_no_engine_can_answer_harms_no_other(pair: Serving, tensors: dict[str, np.ndarray]) -> None:
    poison = {
        "USER_IDS": np.array([1]), "TOKEN_LENGTHS": np.array([3]), "TOKENS": np.array([1, 2, POISON]),
        "NUM_CANDIDATES": np.array([1]),
    }  # fmt: skip
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda t=t: found.append(pair.infer(t)[0])) for t in [poison, *[tensors] * 6, poison]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200] * 6 + [400] * 2
    assert "no strategy can answer this request: ValueError: one request" in pair.infer(poison)[1]["error"]
    assert [s["state"] for s in pair.call("/status")[1]["strategies"]] == ["ready", "ready"]


class Candidates(Costs):
    """Costs that no batch changes. each_s: of a candidate, in seconds."""

    def __init__(self, each_s: float) -> None:
        super().__init__(0.0, {Kind(0): 0.0})
        self._candidate_s = each_s

    def each_s(self, kind: Kind) -> float:
        return self._candidate_s * (1 << kind.candidates) / 2  # for numbers that are powers of two

    def observe(self, kinds: Sequence[Kind], seconds: float) -> None:
        pass


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of a candidate, by the label of an engine, that strategies take for their costs whatever batches take.

    Deadlines are as long, so that a slow machine meets those that the test means it to meet.
    """
    given: dict[str, float] = {}

    def measure(one: CheckedEngine, engine: Any) -> Costs:
        return Candidates(given[one.spec.engine.label])  # type: ignore[attr-defined]

    monkeypatch.setattr(CheckedEngine, "_measure", measure)
    monkeypatch.setattr(controller, "FRESH_S", np.inf)
    return given


def test_overload_degrades_first_and_then_refuses(costs: dict[str, float], tensors: dict[str, np.ndarray]) -> None:
    """An answer costs 80 s. What waits behind others is answered worse, and then not at all."""
    steps = [Step("half", max_candidates=4, loss={"auc_loss_pct": 0.3}), Step("cheap", strategy="cheap")]
    overrides = [*TINY, "engine=faulty", "scenario.max_batch=1"]
    slow = Strategy("slow", [*overrides, "engine.label=slow"])
    cheap = Strategy("cheap", [*overrides, "engine.label=cheap"])
    costs.update(slow=10.0, cheap=2.5)
    deployment = Deployment(**TASK, limits={"latency_ms.p99": 400_000.0}, strategies=[slow, cheap], degrade=steps)
    with serving("serve.gate_share=0", deployment=deployment) as server:
        for _ in range(3):
            assert server.infer(tensors)[1]["parameters"]["strategy"] == "slow"
        answers: list[tuple[int, Any, Any]] = []
        calls = [threading.Thread(target=lambda: answers.append(server.infer(tensors))) for _ in range(24)]
        FAULTS["slow"] = FAULTS["cheap"] = "hang"
        for call in calls:
            call.start()
        wait_until(lambda: server.call("/status")[1]["pending"] + len(answers) == 24)
        FAULTS.clear()
        for call in calls:
            call.join()
        answered = [a[1]["parameters"] for a in answers if a[0] == 200]
        refused = [a for a in answers if a[0] == 429]
        assert len(answered) + len(refused) == 24 and refused and len(answered) >= 4
        assert all("would take" in a[1]["error"] and int(a[2]["retry-after"]) >= 1 for a in refused)
        assert server.metric("grbench_shed_total", reason="deadline") == len(refused)
        degraded = [p for p in answered if "degraded" in p]
        assert 0 < server.metric("grbench_degraded_total") <= len(degraded) < len(answered)
        assert all(p["strategy"] == "cheap" or p["auc_loss_pct"] == 0.3 for p in degraded)
        assert {(p["degraded"], p["asked"], p["ran"]) for p in degraded} <= {
            ("half", f"candidates={tensors['NUM_CANDIDATES'][0]}", "candidates=4"),
            ("cheap", "strategy=slow", "strategy=cheap"),
        }
        status, answer, _ = server.infer(tensors, deadline_ms=1.0)
        assert status == 429 and "deadline" in answer["error"]


def test_steps_are_taken_in_their_order_before_a_call_is_refused(costs: dict[str, float]) -> None:
    """Each user of a call waits behind those before. The less time the call has, the more of them are degraded.

    After a refusal all of them may begin with a step. The answer names it once then.
    """
    users = tensors_of(tiny_trace()[1].requests[:8])
    half = Step("half", max_candidates=4, loss={"hr10_popular_loss": 0.02}, record="records/half")
    half.intervals = {"hr10_popular_loss": [0.01, 0.03]}
    overrides = [*TINY, "engine=faulty", "scenario.max_batch=1"]
    strategies = [Strategy(name, [*overrides, f"engine.label={name}"]) for name in ("usual", "cheap")]
    costs.update(usual=5.0, cheap=0.4)
    deployment = Deployment(**TASK, strategies=strategies, degrade=[half, Step("cheap", strategy="cheap")])
    with serving("serve.gate_share=0", deployment=deployment) as server:
        status, answer, _ = server.infer(users)
        assert status == 200 and "degraded" not in answer["parameters"]
        seen, refused = set[str](), 0
        for deadline_s in range(360, 0, -20):
            status, answer, headers = server.infer(users, deadline_ms=1000 * deadline_s)
            if status != 200:
                refused += 1
                assert status == 429 and int(headers["retry-after"]) >= 1
                continue
            parameters = answer["parameters"]
            taken = parameters.get("degraded", "").split(",")
            assert taken == sorted(taken, key=["", "half", "cheap"].index)
            seen |= set(taken)
            assert parameters.get("hr10_popular_loss") == (0.02 if "half" in taken else None)
            assert parameters.get("loss") == ("unknown" if "cheap" in taken else None)
            sizes = next(o["data"] for o in answer["outputs"] if o["name"] == "OUTPUT_LENGTHS")
            each = taken if len(taken) > 1 else taken * 8
            assert sizes == [4 if step == "half" else 8 for step in each]
        assert seen == {"", "half", "cheap"} and refused
        for part, value in {"value": 0.02, "low": 0.01, "high": 0.03}.items():
            assert server.metric("grbench_step_loss", step="half", loss="hr10_popular_loss", part=part) == value
        assert np.isnan(server.metric("grbench_step_loss", step="cheap", loss="unknown", part="value"))
        assert server.metric("grbench_degraded_total", step="half") and server.metric("grbench_shed_total")
        [said] = [event for event in server.events() if event["event"] == "losses not measured"]
        assert said["steps"] == {"cheap": "unknown"}


def test_connections_too_many_are_refused_and_the_earlier_ones_are_served(
    monkeypatch: pytest.MonkeyPatch, tensors: dict[str, np.ndarray]
) -> None:
    monkeypatch.setattr(options, "BEYOND_QUEUE", 1)
    with serving(*TINY, "engine=hstu", "serve.max_queue=1") as server, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(contextlib.closing(HTTPConnection("127.0.0.1", server.port))) for _ in range(2)]
        body = json.dumps({"inputs": as_json(tensors)})

        def asked(connection: HTTPConnection, path: str, body: str | None = None) -> tuple[int, Any, Any]:
            connection.request("GET" if body is None else "POST", path, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers

        for _ in range(2):
            assert [asked(one, "/v2/models/hstu_tiny/infer", body)[0] for one in kept] == [200, 200]
            for path, sent in {"/v2/models/hstu_tiny/infer": body, "/status": None, "/v2/health/live": body}.items():
                status, answer, headers = asked(HTTPConnection("127.0.0.1", server.port), path, sent)
                assert status == 503 and answer["error"].startswith("2 connections are open already (serve.max_queue=1")
                assert (headers["retry-after"], headers["connection"]) == ("1", "close")
            for name, healthy in {"live": {"live": True}, "ready": {"ready": True}}.items():
                status, answer, headers = asked(HTTPConnection("127.0.0.1", server.port), f"/v2/health/{name}")
                assert (status, answer, headers["connection"]) == (200, healthy, "close")
        kept.pop().close()
        wait_until(lambda: server.call("/status")[0] == 200)
        assert server.metric("grbench_shed_total", reason="connections") >= 6


def test_a_full_queue_refuses(tensors: dict[str, np.ndarray]) -> None:
    """A call that has room for one of its two users only leaves none of them there."""
    words = [*TINY, "engine=faulty", "engine.label=full", "serve.max_queue=2", "serve.grpc_port=null"]
    with serving(*words) as server:
        FAULTS["full"] = "hang"
        waiting = threading.Thread(target=lambda: server.infer(tensors))
        waiting.start()
        wait_until(lambda: server.call("/status")[1]["pending"] == 1)
        status, answer, headers = server.infer(tensors_of(tiny_trace()[1].requests[:2]))
        assert (status, answer["error"]) == (429, "2 requests wait already (serve.max_queue)")
        assert headers["retry-after"] and server.call("/status")[1]["pending"] == 1
        FAULTS.clear()
        waiting.join()


def test_a_call_whose_client_has_left_takes_no_place_in_a_batch_and_is_no_failure(
    tensors: dict[str, np.ndarray],
) -> None:
    """The engine hangs while a call waits behind another one, and is asked about neither that nor a cancelled one."""
    words = [*TINY, "engine=faulty", "engine.label=left", "serve.log_requests=true"]
    with serving(*words) as server, tritongrpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:

        def figures() -> tuple[float, int, int]:
            [its] = server.call("/status")[1]["strategies"]
            return server.metric("grbench_requests_total", status="499"), its["batches"], its["pending"]

        FAULTS["left"] = "hang"
        first = threading.Thread(target=server.infer, args=[tensors])
        first.start()
        wait_until(lambda: figures() == (0, 0, 1))
        body = json.dumps({"inputs": as_json(tensors)}).encode()
        head = f"POST /v2/models/hstu_tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as leaves:
            leaves.sendall(head.encode() + body)
            wait_until(lambda: figures() == (0, 0, 2))
        wait_until(lambda: figures()[0] == 1)
        FAULTS.clear()
        first.join()
        wait_until(lambda: figures() == (1, 1, 0))
        FAULTS["left"] = "hang"

        assert client.is_server_live()  # a new channel may take longer than the call has
        with pytest.raises(tritongrpc.InferenceServerException, match="Deadline Exceeded"):
            client.infer("hstu_tiny", inputs_of(tensors), request_id="late", client_timeout=0.5)
        wait_until(lambda: figures()[0] == 2)
        FAULTS.clear()
        wait_until(lambda: figures()[2] == 0)
        client.infer("hstu_tiny", inputs_of(tensors), request_id="fine")
        assert server.metric("grbench_requests_total", status="500") == 0
        assert server.metric("grbench_inflight") == 0
        calls = {
            e["request_id"]: (e["level"], e["status"], e["error"]) for e in server.events() if e["event"] == "call"
        }
        assert calls["late"] == ("error", 499, "the client has left") and calls["fine"] == ("info", 200, "")


def inputs_of(tensors: dict[str, np.ndarray]) -> list[tritongrpc.InferInput]:
    """Tensors as inputs of Triton's gRPC client."""
    made = []
    for one in as_json(tensors):
        made.append(tritongrpc.InferInput(one["name"], one["shape"], one["datatype"]))
        made[-1].set_data_from_numpy(tensors[one["name"]])
    return made
