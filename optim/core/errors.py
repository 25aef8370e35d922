"""What the optimizers refuse. One sentence each: where, what was found, what is allowed, what to do."""


class OptimError(ValueError):
    """Any refusal that a caller can mend before a step is taken."""


class UnknownOptimizerError(OptimError):
    """No optimizer of that name."""


class OptionError(OptimError):
    """An unknown option, or a value that the option does not take."""


class RoutingError(OptimError):
    """A model, or a parameter, that no rule can update."""


class StateMismatchError(OptimError):
    """A saved state that belongs to another model, seed or set of options."""


class GradientError(OptimError):
    """A gradient of a kind that no rule takes."""


class NonFiniteError(FloatingPointError):
    """An infinity or NaN met in a step. The run has diverged; this is a result, not a wrong configuration."""


def nearest(name: str, allowed: list[str]) -> str:
    """` Did you mean 'muon'?`, or nothing where no allowed name is close."""
    import difflib

    close = difflib.get_close_matches(name, allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
