"""Read a declaration from a YAML file, refusing what a declaration never needs.

Refused, each in one sentence: a missing or huge file, text that is not YAML, aliases (a YAML bomb is made of
them), a key that stands twice (YAML would silently keep the last), anything but a mapping at the top.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from muonlab.registry.errors import UsageError

MAX_BYTES = 1_000_000
"""A declaration is a few kilobytes; a file beyond this is not one."""
PLAIN_WIDTH, PLAIN_BRACKETS = 500, 500
"""A block begins to the right of the one around it, and a bracket opens one level: both bound the nesting."""


class _NoDoubleKeys(yaml.constructor.SafeConstructor):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain value, not a list or a mapping", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _StrictLoader(_NoDoubleKeys, yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed here", event.start_mark)
        return super().compose_node(parent, index)


class _QuickLoader(_NoDoubleKeys, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's. It resolves aliases before anybody can refuse them, and recurses in C without a limit."""


# YAML 1.2, which DVC writes and people mean, reads 1e-05 as a number; PyYAML's 1.1 wants a point in it.
for _loader in (_StrictLoader, _QuickLoader):
    _loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _is_plain(text: str) -> bool:
    """Whether there can be no alias in it, and no nesting but a shallow one."""
    widest = max(map(len, text.splitlines()), default=0)
    return "*" not in text and widest <= PLAIN_WIDTH and text.count("[") + text.count("{") <= PLAIN_BRACKETS


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Any:
    """The content of a text; one command reads the same declarations again for each study that names them."""
    if _is_plain(text):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            return yaml.load(text, Loader=_QuickLoader)  # noqa: S506 - a SafeLoader, made stricter
    return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - as above, and it says best what is wrong


def read_yaml(path: Path, *, where: str | None = None) -> dict[str, Any]:
    """Return the mapping in a YAML file; `where` names the file in errors (its path by default).

    Raises UsageError with one sentence when the file is missing, too large or not a plain mapping.
    """
    where = where or str(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(f"{where}: the file has {size} bytes; a declaration has at most {MAX_BYTES}.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: is not UTF-8 text (byte {error.start}).") from error
    try:
        loaded = copy.deepcopy(_parse(text))  # whoever gets it may change it
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{where}{line}: {error.problem or 'not valid YAML'}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{where}: not valid YAML ({type(error).__name__}).") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"{where}: found {type(loaded).__name__}; expected a mapping of keys to values.")
    return loaded
