"""Options of the server, and how a command line names them and the strategies."""

from __future__ import annotations

import ipaddress
import shlex
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from grbench import deployment
from grbench.config.compose import compose_spec, explain
from grbench.config.schema import ConfigError, RunConfig
from grbench.deployment import Deployment, Strategy
from grbench.execution.files import require_weights
from grengines.options import expand_home, option, violations
from grengines.overrides import literal

PREFIX = "serve."
BEYOND_QUEUE = 256  # connections beyond `max_queue`, so that refusals and health checks get through
SWITCH_S = 0.0005  # a thread that computes in Python gives way after this, and the event loop answers


@dataclass
class ServeConfig:
    """Options of the server. They are no part of a strategy."""

    host: str = option("127.0.0.1", "address to listen on; any but this machine's own needs `api_key_file`")
    port: int = option(8000, "port of HTTP; 0: a free one", ge=0, le=65535)
    grpc_port: int | None = option(8001, "port of gRPC; 0: a free one; null: none", ge=0, le=65535)
    replicas: int = option(
        1,
        "servers, one a GPU, each with a copy of the strategies; above 1 Ray starts them behind HAProxy",
        ge=1,
        le=256,
    )
    replica_port: int = option(8100, "first port of the replicas, which have two each", ge=1, le=65023)
    replica: int = option(0, "number of this replica, which `replicas` gives; 0: it is alone", ge=0)
    stats_port: int = option(8404, "port of HAProxy's metrics and page, on 127.0.0.1", ge=1, le=65535)
    name: str | None = option(None, "name of the model for clients; null: the model's own")
    api_key_file: str | None = option(
        None,
        "file with the key that clients send as `Authorization: Bearer KEY`; or lines `NAME KEY`, one for each client, "
        "of which none sees another's users",
        file=True,
    )
    tls_cert_file: str | None = option(None, "certificate chain in PEM; null: no TLS", file=True)
    tls_key_file: str | None = option(None, "private key of the certificate in PEM", file=True)
    max_users: int = option(64, "most users of one call", ge=1, le=65536)
    max_history: int | None = option(None, "most events of a history; null: `workload.max_history`", ge=1)
    max_candidates: int = option(4096, "most candidates of a user", ge=1, le=1_000_000)
    max_body_mb: float = option(16.0, "largest body of a call, 10^6 bytes; beyond it: status 413", gt=0, le=1024)
    max_bodies_mb: float = option(
        256.0, "most 10^6 bytes of the bodies of all calls that are not answered yet; beyond it: status 503", gt=0
    )
    body_timeout_s: float = option(10.0, "time for a client to send a body; beyond it: status 408", gt=0, le=3600)
    max_queue: int = option(1024, "most requests in the server; beyond it: status 429", ge=1, le=1_000_000)
    time_limit_s: float = option(30.0, "longest batch; beyond it the engine counts as hung", gt=0, le=3600)
    drain_s: float = option(30.0, "time to finish what is in flight when the server ends", ge=0, le=3600)
    gate_share: float = option(
        0.01, "share of the answers that the fp32 reference answers again in the background", ge=0, le=1
    )
    gate_load: float = option(
        0.02, "largest part of the time that the reference takes for that; it leaves out what is beyond", gt=0, le=1
    )
    state_users: int = option(100_000, "most users whose appended events are kept", ge=1, le=100_000_000)
    otlp_endpoint: str | None = option(
        None, "OpenTelemetry collector that gets traces, such as http://127.0.0.1:4318; null: none"
    )
    trace_share: float = option(0.01, "share of the calls that are traced, unless the client decides", ge=0, le=1)
    log_requests: bool = option(False, "log every call; false: only those that fail")

    @property
    def most_connections(self) -> int:
        """Connections of HTTP, and calls of gRPC, at a time."""
        return self.max_queue + BEYOND_QUEUE

    @property
    def is_local(self) -> bool:
        """True if only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def url(self, port: int) -> str:
        """Return the address for a client on this machine."""
        scheme = "http" if self.tls_cert_file is None else "https"
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )
        return f"{scheme}://{host}:{port}"

    @property
    def api_keys(self) -> dict[bytes, str] | None:
        """The keys that clients need, each with its client's name; None: none. Raises ConfigError for a wrong file."""
        if self.api_key_file is None:
            return None
        try:
            lines = Path(self.api_key_file).read_bytes().splitlines()
        except OSError as e:
            raise ConfigError(
                f"serve.api_key_file={self.api_key_file}: {e.strerror}; give a file that holds the key"
            ) from None
        rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise ConfigError(f"serve.api_key_file={self.api_key_file}: it is empty; write a long random key into it")
        if wrong := next((number for number, words in rows if not words[-1].isascii()), None):
            raise ConfigError(
                f"serve.api_key_file={self.api_key_file}: line {wrong}; allowed are keys of ASCII, because headers "
                "carry no other"
            )
        if len(rows) == 1 and len(rows[0][1]) == 1:
            return {rows[0][1][0]: ""}
        keys: dict[bytes, str] = {}
        for number, words in rows:
            name = words[0].decode(errors="replace")
            if len(words) != 2 or words[1] in keys or name in keys.values():
                raise ConfigError(
                    f"serve.api_key_file={self.api_key_file}: line {number}; allowed are one key without spaces, or "
                    "lines `NAME KEY` with names and keys that differ"
                )
            keys[words[1]] = name
        return keys

    def check_tls(self) -> None:
        """Read the certificate and its key. Raises ConfigError."""
        if self.tls_cert_file is None and self.tls_key_file is None:
            return
        if self.tls_cert_file is None or self.tls_key_file is None:
            raise ConfigError("serve.tls_cert_file and serve.tls_key_file: give both or neither")
        try:  # an encrypted key would ask for its password on the terminal
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls_cert_file, self.tls_key_file, password=lambda: "")
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"serve.tls_cert_file={self.tls_cert_file}, serve.tls_key_file={self.tls_key_file}: {e}; "
                "give a certificate chain and its private key, both in PEM and without a password"
            ) from None


def parse(words: Sequence[str]) -> tuple[ServeConfig, str | None, list[str]]:
    """Return the server's options, the deployment file (None: there is none), and the overrides of a run.

    Raises ConfigError, one line.
    """
    own = [word.removeprefix(PREFIX) for word in words if word.startswith(PREFIX)]
    files = [word.removeprefix("deployment=") for word in words if word.startswith("deployment=")]
    overrides = [word for word in words if not word.startswith((PREFIX, "deployment="))]
    if len(files) > 1 or (files and overrides):
        raise ConfigError(
            f"{(overrides or words)[0]}: deployment=FILE names the strategies, so no override of a run goes with it; "
            "write it into the file"
        )
    try:
        given = OmegaConf.from_dotlist(own)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ServeConfig), given))
    except (GrammarParseError, InterpolationResolutionError) as e:
        word = next(word for word in words if word.startswith(f"{PREFIX}{e.full_key}="))
        raise ConfigError(
            f"{word}: ${{ refers to another option; for the text itself type {shlex.quote(literal(word))}"
        ) from None
    except OmegaConfBaseException as e:
        raise ConfigError(f"{PREFIX}{explain(e)}") from None
    assert isinstance(config, ServeConfig)
    expand_home(config)
    if problem := next(violations(config), None):
        raise ConfigError(f"{PREFIX}{problem}")
    free = [name for name in ("port", "grpc_port") if getattr(config, name) == 0]
    if config.replicas > 1 and free:
        raise ConfigError(f"{PREFIX}{free[0]}=0: with replicas HAProxy listens, and it needs a port; give one")
    if config.max_bodies_mb < config.max_body_mb:
        raise ConfigError(
            f"{PREFIX}max_bodies_mb={config.max_bodies_mb:g}: {PREFIX}max_body_mb={config.max_body_mb:g}, so a body of "
            "that size would never be taken; give at least as much"
        )
    config.check_tls()
    if config.api_keys is None and not config.is_local:
        raise ConfigError(
            f"serve.host={config.host}: others could connect; give serve.api_key_file=FILE too, or leave 127.0.0.1"
        )
    return config, files[0] if files else None, overrides


def deployment_of(file: str | None, overrides: Sequence[str], config_dir: str | None = None) -> Deployment:
    """Return the deployment of a command line: the file's, or one strategy of the overrides. Raises ConfigError.

    config_dir: folder of the user's own YAML files, an absolute path; a file names its own.
    """
    if file is not None:
        if config_dir is not None:
            raise ConfigError(f"--config-dir: deployment=FILE names the folder; write config_dir: {config_dir} into it")
        return deployment.load(file)
    spec, _ = compose_spec(overrides, config_dir, refuse_unread=True)
    require_weights(spec)
    own = [word for word in overrides if not word.startswith("task=")]
    is_limited = spec.latency_limit_ms != RunConfig.latency_limit_ms or any(
        word.lstrip("+").startswith("latency_limit_ms=") for word in overrides
    )  # a run has a limit to report goodput, which is no deadline of a client
    return Deployment(
        version=deployment.VERSION,
        task=spec.task,
        limits={"latency_ms.p99": spec.latency_limit_ms} if is_limited else {},
        strategies=[Strategy(spec.engine.name, own or [f"engine={spec.engine.name}"])],
        config_dir=config_dir,
    )


def bound(host: str, port: int, name: str) -> socket.socket:
    """Return a socket at an address. name: the option that has the port. Raises ConfigError for one that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as e:
        listener.close()
        raise ConfigError(
            f"{PREFIX}{name}={port}: {host}: {getattr(e, 'strerror', None) or e}; give another {PREFIX}{name}"
        ) from None
    return listener
