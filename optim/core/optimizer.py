"""The one optimizer class: Muon and its heuristics for matrices, AdamW for the rest, one schedule.

    matrices:  M, X <- heuristics(g, M);  w <- w*(1 - lr*weight_decay) - lr * adjust(m, n) * polar(X)
    the rest:  AdamW

w is the parameter itself, or its float32 master where the parameter is narrower: a bf16 weight of 0.02 cannot
move by 1e-6, and without masters about 3% of the weights moved in a step. The first step copies a parameter
into its master; from then on the master is the truth, so weights must be loaded before the first step, or
together with the state.

Matrices of one shape are updated in one stack. All settings are plain values in the parameter groups, all
state is tensors keyed by parameter, so `state_dict` is all that a resume needs; a resumed run is
bit-identical.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from optim.core import heuristics
from optim.core.diagnostics import Rows, of_orthogonalized, rms
from optim.core.errors import NonFiniteError, StateMismatchError
from optim.core.options import Options
from optim.core.orthogonalize import polar
from optim.core.routing import GROUPS, route

STACK_ENTRIES = 2**24
"""Entries in one stack at most (a larger matrix goes alone): stacking pays for small matrices only, and
float64 copies of every 2048 x 8192 matrix of a 1B model at once would not fit."""

SCHEDULED = {"params", "lr"}
"""What may differ between a group and its saved state: the parameters' ids, and where the schedule stands."""


def lr_factor(m: int, n: int, adjust: str) -> float:
    """The factor on lr of an m x n matrix (m rows = fan-out), as in torch.optim.Muon."""
    if adjust == "original":
        return math.sqrt(max(1.0, m / n))
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return 1.0


class RoutedOptimizer(torch.optim.Optimizer):
    """Built by `optim.build`. See the module's text for the rule, `optim.core.routing` for the groups.

    A group holds `name`, `route` (muon or adamw), `param_names`, `indices` (positions among the model's
    parameters), `lr`, `initial_lr` and the settings of its rule. A step raises NonFiniteError, naming the
    parameter, for a gradient (then nothing has been changed) or a momentum that is not finite.
    """

    _diagnosed: Mapping[str, float] = MappingProxyType({})

    def __init__(self, model: nn.Module, options: Options, *, seed: int) -> None:
        members = defaultdict(list)
        for routed in route(model, options.orthogonalized()):
            members[routed.group].append(routed)
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
                    "params": [(routed.name, routed.parameter) for routed in members[name]],
                    "name": name,
                    "route": rule,
                    "indices": [routed.position for routed in members[name]],
                    "initial_lr": settings["lr"],
                    "on_nonfinite": options.on_nonfinite,
                    "diagnose_every": options.diagnose_every,
                }
            )
        super().__init__(groups, {"lr": options.lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients at hand; a parameter without one is left alone, its step count too."""
        loss = None
        self._diagnosed = {}
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_bad_gradients()
        rows: Rows = defaultdict(list)
        for group in self.param_groups:
            diagnosed = group["route"] == "muon" or group["name"] == "hidden"
            if group["route"] == "muon":
                for stack in self._stacks(group):
                    self._muon_step(group, stack, rows)
            else:
                self._adamw_step(group, rows if diagnosed else None)
        self._diagnosed = {name: math.fsum(values) / len(values) for name, values in rows.items()}
        return loss

    def diagnostics(self) -> dict[str, float]:
        """Means over the matrices of the last step (see `optim.core.diagnostics`).

        Empty unless that step's number is a multiple of `diagnose_every`.
        """
        return dict(self._diagnosed)

    # ------------------------------------------------------------------ rules

    def _muon_step(self, group: dict[str, Any], members: list[tuple[str, int, Tensor]], rows: Rows) -> None:
        """One step for matrices of one shape: (name, index, parameter) each."""
        names, indices, parameters = (list(part) for part in zip(*members, strict=True))
        states = [self._state_of(parameter, ("momentum_buffer",)) for parameter in parameters]
        steps = [int(state["step"]) + 1 for state in states]
        weights = [self._weight(parameter) for parameter in parameters]
        grad = torch.stack([p.grad.to(w.dtype) for p, w in zip(parameters, weights, strict=True)])
        momentum = torch.stack([state["momentum_buffer"] for state in states])

        momentum, plain = heuristics.advance(grad, momentum, steps, group)
        _refuse_non_finite(plain, names, "momentum")
        projected = heuristics.project(plain, group["project"])
        matrix, fired = heuristics.perturb(projected, grad, momentum, steps, indices, group)
        if any(fired):
            _refuse_non_finite(matrix, names, "perturbed momentum")
        update = polar(matrix, group["orthogonalizer"])

        m, n = grad.shape[-2:]
        lr = group["lr"] * lr_factor(m, n, group["lr_adjust"])
        diagnose = self._is_diagnosed(group, steps)
        before = torch.stack(weights) if diagnose else None
        for i, (parameter, state, weight) in enumerate(zip(parameters, states, weights, strict=True)):
            state["step"] += 1
            state["momentum_buffer"].copy_(momentum[i])
            if group["weight_decay"] != 0:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update[i], alpha=-lr)
            _write_back(parameter, weight)
        if before is not None:
            found = of_orthogonalized(plain, matrix, update, group["orthogonalizer"])
            found["momentum_rms"] = rms(momentum).tolist()
            found["noise_fired_share"] = [float(fires) for fires in fired]
            found["grad_norm"] = heuristics.frobenius(grad).flatten().tolist()
            found["update_rms"] = rms(torch.stack(weights) - before).tolist()
            for name, values in found.items():
                rows[name] += values

    def _adamw_step(self, group: dict[str, Any], rows: Rows | None) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        states = [self._state_of(parameter, ("exp_avg", "exp_avg_sq")) for parameter in parameters]
        weights = [self._weight(parameter) for parameter in parameters]
        grads = [p.grad.to(w.dtype) for p, w in zip(parameters, weights, strict=True)]
        diagnose = rows is not None and self._is_diagnosed(group, [int(state["step"]) + 1 for state in states])
        before = [weight.clone() for weight in weights] if diagnose else []
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
        for parameter, weight in zip(parameters, weights, strict=True):
            _write_back(parameter, weight)
        if rows is not None and diagnose:
            for grad, weight, old in zip(grads, weights, before, strict=True):
                rows["grad_norm"].append(heuristics.frobenius(grad).item())
                rows["update_rms"].append(rms(weight - old).item())

    # ------------------------------------------------------------------ state

    def _state_of(self, parameter: Tensor, buffers: tuple[str, ...]) -> dict[str, Any]:
        """The parameter's state, made in its first step. `step` is float32 on the CPU, as in torch."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            if parameter.dtype.itemsize < 4:
                state["master"] = parameter.detach().float()
            for buffer in buffers:
                state[buffer] = torch.zeros_like(self._weight(parameter))
        return state

    def _weight(self, parameter: Tensor) -> Tensor:
        """What the update is applied to: the float32 master of a narrow parameter, else the parameter."""
        state: dict[str, Tensor] = self.state[parameter]
        return state.get("master", parameter)

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

    def _is_diagnosed(self, group: dict[str, Any], steps: list[int]) -> bool:
        every: int = group["diagnose_every"]
        return every > 0 and max(steps) % every == 0

    def _refuse_bad_gradients(self) -> None:
        """Before anything is changed, so that a refused step leaves weights and state as they were."""
        named = [
            (name, parameter)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        for name, parameter in named:
            if parameter.grad.is_sparse:
                raise NotImplementedError(
                    f"parameter {name!r} has a sparse gradient; build its nn.Embedding with sparse=False."
                )
        finite = [parameter.grad.isfinite().all() for _, parameter in named]
        if finite and not torch.stack([flag.cpu() for flag in finite]).all():
            name = next(name for (name, _), flag in zip(named, finite, strict=True) if not flag)
            raise _diverged(name, "gradient")

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
            for key in sorted((group.keys() | saved.keys()) - SCHEDULED):
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


def _refuse_non_finite(stack: Tensor, names: list[str], what: str) -> None:
    finite = stack.isfinite().all(dim=-1).all(dim=-1).tolist()
    if not all(finite):
        raise _diverged(names[finite.index(False)], what)


def _diverged(name: str, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"parameter {name!r}: its {what} holds inf or NaN, so no update exists; the run has diverged, "
        "try a lower lr or clip the gradients."
    )


def _write_back(parameter: Tensor, weight: Tensor) -> None:
    if weight is not parameter:
        parameter.copy_(weight)
