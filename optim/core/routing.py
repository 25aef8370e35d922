"""Which rule updates which parameter.

    group      what it holds                                         updated by, for `route`:
                                                                     hidden  all_matrices  none
    hidden     2-D parameters that are none of the following         muon    muon          adamw
    embedding  nn.Embedding, EmbeddingBag, bare ones named like it   adamw   muon          adamw
    head       get_output_embeddings(), modules named like one       adamw   muon          adamw
    vector     norms, biases, Mamba's A and D: 0-D and 1-D           adamw   adamw         adamw
    tensor     Mamba's depthwise convolutions: 3-D and more          adamw   adamw         adamw

Most rows of an embedding or a head have no gradient in a batch, and orthogonalising spends most of the update
on them. A head that is tied to the embedding is one parameter, found by identity, and sits in `embedding`.
What this cannot see (a head of an unusual name) the printed table shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optim.core.errors import RoutingError
from optim.core.orthogonalize import resolve

GROUPS = ("hidden", "embedding", "head", "vector", "tensor")
HEAD_NAMES = {"lm_head", "head", "output_head", "embed_out", "unembed", "unembedding"}
EMBEDDING_NAMES = {"wte", "wpe"}


class RouteRow(NamedTuple):
    """One parameter: its name, its shape, the rule that updates it and the group it sits in."""

    name: str
    shape: tuple[int, ...]
    route: str
    group: str
    orthogonalizer: str | None
    """The method that computes its polar factor, with `auto` resolved; None where there is no such step."""


class Routed(NamedTuple):
    """One trainable parameter: its index among all of the model's parameters does not depend on its route."""

    position: int
    name: str
    parameter: Tensor
    route: str
    group: str


def route(model: nn.Module, orthogonalized: str) -> list[Routed]:
    """Every trainable parameter of `model`, once, in the model's order. Raises RoutingError."""
    matrices = {
        "none": set(),
        "hidden": {"hidden"},
        "all_matrices": {"hidden", "embedding", "head"},
    }[orthogonalized]
    embeddings = {id(parameter) for parameter in _embedding_parameters(model)}
    heads = {id(parameter) for parameter in _head_parameters(model)}
    routed = []
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        if parameter.numel() == 0 or not parameter.is_floating_point():
            raise RoutingError(
                f"parameter {name!r} is {parameter.dtype} of shape {tuple(parameter.shape)}; only real "
                "floating parameters that hold something can be trained, so remove or freeze it."
            )
        if parameter.ndim != 2:
            group = "vector" if parameter.ndim < 2 else "tensor"
        elif id(parameter) in embeddings:
            group = "embedding"
        elif id(parameter) in heads:
            group = "head"
        else:
            group = "hidden"
        routed.append(Routed(index, name, parameter, "muon" if group in matrices else "adamw", group))
    if not routed:
        raise RoutingError(f"{type(model).__name__} has no trainable parameter; unfreeze some.")
    if matrices and all(found.route == "adamw" for found in routed):
        groups = ", ".join(sorted({found.group for found in routed}))
        raise RoutingError(
            f"{type(model).__name__} has no {' or '.join(sorted(matrices))} matrix to orthogonalise, its parameters "
            f"are of group {groups}; train it with adamw."
        )
    return routed


def _embedding_parameters(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield module.weight
        for name, parameter in module.named_parameters(recurse=False):
            if "embed" in name or name in EMBEDDING_NAMES:  # a table that is a bare parameter
                yield parameter


def _head_parameters(model: nn.Module) -> Iterator[Tensor]:
    for name, module in model.named_modules():
        named = name.rpartition(".")[2] in HEAD_NAMES
        heads = [module] if named else []
        if hasattr(module, "get_output_embeddings"):
            heads.append(module.get_output_embeddings())
        for head in heads:
            if isinstance(head, nn.Module):
                yield from head.parameters()


def table(optimizer: torch.optim.Optimizer) -> list[RouteRow]:
    """The routing of an optimizer that `optim.build` made, group by group."""
    return [
        RouteRow(name, tuple(parameter.shape), group["route"], group["name"], _orthogonalizer(parameter, group))
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]


def _orthogonalizer(parameter: Tensor, group: Mapping[str, Any]) -> str | None:
    if group["route"] != "muon":
        return None
    method: str = group["orthogonalizer"]
    # What is orthogonalised has the precision of the master, where there is one.
    dtype = torch.promote_types(parameter.dtype, torch.float32) if group["masters"] else parameter.dtype
    return resolve(tuple(parameter.shape), dtype, parameter.device.type) if method == "auto" else method
