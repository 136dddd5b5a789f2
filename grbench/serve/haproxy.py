"""HAProxy before the replicas of a server: its configuration, and the process.

HAProxy chooses the replica of a call, by the user's header or parameter of the URL (consistent hashing with bounded
load), so that a user comes back to the replica that holds their state. It checks each replica's health, and tries a
call again elsewhere if a replica is lost. Nothing of this is done here.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from grbench.config.arguments import CommandError
from grbench.serve.options import ServeConfig
from grengines.remote.client import USER_HEADER

OWNER_HEADER = "x-grbench-owner"  # says whose the user of a call is, see `_routes`
WEIGHT = 16  # of each replica: with the 16 points on the ring of weight 1 some have far more users than others
PR_SET_PDEATHSIG = 1  # of Linux's prctl
INSTALL = "apt-get install haproxy, or conda install -c conda-forge haproxy"


@dataclass(frozen=True)
class Address:
    """The place where a replica listens. Its number is its place on the ring, so it stays when others come and go."""

    number: int  # from 1
    host: str
    port: int
    grpc_port: int | None

    @property
    def name(self) -> str:
        return f"replica{self.number}"


def configuration(config: ServeConfig, replicas: Sequence[Address], certificate: Path | None = None) -> str:
    """Return HAProxy's configuration. certificate: chain and key in one file; None: no TLS."""
    template = Template(files("grbench.serve").joinpath("haproxy.cfg").read_text(encoding="utf-8"))
    tls = f" ssl crt {certificate}" if certificate else ""
    servers = [f"    server {r.name} {r.host}:{r.port} id {r.number} weight {WEIGHT} check" for r in replicas]
    any_servers = [f"    server {r.name} {r.host}:{r.port} track replicas/{r.name}" for r in replicas]
    grpc_bind, grpc_servers, any_grpc_servers = "", [], []
    if config.grpc_port is not None:
        grpc_bind = f"    bind {config.host}:{config.grpc_port}{f'{tls} alpn h2' if tls else ' proto h2'}"
        grpc_servers = [
            f"    server {r.name} {r.host}:{r.grpc_port} id {r.number} weight {WEIGHT} proto h2 check port {r.port} "
            "check-proto h1"
            for r in replicas
        ]
        any_grpc_servers = [
            f"    server {r.name} {r.host}:{r.grpc_port} proto h2 track grpc_replicas/{r.name}" for r in replicas
        ]
    return template.substitute(
        bind=f"{config.host}:{config.port}{tls}",
        stats=f"127.0.0.1:{config.stats_port}",
        header=USER_HEADER,
        owner=OWNER_HEADER,
        connections=config.most_connections,
        drain_s=max(int(config.drain_s), 1),
        routes=_routes("replicas", replicas),
        servers="\n".join(servers),
        any_servers="\n".join(any_servers),
        grpc_bind=grpc_bind,
        grpc_routes=_routes("grpc_replicas", replicas) if grpc_servers else "",
        grpc_servers="\n".join(grpc_servers),
        any_grpc_servers="\n".join(any_grpc_servers),
    )


def _routes(backend: str, replicas: Sequence[Address]) -> str:
    """Return the rules by which a backend says to a replica whose the user of a call is.

    OWNER_HEADER has the number of the replica that the user's calls go to, 0 if it is not known, and then " full" if
    that replica is up and has all the calls that `hash-balance-factor` leaves it. HAProxy does not say that it passed a
    call on, so this is computed as it does (rounded down: it gives some replicas one call more). A replica that
    answers becomes the user's, unless the user's own was full: then the call was passed on, and the next may go back.
    """
    calls = {r.number: f"srv_conn({backend}/{r.name})" for r in replicas}
    full = [
        f"set-var(txn.full) bool(true) if {{ sc0_get_gpt0 eq {r.number} }} {{ srv_is_up({backend}/{r.name}) }} "
        f"{{ {calls[r.number]} ge 1 }} {{ {calls[r.number]},sub(txn.most) ge 0 }}"
        for r in replicas
    ]
    rules = [
        f"track-sc0 req.hdr({USER_HEADER}) table replicas",
        f"set-var(txn.up) nbsrv({backend})",
        "set-var(txn.calls) int(1)",  # this one
        *(f"set-var(txn.calls) {of_one},add(txn.calls)" for of_one in calls.values()),
        "set-var(txn.most) var(txn.calls),mul(125),add(99),div(100),div(txn.up)",
        *full,
        f"set-header {OWNER_HEADER} %[sc0_get_gpt0]",
        f'set-header {OWNER_HEADER} "%[sc0_get_gpt0] full" if {{ var(txn.full) -m bool }}',
    ]
    lines = [*(f"http-request {rule}" for rule in rules),
             "http-response sc-set-gpt0(0) srv_id unless { var(txn.full) -m bool }"]  # fmt: skip
    return "\n".join(f"    {line}" for line in lines)


class Proxy:
    """HAProxy as a process of its own, with a configuration that can be replaced while it runs.

    It ends when the thread that made it ends, even by SIGKILL.
    """

    def __init__(self, file: Path, text: str) -> None:
        """Raises CommandError if it is not installed or does not take the configuration."""
        if (program := shutil.which("haproxy")) is None:
            raise CommandError(f"haproxy is not installed, and it stands before replicas; {INSTALL}", 1)
        self._program, self._file, self._text = program, file, ""
        self._check(text)
        prctl = ctypes.CDLL(None).prctl  # found before the fork: the child may take no lock
        self._process = subprocess.Popen(
            [program, "-W", "-db", "-f", str(file)],
            start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def replace(self, text: str) -> None:
        """Take another configuration, if it is another: the old workers finish what they hold."""
        if text != self._text:
            self._check(text)
            self._process.send_signal(signal.SIGUSR2)

    def close(self, limit_s: float) -> None:
        """Take no more calls, finish those in flight within the limit, and end."""
        self._process.send_signal(signal.SIGUSR1)
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()

    def _check(self, text: str) -> None:
        self._file.write_text(text, encoding="utf-8")
        checked = subprocess.run([self._program, "-c", "-q", "-f", str(self._file)], capture_output=True, text=True)
        if checked.returncode:
            line = next((line for line in checked.stderr.splitlines() if "ALERT" in line), checked.stderr)
            raise CommandError(f"haproxy refuses {self._file}: {' '.join(line.split())}", 1)
        self._text = text


@contextlib.contextmanager
def certificate_of(config: ServeConfig, folder: Path) -> Iterator[Path | None]:
    """Write certificate and key as the one file that HAProxy reads, which only the owner can read, for a time."""
    if not (config.tls_cert_file and config.tls_key_file):
        yield None
        return
    file = folder / "certificate.pem"
    file.touch(0o600)
    try:
        file.write_bytes(Path(config.tls_cert_file).read_bytes() + b"\n" + Path(config.tls_key_file).read_bytes())
        yield file
    finally:
        file.unlink()
