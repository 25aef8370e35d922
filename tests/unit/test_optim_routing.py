"""Which parameter goes where: embedding and head are never orthogonalised unless a study asks for it."""

import pytest
import torch
from torch import nn

import optim


class Hybrid(nn.Module):
    """One of everything: a token table, a bare position table, a 3-D convolution, norms, matrices, a head."""

    def __init__(self, tied=False, head="lm_head"):
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.pos_embed = nn.Parameter(torch.zeros(7, 4))
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3, groups=4)
        self.A_log = nn.Parameter(torch.zeros(4))
        self.temperature = nn.Parameter(torch.ones(()))
        self.mlp = nn.Linear(4, 8)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        setattr(self, head, nn.Linear(4, 11, bias=False))
        if tied:
            getattr(self, head).weight = self.tokens.weight


class WithGetter(Hybrid):
    def __init__(self):
        super().__init__(head="unusual")

    def get_output_embeddings(self):
        return self.unusual


def groups(model, **options):
    table = optim.routing_table(optim.build("muon", model, **options))
    return {row.name: (row.route, row.group) for row in table}


def test_hidden_matrices_alone_are_orthogonalised():
    assert groups(Hybrid()) == {
        "mlp.weight": ("muon", "hidden"),
        "tokens.weight": ("adamw", "embedding"),
        "pos_embed": ("adamw", "embedding"),
        "lm_head.weight": ("adamw", "head"),
        "A_log": ("adamw", "vector"),
        "temperature": ("adamw", "vector"),
        "norm.weight": ("adamw", "vector"),
        "norm.bias": ("adamw", "vector"),
        "conv.bias": ("adamw", "vector"),
        "mlp.bias": ("adamw", "vector"),
        "conv.weight": ("adamw", "tensor"),
    }


def test_all_matrices_repeats_the_original():
    found = groups(Hybrid(), route="all_matrices")
    muon = {name for name, (route, _) in found.items() if route == "muon"}
    assert muon == {"mlp.weight", "tokens.weight", "pos_embed", "lm_head.weight"}


def test_the_adamw_arm_has_the_same_groups_and_no_muon():
    adamw = optim.routing_table(optim.build("adamw", Hybrid()))
    muon = optim.routing_table(optim.build("muon", Hybrid()))
    assert [(row.name, row.shape, row.group) for row in adamw] == [(row.name, row.shape, row.group) for row in muon]
    assert {row.route for row in adamw} == {"adamw"}


def test_a_tied_head_is_one_parameter_in_the_embedding():
    found = groups(Hybrid(tied=True))
    assert found["tokens.weight"] == ("adamw", "embedding")
    assert "lm_head.weight" not in found


def test_a_head_of_any_name_is_found_through_the_models_getter_also_when_wrapped():
    assert groups(WithGetter())["unusual.weight"] == ("adamw", "head")
    assert groups(nn.ModuleDict({"module": WithGetter()}))["module.unusual.weight"] == ("adamw", "head")


def test_shapes_and_order_are_those_of_the_groups():
    optimizer = optim.build("muon", Hybrid())
    table = optim.routing_table(optimizer)
    assert [row.shape for row in table] == [
        tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]
    ]


def test_one_learning_rate_reaches_both_parts_unless_adamw_has_its_own():
    assert {group["initial_lr"] for group in optim.build("muon", Hybrid(), lr=0.5).param_groups} == {0.5}
    optimizer = optim.build("nolah", Hybrid(), lr=0.5, adamw_lr=0.1)
    for key in ("lr", "initial_lr"):
        assert {group["route"]: group[key] for group in optimizer.param_groups} == {"muon": 0.5, "adamw": 0.1}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: nn.Linear(2, 2).requires_grad_(False), "Linear has no trainable parameter"),
        (lambda: nn.Linear(0, 3), r"parameter 'weight' is torch.float32 of shape \(3, 0\)"),
        (lambda: nn.Linear(3, 0), r"parameter 'weight' is torch.float32 of shape \(0, 3\)"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "parameter 'weight' is torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_that_cannot_be_trained_is_refused(make, sentence):
    model = make()
    with pytest.raises(optim.RoutingError, match=sentence):
        optim.build("muon", model)


def test_a_model_without_a_hidden_matrix_is_refused_by_what_orthogonalises_and_no_other():
    for kind in optim.names():
        model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
        if "orthogonalizer" not in optim.options_model(kind).model_fields:
            assert len(optim.routing_table(optim.build(kind, model))) == 3
            continue
        with pytest.raises(
            optim.RoutingError, match=r"Sequential has no hidden matrix to orthogonalise.* adamw"
        ) as error:
            optim.build(kind, model)
        assert "\n" not in str(error.value)
        assert optim.build(kind, model, route="all_matrices").param_groups[0]["name"] == "embedding"
        with pytest.raises(optim.RoutingError, match="no embedding or head or hidden matrix"):
            optim.build(kind, nn.LayerNorm(4), route="all_matrices")


@pytest.mark.parametrize("added", [{"params": []}, {"params": [nn.Parameter(torch.ones(2, 2))]}])
def test_a_group_that_the_routing_has_not_made_is_refused(added):
    for kind in optim.names():
        optimizer = optim.build(kind, Hybrid())
        groups_before = len(optimizer.param_groups)
        with pytest.raises(optim.RoutingError, match="holds no parameter or was not made by the routing"):
            optimizer.add_param_group(dict(added))
        with pytest.raises(optim.RoutingError, match="parameter group 'hidden' holds no parameter"):
            optimizer.add_param_group({**optimizer.param_groups[0], "params": []})
        assert len(optimizer.param_groups) == groups_before


def test_the_table_says_which_method_orthogonalises_each_shape():
    def methods(dtype=torch.float32, **options):
        model = Hybrid().to(dtype)
        table = optim.routing_table(optim.build("muon", model, route="all_matrices", **options))
        assert all((row.orthogonalizer is None) == (row.route == "adamw") for row in table)
        return {row.shape: row.orthogonalizer for row in table if row.route == "muon"}

    for method in ("svd", "gram_eigh", "newton_schulz", "polar_express"):
        assert set(methods(orthogonalizer=method).values()) == {method}
    for dtype, seen in [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ]:
        found = methods(dtype, orthogonalizer="auto")
        assert found == {shape: optim.resolve_orthogonalizer(shape, seen, "cpu") for shape in found}


def test_what_adamw_updates_is_warmed_up_unless_told_otherwise():
    for kind in optim.names():
        assert {group["warmup"] for group in optim.build(kind, Hybrid()).param_groups} == {True}
        if "warmup_adamw" in optim.options_model(kind).model_fields:
            cold = optim.build(kind, Hybrid(), warmup_adamw=False).param_groups
            assert {(group["route"], group["warmup"]) for group in cold} == {("muon", True), ("adamw", False)}


@pytest.mark.parametrize("seed", [-1, 1.0, "3", True, None])
def test_a_seed_that_is_no_seed_is_refused(seed):
    with pytest.raises(optim.OptionError, match="seed is"):
        optim.build("muon", Hybrid(), seed=seed)
