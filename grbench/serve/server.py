"""The server of one process: it listens, brings the strategies up, and ends without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import uvicorn

from grbench.deployment import Deployment
from grbench.execution.clock import wake_on_time
from grbench.execution.heap import share_arena
from grbench.serve.connections import Connection
from grbench.serve.errors import RefusedError
from grbench.serve.http import Api
from grbench.serve.logs import Log
from grbench.serve.options import ServeConfig
from grbench.serve.rpc import Rpc
from grbench.serve.service import Service


class _Http(uvicorn.Server):
    """Uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    deployment: Deployment,
    source: str | None,
    config: ServeConfig,
    log: Log,
    listener: socket.socket,
    load: Callable[[], Deployment],
    ended: asyncio.Event | None = None,
    again: asyncio.Event | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or `ended`, and return 0. Raises RuntimeError if no strategy can serve.

    It returns 1 once no strategy serves and only another process can: the caller then ends this one.

    Clients can connect at once; the server is ready when a strategy is checked and warm. SIGHUP or `again` reloads.
    A thread may still be in an engine at the end, and the process would wait for it.
    """
    share_arena()  # both before there are threads
    wake_on_time()
    service = Service(deployment, source, config, log, load)
    end = ended or asyncio.Event()
    http = _Http(
        uvicorn.Config(
            Api(service),
            log_config=None,
            access_log=False,
            proxy_headers=False,
            lifespan="off",
            http=Connection,
            limit_concurrency=config.most_connections,
            server_header=False,
            timeout_graceful_shutdown=max(int(config.drain_s), 1),
            ssl_certfile=config.tls_cert_file,
            ssl_keyfile=config.tls_key_file,
        )
    )
    rpc = Rpc(service) if config.grpc_port is not None else None
    again = again or asyncio.Event()
    with _signals(end, again.set):
        grpc_port = await rpc.start() if rpc else None
        listening = asyncio.create_task(http.serve([listener]))
        port = listener.getsockname()[1]
        log.info("listening", host=config.host, port=port, grpc_port=grpc_port, since_start_s=_since_start_s())
        starting = asyncio.create_task(_start(service, port))
        reloads = asyncio.create_task(_reload_upon(again, service))
        stop = asyncio.create_task(end.wait())
        lost, is_lost = asyncio.create_task(service.lost.wait()), False
        try:
            await asyncio.wait({starting, stop, listening}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await asyncio.wait({stop, listening, lost}, return_when=asyncio.FIRST_COMPLETED)
            is_lost = lost.done()
            if is_lost:
                log.error("lost", error=_lost_line(service))
        finally:
            service.draining = True
            drained = time.monotonic() + config.drain_s  # one limit for all that follows
            log.info("draining", limit_s=config.drain_s)
            stop.cancel()
            lost.cancel()
            starting.cancel()
            reloads.cancel()
            http.should_exit = True
            if rpc:
                await rpc.stop(config.drain_s)
            await listening
            if not is_lost:  # else an engine may not be released any more
                await service.close(max(drained - time.monotonic(), 0.0))
            log.info("ended")
    return int(is_lost)


def _lost_line(service: Service) -> str:
    """Return why only another process can serve."""
    assert service.present is not None
    states = "; ".join(f"{s.name} is {s.state} ({s.why})" for s in service.present.controller.strategies)
    return f"no strategy serves, and only a new process can; this one ends, start it again: {states}"


async def _start(service: Service, port: int) -> None:
    await service.start()
    facts = {"model": service.model, "task": service.deployment.task, "since_start_s": _since_start_s()}
    service.log.info("ready", **facts, next=f"grbench load url={service.config.url(port)}")


def _since_start_s() -> float:
    """Return the age of this process in seconds."""
    return round(time.time() - float(psutil.Process().create_time()), 2)


async def _reload(service: Service) -> None:
    with contextlib.suppress(RefusedError):  # it is logged
        await service.reload()


async def _reload_upon(event: asyncio.Event, service: Service) -> None:
    while await event.wait():
        event.clear()
        await _reload(service)


@contextlib.contextmanager
def _signals(end: asyncio.Event, reload: Callable[[], object]) -> Iterator[None]:
    """Handle SIGTERM, SIGINT and SIGHUP on the event loop. Only the main thread can take signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: end.set, signal.SIGINT: end.set, signal.SIGHUP: reload}
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, old)
