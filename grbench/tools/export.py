"""`grbench export`: a ranking model as ONNX, a torch.export program and a manifest, checked against the reference."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from grbench.config.arguments import Arguments, CommandError
from grbench.tools.ranking_model import OVERRIDES, add_catalogue_flags, compose_ranking, require_folder
from grengines.api import UnavailableError


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = "Export a ranking model: ONNX, a torch.export program, a manifest, and a check against the fp32 reference."
    examples = [
        "export --out outputs/export",
        "export --out outputs/export model=dlrm_v3 --items 1000000 --actions 3",
        "export --out outputs/export model.weights=outputs/ranker/weights.safetensors",
    ]
    parser = Arguments("export", about, examples, OVERRIDES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an export in it is replaced")
    add_catalogue_flags(parser)
    precision = "precision of the export (default: %(default)s)"
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16", "int8"], default="fp32", help=precision)
    hidden = "attention for runtimes whose shapes may change within a loop"
    parser.add_argument("--skip-hidden", action="store_true", help=hidden)
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 exported and checked, 1 the check failed, 2 the input cannot be used."""
    args = parser().parse_intermixed_args(words)
    require_folder(args.out)
    spec, catalogue = compose_ranking(args)
    model = spec.ranking_model
    from grengines.export import exporter
    from grengines.export.check import check
    from grengines.numerics import IncorrectError

    try:
        made = exporter.export(model, catalogue, spec.seed, args.precision, args.out, skip_hidden=args.skip_hidden)
        for name, facts in made.manifest["files"].items():
            print(f"{made.folder / name}: {facts['bytes']:,} bytes")
        if args.precision == "bf16":
            exporter.note(made, "check", {"passed": None, "why": "ONNX Runtime's CPU provider has no bf16 kernels"})
            print("not checked: ONNX Runtime's CPU provider has no bf16 kernels; export fp32 to check the model")
            return 0
        result = check(made, model, catalogue, spec.seed)
    except IncorrectError as e:
        exporter.note(made, "check", e.result.to_dict() if e.result else {"passed": False})
        raise CommandError(e, code=1) from e
    except (ValueError, UnavailableError, OSError) as e:
        raise CommandError(" ".join(str(e).split())) from e
    exporter.note(made, "check", result.to_dict())
    print(
        f"checked: {result.runtime}, {result.batches} random batches, error {result.error:.1e}, "
        f"allowed {result.tolerance:.1e}, without attention {result.zero_attention_error:.1e}"
    )
    return 0
