"""The model of a cell: a small hybrid from random weights, or one that others have made.

    weights = f(settings.model, settings.data.vocab_size, seed)              where settings.model is described
    weights = those of the files, or f(their configuration, seed)            where it is named (see `pretrained`)

and of nothing else: the global generator is neither read nor moved. What is described is a dense GraniteMoeHybrid
(Mamba2 + attention, no positions). All its matrices are drawn N(0, initializer_range); Mamba's A_log, D and dt_bias
have the fixed start of its paper (arXiv:2405.21060). As in the Granite 4.0 h-350m and h-1b models: no experts
(`num_local_experts` 0, one gated MLP a layer), tied embeddings, no rotary embedding. Unlike them, the embedding,
residual and logit multipliers are 1, and attention is scaled by head_dim^-1/2.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch.nn import functional
from transformers import PreTrainedModel

# The package's own modules, not `AutoModel`: that would import every architecture.
from transformers.models.granitemoehybrid.configuration_granitemoehybrid import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridForCausalLM
from transformers.utils import logging as transformers_logging

from muonlab.registry.errors import IntegrityError
from muonlab.registry.settings import MAMBA_EXPAND, DataSettings, ModelSettings, WorkloadSettings
from muonlab.training import mamba, pretrained
from muonlab.training.fused_loss import HeadLoss

Model = PreTrainedModel

# The names of transformers 5, which rewrites the older ones that a config may hold.
_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


def build(settings: WorkloadSettings, *, seed: int) -> Model:
    """The workload's model on the CPU as a run of `seed` begins with it: in float32, then rounded to its `weights`.

    Raises UsageError where a model that others have made is not there, or does not fit the workload's data.
    """
    named = settings.model
    if isinstance(named, ModelSettings) or named.start == "random":
        return architecture(settings, seed=seed)
    with torch.random.fork_rng(devices=[]):
        return _finished(pretrained.load(named, settings), settings)


def architecture(settings: WorkloadSettings, *, seed: int = 0) -> Model:
    """As `build`, with weights drawn from `seed` alone: all that is needed where others are loaded into it."""
    # Else every run says that Mamba's CUDA kernels are missing; what it falls back on computes the same.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Model
        if isinstance(settings.model, ModelSettings):
            model = GraniteMoeHybridForCausalLM(_config(settings.model, settings.data))
        else:
            model = pretrained.empty(settings.model, settings)
    return _finished(model, settings)


def _finished(model: Model, settings: WorkloadSettings) -> Model:
    mamba.install()
    model.train()  # without dropout it computes the same, and Mamba's fused kernels serve training alone
    model.to(getattr(torch, settings.weights))
    return model


def _config(settings: ModelSettings, data: DataSettings) -> GraniteMoeHybridConfig:
    return GraniteMoeHybridConfig(
        vocab_size=data.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=len(settings.layers),
        layer_types=[_LAYER_TYPES[kind] for kind in settings.layers],
        num_attention_heads=settings.attention_heads,
        num_key_value_heads=settings.key_value_heads,
        attention_multiplier=(settings.hidden_size // settings.attention_heads) ** -0.5,
        mamba_expand=MAMBA_EXPAND,
        mamba_n_heads=MAMBA_EXPAND * settings.hidden_size // settings.mamba_d_head,
        mamba_d_head=settings.mamba_d_head,
        mamba_d_state=settings.mamba_d_state,
        mamba_chunk_size=settings.mamba_chunk_size,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=settings.mlp_size,
        max_position_embeddings=data.sequence_length,
        position_embedding_type="nope",
        initializer_range=settings.initializer_range,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def token_losses(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood [nats] of every target of the blocks `tokens` [B, S + 1], as [B, S].

    Its mean is the loss of the model's own forward with labels (without what experts add for balance).
    """
    logits, targets = _logits(model, tokens[:, :-1]), tokens[:, 1:]
    # A narrow model's logits are narrow; their log-sum-exp is not to be.
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def mean_loss(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """The mean of `token_losses` [nats/token], to rounding, for a step: it may have no second derivative."""
    if not isinstance(model, GraniteMoeHybridForCausalLM) or not _is_for_tiles(model.lm_head.weight):
        return token_losses(model, tokens).mean()
    hidden, targets = _before_the_head(model, tokens[:, :-1]), tokens[:, 1:]
    loss: torch.Tensor = HeadLoss.apply(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())  # type: ignore[no-untyped-call]
    return loss


def _is_for_tiles(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits [B, S, vocabulary]."""
    if not isinstance(model, GraniteMoeHybridForCausalLM):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    return functional.linear(_before_the_head(model, ids), model.lm_head.weight)


def _before_the_head(model: GraniteMoeHybridForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """What Granite's logits are linear in [B, S, hidden].

    They are divided by a constant. Here it divides what they are computed from: the logits are the largest
    tensor of a step, and to divide them, forward and backward, was a twentieth of a step of the tiny model.
    """
    hidden, scaling = model.model(input_ids=ids, use_cache=False).last_hidden_state, model.config.logits_scaling
    scaled: torch.Tensor = hidden if scaling == 1 else hidden / scaling
    return scaled


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    """The model's parameters by name, each once (the output head is the embedding)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def weights_sha256(model: Model) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the parameters."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights_of(model).items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: Model, content: bytes, where: str) -> None:
    """Copy a safetensors file's weights into the model.

    Raises IntegrityError, naming `where` the content is from, for weights that are not this model's.
    """
    own = weights_of(model)
    try:
        found = load(content)
    except SafetensorError as error:
        raise IntegrityError(f"{where}: not a whole safetensors file ({error}).") from None
    kinds = [{name: (w.shape, w.dtype) for name, w in weights.items()} for weights in (found, own)]
    if kinds[0] != kinds[1]:
        raise IntegrityError(
            f"{where}: the weights are those of another model (names, shapes or dtypes of the parameters differ)."
        )
    with torch.no_grad():
        for name, weight in own.items():
            # A copy, not an exchange: kernels may round differently on memory that is aligned differently.
            weight.copy_(found[name])
