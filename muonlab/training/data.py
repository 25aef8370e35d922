"""Documents to tokens to blocks, and the order in which blocks are seen.

    documents --split by document--> training | validation --BPE--> ids --each + end token, joined--> stream
    block i of a stream:  input = stream[iS : iS + S],  target = stream[iS + 1 : iS + S + 1]

with S = sequence_length. Blocks share no target: every token of a stream but its first, and but the fewer
than S at its end, is predicted exactly once, and there is no padding that a loss could count. (The last
target of a block is the first input of the next.) The split comes before packing, so no article has tokens on
both sides; the tokenizer is trained on the training documents alone. The streams lie one behind the other in
one memory-mapped uint32 file.

    order:  position k = step * batch + j is block  default_rng([seed, k // n]).permutation(n)[k % n]  of n

a function of (seed, step) alone: the same for every optimizer, and after a resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.settings import Closed, DataSettings
from muonlab.training import wiki

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_TOKEN = "<|endoftext|>"  # noqa: S105 - a token of text

TOKENS_FILE, TOKENIZER_FILE, META_FILE = "tokens.bin", "tokenizer.json", "meta.json"

Split = Literal["training", "validation"]


class SplitCounts(Closed):
    """Size of one side of the split. Tokens include one end token a document."""

    documents: int
    tokens: int
    blocks: int


class DataHashes(Closed):
    """SHA-256 of the documents' text with their split, and of the two files."""

    text: str
    tokenizer: str
    tokens: str


class Meta(Closed):
    """What `meta.json` says of a token file."""

    schema_version: Literal[1] = 1
    source: str
    licence: str
    attribution: str
    settings: DataSettings
    end_token_id: int
    splits: dict[Split, SplitCounts]
    sha256: DataHashes


def prepare(settings: DataSettings, out: Path, *, progress: Callable[[str], None]) -> Meta:
    """Write `tokens.bin`, `tokenizer.json` and `meta.json` into the folder `out`, replacing what was there.

    All three appear at once (a temporary folder beside `out` is renamed), and the same settings give the same
    bytes. `progress` is told of each stage in a few words. Raises UsageError where the documents are too few.
    """
    progress(f"reading {settings.source}")
    documents = _documents(settings)
    split = _split(len(documents), settings)
    text = {side: [documents[i] for i in split[side]] for side in split}

    progress(f"training a tokenizer of {settings.vocab_size} on {len(text['training'])} documents")
    tokenizer = _train_tokenizer(text["training"], settings.vocab_size)
    end = tokenizer.get_vocab()[END_TOKEN]

    progress(f"encoding {len(documents)} documents")
    streams = {side: _encode(tokenizer, text[side], end, settings.vocab_size) for side in split}
    splits = {
        side: SplitCounts(
            documents=len(text[side]),
            tokens=len(streams[side]),
            blocks=_block_count(len(streams[side]), settings.sequence_length),
        )
        for side in split
    }
    for side, counts in splits.items():
        if counts.blocks < 1:
            raise UsageError(
                f"data settings: the {side} documents give {counts.tokens} tokens, fewer than one block of "
                f"sequence_length {settings.sequence_length}; shorten it, or raise max_documents."
            )

    token_bytes = b"".join(streams[side].tobytes() for side in ("training", "validation"))
    tokenizer_bytes = tokenizer.to_str(pretty=False).encode()
    meta = Meta(
        source=settings.source,
        licence=wiki.LICENCE,
        attribution=wiki.ATTRIBUTION,
        settings=settings,
        end_token_id=end,
        splits=splits,
        sha256=DataHashes(
            text=_sha256(json.dumps(text, sort_keys=True).encode()),
            tokenizer=_sha256(tokenizer_bytes),
            tokens=_sha256(token_bytes),
        ),
    )
    _write_folder(
        out,
        {
            TOKENS_FILE: token_bytes,
            TOKENIZER_FILE: tokenizer_bytes,
            META_FILE: (meta.model_dump_json(indent=2) + "\n").encode(),
        },
    )
    progress(f"{splits['training'].blocks} training and {splits['validation'].blocks} validation blocks")
    return meta


def _documents(settings: DataSettings) -> list[str]:
    documents = list(islice(wiki.articles(), settings.max_documents))
    if len(documents) < 2:
        raise UsageError(
            f"data settings: {len(documents)} document of {settings.source} cannot be split into training "
            "and validation; raise max_documents to at least 2."
        )
    return documents


def _split(documents: int, settings: DataSettings) -> dict[Split, list[int]]:
    """Indices of the documents on each side, ascending; at least one document on each."""
    validation = min(max(1, round(settings.validation_fraction * documents)), documents - 1)
    shuffled = np.random.default_rng(settings.split_seed).permutation(documents)
    return {
        "training": sorted(shuffled[validation:].tolist()),
        "validation": sorted(shuffled[:validation].tolist()),
    }


def _train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: Sequence[str], end: int, vocab_size: int) -> npt.NDArray[np.uint32]:
    """Encode each document, append the end token to each, and join them."""
    tokenizer.encode_special_tokens = True  # a document that spells the end token does not end there
    encoded = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    stream = np.array([i for document in encoded for i in (*document.ids, end)], dtype=np.uint32)
    _refuse_unknown_ids(stream, vocab_size, "the tokenizer")
    return stream


def _refuse_unknown_ids(tokens: npt.NDArray[np.uint32], vocab_size: int, where: str) -> None:
    """Raise IntegrityError for an id that the model has no embedding for (which torch may read past)."""
    if tokens.max() >= vocab_size:
        raise IntegrityError(
            f"{where}: token id {tokens.max()} is beyond the vocabulary of {vocab_size}; "
            "tokenizer and model must have one vocab_size."
        )


def _block_count(tokens: int, sequence_length: int) -> int:
    return (tokens - 1) // sequence_length


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_folder(out: Path, files: dict[str, bytes]) -> None:
    """Make `out` hold just these files, at once: never seen half-written, and intact when writing fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)


@dataclass(frozen=True)
class TokenData:
    """A prepared token file, opened. Shape letters: B = blocks, S = sequence_length."""

    meta: Meta
    folder: Path
    _tokens: npt.NDArray[np.uint32] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> TokenData:
        """Open what `prepare` wrote; raises IntegrityError where the files are not as meta.json says."""
        try:
            meta = Meta.model_validate_json((folder / META_FILE).read_bytes())
            for name, declared in (
                (TOKENS_FILE, meta.sha256.tokens),
                (TOKENIZER_FILE, meta.sha256.tokenizer),
            ):
                with (folder / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != declared:
                    raise IntegrityError(
                        f"{folder / name}: its SHA-256 is {found[:12]}…, {META_FILE} says {declared[:12]}…; "
                        "prepare the data again."
                    )
        except FileNotFoundError as error:
            raise UsageError(f"{error.filename}: no such file; prepare the data first.") from None
        except ValidationError as error:
            raise IntegrityError(
                f"{folder / META_FILE}: not a description of token data, {error.errors()[0]['msg']!r}; "
                "prepare the data again."
            ) from None
        tokens = np.memmap(folder / TOKENS_FILE, dtype=np.uint32, mode="r")
        counted = sum(counts.tokens for counts in meta.splits.values())
        if len(tokens) != counted:
            raise IntegrityError(
                f"{folder / TOKENS_FILE}: {len(tokens)} tokens, {META_FILE} says {counted}; prepare the data again."
            )
        _refuse_unknown_ids(tokens, meta.settings.vocab_size, str(folder / TOKENS_FILE))
        return cls(meta, folder, tokens)

    def block_count(self, split: Split) -> int:
        """Number of blocks of a split."""
        return self.meta.splits[split].blocks

    def blocks(self, split: Split, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the blocks `indices` [B] as [B, S + 1]: input is [:, :-1], target is [:, 1:]."""
        length = self.meta.settings.sequence_length
        start = self.meta.splits["training"].tokens if split == "validation" else 0
        positions = start + indices[:, None] * length + np.arange(length + 1)
        blocks: npt.NDArray[np.int64] = self._tokens[positions].astype(np.int64)
        return blocks

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made these tokens."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / TOKENIZER_FILE))


class Order:
    """The training blocks of every step: a function of (seed, step), given batch size and block count."""

    def __init__(self, *, seed: int, batch_size: int, blocks: int) -> None:
        self.blocks = blocks
        self._seed, self._batch_size = seed, batch_size
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def step(self, step: int) -> npt.NDArray[np.int64]:
        """Block indices [batch_size] of optimizer step `step`, counted from 0."""
        positions = range(step * self._batch_size, (step + 1) * self._batch_size)
        return np.array([self._at(*divmod(position, self.blocks)) for position in positions], dtype=np.int64)

    def _at(self, epoch: int, within: int) -> int:
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.blocks)
        return int(self._permutation[within])


def order_sha256(*, seed: int, steps: int, batch_size: int, blocks: int) -> str:
    """SHA-256 over the block indices of all steps, as little-endian int64."""
    order = Order(seed=seed, batch_size=batch_size, blocks=blocks)
    digest = hashlib.sha256()
    for step in range(steps):
        digest.update(order.step(step).astype("<i8").tobytes())
    return digest.hexdigest()


def validation_subset(blocks: int, wanted: int) -> npt.NDArray[np.int64]:
    """The validation blocks [min(wanted, blocks)] of the evaluations in training: the same for every seed."""
    return np.random.default_rng(0).permutation(blocks)[:wanted]
