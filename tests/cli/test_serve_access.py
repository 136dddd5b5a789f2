"""Access to a server and its traces: several clients, TLS, and the stages of a call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as tritongrpc
from helpers.serving import TINY, Serving, certificate, serving, tiny_trace, wait_until
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from grbench.config.schema import ConfigError
from grbench.serve import traces
from grbench.serve.options import parse
from grengines.remote.client import Client, ServerError

SPANS = InMemorySpanExporter()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    """A server of two clients with TLS and traces, and its certificate."""
    folder = tmp_path_factory.mktemp("secured")
    cert, key = certificate(folder)
    (folder / "keys").write_text("shop long-secret-1\nnews long-secret-2\n")
    words = [*TINY, "engine=hstu", "cache=lru", f"serve.api_key_file={folder / 'keys'}", "serve.trace_share=0",
             f"serve.tls_cert_file={cert}", f"serve.tls_key_file={key}", "serve.otlp_endpoint=http://x"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "sent_to", lambda endpoint: SPANS)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms between two exports
        with serving(*words) as server:
            yield server, cert


@pytest.fixture
def clients(secured: tuple[Serving, Path], monkeypatch: pytest.MonkeyPatch) -> list[Client]:
    server, cert = secured
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    return [Client(f"https://localhost:{server.port}", key) for key in ("long-secret-1", "long-secret-2")]


@pytest.fixture(scope="module")
def request_() -> Any:
    return next(r for r in tiny_trace()[1].requests if len(r.history_items) > 3)


def test_no_client_sees_the_users_of_another(clients: list[Client], request_: Any) -> None:
    shop, news = clients
    events = len(request_.history_items)
    assert shop.append(request_, 0) == events
    with pytest.raises(ServerError, match=f"user {request_.user_id} has no state here") as refused:
        news.append(request_, events)
    assert refused.value.status == 404
    assert news.append(request_, 0) == events  # a new state, not a repeated delta of the other's
    known, answer = shop.rank([request_]), news.rank([request_])
    assert "cached_tokens" not in answer.parameters  # it would say what the other has asked
    np.testing.assert_allclose(answer.scores[0], known.scores[0], rtol=1e-4, atol=1e-5)


def test_tls_needs_a_certificate_that_is_known(
    secured: tuple[Serving, Path], clients: list[Client], monkeypatch: pytest.MonkeyPatch, request_: Any
) -> None:
    server, cert = secured
    assert np.isfinite(clients[0].rank([request_]).scores[0]).all()
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ServerError, match="CERTIFICATE_VERIFY_FAILED"):
        Client(f"https://localhost:{server.port}", "long-secret-1").status()
    with pytest.raises(ServerError):
        Client(f"http://localhost:{server.port}", "long-secret-1").status()
    with tritongrpc.InferenceServerClient(
        f"localhost:{server.grpc_port}", ssl=True, root_certificates=str(cert)
    ) as client:
        assert client.is_server_ready()
        with pytest.raises(tritongrpc.InferenceServerException, match="UNAUTHENTICATED"):
            client.get_server_metadata(headers={"authorization": "Bearer long-secret-3"})


def test_an_idle_client_over_tls_does_not_delay_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    words = ["serve.grpc_port=null", f"serve.tls_cert_file={cert}", f"serve.tls_key_file={key}"]
    with ExitStack() as stack:
        server = stack.enter_context(serving(*TINY, "engine=hstu", *words))
        client = Client(f"https://localhost:{server.port}")
        client.status()
        begun = time.monotonic()
        stack.close()
        assert time.monotonic() - begun < 15  # TLS alone would wait for its goodbye for 30 s
    del client  # it kept its connection until here


def test_a_traced_call_has_a_span_for_each_stage(clients: list[Client], request_: Any) -> None:
    client, trace_id = clients[0], "0af7651916cd43dd8448eb211c80319c"
    client._headers["traceparent"] = f"00-{trace_id}-b7ad6b7169203331-01"
    SPANS.clear()
    parameters = client.rank([request_]).parameters
    client._headers["traceparent"] = f"00-{trace_id}-b7ad6b7169203331-00"
    client.rank([request_])  # its client does not want a trace
    wait_until(lambda: len(SPANS.get_finished_spans()) >= 7)
    spans = {span.name: span for span in SPANS.get_finished_spans()}
    assert list(spans) == ["parse", "queue", "pack", "load", "compute", "post", "infer"]
    call = spans.pop("infer")
    assert f"{call.context.trace_id:032x}" == trace_id and f"{call.parent.span_id:016x}" == "b7ad6b7169203331"
    assert call.attributes["grbench.strategy"] == "hstu" and call.attributes["http.response.status_code"] == 200
    assert all(span.parent.span_id == call.context.span_id for span in spans.values())
    ends = [span.end_time for span in spans.values()]
    assert [span.start_time for span in spans.values()] == [call.start_time, *ends[:-1]] and ends[-1] == call.end_time
    for stage in ("pack", "load", "compute"):
        took_ms = (spans[stage].end_time - spans[stage].start_time) / 1e6
        assert took_ms == pytest.approx(parameters[f"{stage}_ms"], abs=0.001)


@pytest.mark.parametrize(
    "text, words",
    [("", "it is empty"), ("a x\na y\n", "line 2; allowed are one key without spaces, or lines `NAME KEY` with"),
     ("a x\n\nb x\n", "line 3; allowed are one key"), ("a x\nb\n", "line 2; allowed"), ("a x y", "line 1; allowed"),
     ("schlüssel", "line 1; allowed are keys of ASCII"), ("a x\nb schlüssel\n", "line 2; allowed are keys of ASCII")],
)  # fmt: skip
def test_a_wrong_file_of_keys_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=words):
        _ = parse([f"serve.api_key_file={tmp_path / 'keys'}", "serve.host=0.0.0.0"])[0].api_keys


@pytest.mark.parametrize("text, keys", [("s3cret\n", {b"s3cret": ""}), ("alice s3cret\n", {b"s3cret": "alice"})])
def test_a_file_of_one_line_has_a_key_or_a_name_and_a_key(tmp_path: Path, text: str, keys: dict[bytes, str]) -> None:
    (tmp_path / "keys").write_text(text)
    assert parse([f"serve.api_key_file={tmp_path / 'keys'}"])[0].api_keys == keys
