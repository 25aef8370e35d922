"""What a command answers: one frozen object, printed as sentences for people or as one JSON object for programs.

The docstrings of the fields are the documentation of the JSON keys: docs/cli.md is made from them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydantic import ConfigDict

from muonlab.registry.settings import Closed


class Facts(Closed):
    """A part of an answer. Keys may be added in later versions; none is renamed or removed."""

    model_config = ConfigDict(defer_build=True)  # a command gives few of the answers that it imports

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        # Pydantic's own use_attribute_docstrings reads the sources whenever a command is run.
        schema: dict[str, Any] = handler(core_schema)
        meanings = {name: text for base in reversed(cls.__mro__) if issubclass(base, Facts)
                    for name, text in _meanings(base).items()}  # fmt: skip
        for key, found in handler.resolve_ref_schema(schema)["properties"].items():
            if key in meanings:
                found["description"] = meanings[key]
        return schema


class Answer(Facts):
    """All that a command answers."""

    @abstractmethod
    def lines(self) -> Iterator[str]:
        """The answer for a reader, line by line."""


def _meanings(model: type[Facts]) -> dict[str, str]:
    """Field -> the docstring below it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in pairwise(body.body):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found
