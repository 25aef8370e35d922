"""The loss of a model on the validation split, and a sample of what it writes.

    loss = (sum over blocks and positions of -log p(target | block so far)) / (number of targets)

In nats/token. Every target counts once and equally; the sum is taken in float64, block after block, in batches whose
size is a function of the workload alone, so that a loss recomputed from the saved weights equals the training's own
bit for bit on the same machine (of a run on one process; several add up in another order).
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
from muonlab.training.device import Placement, place
from muonlab.training.distributed import ALONE, Ranks

if TYPE_CHECKING:
    from muonlab.training.model import Model

EVALUATION_BATCH, EVALUATION_LOGITS = 32, 2**26
"""Blocks in a forward pass, and logits (256 MiB of float32; a loss takes about three times that for a moment), at most.
No function of the machine: another batch size rounds differently in the last bits."""

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
    data = TokenData.open(data_dir)
    placement = place(settings)
    model = models.architecture(settings)
    models.load_weights(model, weights.read_bytes(), str(weights))
    found = models.weights_sha256(model)
    model.to(placement.device)  # type: ignore[arg-type]
    scorer = Scorer(model, data, placement)
    loss = known[found] if known and found in known else scorer.validation_loss()
    prompt, sample = _sample(scorer, settings.sample_tokens)
    return Evaluation(loss, perplexity(loss), found, prompt, sample)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that exceeds a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluation_batch(sequence_length: int, vocab_size: int) -> int:
    """Blocks in a forward pass of the evaluation."""
    return max(1, min(EVALUATION_BATCH, EVALUATION_LOGITS // (sequence_length * vocab_size)))


@dataclass(frozen=True)
class Scorer:
    """A model on its device, and the data that it is scored on."""

    model: Model
    data: TokenData
    placement: Placement
    ranks: Ranks = ALONE

    def token_losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """`models.token_losses` of blocks on the CPU, on the device and in the precision of the run."""
        with self.placement.computing():
            return models.token_losses(self.model, tokens.to(self.placement.device))

    def mean_loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """`models.mean_loss` likewise."""
        with self.placement.computing():
            return models.mean_loss(self.model, tokens.to(self.placement.device))

    @torch.inference_mode()
    def validation_loss(self, blocks: npt.NDArray[np.int64] | None = None) -> float:
        """Mean loss [nats/token] over the given validation blocks [B], or over all of them; each rank takes some."""
        if blocks is None:
            blocks = np.arange(self.data.block_count("validation"))
        settings = self.data.meta.settings
        size = evaluation_batch(settings.sequence_length, settings.vocab_size)
        total, count = 0.0, 0
        for start in range(self.ranks.rank * size, len(blocks), self.ranks.size * size):
            losses = self.token_losses(torch.from_numpy(self.data.blocks("validation", blocks[start : start + size])))
            total += losses.double().sum().item()
            count += losses.numel()
        total, targets = self.ranks.sums([total, count], self.placement.device)
        return total / targets


@torch.inference_mode()
def _sample(scorer: Scorer, length: int) -> tuple[str, str]:
    """The prompt and `length` tokens drawn after it, as text: the same prompt and draws for every model."""
    data = scorer.data
    window = data.meta.settings.sequence_length
    first = data.blocks("validation", np.zeros(1, dtype=np.int64))
    prompt = first[0, : min(PROMPT_TOKENS, window)].tolist()
    generator = torch.Generator().manual_seed(0)
    ids = list(prompt)
    for _ in range(length):
        seen = torch.tensor([ids[-window:]], device=scorer.placement.device)
        with scorer.placement.computing():
            logits = scorer.model(input_ids=seen, use_cache=False, logits_to_keep=1).logits
        likely = logits[0, -1].cpu().double().topk(min(SAMPLE_TOP_K, logits.shape[-1]))
        choice = torch.multinomial(likely.values.softmax(dim=-1), 1, generator=generator)
        ids.append(int(likely.indices[choice]))
    decode = data.tokenizer().decode
    return decode(prompt, skip_special_tokens=False), decode(ids[len(prompt) :], skip_special_tokens=False)
