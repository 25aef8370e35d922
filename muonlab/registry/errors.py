"""The errors that a user can cause or must know of, each with the exit code that `muon` returns for it.

Every message is one sentence or two: where, what was found, what is allowed, what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar, get_args

from pydantic import ValidationError


class MuonlabError(Exception):
    """Base of all errors that are reported as a sentence, without a traceback."""

    exit_code = 1


class UsageError(MuonlabError):
    """Input that is refused before anything is written."""

    exit_code = 2


class CellsFailedError(MuonlabError):
    """Cells of a study failed or are missing: there is no complete grid to judge."""

    exit_code = 3


class OverBudgetError(MuonlabError):
    """The declared budget is spent or would be exceeded."""

    exit_code = 4


class IntegrityError(MuonlabError):
    """Recorded evidence contradicts itself or the declaration; no verdict can rest on it."""

    exit_code = 5


def nearest(found: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the allowed name closest to `found`, or an empty string."""
    matches = difflib.get_close_matches(found, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


LISTED = 8
"""So many names a refusal lists where another place has them all."""


def unknown_name(where: str, what: str, found: str, allowed: Iterable[str], *, all_in: str = "") -> UsageError:
    """Build the error for a name that is not among the allowed ones: the nearest first, then what is allowed.

    Of many names only `LISTED` are listed if `all_in` says which command or file has them all.
    """
    names = sorted(allowed)
    left = len(names) - LISTED
    if all_in and left > 0:
        listed = f"{', '.join(names[:LISTED])} ... and {left} more ({all_in})"
    else:
        listed = ", ".join(names) if names else "(none declared)"
    close = nearest(found, names)
    return UsageError(f"{where}: unknown {what} {found!r}{f'.{close} Allowed' if close else '; allowed'}: {listed}.")


def explain(error: ValidationError, where: str, *, prefix: str = "") -> UsageError:
    """Turn a pydantic error into one sentence: where, what was found, what is allowed.

    Only the first problem is named: the next one shows when it is mended. `prefix` is the dotted path of
    the validated mapping inside the file `where`.
    """
    first = error.errors(include_url=False)[0]
    # The name of a model in the path says which of several a value was taken for.
    named = [part for part in first["loc"] if part not in _MODELS]
    path = ".".join(str(part) for part in (*([prefix] if prefix else []), *named))
    found = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        key = str(first["loc"][-1])
        allowed = _allowed_keys(error, first["loc"])
        listed = f"; allowed: {', '.join(sorted(allowed))}" if allowed else ""
        return UsageError(f"{where}: unknown key {path!r}{listed}.{nearest(key, allowed)}")
    if kind == "missing":
        return UsageError(f"{where}: the required key {path!r} is missing.")
    if kind == "value_error":
        return UsageError(f"{where}: {path}: {str(first['msg']).removeprefix('Value error, ')}")
    message = str(first["msg"]).replace("Input should be", "it should be")
    return UsageError(f"{where}: {path}: found {_short(found)}; {message}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_MODELS: dict[str, type] = {}
_Model = TypeVar("_Model", bound=type)


def _allowed_keys(error: ValidationError, loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model in which the unknown key stood, followed down from the validated model."""
    from pydantic import BaseModel

    at: Any = _MODELS.get(error.title)
    for part in loc[:-1]:
        if part in _MODELS:
            at = _MODELS[str(part)]
        elif isinstance(at, type) and issubclass(at, BaseModel):
            field = at.model_fields.get(str(part))
            at = field.annotation if field else None
        else:  # the values of a mapping or a list
            at = (get_args(at) or (None,))[-1]
    if isinstance(at, type) and issubclass(at, BaseModel):
        return [f.alias or name for name, f in at.model_fields.items()]
    return []


def explains(model: _Model) -> _Model:
    """Class decorator: make the model's field names known to `explain`, by the model's title."""
    _MODELS[model.__name__] = model
    return model
