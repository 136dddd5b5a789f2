"""Question to the engines, in a process of its own: which can be built here with which options and weights?

    python -m grbench.tune.legal < SPECS.json > REASONS.json

Both are lists: cells as `spec_to_json` writes them, and for each of them null or why its engine refuses it. The
constructor of an engine checks devices, precisions, caches and kernels, and loads nothing. Of weights the header says
whether they are of this model. Importing engines takes seconds and a device, which the launcher must not hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from grbench.config.schema import ConfigError, RunSpec, spec_from_json, spec_to_json
from grengines import registry

PACKAGES_ONLY = ("generate", "recommend")  # their engines need the workload's semantic IDs to be built


def refusals(specs: Sequence[RunSpec]) -> list[str | None]:
    """Return for each cell None, or why its engine can't be built on this machine. Raises ConfigError."""
    if not specs:
        return []
    done = subprocess.run(
        [sys.executable, "-m", "grbench.tune.legal"],
        input=json.dumps([spec_to_json(spec) for spec in specs]),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"the engines could not be asked what they run here ({last}); see grbench doctor") from None
    return found


def refusal(spec: RunSpec) -> str | None:
    """Return None, or why a cell can't run here: its weights are another model's, or its engine can't be built."""
    from grbench.execution.files import require_weights

    try:
        require_weights(spec)
    except ConfigError as e:
        return str(e)
    engine = registry.get(spec.engine.name)
    named = [engine.name, *(getattr(spec.engine, stage).name for stage in engine.stages)]
    for name in named:
        if reason := registry.availability(name):
            return f"engine {name}: {reason}"
    if spec.task in PACKAGES_ONLY:
        return None
    from grbench.execution import engines
    from grengines.api import Catalogue, UnavailableError

    try:
        built = engines.build(spec, Catalogue(2, 2, 2))
    except (UnavailableError, ValueError) as e:
        return " ".join(str(e).split())
    built.close()
    return None


def main() -> None:
    """Answer the question on standard input."""
    answers = [refusal(spec_from_json(text)) for text in json.load(sys.stdin)]
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main()
