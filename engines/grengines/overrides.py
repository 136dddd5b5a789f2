"""Overrides that a person can type: Hydra reads from them what was meant. `shlex.join` quotes them for the shell."""

from __future__ import annotations

import re
import shlex

# What Hydra's grammar takes as a text without quotes: no number, no other word of its own, no other letters.
_BARE = re.compile(r"(?!(?:null|true|false|inf|nan)$)(?:[a-z_/]|\.{1,2}/)[\w/.+%@-]*", re.ASCII | re.IGNORECASE)


def override(key: str, text: str) -> str:
    """Return the override that gives an option a text, such as a path."""
    return f"{key}={quoted(literal(text))}"


def literal(text: str) -> str:
    """Return what OmegaConf reads as this text: `${` alone begins an interpolation."""
    return re.sub(r"(\\*)\${", lambda found: 2 * found[1] + r"\${", text)


def as_it_stands(key: str, text: str, why: str) -> str:
    """Return the error line for a text with a `${` that refers to nothing: why, and how the text itself is typed."""
    word = shlex.quote(override(key, text))
    return f"{key}={text}: ${{ refers to another option: {why}; for the text itself type {word}"


def quoted(text: str) -> str:
    """Return a text as an override has it: in quotes unless Hydra's grammar takes it as it stands."""
    if _BARE.fullmatch(text):
        return text
    # A backslash is a letter like any other there, but not before a quote.
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + found[2].replace('"', r"\""), text)
    return f'"{escaped}"'
