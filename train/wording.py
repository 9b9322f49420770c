"""How the program words a mistake: one paragraph with the key's path, its value, and the nearest valid name."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A mistake of the person who started the run; the message is all they need to see."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


class RankError(TrainingError):
    """A TrainingError that only this one of several processes has: it is the one that has to say so."""


def show(value: Any) -> str:
    """A value as it would stand in YAML, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, names: Iterable[str], what: str, near: Sequence[str] = ()) -> str:
    """`did you mean X? ...`, with all names where they are few. `near` are guesses better than difflib's."""
    names = list(names)
    close = list(near) or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    question = f"did you mean {close[0]}?" if close else ""
    choices = f"the {what} is one of {', '.join(names)}" if len(names) <= 40 else ""
    if question and choices:
        choices = choices[0].upper() + choices[1:]
    return f"{question} {choices}".strip() or f"no {what} has a name near it"


def known_name(name: str, catalogue: Mapping[str, str]) -> str:
    """Accepts a catalogue's name, or `prefix:anything` where it lists `prefix:<...>`; else raises ValueError."""
    prefix, colon, rest = name.partition(":")
    families = {entry.partition(":")[0]: entry for entry in catalogue if ":" in entry}
    if (colon and rest and prefix in families) or (not colon and name in catalogue):
        return name
    close = difflib.get_close_matches(prefix, families, n=1)
    raise ValueError(nearest(name, catalogue, "name", [families[close[0]]] if close else []))


def sentence(item: Mapping[str, Any], keys: Mapping[str, tuple[str, str]]) -> str:
    """One pydantic error as `path = value: what is wrong, what is right.`

    item: as `ValidationError.errors()` gives it. keys: path -> (default, description) of every key there is.
    """
    path, kind, value = ".".join(str(part) for part in item["loc"]), item["type"], item["input"]
    default, description = keys.get(path, ("", ""))
    below = ", ".join(key for key in keys if key.startswith(f"{path}."))
    if kind == "value_error":  # raised by our own validators, which name the path themselves when they see several keys
        reason = str(item["ctx"]["error"])
        return _end(reason if " = " in reason else f"{path} = {show(value)}: {reason}")
    if kind == "missing":
        return _end(f"{path} is missing: {description or f'it is a section with the keys {below}'}")
    if kind == "extra_forbidden":
        section, _, last = path.rpartition(".")
        siblings = {
            key.removeprefix(f"{section}.").partition(".")[0] for key in keys if key.startswith(f"{section}.") or not section
        }
        asked = f"{path}.{next(iter(value))}" if isinstance(value, dict) and value else path  # of a section, its first key
        close = [key for key in keys if key.rpartition(".")[2] == last] or difflib.get_close_matches(asked, keys, n=1)
        return _end(f"{path} = {show(value)}: there is no such key; {nearest(path, sorted(siblings), 'key', close)}")
    if below:
        return _end(f"{path} = {show(value)}: it should be a section with the keys {below}")
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return _end(f"{path} = {show(value)}: {nearest(str(value), choices, 'value')}")
    wish = re.sub(r"^(Input|String) should", "it should", item["msg"]).replace("valid tuple", "list")
    return _end(f"{path} = {show(value)}: {wish}" + (f" ({description}; default {default})" if description else ""))


def _end(text: str) -> str:
    return text if text.endswith(("?", ".")) else f"{text}."
