"""The one optimizer class: Muon and its heuristics for matrices, AdamW for the rest, one schedule.

    matrices:  M, X <- heuristics(g, M);  w <- w*(1 - lr*weight_decay) - lr * adjust(m, n) * polar(X)
    the rest:  AdamW

w is the parameter itself, or its float32 master where the parameter is narrower: a bf16 weight of 0.02 cannot
move by 1e-6, and without masters (`masters: false`, as the original did) about 3% of the weights moved in a
step. The first step copies a parameter into its master; from then on the master is the truth, so weights must
be loaded before the first step, or together with the state.

A step is worked out before anything is applied, so one that is refused or skipped leaves weights and state as
they were. The price is memory, for a moment: the gradients and the new momenta of all matrices, and what a
projection, noise or Nesterov's rule makes of them.

Matrices of one shape are updated in one stack. All settings are plain values in the parameter groups, all
state is tensors keyed by parameter, so `state_dict` is all that a resume needs; a resumed run is
bit-identical.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from optim.core import heuristics, sharding
from optim.core.diagnostics import Rows, of_orthogonalized, of_parameters, sample
from optim.core.errors import GradientError, NonFiniteError, RoutingError, StateMismatchError
from optim.core.gram import largest
from optim.core.methods import method_options
from optim.core.options import Options
from optim.core.routing import GROUPS, route

STACK_ENTRIES = 2**24
"""Entries in one stack at most (a larger matrix goes alone): stacking pays for small matrices only, and
float64 copies of every 2048 x 8192 matrix of a 1B model at once would not fit."""

COUNTERS = ("calls", "skipped_steps", "noise_due", "noise_fired")
"""What a group counts: calls of `step`, those that changed nothing, and since the last diagnosis the matrices
that were orthogonalised, one by one, and those of them that got noise."""

PROGRESS = {"params", "lr", *COUNTERS}
"""What may differ between a group and its saved state: the parameters' ids, and how far the run has come."""

LOG = logging.getLogger("optim")


def lr_factor(m: int, n: int, adjust: str) -> float:
    """The factor on lr of an m x n matrix (m rows = fan-out), as in torch.optim.Muon."""
    if adjust == "original":
        return math.sqrt(max(1.0, m / n))
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return 1.0


class _Step(NamedTuple):
    """A step of b matrices of one shape, worked out and not yet applied: tensors are [b, m, n]."""

    group: dict[str, Any]
    names: list[str]
    indices: list[int]
    parameters: list[Tensor]
    states: list[dict[str, Tensor]]
    steps: list[int]
    grad: Tensor
    momentum: Tensor
    plain: Tensor
    """What Muon would orthogonalise: the momentum, or with Nesterov g + mu*M."""
    matrix: Tensor
    """What is orthogonalised: `plain` itself where no projection and no noise acted."""
    fired: list[bool]
    compared: Tensor | None = None
    """What Muon would orthogonalise of the diagnostics' sample, in a step that is diagnosed."""


class RoutedOptimizer(torch.optim.Optimizer):
    """Built by `optim.build`. See the module's text for the rule, `optim.core.routing` for the groups.

    A group holds `name`, `route` (muon or adamw), `param_names`, `indices` (positions among the model's
    parameters), `lr`, `initial_lr`, `warmup` (whether the schedule's warm-up is meant for it), the settings of
    its rule and the counts of COUNTERS. Where a gradient or a momentum is not finite, a step changes nothing:
    it raises NonFiniteError, naming the parameter, or with `on_nonfinite: skip_step` counts itself in
    `skipped_steps`; on all ranks alike.
    """

    _diagnosed: Mapping[str, float] = MappingProxyType({})
    _warned = False

    def __init__(self, model: nn.Module, options: Options, *, seed: int) -> None:
        members = defaultdict(list)
        for routed in route(model, options.orthogonalized()):
            members[routed.group].append(routed)
        shared = options.model_dump(include={"on_nonfinite", "diagnose_every", "masters", "shard"})
        groups = []
        for name in sorted(members, key=GROUPS.index):
            rule = members[name][0].route
            if rule == "muon":
                settings = {**heuristics.OFF, **options.matrix_settings(), "seed": seed}
            else:
                settings = options.adamw_settings()
            groups.append(
                {
                    **settings,
                    **shared,
                    **dict.fromkeys(COUNTERS, 0),
                    "params": [(routed.name, routed.parameter) for routed in members[name]],
                    "name": name,
                    "route": rule,
                    "indices": [routed.position for routed in members[name]],
                    "initial_lr": settings["lr"],
                }
            )
        super().__init__(groups, {"lr": options.lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group that the routing has made. Raises RoutingError for any other, and for an empty one."""
        if "route" not in param_group or not param_group["params"]:
            raise RoutingError(
                f"parameter group {param_group.get('name')!r} holds no parameter or was not made by the routing; "
                "build a new optimizer over the whole model instead."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients at hand; a parameter without one is left alone, its step count too."""
        loss = None
        self._diagnosed = {}
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        split = self._first["shard"] and sharding.ranks() > 1
        pending: list[_Step] = []
        problem = self._bad_gradient()
        if problem is None:
            pending, problem = self._work_out()
        if split and sharding.any_rank(problem is not None, self._first["params"][0].device):
            problem = problem or "another rank's gradient or momentum holds inf or NaN"
        if problem is not None:
            self._skip_or_raise(problem)
            return loss

        for group in self.param_groups:
            group["calls"] += 1
        every = self._first["diagnose_every"]
        rows: dict[str, Rows] | None = None
        if every > 0:
            for item in pending:
                if heuristics.bends_momentum(item.group):
                    _accumulate_muons_own(item)
            if self._first["calls"] % every == 0:
                rows = defaultdict(lambda: defaultdict(list))
        if rows is not None:
            pending = [item._replace(compared=_compared(item)) for item in pending]
        work = [sharding.Work(_to_orthogonalize(item), *method_options(item.group)) for item in pending]
        for item, factors in zip(pending, sharding.polar_factors(work, split), strict=True):
            self._muon_step(item, factors, None if rows is None else rows[item.group["name"]])
        for group in self.param_groups:
            if group["route"] == "adamw":
                self._adamw_step(group, None if rows is None else rows[group["name"]])
        if rows is not None:
            self._diagnosed = self._means(rows)
        return loss

    def diagnostics(self) -> dict[str, float]:
        """What the last step did, as means (see `optim.core.diagnostics`).

        Empty unless the number of calls of `step` is a multiple of `diagnose_every`, but for `skipped_steps`.
        """
        found = dict(self._diagnosed)
        if self._first["on_nonfinite"] == "skip_step":
            found["skipped_steps"] = float(self._first["skipped_steps"])
        return found

    # ------------------------------------------------------------------ rules

    def _work_out(self) -> tuple[list[_Step], str | None]:
        """The step of all matrices up to the polar factor, and what is not finite in it."""
        muon = [group for group in self.param_groups if group["route"] == "muon"]
        pending = [self._advanced(group, stack) for group in muon for stack in self._stacks(group)]
        problem = _bad_matrix(pending, "momentum")
        if problem is None:
            pending = [_perturbed(item) for item in pending]
            problem = _bad_matrix([item for item in pending if any(item.fired)], "perturbed momentum")
        return pending, problem

    def _advanced(self, group: dict[str, Any], members: list[tuple[str, int, Tensor]]) -> _Step:
        """The step of some matrices of one shape, (name, index, parameter) each, up to the momentum."""
        names, indices, parameters = (list(part) for part in zip(*members, strict=True))
        states = [self._state_of(parameter, group, ("momentum_buffer",)) for parameter in parameters]
        steps = [int(state["step"]) + 1 for state in states]
        grad = torch.stack([_gradient(p, state) for p, state in zip(parameters, states, strict=True)])
        momentum = torch.stack([state["momentum_buffer"] for state in states])
        momentum, plain = heuristics.advance(grad, momentum, steps, group)
        unperturbed = [False] * len(names)
        return _Step(
            group, names, indices, parameters, states, steps, grad, momentum, plain, matrix=plain, fired=unperturbed
        )

    def _muon_step(self, item: _Step, factors: Tensor, rows: Rows | None) -> None:
        """Weights and states move by the first b of `factors`, those of `item.matrix` [b, m, n]."""
        group, b = item.group, len(item.names)
        update = factors[:b]
        m, n = update.shape[-2:]
        lr = group["lr"] * lr_factor(m, n, group["lr_adjust"])
        group["noise_due"] += len(item.fired)
        group["noise_fired"] += sum(item.fired)
        weights = [_weight(p, state) for p, state in zip(item.parameters, item.states, strict=True)]
        before = None if rows is None else torch.stack(weights)
        for i, (parameter, state, weight) in enumerate(zip(item.parameters, item.states, weights, strict=True)):
            self.state[parameter] = state
            state["step"] += 1
            state["momentum_buffer"].copy_(item.momentum[i])
            if group["weight_decay"] != 0:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update[i], alpha=-lr)
            _write_back(parameter, weight)
        if rows is not None and before is not None:
            _extend(rows, of_parameters(item.grad, item.momentum, torch.stack(weights).sub_(before)))
            muons = item.compared if len(factors) == b else factors[b:]
            _extend(rows, of_orthogonalized(item.plain, item.matrix, update, muons))

    def _adamw_step(self, group: dict[str, Any], rows: Rows | None) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        states = [self._state_of(parameter, group, ("exp_avg", "exp_avg_sq")) for parameter in parameters]
        weights = [_weight(p, state) for p, state in zip(parameters, states, strict=True)]
        grads = [_gradient(p, state) for p, state in zip(parameters, states, strict=True)]
        before = [] if rows is None else [weight.clone() for weight in weights]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, state, weight in zip(parameters, states, weights, strict=True):
            self.state[parameter] = state
            _write_back(parameter, weight)
        if rows is not None:
            changes = [weight - old for weight, old in zip(weights, before, strict=True)]
            _extend(rows, of_parameters(grads, [state["exp_avg"] for state in states], changes))

    def _means(self, rows: dict[str, Rows]) -> dict[str, float]:
        """The mean of every diagnostic, by its name and that of its group unless hidden."""
        means = {}
        for group in self.param_groups:
            ending = "" if group["name"] == "hidden" else f"_{group['name']}"
            for name, values in rows[group["name"]].items():
                means[name + ending] = math.fsum(values) / len(values)
            if group["noise_due"] > 0:
                means["noise_fired_share" + ending] = group["noise_fired"] / group["noise_due"]
                group["noise_fired"] = group["noise_due"] = 0
        return means

    # ------------------------------------------------------------------ state

    @property
    def _first(self) -> dict[str, Any]:
        """A group to read what is the same in all of them."""
        return self.param_groups[0]

    def _state_of(self, parameter: Tensor, group: dict[str, Any], buffers: tuple[str, ...]) -> dict[str, Tensor]:
        """The parameter's state; before its first step a new one, which is kept when that step is applied.

        `step` is float32 on the CPU, as in torch.
        """
        if parameter in self.state:
            known: dict[str, Tensor] = self.state[parameter]
            return known
        state = {"step": torch.zeros(())}
        if group["masters"] and parameter.dtype.itemsize < 4:
            state["master"] = parameter.detach().float()
        return {**state, **{buffer: torch.zeros_like(_weight(parameter, state)) for buffer in buffers}}

    def _stacks(self, group: dict[str, Any]) -> Iterator[list[tuple[str, int, Tensor]]]:
        """(name, index, parameter) of those with a gradient, alike in shape, dtype and device."""
        alike = defaultdict(list)
        for name, index, parameter in zip(group["param_names"], group["indices"], group["params"], strict=True):
            if parameter.grad is not None:
                alike[parameter.shape, parameter.dtype, parameter.device].append((name, index, parameter))
        for (shape, _, _), members in alike.items():
            count = max(1, STACK_ENTRIES // shape.numel())
            for start in range(0, len(members), count):
                yield members[start : start + count]

    def _bad_gradient(self) -> str | None:
        """Which gradient is not finite, looked at before anything is computed; raises GradientError."""
        named = [
            (name, parameter)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        for name, parameter in named:
            if parameter.grad.layout != torch.strided:
                raise GradientError(
                    f"parameter {name!r} has a sparse gradient, which no rule takes; build its nn.Embedding with "
                    "sparse=False."
                )
        squared = {
            id(parameter) for group in self.param_groups if group["route"] == "adamw" for parameter in group["params"]
        }
        finite = [_is_finite(parameter.grad, squared=id(parameter) in squared) for _, parameter in named]
        return _first_bad([name for name, _ in named], finite, "gradient")

    def _skip_or_raise(self, problem: str) -> None:
        if self._first["on_nonfinite"] == "raise":
            raise NonFiniteError(
                f"{problem}, so no update exists; the run has diverged, try a lower lr or clip the gradients."
            )
        for group in self.param_groups:
            group["calls"] += 1
            group["skipped_steps"] += 1
        if not self._warned:
            self._warned = True
            LOG.warning("%s: the step is skipped; later ones are only counted, as `skipped_steps`.", problem)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict()`; lr may differ, any other setting, name or shape may not.

        torch's own casts state to the parameter's dtype, which would round the float32 momentum and masters
        of a bf16 model. Here every tensor keeps its dtype. Raises StateMismatchError.
        """
        self._refuse_other_state(state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                device = value.device if key == "step" else parameter.device
                self.state[parameter][key] = value.detach().to(device, copy=True)

    def _refuse_other_state(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        if [group["name"] for group in self.param_groups] != [group.get("name") for group in saved_groups]:
            raise StateMismatchError(
                f"saved groups are {[group.get('name') for group in saved_groups]}, this optimizer's are "
                f"{[group['name'] for group in self.param_groups]}; load the same optimizer's state."
            )
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for key in sorted((group.keys() | saved.keys()) - PROGRESS):
                if group.get(key) != saved.get(key):
                    raise StateMismatchError(
                        f"group {group['name']!r}: {key} is {group.get(key)!r}, but {saved.get(key)!r} in "
                        "the saved state; a run continues with the settings it began."
                    )
            for name, saved_id, parameter in zip(group["param_names"], saved["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(saved_id, {}).items():
                    if key != "step" and value.shape != parameter.shape:
                        raise StateMismatchError(
                            f"parameter {name!r} has shape {tuple(parameter.shape)}, but its saved {key} has "
                            f"{tuple(value.shape)}; load the state of the same model."
                        )


def _perturbed(item: _Step) -> _Step:
    """With the projection and the noise of the step in `matrix`."""
    projected = heuristics.project(item.plain, item.group["project"])
    matrix, fired = heuristics.perturb(projected, item.grad, item.momentum, item.steps, item.indices, item.group)
    return item._replace(matrix=matrix, fired=fired)


def _accumulate_muons_own(item: _Step) -> None:
    """Adds this step to Muon's own momentum on the same gradients, of the diagnostics' sample of the matrices.

    Kept beside their state as `muon_momentum`, from their first step on; nothing but a diagnostic depends on it.
    """
    for i in sample(*item.grad.shape):
        state = item.states[i]
        if item.steps[i] == 1:
            state["muon_momentum"] = torch.zeros_like(state["momentum_buffer"])
        if "muon_momentum" in state:
            heuristics.accumulate_(state["muon_momentum"], item.grad[i], item.group)


def _compared(item: _Step) -> Tensor | None:
    """What Muon would orthogonalise, of the sample; None where that is what is orthogonalised.

    NaN where that is not known: a matrix came into the sample after its first step, or Muon's own momentum has
    overflown though a gate has kept this one small.
    """
    chosen = sample(*item.grad.shape)
    if not heuristics.bends_momentum(item.group):
        return None if item.matrix is item.plain else torch.stack([item.plain[i] for i in chosen])
    unknown = torch.full_like(item.grad[0], math.nan)
    held = torch.stack([item.states[i].get("muon_momentum", unknown) for i in chosen])
    own = heuristics.looked_ahead(held, torch.stack([item.grad[i] for i in chosen]), item.group)
    return own if own.isfinite().all() else torch.full_like(own, math.nan)


def _to_orthogonalize(item: _Step) -> Tensor:
    """The step's matrices, and behind them what they are compared with: a call of its own would cost more."""
    if item.compared is None or item.compared.isnan().any():
        return item.matrix
    return torch.cat([item.matrix, item.compared])


def _bad_matrix(pending: list[_Step], what: str) -> str | None:
    """Which of the matrices to orthogonalise is not finite."""
    names = [name for item in pending for name in item.names]
    return _first_bad(names, [largest(item.matrix).isfinite() for item in pending], what)


def _is_finite(grad: Tensor, *, squared: bool) -> Tensor:
    """Whether all of a gradient is finite, and its square, of which AdamW keeps the average, in float32 too.

    Both ends of its range are, and NaN is at both ends: one pass, and no copy.
    """
    ends = torch.stack(grad.aminmax())
    return (ends.to(torch.promote_types(grad.dtype, torch.float32)).square() if squared else ends).isfinite().all()


def _first_bad(names: list[str], finite: list[Tensor], what: str) -> str | None:
    """The sentence on the first name whose flag is down; None where all are up."""
    if not finite:
        return None
    flags = torch.cat([flag.to(finite[0].device).reshape(-1) for flag in finite])
    if flags.all():
        return None
    return f"parameter {names[flags.tolist().index(False)]!r}: its {what} holds inf or NaN"


def _weight(parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What the update is applied to: the float32 master of a narrow parameter, else the parameter."""
    return state.get("master", parameter)


def _gradient(parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The gradient in the precision of what it updates."""
    assert parameter.grad is not None
    return parameter.grad.to(_weight(parameter, state).dtype)


def _write_back(parameter: Tensor, weight: Tensor) -> None:
    if weight is not parameter:
        parameter.copy_(weight)


def _extend(rows: Rows, found: Rows) -> None:
    for name, values in found.items():
        rows[name] += values
