"""`grbench import-weights`: a checkpoint of another project as weights, options and a list of its tensors."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from grbench.config.arguments import Arguments, CommandError
from grbench.execution.folders import require_parent
from grengines.overrides import override
from grengines.runtime import atomic_io

LAYOUTS = ("dlrm_v3", "research", "nvidia", "qwen3", "semantic_ids")


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Turn a checkpoint of another project into weights of grbench, the model options that they need, and a list of "
        "every tensor: mapped, folded into others, or left out. Nothing in a checkpoint is executed."
    )
    examples = [
        "import-weights dense.pt --from dlrm_v3 --tables tables.safetensors --heads 4 --scaling-seqlen 18432 "
        "--out imported/dlrm.safetensors",
        "import-weights hstu.pt --from research --heads 2 --out imported/hstu.safetensors",
        "import-weights qwen3/ --from qwen3 --sizes 256,256,256 --first-token 151669 --out imported/qwen.safetensors",
        "import-weights index.json --from semantic_ids --out imported/ids.safetensors",
    ]
    parser = Arguments("import-weights", about, examples)
    parser.add_argument("file", type=Path, help="checkpoint: .pt, .pth or .safetensors; a folder for qwen3")
    parser.add_argument("--from", dest="layout", choices=LAYOUTS, required=True, help="whose layout it is")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write; options and list beside it")
    parser.add_argument("--tables", type=Path, help="dlrm_v3, nvidia: safetensors with items and what WEIGHTS.md lists")
    parser.add_argument("--heads", type=int, help="dlrm_v3, research, nvidia: attention heads")
    parser.add_argument("--scaling-seqlen", type=int, help="dlrm_v3, nvidia: the length that attention is divided by")
    parser.add_argument("--temperature", type=float, default=0.05, help="research: of its softmax (default 0.05)")
    parser.add_argument(
        "--sizes", type=_sizes, default=(), help="qwen3, semantic_ids: codes of each level: 256,256,256"
    )
    parser.add_argument("--first-token", type=int, help="qwen3: the token of the first level's first code")
    parser.add_argument("--begin-token", type=int, help="qwen3: token of an empty prompt (default: bos_token_id)")
    parser.add_argument(
        "--whole-vocabulary", action="store_true", help="qwen3: keep every token, for a softmax over all of them"
    )
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed are numbers of at least 1, such as 256,256,256")
    return sizes


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 written, 2 the input cannot be used."""
    args = parser().parse_args(words)
    if args.out.suffix != ".safetensors":
        raise CommandError(f"--out {args.out}: allowed is a name that ends in .safetensors")
    for flag in ("heads", "scaling_seqlen", "temperature"):
        if (value := getattr(args, flag)) is not None and not 0 < value < math.inf:
            raise CommandError(f"--{flag.replace('_', '-')} {value}: allowed is a number above 0")
    require_parent(args.out)
    try:
        return _ids(args) if args.layout == "semantic_ids" else _weights(args)
    except (ValueError, OSError) as e:
        raise CommandError(" ".join(str(e).split())) from e


def _ids(args: argparse.Namespace) -> int:
    from grbench.importing import semantic_ids

    ids, shared = semantic_ids.read(args.file, args.sizes)
    ids.save(args.out)
    print(f"{args.out}: {len(ids.codes):,} items, codes {', '.join(map(str, ids.sizes))}")
    if shared:
        print(f"{shared:,} items shared a tuple with an earlier one: the last level numbers them")
    print(f"to use them: retrieval.semantic_ids={args.out}")
    return 0


def _weights(args: argparse.Namespace) -> int:
    from grbench.importing import dlrm_v3, nvidia, qwen3, research
    from grbench.importing.output import write
    from grbench.importing.parts import Flags
    from grbench.importing.source import read

    flags = Flags(
        args.tables, args.heads, args.scaling_seqlen, args.temperature, args.sizes, args.first_token, args.begin_token,
        args.whole_vocabulary,
    )  # fmt: skip
    load = {"dlrm_v3": dlrm_v3.load, "research": research.load, "nvidia": nvidia.load, "qwen3": qwen3.load}
    source = qwen3.read(args.file) if args.layout == "qwen3" else read(args.file)
    imported = load[args.layout](source, flags)
    written = write(imported, args.out)
    listed = args.out.with_suffix(".json")
    atomic_io.write(listed, (json.dumps([vars(fate) for fate in source.fates], indent=1) + "\n").encode())
    for fate in source.fates:
        print(f"{fate.fate:<8}  {fate.tensor} {fate.shape} -> {fate.to}")
    counts = Counter(fate.fate for fate in source.fates)
    print(f"{args.out}: {', '.join(f'{n} tensors {fate}' for fate, n in counts.items())}; the list: {listed}")
    for note in imported.notes:
        print(f"note: {note}")
    name = args.out.stem
    words = ["python", "-m", "grbench", "--config-dir", str(args.out.parent), f"model={name}", "engine=hstu"]
    if imported.schema == "decoder":
        words[-1] = "engine=hf"
    words += imported.run.split()
    if imported.weights_key != "model.weights":
        words.append(override(imported.weights_key, str(args.out)))
    print(f"{written}: its options; to run it: {shlex.join(words)} workload=... ")
    return 0
