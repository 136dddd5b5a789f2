"""Export a ranking model: ONNX, a torch.export program, a manifest, and a check against the fp32 reference.

    python -m grengines.export --out outputs/export --model conf/model/hstu_tiny.yaml --items 1682 --actions 2
    python -m grengines.export --out outputs/export --weights trained.safetensors

The model's options come from --model, a YAML file such as those in conf/model/, or from --weights, whose file says what
it was written for; key=value on the command line wins. Exit codes: 0 exported and checked, 1 the check failed, 2 what
was given can't be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from grengines.api import Catalogue, UnavailableError
from grengines.models.hstu.config import HSTUConfig
from grengines.options import describe, violations

PROG = "grengines.export"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an export in it is replaced")
    model_arguments(parser)
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16", "int8"], default="fp32")
    parser.add_argument(
        "--skip-hidden", action="store_true", help="attention for runtimes whose shapes may change within a loop"
    )
    args = parser.parse_args()
    try:
        model, catalogue = described(args)
        return run(model, catalogue, args)
    except (ValueError, UnavailableError, OSError) as e:
        print(f"{PROG}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def run(model: HSTUConfig, catalogue: Catalogue, args: argparse.Namespace) -> int:
    from grengines.export import exporter
    from grengines.export.check import check
    from grengines.numerics import IncorrectError

    made = exporter.export(model, catalogue, args.seed, args.precision, args.out, skip_hidden=args.skip_hidden)
    for name, facts in made.manifest["files"].items():
        print(f"{made.folder / name}: {facts['bytes']:,} bytes")
    if args.precision == "bf16":
        exporter.note(made, "check", {"passed": None, "why": "ONNX Runtime's CPU provider has no bf16 kernels"})
        print("not checked: ONNX Runtime's CPU provider has no bf16 kernels; export fp32 to check the model")
        return 0
    try:
        result = check(made, model, catalogue, args.seed)
    except IncorrectError as e:
        exporter.note(made, "check", e.result.to_dict() if e.result else {"passed": False})
        print(f"{PROG}: {e}", file=sys.stderr)
        return 1
    exporter.note(made, "check", result.to_dict())
    print(
        f"checked: {result.runtime}, {result.batches} random batches, error {result.error:.1e}, "
        f"allowed {result.tolerance:.1e}, without attention {result.zero_attention_error:.1e}"
    )
    return 0


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `described` reads."""
    parser.add_argument("--model", type=Path, help="YAML file with the model's options")
    parser.add_argument("--weights", type=Path, help="safetensors file; without it weights are random, from --seed")
    parser.add_argument("--items", type=int, help="in the catalogue (with --weights: as its table has)")
    parser.add_argument("--users", type=int, default=1, help="in the catalogue (default: %(default)s)")
    parser.add_argument("--actions", type=int, help="action bits of an event (with --weights: as its table has)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the model")


def described(args: argparse.Namespace) -> tuple[HSTUConfig, Catalogue]:
    """The model and catalogue that the command line asks for. Raises ValueError, one line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}
    if args.weights:
        given, shapes = _from_weights(args.weights)
    if args.model:
        given |= _from_yaml(args.model)
    if wrong := next((o for o in args.options if "=" not in o), None):
        raise ValueError(f"{wrong}: not an option, which is key=value")
    own = {"weights": str(args.weights)} if args.weights else {}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(HSTUConfig), given, OmegaConf.from_dotlist(args.options), own)
        model = OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        fields = {f.name: f for f in dataclasses.fields(HSTUConfig)}
        key = e.full_key or ""
        allowed = describe(fields[key]) if key in fields else f"known are {', '.join(fields)}"
        raise ValueError(f"{key}: {str(e).splitlines()[0]}; {allowed}") from None
    assert isinstance(model, HSTUConfig)
    if problems := list(violations(model)):
        raise ValueError("; ".join(problems))
    return model, _catalogue(args, model, shapes)


def _catalogue(args: argparse.Namespace, model: HSTUConfig, shapes: dict[str, list[int]]) -> Catalogue:
    items, actions = args.items, args.actions
    if shapes:
        users = min(args.users * model.contextual_seq_len, model.embedding_rows)
        items = shapes["token_table"][0] - users if items is None else items
        actions = shapes["action_table"][0] if actions is None else actions
    for name, value, least in (("items", items, 1), ("users", args.users, 1), ("actions", actions, 0)):
        if value is None:
            raise ValueError(f"--{name}: how many has the catalogue? ml_100k has --items 1682 --users 943 --actions 2")
        if value < least:
            raise ValueError(f"--{name} {value}: allowed is >= {least}")
    return Catalogue(num_users=args.users, num_items=items, num_actions=actions)


def _from_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    why = "holds no options"
    try:
        read = OmegaConf.load(path)
        if isinstance(read, DictConfig):
            return {str(k): v for k, v in read.items() if k != "defaults"}  # those are Hydra's
    except Exception as e:  # of OmegaConf, of YAML, of the file system: whatever it is, the file is no good
        why = f"can't be read ({e})"
    raise ValueError(f"{path}: {why}; give a YAML file such as conf/model/hstu_tiny.yaml")


def _from_weights(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            model = json.loads((f.metadata() or {}).get("model", "{}"))
            shapes = {name: f.get_slice(name).get_shape() for name in ("token_table", "action_table")}
    except (OSError, SafetensorError, ValueError) as e:
        raise ValueError(f"{path}: no weights of a ranking model ({' '.join(str(e).split())})") from None
    return dict(model), shapes


if __name__ == "__main__":
    sys.exit(main())
