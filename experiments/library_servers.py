"""The servers that `server_libraries.py` starts, each with the Python that has its library.

Each takes a call of the Open Inference Protocol, reads its tensors into arrays, and answers three zeros a candidate.
The libraries are imported where they are used, because an interpreter has only one of them. A test starts each server
whose library its own interpreter has; `make setup` installs FastAPI alone, as a part of vLLM.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import asyncio
import logging
from typing import Any

import numpy as np

MODEL = "m"
TASKS = 3

logging.disable(logging.INFO)  # a line a call would be its cost too


def kserve(port: int) -> None:
    """Serve by KServe's SDK."""
    from kserve import InferOutput, InferResponse, Model, ModelServer

    class Ranker(Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(MODEL)
            self.ready = True

        async def predict(self, payload: Any, *_: Any, **__: Any) -> Any:
            read = {one.name: one.as_numpy() for one in payload.inputs}
            scores = np.zeros((int(read["NUM_CANDIDATES"][0]), TASKS), np.float32)
            output = InferOutput("OUTPUT", list(scores.shape), "FP32")
            output.set_data_from_numpy(scores, binary_data=payload.use_binary_outputs)
            return InferResponse(payload.id or "", MODEL, [output], use_binary_outputs=payload.use_binary_outputs)

    ModelServer(http_port=port, enable_grpc=False, enable_latency_logging=False, access_log_format=None).start(
        [Ranker()]
    )


def mlserver(port: int) -> None:
    """Serve by MLServer."""
    from mlserver import MLModel, MLServer, ModelSettings, Settings
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceResponse

    global Ranker  # MLServer imports it by name

    class Ranker(MLModel):  # type: ignore[misc]
        async def predict(self, payload: Any) -> Any:
            read = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
            scores = np.zeros((int(read["NUM_CANDIDATES"].ravel()[0]), TASKS), np.float32)
            return InferenceResponse(model_name=MODEL, outputs=[NumpyCodec.encode_output("OUTPUT", scores)])

    async def serve() -> None:  # by gRPC too, which has no switch; at port 0 gRPC takes one that is free
        settings = Settings(
            host="127.0.0.1", http_port=port, grpc_port=0, metrics_endpoint=None, parallel_workers=0,
            gzip_enabled=False, debug=False,
        )  # fmt: skip
        server = MLServer(settings)
        await server.start([ModelSettings(name=MODEL, implementation=Ranker)])

    asyncio.run(serve())


def fastapi(port: int) -> None:
    """Serve by FastAPI, with a function of our own that reads and writes the tensors."""
    import orjson
    import uvicorn
    from fastapi import FastAPI, Request, Response

    kinds = {"INT64": np.int64, "FP32": np.float32}
    app = FastAPI()

    @app.post(f"/v2/models/{MODEL}/infer")
    async def infer(request: Request) -> Response:
        body = await request.body()
        end = int(request.headers.get("inference-header-content-length", len(body)))
        content, at, read = orjson.loads(body[:end]), end, {}
        for one in content["inputs"]:
            kind = kinds[one["datatype"]]
            if "data" in one:
                read[one["name"]] = np.array(one["data"], kind)
            else:
                size = one["parameters"]["binary_data_size"]
                read[one["name"]] = np.frombuffer(body[at : at + size], kind)
                at += size
        scores = np.zeros((int(read["NUM_CANDIDATES"][0]), TASKS), np.float32)
        output: dict[str, Any] = {"name": "OUTPUT", "datatype": "FP32", "shape": scores.shape}
        if not content.get("parameters", {}).get("binary_data_output"):
            return Response(
                orjson.dumps({"model_name": MODEL, "outputs": [output | {"data": scores.ravel().tolist()}]})
            )
        output["parameters"] = {"binary_data_size": scores.nbytes}
        head = orjson.dumps({"model_name": MODEL, "outputs": [output]})
        return Response(head + scores.tobytes(), headers={"inference-header-content-length": str(len(head))})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def grbench(port: int) -> None:
    """Serve by the front end of `grbench serve`, with all its checks of a call, and without an engine behind it."""
    import uvicorn
    from front_end_parts import FACTS, without_engine

    from grbench.serve.connections import Connection
    from grbench.serve.http import Api
    from grbench.serve.metrics import Metrics
    from grbench.serve.requests import Bounds, Reply, decode, encode
    from grbench.serve.state import Histories
    from grengines.api import Catalogue

    bounds, states = Bounds("rank", Catalogue(10, 1000, 8), 64, 4096, 4096), Histories(10, 4096)

    async def infer(call: Any, *_: Any) -> tuple[Any, Any]:
        [request] = decode(call.tensors, bounds, states, 100.0)
        return encode([Reply(np.zeros((len(request.candidates), TASKS), np.float32))]), FACTS

    config = uvicorn.Config(
        Api(without_engine(infer, Metrics(None))), port=port, log_config=None, access_log=False, lifespan="off",
        http=Connection, proxy_headers=False,
    )  # fmt: skip
    uvicorn.Server(config).run()


SERVERS = {server.__name__: server for server in (grbench, fastapi, kserve, mlserver)}
