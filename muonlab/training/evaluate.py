"""The loss of a model on the validation split, and a sample of what it writes.

    loss = (sum over blocks and positions of -log p(target | block so far)) / (number of targets)

In nats/token. Every target counts once and equally; the sum is taken in float64, block after block, in
batches of a fixed size, so that a loss recomputed from the saved weights equals the training's own bit for
bit on the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from muonlab.registry.settings import WorkloadSettings
from muonlab.training import model as models
from muonlab.training.data import TokenData

if TYPE_CHECKING:
    from muonlab.training.model import Model

EVALUATION_BATCH = 32
"""Blocks in a forward pass. Fixed: another batch size rounds differently in the last bits."""

PROMPT_TOKENS = 32
"""Length of the sample's prompt, the beginning of the validation split."""
SAMPLE_TOP_K = 50
"""The sample is drawn from the most likely tokens only: the tail of a small model is noise."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Losses in nats/token."""

    val_loss: float
    perplexity: float
    weights_sha256: str
    prompt: str
    sample: str
    """The sampled continuation of `prompt`; untrusted text."""


def evaluate(
    weights: Path, settings: WorkloadSettings, data_dir: Path, *, known: Mapping[str, float] | None = None
) -> Evaluation:
    """Evaluate saved weights (safetensors) on the whole validation split, and sample one continuation.

    `known` holds losses by the hash of the weights that gave them, as a training knows its own final one. A loss is a
    function of weights and data: it is not computed again when the file holds exactly those weights.
    Raises IntegrityError for weights of another model, or data that is not what its meta.json says.
    """
    torch.set_num_threads(1)
    data = TokenData.open(data_dir)
    model = models.build(
        settings.model,
        vocab_size=settings.data.vocab_size,
        sequence_length=settings.data.sequence_length,
        seed=0,
        weights=settings.weights,
    )
    models.load_weights(model, weights.read_bytes(), str(weights))
    found = models.weights_sha256(model)
    loss = known[found] if known and found in known else validation_loss(model, data)
    prompt, sample = _sample(model, data, settings.sample_tokens)
    return Evaluation(loss, perplexity(loss), found, prompt, sample)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that exceeds a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.inference_mode()
def validation_loss(model: Model, data: TokenData, blocks: npt.NDArray[np.int64] | None = None) -> float:
    """Mean loss [nats/token] over the given validation blocks [B], or over all of them."""
    if blocks is None:
        blocks = np.arange(data.block_count("validation"))
    total, count = 0.0, 0
    for start in range(0, len(blocks), EVALUATION_BATCH):
        tokens = torch.from_numpy(data.blocks("validation", blocks[start : start + EVALUATION_BATCH]))
        losses = models.token_losses(model, tokens)
        total += losses.double().sum().item()
        count += losses.numel()
    return total / count


@torch.inference_mode()
def _sample(model: Model, data: TokenData, length: int) -> tuple[str, str]:
    """The prompt and `length` tokens drawn after it, as text: the same prompt and draws for every model."""
    window = data.meta.settings.sequence_length
    first = data.blocks("validation", np.zeros(1, dtype=np.int64))
    prompt = first[0, : min(PROMPT_TOKENS, window)].tolist()
    generator = torch.Generator().manual_seed(0)
    ids = list(prompt)
    for _ in range(length):
        logits = model(input_ids=torch.tensor([ids[-window:]]), use_cache=False, logits_to_keep=1).logits
        likely = logits[0, -1].double().topk(min(SAMPLE_TOP_K, logits.shape[-1]))
        choice = torch.multinomial(likely.values.softmax(dim=-1), 1, generator=generator)
        ids.append(int(likely.indices[choice]))
    decode = data.tokenizer().decode
    return decode(prompt, skip_special_tokens=False), decode(ids[len(prompt) :], skip_special_tokens=False)
