"""Several servers, one a GPU: Ray places, watches and restarts them, and HAProxy stands before them.

Each replica is an actor of Ray with a whole server in it. With RAY_ADDRESS, replicas are spread over the machines of
that cluster. Without it they share this machine, in a cluster of their own that nobody else can use. This process only
starts both, and gives HAProxy new addresses when a replica has moved to another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grbench.config.arguments import CommandError
from grbench.execution.ray_places import spread
from grbench.serve.haproxy import Address, Proxy, certificate_of, configuration
from grbench.serve.logs import Log
from grbench.serve.options import SWITCH_S, ServeConfig, bound, deployment_of, parse

WATCH_S = 1.0  # between two looks at the replicas
ANSWER_S = 1.0  # for the replicas to say where they are
START_S = 300.0  # for Ray to place the replicas and start their processes
LOCAL = "local"  # Ray's address of a cluster that begins and ends with this process


class Replica:
    """A server in an actor of Ray. Its methods run on the actor's event loop.

    config_dir: folder of the user's own YAML files, which the words need. is_spread: HAProxy may be on another machine,
    so the replica listens on its machine's address in the cluster.
    """

    def __init__(self, number: int, words: Sequence[str], config_dir: str | None, is_spread: bool) -> None:
        sys.setswitchinterval(SWITCH_S)
        self._number, self._words, self._config_dir, self._is_spread = number, words, config_dir, is_spread
        self._ended = asyncio.Event()
        self._reload = asyncio.Event()

    @cached_property
    def _parsed(self) -> tuple[ServeConfig, str | None, list[str]]:
        """Meaning of the words. It is no part of `__init__`, whose errors Ray wraps in a traceback."""
        config, file, overrides = parse(self._words)
        if self._is_spread:
            ray: Any = importlib.import_module("ray")
            config.host = ray.util.get_node_ip_address()
        return config, file, overrides

    def address(self) -> Address:
        """Return where it listens."""
        config, _, _ = self._parsed
        return Address(self._number, config.host, config.port, config.grpc_port)

    async def run(self) -> None:
        """Serve until `end`. If only another process can serve, this one ends, and Ray starts another.

        One that Ray has started again and that can't serve does the same: what it needs may come back, and the other
        replicas go on. Before that, what can't serve is an error of the command.
        """
        try:
            code = await self._serve()
        except Exception as e:
            ray: Any = importlib.import_module("ray")
            if not (ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed):
                raise
            Log().error("not started again", replica=self._number, error=" ".join(str(e).split()))
            code = 1
        if code:
            os._exit(code)

    async def _serve(self) -> int:
        from grbench.serve.server import serve

        config, file, overrides = self._parsed
        load = partial(deployment_of, file, overrides, self._config_dir)
        with bound(config.host, config.port, "replica_port") as listener:
            return await serve(load(), file, config, Log(), listener, load, self._ended, self._reload)

    def end(self) -> None:
        """Finish what is in flight and end."""
        self._ended.set()

    def reload(self) -> None:
        """Read the deployment again."""
        self._reload.set()


def words_of(words: Sequence[str], config: ServeConfig, number: int) -> list[str]:
    """Return the words of a replica's own server, from those of the command. HAProxy has the address and TLS."""
    taken = (
        "serve.host=",
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


def serve_replicas(config: ServeConfig, words: Sequence[str], config_dir: str | None, log: Log) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP makes all replicas reload at once. Raises CommandError.

    words, config_dir: of the command.
    """
    if find_spec("ray") is None:
        raise CommandError("package ray is not installed, and it starts replicas; pip install 'grbench[ray]'", 1)
    cluster = os.environ.get("RAY_ADDRESS") or LOCAL
    if cluster != LOCAL:
        _check_spread(config, cluster)
    for name, port in (("port", config.port), ("grpc_port", config.grpc_port)):
        if port is not None:
            bound(config.host, port, name).close()
    bound("127.0.0.1", config.stats_port, "stats_port").close()
    if cluster == LOCAL:  # before the import of Ray, which reads it: Ray listens on every address of the machine
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else Ray leaves out lines that two replicas log alike
    ray: Any = importlib.import_module("ray")
    try:
        ray.init(address=cluster, include_dashboard=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        raise CommandError(f"RAY_ADDRESS={cluster}: Ray does not start there: {' '.join(str(e).split())}", 1) from None
    ending, reloading = threading.Event(), threading.Event()
    try:
        for number, event in {signal.SIGTERM: ending, signal.SIGINT: ending, signal.SIGHUP: reloading}.items():
            signal.signal(number, lambda *_, event=event: event.set())  # after Ray, which has handlers of its own
        actor = _actor(ray, config.replicas)
        replicas = [
            actor.remote(n, words_of(words, config, n), config_dir, cluster != LOCAL)
            for n in range(1, config.replicas + 1)
        ]
        _serve(config, ray, replicas, ending, reloading, log)
    except ray.exceptions.RayTaskError as e:
        raise CommandError(f"a replica cannot serve: {' '.join(str(e.cause).split())}", 1) from None
    except ray.exceptions.RayError as e:
        raise CommandError(f"Ray: {' '.join(str(e).split())}", 1) from None
    finally:
        ray.shutdown()


def _check_spread(config: ServeConfig, cluster: str) -> None:
    """Raises CommandError for options that do not fit replicas on several machines."""
    if config.is_local:
        raise CommandError(
            f"serve.host={config.host}: with RAY_ADDRESS={cluster} replicas are on other machines, and this address is "
            "not; give serve.host=0.0.0.0 and serve.api_key_file=FILE, or unset RAY_ADDRESS"
        )
    if config.tls_cert_file:
        raise CommandError(
            f"serve.tls_cert_file={config.tls_cert_file}: with RAY_ADDRESS={cluster} calls would go on from HAProxy to "
            "other machines without TLS; unset RAY_ADDRESS, or leave TLS out and end it before the server"
        )


def _actor(ray: Any, count: int) -> Any:
    """Return the class of the replicas with what each takes of the cluster. Raises CommandError if that is too little.

    A replica takes a GPU, or without GPUs its share of the processors. All have equally many threads.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("GPU", "CPU"))
    room, what = (gpus, "GPUs") if any(gpus) else (cpus, "processors")
    if (there := sum(room)) < count:
        raise CommandError(
            f"serve.replicas={count}: each takes one of the {what}, and there are {there}; give fewer", 1
        )
    if any(gpus):  # Ray may put as many on a node as it has GPUs
        share = max(min(cpu // gpu for gpu, cpu in zip(gpus, cpus, strict=True) if gpu), 1)
    else:
        _, share = spread(count, room, cpus)
    return ray.remote(Replica).options(
        num_cpus=0 if any(gpus) else share, num_gpus=1 if any(gpus) else 0, max_restarts=-1, max_task_retries=-1,
        scheduling_strategy="SPREAD", runtime_env={"env_vars": {"OMP_NUM_THREADS": str(share)}},
    )  # fmt: skip


def _serve(
    config: ServeConfig, ray: Any, replicas: list[Any], ending: threading.Event, reloading: threading.Event, log: Log
) -> None:
    running = [replica.run.remote() for replica in replicas]
    proxy: Proxy | None = None
    with tempfile.TemporaryDirectory(prefix="grbench-") as folder, certificate_of(config, Path(folder)) as certificate:
        try:
            addresses = _started(ray, replicas, ending)
            if ending.is_set():
                return
            proxy = Proxy(Path(folder, "haproxy.cfg"), configuration(config, addresses, certificate))
            where = [f"{a.host}:{a.port}" for a in addresses]
            command = f"grbench load url={config.url(config.port)}"
            log.info("listening", host=config.host, port=config.port, replicas=where, next=command)
            while not ending.wait(WATCH_S):
                if proxy.has_ended:
                    raise CommandError("haproxy has ended; its last lines say why", 1)
                if ended := ray.wait(running, timeout=0)[0]:
                    ray.get(ended)  # raises what ended it: a deployment that cannot serve
                    raise CommandError("a replica has ended", 1)
                if reloading.is_set():
                    reloading.clear()
                    for replica in replicas:
                        replica.reload.remote()  # nobody waits for it: one that restarts reads the deployment anyway
                addresses = _now(ray, replicas, addresses)
                proxy.replace(configuration(config, addresses, certificate))
        finally:
            limit_s = config.drain_s if proxy else 0.0  # without HAProxy no call has come
            log.info("draining", limit_s=limit_s)
            drained = time.monotonic() + limit_s
            if proxy:
                proxy.close(limit_s)
            for replica in replicas:
                replica.end.remote()
            ray.wait(running, num_returns=len(running), timeout=max(drained - time.monotonic(), 1.0))
            log.info("ended")


def _started(ray: Any, replicas: list[Any], ending: threading.Event) -> list[Address]:
    """Wait until all replicas run, or a signal comes, and return where they listen. Raises CommandError."""
    asked = [replica.address.remote() for replica in replicas]
    waiting, limit = asked, time.monotonic() + START_S
    found: list[Address] = []
    while waiting and not ending.is_set():
        if time.monotonic() > limit:
            raise CommandError(
                f"{len(waiting)} of {len(asked)} replicas have not started within {START_S:g} s: the machines have "
                "too little free for them, or are slow; give a smaller serve.replicas",
                1,
            )
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=WATCH_S)
        found += ray.get(done)
    return sorted(found, key=lambda address: address.number)


def _now(ray: Any, replicas: list[Any], before: list[Address]) -> list[Address]:
    """Return where the replicas listen, and of one that restarts where it was."""
    asked = [replica.address.remote() for replica in replicas]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    found = list(before)
    for place, address in enumerate(asked):
        if address in answered:
            with contextlib.suppress(ray.exceptions.RayActorError):
                found[place] = ray.get(address)
    return found
