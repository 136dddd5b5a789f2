"""The Open Inference Protocol over gRPC.

The messages are read from open_inference.binpb into a pool of their own, because a process that also has Triton's
client has messages of the same names in the common pool.
"""

from __future__ import annotations

import math
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError

from grbench import __version__
from grbench.serve import describe
from grbench.serve.bodies import on_thread
from grbench.serve.counted import Counted
from grbench.serve.describe import EXTENSIONS, PLATFORM, VERSION
from grbench.serve.errors import RefusedError, invalid
from grbench.serve.keys import client_of
from grbench.serve.options import bound
from grbench.serve.protocol import (
    INLINE,
    NAMES,
    Call,
    Tensor,
    check_output,
    dtype_of,
    shape_of,
    shown,
    tensor_of_bytes,
    tensor_of_list,
    text_of,
)
from grbench.serve.service import Service

SERVICE = "inference.GRPCInferenceService"
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
CONTENTS = {"BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
            "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
            "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents"}  # fmt: skip
Handler = Callable[[Any, Any], Awaitable[Any]]


def messages() -> dict[str, Any]:
    """Return the classes of the protocol's messages, by name."""
    data = files("grbench.serve").joinpath("open_inference.binpb").read_bytes()
    [file] = descriptor_pb2.FileDescriptorSet.FromString(data).file
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    classes: dict[str, Any] = message_factory.GetMessageClassesForFiles([file.name], pool)
    return classes


class Rpc:
    """The gRPC server of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._keys = service.config.api_keys
        classes = {name.removeprefix("inference."): made for name, made in messages().items()}
        self._classes = classes
        handlers: dict[str, Handler] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server,
            "ModelMetadata": self._model,
            "ModelInfer": self._infer,
            "ModelConfig": self._config,
            "ModelStatistics": self._stats,
        }
        most = int(service.config.max_body_mb * 1e6)
        options = [
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that another server has is an error
        ]
        self._server_ = grpc.aio.server(options=options, maximum_concurrent_rpcs=service.config.most_connections)
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(handler, open_to_all=name in ("ServerLive", "ServerReady")),
                request_deserializer=partial(_parsed, classes[f"{name}Request"]),
                response_serializer=classes[f"{name}Response"].SerializeToString,
            )
            for name, handler in handlers.items()
        }
        self._server_.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, methods)])

    async def start(self) -> int:
        """Listen. Returns the port. Raises ConfigError for one that is taken."""
        config = self._service.config
        host = f"[{config.host}]" if ":" in config.host else config.host
        bound(config.host, config.grpc_port or 0, "grpc_port").close()  # gRPC would write lines of its own
        port = self._bind(f"{host}:{config.grpc_port}")
        await self._server_.start()
        return port

    def _bind(self, address: str) -> int:
        config = self._service.config
        if config.tls_cert_file and config.tls_key_file:
            pair = [(Path(config.tls_key_file).read_bytes(), Path(config.tls_cert_file).read_bytes())]
            return int(self._server_.add_secure_port(address, grpc.ssl_server_credentials(pair)))
        return int(self._server_.add_insecure_port(address))

    async def stop(self, limit_s: float) -> None:
        """Take no more calls, and finish those in flight within a limit."""
        await self._server_.stop(limit_s)

    def _guarded(self, handler: Handler, open_to_all: bool) -> Handler:
        async def guarded(request: Any, context: Any) -> Any:
            try:
                if not open_to_all:
                    self._client_of(context)
                if isinstance(request, DecodeError):
                    raise invalid(f"message: {request}")
                return await handler(request, context)
            except RefusedError as e:
                if e.retry_after_s is not None:
                    context.set_trailing_metadata([("retry-after-ms", f"{e.retry_after_s * 1e3:.0f}")])
                await context.abort(CODES.get(e.status, grpc.StatusCode.UNKNOWN), str(e))
            except Exception as e:
                ident = getattr(request, "id", "")[:128] or uuid.uuid4().hex
                line = " ".join(f"{type(e).__name__}: {e}".split())
                self._service.log.error("defect", request_id=ident, error=line, where=traceback.format_exc())
                await context.abort(CODES[500], f"a defect of the server; its log has request {ident}")

        return guarded

    def _client_of(self, context: Any) -> str:
        return client_of(_metadata(context).get("authorization", ""), self._keys)

    async def _live(self, request: Any, context: Any) -> Any:
        return self._classes["ServerLiveResponse"](live=True)

    async def _ready(self, request: Any, context: Any) -> Any:
        return self._classes["ServerReadyResponse"](ready=self._service.ready)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        if self._service.ready:
            describe.model_metadata(self._service, request.name, request.version)
        return self._classes["ModelReadyResponse"](ready=self._service.ready)

    async def _server(self, request: Any, context: Any) -> Any:
        return self._classes["ServerMetadataResponse"](name=PLATFORM, version=__version__, extensions=EXTENSIONS)

    async def _model(self, request: Any, context: Any) -> Any:
        facts = describe.model_metadata(self._service, request.name, request.version)
        for tensor in facts["outputs"]:
            words = tensor.pop("parameters", {})
            tensor["parameters"] = {name: {"string_param": word} for name, word in words.items()}
        return self._filled("ModelMetadataResponse", facts)

    async def _config(self, request: Any, context: Any) -> Any:
        return self._filled(
            "ModelConfigResponse", {"config": describe.model_config(self._service, request.name, request.version)}
        )

    async def _stats(self, request: Any, context: Any) -> Any:
        stats = describe.model_statistics(self._service, request.name, request.version)
        return self._filled("ModelStatisticsResponse", {"model_stats": [stats]})

    def _filled(self, name: str, content: dict[str, Any]) -> Any:
        return json_format.ParseDict(content, self._classes[name]())

    async def _infer(self, request: Any, context: Any) -> Any:
        counting = Counted(self._service, _metadata(context), request.id[:128])
        with counting as counted, self._service.bodies.held() as held:
            held.reach(size := request.ByteSize())
            self._service.serving(request.model_name, request.model_version)  # a wrong name first
            parameters = {name: _value(value) for name, value in request.parameters.items()}
            ident = text_of(request.id, "id")
            outputs = {text_of(output.name, f"outputs[{i}].name"): True for i, output in enumerate(request.outputs)}
            for part in (*request.inputs, *request.outputs):
                check_output(part.parameters, shown(part.name))
            tensors = await on_thread(_tensors, request) if size > INLINE else _tensors(request)
            left_s = context.time_remaining()
            limit_s = math.inf if left_s is None else left_s
            came = counted.begun  # gRPC hands a call over once all of it is there
            call = Call(tensors, ident, parameters, outputs, True, limit_s, self._client_of(context), came)
            tensors, facts = await self._service.infer(call, request.model_name, request.model_version, counted.begun)
            counted.answered(facts)
            return self._response(request, tensors, facts)

    def _response(self, request: Any, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Any:
        response = self._classes["ModelInferResponse"](model_name=request.model_name, model_version=VERSION)
        response.id = request.id
        for name, value in facts.items():
            kind = {str: "string_param", bool: "bool_param", int: "int64_param", float: "double_param"}[type(value)]
            setattr(response.parameters[name], kind, value)
        for name, tensor in tensors.items():
            response.outputs.add(name=name, datatype=NAMES[tensor.dtype], shape=tensor.shape)
            response.raw_output_contents.append(tensor.tobytes())
        return response


def _parsed(kind: Any, data: bytes) -> Any:
    """Return the message, or the error of one that is damaged: gRPC would log a traceback and blame the server."""
    try:
        return kind.FromString(data)
    except DecodeError as e:
        return e


def _metadata(context: Any) -> dict[str, str]:
    return dict(context.invocation_metadata())


def _tensors(request: Any) -> dict[str, Tensor]:
    """Return the inputs of a call, raw or as numbers. Raises RefusedError."""
    raws = list(request.raw_input_contents)
    if raws and len(raws) != len(request.inputs):
        raise invalid(f"raw_input_contents: {len(raws)} for {len(request.inputs)} inputs; allowed is one for each")
    tensors: dict[str, Tensor] = {}
    for i, one in enumerate(request.inputs):
        if text_of(one.name, f"inputs[{i}].name") in tensors:
            raise invalid(f"inputs[{i}].name={one.name}: it is there twice")
        dtype = dtype_of(one.datatype, one.name)
        shape = shape_of(list(one.shape), one.name)
        if raws:
            tensors[one.name] = tensor_of_bytes(raws[i], dtype, shape, one.name)
        elif (field := CONTENTS.get(one.datatype)) is None:
            raise invalid(f"{one.name}.contents: {one.datatype} goes in raw_input_contents")
        else:
            tensors[one.name] = tensor_of_list(list(getattr(one.contents, field)), dtype, shape, one.name)
    return tensors


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None
