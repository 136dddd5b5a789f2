"""`grbench serve`: serve a deployment, or one strategy, over HTTP and gRPC until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from grbench.config.arguments import Arguments, CommandError
from grbench.config.schema import ConfigError
from grbench.execution.ranks import asked_by, gpus_of, lacking_here
from grbench.serve.logs import Log
from grbench.serve.options import SWITCH_S, bound, deployment_of, parse

MODULES = (
    *("psutil", "starlette", "uvicorn", "uvloop", "httptools", "orjson"),
    *("prometheus_client", "grpc", "opentelemetry"),
)


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Serve strategies over the Open Inference Protocol (HTTP and gRPC): those of a deployment file, or one that "
        "the overrides of a run describe. Each is checked against the fp32 reference before it answers. "
        "`grbench config serve` lists the options serve.KEY=VALUE."
    )
    examples = [
        "serve engine=hstu",
        "serve engine=hstu cache=lru workload=synthetic serve.port=9000",
        "serve deployment=outputs/tune/TIME/best.yaml",
        "serve deployment=outputs/tune/TIME/best.yaml serve.replicas=2",
    ]
    return Arguments("serve", about, examples, "deployment=FILE, or overrides as in `grbench`; serve.KEY=VALUE")


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 a signal ended it, 1 nothing serves or can again, 2 what was given is wrong."""
    args = parser().parse_intermixed_args(words)
    config, file, overrides = parse(args.overrides)
    config_dir = None if args.config_dir is None else str(Path(args.config_dir).absolute())
    load = partial(deployment_of, file, overrides, config_dir)
    deployment = load()
    specs = deployment.specs(file or "grbench serve")
    engines = [spec.engine for spec in specs.values()]
    if config.replicas > 1 and max(map(gpus_of, engines)) > 1:
        raise ConfigError(
            f"serve.replicas={config.replicas} and {asked_by(engines)}: a replica has one GPU; set one of them to 1"
        )
    if not (config.replicas > 1 and os.environ.get("RAY_ADDRESS")):  # else the engines are on other machines
        lacking = [lacking_here(spec) for spec in specs.values()]
        if all(lacking):  # else the others serve
            raise ConfigError(f"{file}: strategies[0].overrides: {lacking[0]}" if file else str(lacking[0]))
    if missing := [name for name in MODULES if not find_spec(name)]:
        raise CommandError(f"package {missing[0]} is not installed; pip install 'grbench[serve]'", 1)
    if config.replicas > 1:
        from grbench.serve.replicas import serve_replicas

        serve_replicas(config, args.overrides, config_dir, Log())
        return 0
    sys.setswitchinterval(SWITCH_S)
    import uvloop

    from grbench.serve.server import serve

    with bound(config.host, config.port, "port") as listener:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                code = runner.run(serve(deployment, file, config, Log(), listener, load))
                sys.stdout.flush()
                # What is closed needs no more. A thread may compile for minutes or hang, and Python's own end takes
                # seconds in a process that has imported vLLM.
                os._exit(code)
        except RuntimeError as e:
            raise CommandError(e, 1) from None
        except ValueError as e:  # the workload's data, or a file that does not belong to it
            raise CommandError(e) from None
