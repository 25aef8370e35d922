"""The base of every result: frozen, closed, JSON-dumpable, and no undefined value without its reason.

A field that is None is explained by one sentence in `undefined` under the field's name; nan and infinity are
refused, so that `model_dump(mode="json")` is valid JSON.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Result(BaseModel):
    """A frozen result whose None fields are each explained in `undefined`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    undefined: dict[str, str] = {}

    @model_validator(mode="after")
    def _every_none_has_a_reason(self) -> Self:
        missing = {name for name in type(self).model_fields if getattr(self, name) is None}
        if missing != set(self.undefined):
            raise ValueError(
                f"{type(self).__name__}: fields {sorted(missing)} are None, reasons are given for "
                f"{sorted(self.undefined)}; every None needs one reason, and nothing else does"
            )
        return self
