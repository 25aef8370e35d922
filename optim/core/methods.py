"""Which orthogonalisers exist, and which options each takes. Imports no torch.

auto           svd or gram_eigh, by shape, dtype and device alone
svd            exact, the definition
gram_eigh      exact, by the eigenvectors of the Gram matrix
newton_schulz  an approximation: steps, dtype
polar_express  an approximation: steps, dtype, lower
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optim.core.errors import OptionError, nearest

TAKES: dict[str, tuple[str, ...]] = {
    "auto": (),
    "svd": (),
    "gram_eigh": (),
    "newton_schulz": ("steps", "dtype"),
    "polar_express": ("steps", "dtype", "lower"),
}
"""method -> the options it takes. A method without options is exact."""

DTYPES = ("bfloat16", "float32", "float64")
"""In which precision an approximate method iterates."""

GROUP_PREFIX = "orthogonalizer_"
"""What a method's option is called as an optimizer's option: `steps` is `orthogonalizer_steps`."""


def options_fault(method: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the options of a known method, as a clause; None where nothing is."""
    taken = TAKES[method]
    for name, value in options.items():
        if name not in taken:
            allowed = f"takes no option {name!r}; allowed: {', '.join(taken)}" if taken else "takes no options"
            return f"method {method!r} {allowed}, found {', '.join(options)}"
        if name == "steps" and not (type(value) is int and value >= 1):
            return f"steps is {value!r}; give an integer of 1 or more"
        if name == "lower" and not (type(value) is float and 0 < value < 1):
            return f"lower is {value!r}; give a number between 0 and 1, both excluded"
        if name == "dtype" and value not in DTYPES:
            return f"dtype is {value!r}; allowed: {', '.join(DTYPES)}"
    return None


def check(method: str, options: Mapping[str, Any], caller: str) -> None:
    """Raises OptionError, naming `caller`, for an unknown method and for options that the method does not take."""
    if method not in TAKES:
        raise OptionError(
            f"{caller}: method {method!r} is unknown; allowed: {', '.join(TAKES)}.{nearest(str(method), list(TAKES))}"
        )
    fault = options_fault(method, options)
    if fault is not None:
        strange = [name for name in options if name not in TAKES[method]]
        close = nearest(strange[0], list(TAKES[method])) if strange else nearest(str(options.get("dtype")), [*DTYPES])
        raise OptionError(f"{caller}: {fault}.{close}")


def method_options(group: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(method, its options) from the plain values of a parameter group; an option of None is not given."""
    given = {name: group.get(GROUP_PREFIX + name) for name in ("steps", "dtype", "lower")}
    return group["orthogonalizer"], {name: value for name, value in given.items() if value is not None}
