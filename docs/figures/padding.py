"""What a loss says that counts padding: the figure of docs/data.md, printed.

Real text, the articles of the workload `tiny`, a paragraph a row, cut at the sequence length and padded to it with the
end token, and `labels = input_ids`: a plain fine-tuning script. The model of `tiny` is trained so, from random weights,
with AdamW. Then one and the same model is scored on the held-out paragraphs:

    counted   mean over all targets, padding included: what such a script reports
    text      mean over the targets that are text
    packed    mean over the blocks of the held-out text without padding: how it is scored here
    counted = (1 - p) text + p padding,  where p is the share of padding among the targets

Losses in nats/token. Nothing is written.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from muonlab.registry.settings import WorkloadSettings
from muonlab.training import model as models
from muonlab.training import tokenizing, wiki
from muonlab.training.data import TokenData, prepare

STEPS, BATCH, LR, SEED = 300, 8, 2e-3, 0
HELD_OUT = 256


@dataclass(frozen=True)
class Scores:
    """Losses [nats/token] of one model on held-out rows, and the share of padding among their targets."""

    share: float
    counted: float
    text: float
    padding: float
    packed: float


def padded(ids: list[np.ndarray], length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, length + 1] of token ids, padded and cut, and which of their targets [R, length] are text."""
    rows = torch.full((len(ids), length + 1), pad, dtype=torch.int64)
    is_text = torch.zeros(len(ids), length, dtype=torch.bool)
    for row, of in enumerate(ids):
        kept = torch.from_numpy(of[: length + 1].astype(np.int64))
        rows[row, : len(kept)] = kept
        is_text[row, : len(kept) - 1] = True
    return rows, is_text


def measure(settings: WorkloadSettings, data: TokenData, paragraphs: list[str], *, steps: int) -> Scores:
    """Train on padded rows of the paragraphs for `steps`, then score the same weights in all three ways."""
    torch.set_num_threads(1)
    length, end = settings.data.sequence_length, data.meta.end_token_id
    encoder = tokenizing.Encoder(data.tokenizer(), end=end, vocab_size=settings.data.vocab_size)
    order = np.random.default_rng(SEED).permutation(len(paragraphs))
    ids = encoder.encode([paragraphs[i] for i in order[: HELD_OUT + steps * BATCH]])
    rows, is_text = padded([of[:-1] for of in ids], length, end)  # the end token is what it is padded with

    model = models.build(settings, seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(steps):
        batch = HELD_OUT + (np.arange(step * BATCH, (step + 1) * BATCH) % (len(rows) - HELD_OUT))
        models.token_losses(model, rows[batch]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.inference_mode():
        losses = torch.cat([models.token_losses(model, part) for part in rows[:HELD_OUT].split(32)]).double()
        blocks = data.blocks("validation", np.arange(min(64, data.block_count("validation"))))
        packed = models.token_losses(model, torch.from_numpy(blocks)).double().mean()
    kept = is_text[:HELD_OUT]
    return Scores(
        share=float((~kept).double().mean()),
        counted=float(losses.mean()),
        text=float(losses[kept].mean()),
        padding=float(losses[~kept].mean()),
        packed=float(packed),
    )


def main() -> None:
    """Prepare the tokens of `tiny`, measure, print."""
    workload = yaml.safe_load(Path("params.yaml").read_text())["workloads"]["tiny"]
    settings = WorkloadSettings(**workload["settings"])
    with tempfile.TemporaryDirectory() as scratch:
        prepare(settings.data, Path(scratch) / "tiny", progress=lambda text: print(text, file=sys.stderr))
        paragraphs = [text for article in wiki.articles() for text in article.split("\n\n")]
        found = measure(settings, TokenData.open(Path(scratch) / "tiny"), paragraphs, steps=STEPS)
    print(f"padding: {found.share:.1%} of the targets, at a loss of {found.padding:.4f}")
    for name in ("counted", "text", "packed"):
        loss = getattr(found, name)
        print(f"{name:>8}: loss {loss:.2f}, perplexity {math.exp(loss):.0f}")


if __name__ == "__main__":
    main()
