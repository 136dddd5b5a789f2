"""Triton's interpreter without what it does for nothing: half of the time of these tests' kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Let the interpreter replace its language once a launch, and leave out checks whose result it drops.

    It replaces the language again at each call of a function within a kernel. It computes each addition and product of
    integers twice, to see overflows, but reports them with the option `debug` alone. A Triton that lacks these private
    names stays as it is.
    """
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, builder = interpreter._patch_lang, interpreter.interpreter_builder

    def once(fn: Any) -> Any:
        seen = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        own = [tl.tensor.__add__, *(module.load for module in seen)]
        return patch(fn) if any(map(tl.core.is_builtin, own)) else interpreter._LangPatchScope()

    interpreter._patch_lang = once
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
