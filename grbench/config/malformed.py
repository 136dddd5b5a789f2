"""Words of a command line that Hydra's grammar refuses: what is wrong with one, and how it is written right."""

from __future__ import annotations

import re
import shlex

from grengines.overrides import as_it_stands, quoted

CLOSING = {"(": ")", "[": "]", "{": "}"}
FUNCTIONS = ("choice", "range", "interval", "glob", "sort", "shuffle", "tag", "int", "float", "str", "bool")
_KEY = re.compile(r"[+~]{0,2}[A-Za-z_$][\w$/.-]*(@[\w$.:-]*)?")
_UNQUOTED = re.compile(r"[\w/\-\\+.$%*@?|: \t]", re.ASCII)  # what a value without quotes may have


def problem(word: str, why: str) -> str:
    """Return one line about a word that is no override: what is wrong and what to write. why: Hydra's own reason."""
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word}: not an override, which is key=value"
    if not _KEY.fullmatch(key):
        return f"{word}: {key!r} is no key; an override is key=value, with a key such as seed or engine.precision"
    if "${" in value and value[0] not in CLOSING and _bracket(value)[0]:
        return as_it_stands(key, value.strip("\"'"), "no } closes it")
    for wrong, right in (_bracket(value), _empty_items(value), _empty_function(value)):
        if wrong:
            return f"{word}: {wrong}; write {_written(key, right)}"
    if wrong := _special(value):
        return f"{word}: {wrong!r} needs quotes around the text; write {shlex.quote(f'{key}={_quoted(value)}')}"
    return f"{word}: not an override, which is key=value ({why})"


def _written(key: str, value: str) -> str:
    """Return how a value is written; a list as a sweep."""
    if not value:
        return f"{key}=VALUE, or -m {key}=VALUE,VALUE for a sweep"
    word = shlex.quote(f"{key}={value}")
    if _is_list(value) or value.partition("(")[0] in FUNCTIONS:
        return f"-m {word}"
    return word if value[0] in CLOSING else f"{word}, or -m {key}={value},VALUE for a sweep"


def _is_list(value: str) -> bool:
    depth = 0
    for letter in value:
        depth += (letter in CLOSING) - (letter in CLOSING.values())
        if letter == "," and not depth:
            return True
    return False


def _empty_items(value: str) -> tuple[str, str]:
    """Return what is wrong with the commas of a list, and the list without its empty items; "" if nothing is."""
    right = re.sub(r",(\s*,)+", ",", value)
    right = re.sub(r",\s*(?=[\])}])|(?<=[\[({]),\s*", "", right).strip()
    right = right.strip(",").strip()
    if right == value.strip():
        return "", value
    place = "begins" if value.lstrip().startswith(",") else "ends" if value.rstrip().endswith(",") else ""
    return (f"the list {place} with a comma" if place and right else "the list has an empty item"), right


def _bracket(value: str) -> tuple[str, str]:
    """Return which bracket has no other one, and the value with it; "" if all are pairs."""
    waiting: list[str] = []
    for letter in value:
        if letter in CLOSING:
            waiting.append(letter)
        elif letter in CLOSING.values() and (not waiting or CLOSING[waiting.pop()] != letter):
            return f"{letter} closes no bracket", value.replace(letter, "", 1)
    if not waiting:
        return "", value
    ends = "".join(CLOSING[letter] for letter in reversed(waiting))
    return f"{waiting[-1]} is not closed", value.rstrip(", ") + ends


def _empty_function(value: str) -> tuple[str, str]:
    """Return which function of a sweep has no values; "" if there is none."""
    found = re.fullmatch(r"(\w+)\(\s*\)", value)
    return (f"{value} has no values", "") if found and found[1] in FUNCTIONS else ("", value)


def _special(value: str) -> str:
    """Return the first letter that a value without quotes can't have, or ""."""
    its_own = "[]{}," if value[:1] in ("[", "{") else ","
    return next((letter for letter in value if letter not in its_own and not _UNQUOTED.match(letter)), "")


def _quoted(value: str) -> str:
    """Return a value with quotes around the texts that need them."""
    parts = re.split(r"([\[\]{},])" if value[:1] in ("[", "{") else "(,)", value)
    return "".join(quoted(part) if _special(part) and len(part) > 1 else part for part in parts)
