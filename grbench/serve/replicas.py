"""Several servers, one a GPU: Ray places, watches and restarts them, and HAProxy stands before them.

Each replica is an actor of Ray with a whole server in it. Where Ray has a cluster (RAY_ADDRESS), replicas are spread
over its machines; else they share this one. This process only starts both, and gives HAProxy new addresses when a
replica has moved to another machine.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grbench.config.arguments import CommandError
from grbench.serve.haproxy import Address, Proxy, certificate_of, configuration
from grbench.serve.logs import Log
from grbench.serve.options import SWITCH_S, ServeConfig, bound, deployment_of, parse

WATCH_S = 1.0  # between two looks at the replicas
ANSWER_S = 5.0  # for a replica to say where it is


class Replica:
    """A server in an actor of Ray. Its methods run on the actor's event loop."""

    def __init__(self, number: int, words: Sequence[str]) -> None:
        sys.setswitchinterval(SWITCH_S)
        self._number, self._words = number, words
        self._ended = asyncio.Event()
        self._reload = asyncio.Event()

    def address(self) -> Address:
        """Return where it listens."""
        ray: Any = importlib.import_module("ray")
        config, _, _ = parse(self._words)
        is_alone = config.host in ("127.0.0.1", "localhost")
        host = "127.0.0.1" if is_alone else ray.util.get_node_ip_address()
        return Address(self._number, host, config.port, config.grpc_port)

    async def run(self) -> None:
        """Serve until `end`."""
        from grbench.serve.server import serve

        config, file, overrides = parse(self._words)

        def load() -> Any:
            return deployment_of(file, overrides)

        with bound(config.host, config.port, "replica_port") as listener:
            await serve(load(), file, config, Log(), listener, load, self._ended, self._reload)

    def end(self) -> None:
        """Finish what is in flight and end."""
        self._ended.set()

    def reload(self) -> None:
        """Read the deployment again."""
        self._reload.set()


def words_of(words: Sequence[str], config: ServeConfig, number: int) -> list[str]:
    """Return the words of a replica's own server, from those of the command. HAProxy has the ports and TLS."""
    taken = (
        "serve.replicas=",
        "serve.port=",
        "serve.grpc_port=",
        "serve.tls_",
        "serve.replica_port=",
        "serve.replica=",
    )
    port = config.replica_port + 2 * (number - 1)
    grpc_port = "null" if config.grpc_port is None else str(port + 1)
    own = [f"serve.port={port}", f"serve.grpc_port={grpc_port}", f"serve.replica={number}"]
    return [*(word for word in words if not word.startswith(taken)), *own]


def serve_replicas(config: ServeConfig, words: Sequence[str], log: Log) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads one replica after the other. Raises CommandError."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise CommandError(
            "package ray is not installed, and it starts replicas; pip install 'grbench[ray]'", 1
        ) from None
    for name, port in (("port", config.port), ("grpc_port", config.grpc_port), ("stats_port", config.stats_port)):
        if port is not None:
            bound(config.host, port, name).close()
    ending, reloading = threading.Event(), threading.Event()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, logging_level=logging.ERROR)
    try:
        for number, event in {signal.SIGTERM: ending, signal.SIGINT: ending, signal.SIGHUP: reloading}.items():
            signal.signal(number, lambda *_, event=event: event.set())  # after Ray, which has handlers of its own
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < gpus < config.replicas:
            raise CommandError(
                f"serve.replicas={config.replicas}: there are {gpus} GPUs, and each replica takes one", 1
            )
        share = max(int(ray.cluster_resources()["CPU"]) // config.replicas, 1)
        actor: Any = ray.remote(Replica).options(
            num_cpus=0 if gpus else share, num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=-1,
            scheduling_strategy="SPREAD", runtime_env={"env_vars": {"OMP_NUM_THREADS": str(share)}},
        )  # fmt: skip
        replicas = [actor.remote(n, words_of(words, config, n)) for n in range(1, config.replicas + 1)]
        _serve(config, ray, replicas, ending, reloading, log)
    finally:
        ray.shutdown()


def _serve(
    config: ServeConfig, ray: Any, replicas: list[Any], ending: threading.Event, reloading: threading.Event, log: Log
) -> None:
    running = [replica.run.remote() for replica in replicas]
    addresses = ray.get([replica.address.remote() for replica in replicas])
    with tempfile.TemporaryDirectory(prefix="grbench-") as folder, certificate_of(config, Path(folder)) as certificate:
        proxy = Proxy(Path(folder, "haproxy.cfg"), configuration(config, addresses, certificate))
        log.info("listening", host=config.host, port=config.port, replicas=[f"{a.host}:{a.port}" for a in addresses])
        try:
            while not ending.wait(WATCH_S):
                if proxy.has_ended:
                    raise CommandError("haproxy has ended; its last lines say why", 1)
                if ended := ray.wait(running, timeout=0)[0]:
                    ray.get(ended)  # raises what ended it: a deployment that cannot serve
                    raise CommandError("a replica has ended", 1)
                if reloading.is_set():
                    reloading.clear()
                    ray.get([replica.reload.remote() for replica in replicas])
                addresses = [_now(ray, *pair) for pair in zip(replicas, addresses, strict=True)]
                proxy.replace(configuration(config, addresses, certificate))
        except ray.exceptions.RayTaskError as e:
            raise CommandError(f"a replica cannot serve: {' '.join(str(e.cause).split())}", 1) from None
        finally:
            log.info("draining", limit_s=config.drain_s)
            drained = time.monotonic() + config.drain_s
            proxy.close(config.drain_s)
            for replica in replicas:
                replica.end.remote()
            ray.wait(running, num_returns=len(running), timeout=max(drained - time.monotonic(), 1.0))
            log.info("ended")


def _now(ray: Any, replica: Any, before: Address) -> Address:
    """Return where a replica listens; while it restarts, where it was."""
    try:
        found: Address = ray.get(replica.address.remote(), timeout=ANSWER_S)
        return found
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return before
