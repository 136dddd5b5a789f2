"""Traces of calls for OpenTelemetry: a span for the call, and one inside it for each stage.

The spans are made after the answer is sent, from the times that the answer reports, so they take no time of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from grbench import __version__
from grbench.serve.metrics import STAGES

OF_ANSWER = STAGES[:-1]  # whose times the answer has; post is what follows them


class Traces:
    """The spans of one server. share: of the calls whose client has not decided about them."""

    def __init__(self, exporter: SpanExporter, share: float) -> None:
        resource = Resource.create({"service.name": "grbench", "service.version": __version__})
        self._provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)), resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("grbench.serve", __version__)
        self._context = TraceContextTextMapPropagator()

    def add(
        self, carrier: Mapping[str, str], took_s: float, post_s: float, status: int, facts: Mapping[str, Any]
    ) -> None:
        """Add a call that has just ended.

        carrier: headers of the client, which may hold its own trace. post_s: time after the last stage.
        facts: parameters of the answer, and further attributes.
        """
        end = time.time_ns()
        start = end - int(took_s * 1e9)
        attributes = {f"grbench.{k}": v for k, v in facts.items()} | {"http.response.status_code": status}
        call = self._tracer.start_span(
            "infer", self._context.extract(carrier), trace.SpanKind.SERVER, attributes, start_time=start
        )
        if status >= 500:
            call.set_status(trace.StatusCode.ERROR)
        if "compute_ms" in facts:
            inside = trace.set_span_in_context(call)
            at = end - int(post_s * 1e9) - int(sum(facts[f"{stage}_ms"] for stage in OF_ANSWER) * 1e6)
            self._stage("parse", inside, start, max(at, start))
            for stage in OF_ANSWER:
                at = self._stage(stage, inside, at, at + int(facts[f"{stage}_ms"] * 1e6))
            self._stage("post", inside, at, end)
        call.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _stage(self, name: str, context: Any, start: int, end: int) -> int:
        self._tracer.start_span(name, context, start_time=start).end(end)
        return end


def sent_to(endpoint: str) -> SpanExporter:
    """Return what sends spans to a collector by OTLP over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
