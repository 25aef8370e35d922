"""The package's surface: loads without torch, finds kinds by looking, refuses in one sentence."""

import subprocess
import sys
import textwrap

import pytest
from pydantic import ValidationError

import optim
from optim.core import registry


def test_import_and_options_load_no_torch():
    code = """
        import sys, optim
        assert "pydantic" not in sys.modules
        for kind in optim.names():
            optim.options_model(kind)()
        assert "torch" not in sys.modules, "torch was imported"
        assert "numpy" not in sys.modules, "numpy was imported"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_names_are_the_files_of_the_package():
    assert optim.names() == sorted(optim.names())
    assert {"adamw", "isotropic", "muon", "nolah", "orthonoise"} <= set(optim.names())


def test_a_new_optimizer_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "sluggish.py").write_text(
        textwrap.dedent('''
            """Muon at a low momentum."""
            from optim.core.options import MuonOptions
            from optim.core.registry import register

            class SluggishOptions(MuonOptions):
                """Its options."""
                momentum: float = 0.5

            register("sluggish", SluggishOptions)
        ''')
    )
    (tmp_path / "mute.py").write_text('"""Registers nothing."""\n')
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    for name in ("sluggish", "mute"):  # set, so that the import is undone with the rest
        monkeypatch.setitem(sys.modules, f"optim.{name}", None)
        del sys.modules[f"optim.{name}"]
    monkeypatch.setattr(optim, "__path__", [*optim.__path__, str(tmp_path)])
    assert {"sluggish", "mute"} <= set(optim.names())
    assert optim.options_model("sluggish")().momentum == 0.5
    with pytest.raises(optim.UnknownOptimizerError, match=r"optim/mute.py does not register 'mute'"):
        optim.options_model("mute")


@pytest.mark.parametrize("kind", ["nolha", "NOLAH", "../muon", "", "core", "os"])
def test_an_unknown_name_is_refused_with_what_is_allowed(kind):
    with pytest.raises(ValueError, match=r"is unknown; allowed: adamw, .*muon") as caught:
        optim.options_model(kind)
    assert isinstance(caught.value, optim.UnknownOptimizerError)
    assert "\n" not in str(caught.value)


def test_the_nearest_name_is_offered():
    with pytest.raises(optim.UnknownOptimizerError, match="Did you mean 'nolah'"):
        optim.options_model("nolha")


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("nolah", {"scal": 0.9}, r"optimizer 'nolah': option 'scal' is unknown; .* Did you mean 'scale'\?"),
        ("muon", {"lr": "0.1"}, r"option 'lr' is '0\.1': "),
        ("muon", {"lr": -1.0}, r"option 'lr' is -1\.0: Input should be greater than 0"),
        ("muon", {"lr": True}, r"option 'lr' is True"),
        ("muon", {"lr": float("nan")}, r"option 'lr' is nan"),
        ("muon", {"lr": float("inf")}, r"option 'lr' is inf"),
        ("muon", {"momentum": 1.0}, r"option 'momentum' is 1\.0"),
        ("muon", {"nesterov": 1}, r"option 'nesterov' is 1"),
        ("muon", {"orthogonalizer": "newton"}, r"'newton_schulz' or 'polar_express'\. Did you mean 'newton_schulz'\?"),
        ("muon", {"betas": [0.9, 1.0]}, r"option 'betas.1' is 1\.0"),
        ("muon", {"on_nonfinite": "skip"}, r"option 'on_nonfinite' is 'skip': .* Did you mean 'skip_step'\?"),
        ("muon", {"on_nonfinite": None}, r"option 'on_nonfinite' is None"),
        ("muon", {"momentum_form": "mean"}, r"option 'momentum_form' is 'mean': .*'accumulated' or 'averaged'"),
        ("adamw", {"masters": 1}, r"option 'masters' is 1"),
        ("adamw", {"shard": "yes"}, r"option 'shard' is 'yes'"),
        ("adamw", {"warmup_adamw": False}, r"option 'warmup_adamw' is unknown"),
        ("isotropic", {"noise_start": -1}, r"option 'noise_start' is -1"),
        ("muon", {"alpha": 0.1}, r"option 'alpha' is unknown"),
        ("adamw", {"momentum": 0.9}, r"option 'momentum' is unknown"),
        ("nolah", {"quantile": 1.0}, r"option 'quantile' is 1\.0"),
        ("nolah", {"scale_start": 0.99}, r"scale_start and scale_anneal_steps go together"),
        ("orthonoise", {"anneal_steps": 0}, r"option 'anneal_steps' is 0"),
        ("orthonoise", {"rank_threshold": 1.5}, r"option 'rank_threshold' is 1\.5"),
        ("muon", {"diagnose_every": -1}, r"option 'diagnose_every' is -1"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(kind, options, sentence):
    with pytest.raises(optim.OptionError, match=sentence) as caught:
        optim.parse_options(kind, options)
    assert "\n" not in str(caught.value)
    assert f"optimizer {kind!r}" in str(caught.value)


def test_options_are_frozen_documented_and_take_what_yaml_gives():
    for kind in optim.names():
        model = optim.options_model(kind)
        options = optim.parse_options(kind, {"lr": 1, "betas": [0.8, 0.9]})
        assert options.betas == (0.8, 0.9)
        with pytest.raises(ValidationError, match="frozen"):
            options.lr = 2.0
        assert all(field.description for field in model.model_fields.values())
        assert not any(field.is_required() for field in model.model_fields.values())


def test_defaults_are_the_original_runs():
    muon, adamw, nolah, noise = (optim.options_model(kind)() for kind in ("muon", "adamw", "nolah", "orthonoise"))
    assert (muon.lr, muon.momentum, muon.weight_decay, muon.nesterov, muon.lr_adjust) == (
        1e-4,
        0.95,
        0.0,
        False,
        "none",
    )
    assert (muon.betas, muon.eps, muon.adamw_weight_decay) == ((0.9, 0.95), 1e-8, 0.01)
    assert (adamw.lr, adamw.betas, adamw.eps, adamw.weight_decay) == (3e-4, (0.9, 0.95), 1e-8, 0.01)
    assert (nolah.gate, nolah.scale, nolah.quantile, nolah.project) == ("tanh", 0.90, 0.95, "sigmoid")
    assert (noise.alpha, noise.anneal_steps, noise.trigger, noise.rank_threshold) == (1e-2, 1000, "rank", 0.5)
