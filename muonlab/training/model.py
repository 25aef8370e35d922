"""The model of a cell: a dense GraniteMoeHybrid (Mamba2 + attention, no positions), from random weights.

    weights = f(settings.model, vocab_size, seed)

and of nothing else: the global generator is neither read nor moved. All matrices are drawn N(0,
initializer_range); Mamba's A_log, D and dt_bias have the fixed start of its paper (arXiv:2405.21060). As in
the Granite 4.0 h-350m and h-1b models: no experts (`num_local_experts` 0, one gated MLP a layer), tied
embeddings, no rotary embedding. Unlike them, the embedding, residual and logit multipliers are 1, and
attention is scaled by head_dim^-1/2.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch.nn import functional

# The package's own modules, not `AutoModel`: that would import every architecture.
from transformers.models.granitemoehybrid.configuration_granitemoehybrid import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridForCausalLM
from transformers.utils import logging as transformers_logging

from muonlab.registry.errors import IntegrityError
from muonlab.registry.settings import MAMBA_EXPAND, ModelSettings

Model = GraniteMoeHybridForCausalLM

# The names of transformers 5, which rewrites the older ones that a config may hold.
_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


def build(
    settings: ModelSettings, *, vocab_size: int, sequence_length: int, seed: int, weights: str = "float32"
) -> Model:
    """Build the model on the CPU with the weights of `seed`: drawn in float32, then rounded to the dtype `weights`."""
    # Else every run says that Mamba's CUDA kernels are missing; what it falls back on computes the same.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = GraniteMoeHybridConfig(
        vocab_size=vocab_size,
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
        max_position_embeddings=sequence_length,
        position_embedding_type="nope",
        initializer_range=settings.initializer_range,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GraniteMoeHybridForCausalLM(config)
    model.to(getattr(torch, weights))
    return model


def token_losses(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood [nats] of every target of the blocks `tokens` [B, S + 1], as [B, S].

    The model's own forward with labels gives the same mean; it also divides the logits by a scaling of 1,
    forward and backward, which is a twentieth of a step of the tiny model.
    """
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = functional.linear(hidden, model.lm_head.weight)
    targets = tokens[:, 1:]
    # A narrow model's logits are narrow; their log-sum-exp is not to be.
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    """The model's parameters by name, each once (the output head is the embedding)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def weights_sha256(model: Model) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the parameters."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights_of(model).items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
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
