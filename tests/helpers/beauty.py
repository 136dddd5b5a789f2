"""Files that study=gpu_candidates reads, for tests that compose it."""

from __future__ import annotations

from pathlib import Path


def stand_ins(folder: Path) -> None:
    """Write one user of Amazon Beauty, and empty files where experiments/quality_gpu.py leaves what it trained."""
    for name, text in (
        ("data/amazon_beauty.txt", "1 1 2 3\n"),
        ("outputs/quality/beauty-ids-0/weights.safetensors", ""),
        ("outputs/quality/beauty-ids-0/semantic_ids.safetensors", ""),
        ("outputs/quality/beauty-rank-0/weights.safetensors", ""),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
