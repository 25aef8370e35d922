"""Documents to tokens to blocks, and the order in which blocks are seen.

    documents --split by document--> training | validation --BPE--> ids --each + end token, joined--> stream
    block i of a stream:  input = stream[iS : iS + S],  target = stream[iS + 1 : iS + S + 1]

with S = sequence_length. Blocks share no target: every token of a stream but its first, and but the fewer
than S at its end, is predicted exactly once, and there is no padding that a loss could count. (The last
target of a block is the first input of the next.) The split comes before packing, so no article has tokens on
both sides; a tokenizer that is trained here is trained on the training documents alone. The streams lie one behind
the other in one memory-mapped uint32 file. Which side a document is on:

    permutation  of a source that is read whole, n documents:  validation = the first max(1, round(fraction n)),
                 n - 1 at most, of default_rng(split_seed).permutation(n)
    text-hash    of a source of any length:  validation where the first 8 bytes of SHA-256(split_seed, newline, text),
                 as a big-endian integer, are below fraction 2^64; so equal documents are on one side

Documents are encoded in shards of about `SHARD_CHARACTERS`, each written once and described by its hashes, in a
folder beside the result. A preparation that was killed, or met an error, reads its documents again, from the first, and
encodes only those of shards that are not there, or not of this text, tokenizer and end token. The result appears at
once, when all of it is there.

    order:  position k = step * batch + j is block  default_rng([seed, k // n]).permutation(n)[k % n]  of n

a function of (seed, step) alone: the same for every optimizer, and after a resume.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from muonlab.registry.canonical import sha256_of
from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.files import file_sha256, write_atomically
from muonlab.registry.settings import Closed, DataSettings
from muonlab.registry.syntax import syntax_sha256
from muonlab.training import sources, tokenizing
from muonlab.training.tokenizing import refuse_unknown_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENS_FILE, TOKENIZER_FILE, META_FILE = "tokens.bin", "tokenizer.json", "meta.json"
TRAINED_FILE = "trained.json"
"""In the workshop: says that the tokenizer that was trained is whole, and on what text."""

SHARD_CHARACTERS = 4 * 2**20
"""Text in memory at once, but for a document that is longer; and what a killed preparation has to do again, at most."""
PROGRESS_S = 5.0
"""Between two lines of progress."""
_CHUNK = 2**20

Split = Literal["training", "validation"]
SPLITS: tuple[Split, Split] = ("training", "validation")
Sided = Callable[[], Iterator[tuple[Split, str]]]
"""Reads the documents from the first, each with its side."""


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

    schema_version: Literal[2] = 2
    source: str
    licence: str
    attribution: str
    settings: DataSettings
    split_rule: sources.SplitRule
    """See the module's text."""
    end_token_id: int
    splits: dict[Split, SplitCounts]
    sha256: DataHashes
    code: str
    """SHA-256 of the syntax of the modules that made it."""


class _Shard(Closed):
    """A run of documents, encoded: a file of the training tokens and behind them the validation tokens."""

    encoder: str
    tokenizer: str
    """SHA-256 of its tokenizer.json."""
    end_token_id: int
    text: str
    """SHA-256 of the documents with their split."""
    sha256: str
    """SHA-256 of the file."""
    documents: dict[Split, int]
    tokens: dict[Split, int]


def prepare(settings: DataSettings, out: Path, *, progress: Callable[[str], None], root: Path | None = None) -> Meta:
    """Write `tokens.bin`, `tokenizer.json` and `meta.json` into the folder `out`, replacing what was there.

    All three appear at once, and the same settings and documents give the same bytes; `out` is as it was until then.
    A folder beside `out` that was made by the same settings is copied. Relative paths of the settings are relative to
    `root`, by default the working folder. `progress` is told of each stage, and of each in every `PROGRESS_S`, in a
    few words. Raises UsageError for documents that cannot be read or are too few, and where another process prepares
    the same folder.
    """
    root = (root or Path()).resolve()
    with _workshop(settings, out) as work:
        new = work / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        meta = _copy_of_another(settings, out, new, root, progress) or _make(settings, work, new, root, progress)
        _sync(new)
        if out.exists():
            shutil.rmtree(work / "old", ignore_errors=True)
            os.rename(out, work / "old")
        os.rename(new, out)
    progress(f"{meta.splits['training'].blocks} training and {meta.splits['validation'].blocks} validation blocks")
    return meta


@contextmanager
def _workshop(settings: DataSettings, out: Path) -> Iterator[Path]:
    """The folder beside `out` in which it is made: kept when the making breaks off, emptied for other settings."""
    from filelock import FileLock, Timeout

    work = out.parent / f".{out.name}.partial"
    work.mkdir(parents=True, exist_ok=True)
    key = sha256_of({"settings": settings.model_dump(mode="json"), "code": _code_sha256()})
    try:
        with FileLock(work / "lock", timeout=0):
            try:
                if not (work / "key").is_file() or (work / "key").read_text() != key:
                    for path in work.iterdir():
                        if path.name != "lock":
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                    write_atomically(work / "key", key, durable=False)
                yield work
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UsageError(
                    f"{out.parent}: no space left on the device; make room, and the next start goes on from here."
                ) from None
            shutil.rmtree(work)
    except Timeout:
        raise UsageError(f"{out}: another process is preparing it; wait for that one, or end it.") from None


@functools.cache
def _code_sha256() -> str:
    here = Path(__file__).parent
    return sha256_of(
        {name: syntax_sha256(here / name) for name in ("data.py", "sources.py", "tokenizing.py", "wiki.py")}
    )


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -------------------------------------------------------------------------------- a result that is already there


def _copy_of_another(
    settings: DataSettings, out: Path, new: Path, root: Path, progress: Callable[[str], None]
) -> Meta | None:
    """Copy the result of a folder beside `out`, if there is one of the same settings, code, tokenizer and text."""
    for folder in sorted(out.parent.iterdir()):
        if folder.name.startswith(".") or folder == out or not (folder / META_FILE).is_file():
            continue
        try:
            meta = Meta.model_validate_json((folder / META_FILE).read_bytes())
        except ValidationError:
            continue
        if (meta.settings, meta.code) != (settings, _code_sha256()):
            continue
        if not tokenizing.is_fixed(settings, root):
            progress(f"loading {settings.tokenizer}: whether it is still the tokenizer of {folder}")
            tokenizer, end = tokenizing.load(settings, root)
            if (tokenizing.sha256_of(tokenizer), end) != (meta.sha256.tokenizer, meta.end_token_id):
                continue
        if not sources.is_fixed(settings, root):
            progress(f"reading {settings.source}: whether it is still the text of {folder}")
            if _text_sha256(_sided(sources.open_source(settings, root), settings)) != meta.sha256.text:
                continue
        for name in (TOKENS_FILE, TOKENIZER_FILE, META_FILE):
            shutil.copyfile(folder / name, new / name)
        found = {name: file_sha256(new / name) for name in (TOKENS_FILE, TOKENIZER_FILE)}
        if found == {TOKENS_FILE: meta.sha256.tokens, TOKENIZER_FILE: meta.sha256.tokenizer}:
            progress(f"reading {folder}: made by the same settings, so it is copied")
            return meta
        progress(f"reading {folder}: made by the same settings, but its files are not as its {META_FILE} says")
    return None


def _text_sha256(sided: Sided) -> str:
    digest = hashlib.sha256()
    for side, text in sided():
        _add_text(digest, side, text)
    return digest.hexdigest()


def _add_text(digest: hashlib._Hash, side: Split, text: str) -> None:
    encoded = text.encode()
    digest.update(f"{side} {len(encoded)}\n".encode())
    digest.update(encoded)


# ---------------------------------------------------------------------------------------------------- the making


def _make(settings: DataSettings, work: Path, new: Path, root: Path, progress: Callable[[str], None]) -> Meta:
    progress(f"reading {settings.source}")
    source = sources.open_source(settings, root)
    sided = _sided(source, settings)
    tokenizer, end, trained_on = _tokenizer(settings, work, root, sided, progress)
    total = source.total
    try:
        encoder = tokenizing.Encoder(
            tokenizer, end=end, vocab_size=settings.vocab_size, fast=_may_be_fast(work, tokenizer)
        )
        shards, text = _encode(sided, encoder, work, total, progress)
    except tokenizing.TokenizersDiffer as difference:
        progress(f"encoding all anew with tokenizers: tiktoken encodes {difference} differently")
        encoder = tokenizing.Encoder(tokenizer, end=end, vocab_size=settings.vocab_size, fast=False)
        shards, text = _encode(sided, encoder, work, total, progress)
    if trained_on not in (None, text):
        (work / TRAINED_FILE).unlink()  # or the next start would meet the tokenizer of this text again
        raise UsageError(
            f"data settings: the documents of {settings.source} changed while they were read; start again when "
            "nothing writes them."
        )
    counts = _counts(shards, settings)
    _join(shards, work, new / TOKENS_FILE)
    (new / TOKENIZER_FILE).write_bytes(tokenizing.content_of(tokenizer).encode())
    meta = Meta(
        source=settings.source,
        licence=source.licence,
        attribution=source.attribution,
        settings=settings,
        split_rule=source.split_rule,
        end_token_id=end,
        splits=counts,
        sha256=DataHashes(
            text=text, tokenizer=file_sha256(new / TOKENIZER_FILE), tokens=file_sha256(new / TOKENS_FILE)
        ),
        code=_code_sha256(),
    )
    (new / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return meta


def _sided(source: sources.Source, settings: DataSettings) -> Sided:
    if source.split_rule == "text-hash":
        return lambda: ((_side_by_text(text, settings), text) for text in source.read())
    documents = list(source.read())
    if len(documents) < 2:
        raise _too_few(settings, len(documents))
    validation = min(max(1, round(settings.validation_fraction * len(documents))), len(documents) - 1)
    held_out = set(np.random.default_rng(settings.split_seed).permutation(len(documents))[:validation].tolist())
    return lambda: (("validation" if i in held_out else "training", text) for i, text in enumerate(documents))


def _side_by_text(text: str, settings: DataSettings) -> Split:
    digest = hashlib.sha256(f"{settings.split_seed}\n{text}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8]) < settings.validation_fraction * 2**64 else "training"


def _too_few(settings: DataSettings, documents: int) -> UsageError:
    more = "raise max_documents to at least 2" if settings.max_documents == 1 else "it takes at least 2"
    return UsageError(
        f"data settings: {documents} document{'' if documents == 1 else 's'} of {settings.source} cannot be split into "
        f"training and validation; {more}."
    )


def _tokenizer(
    settings: DataSettings, work: Path, root: Path, sided: Sided, progress: Callable[[str], None]
) -> tuple[Tokenizer, int, str | None]:
    """The tokenizer, its end token, and the hash of the text that it was trained on, if it was."""
    from tokenizers import Tokenizer

    if settings.tokenizer is not None:
        return (*tokenizing.load(settings, root), None)
    file, described = work / TOKENIZER_FILE, work / TRAINED_FILE
    trained = json.loads(described.read_bytes()) if described.is_file() else None
    if trained and file_sha256(file) == trained["sha256"]:
        tokenizer, trained_on = Tokenizer.from_file(str(file)), trained["text"]
    else:
        progress(f"training a tokenizer of {settings.vocab_size} on the training documents")
        digest, documents = hashlib.sha256(), dict.fromkeys(SPLITS, 0)

        def training() -> Iterator[str]:
            for side, text in sided():
                _add_text(digest, side, text)
                documents[side] += 1
                if side == "training":
                    yield text

        tokenizer = tokenizing.train(training(), settings.vocab_size)
        _refuse_one_sided(settings, documents)
        trained_on = digest.hexdigest()
        write_atomically(file, tokenizing.content_of(tokenizer))
        # Last: it says that the tokenizer is whole.
        write_atomically(described, json.dumps({"text": trained_on, "sha256": file_sha256(file)}))
    return tokenizer, tokenizer.get_vocab()[tokenizing.END_TOKEN], trained_on


def _refuse_one_sided(settings: DataSettings, documents: dict[Split, int]) -> None:
    total = sum(documents.values())
    if total < 2:
        raise _too_few(settings, total)
    for side in SPLITS:
        if not documents[side]:
            raise UsageError(
                f"data settings: none of the {total} documents falls on the {side} side by validation_fraction "
                f"{settings.validation_fraction} and split_seed {settings.split_seed}; change one of them, or add "
                "documents."
            )


def _may_be_fast(work: Path, tokenizer: Tokenizer) -> bool:
    """Whether no shard of a preparation that broke off was encoded by `tokenizers`, as a difference asks for."""
    slow = ("tokenizers", tokenizing.sha256_of(tokenizer))
    shards = (_Shard.model_validate_json(path.read_bytes()) for path in work.glob("shard-*.json"))
    return not any((shard.encoder, shard.tokenizer) == slow for shard in shards)


def _encode(
    sided: Sided, encoder: tokenizing.Encoder, work: Path, total: int | None, progress: Callable[[str], None]
) -> tuple[list[_Shard], str]:
    """Encode what is not yet encoded; return the shards, in order, and the hash of the whole text."""
    of_all = f"{total} documents" if total else "documents"
    progress(f"encoding {of_all} with {encoder.name}")
    digest, shards, said = hashlib.sha256(), list[_Shard](), time.monotonic()
    began, read, encoded = said, 0, 0
    for batch in _batches(sided()):
        for side, text in batch:
            _add_text(digest, side, text)
        path = work / f"shard-{len(shards):06}"
        shard = _finished(path, encoder, batch)
        if shard is None:
            shard = _write_shard(path, encoder, batch, read)
            encoded += len(batch)
        elif not encoded:
            began = time.monotonic()  # the rate is that of encoding
        shards.append(shard)
        read += len(batch)
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            progress(f"encoding goes on: {_pace(read, encoded, total, said - began)}")
    if encoded < read:
        progress(f"encoding is done: {read - encoded} of {read} documents were encoded before")
    return shards, digest.hexdigest()


def _pace(read: int, encoded: int, total: int | None, seconds: float) -> str:
    rate = encoded / seconds if seconds > 0 else 0.0
    done = f"{read} of {total} documents" if total else f"{read} documents"
    left = f", {_duration((total - read) / rate)} left" if total and rate else ""
    return f"{done}, {rate:.0f} a second{left}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def _batches(documents: Iterator[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    """Runs of documents of `SHARD_CHARACTERS` or the first that reach them: a function of the documents alone."""
    batch, characters = list[tuple[Split, str]](), 0
    for side, text in documents:
        batch.append((side, text))
        characters += len(text) + 1  # so that empty documents do not add up without end
        if characters >= SHARD_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _finished(path: Path, encoder: tokenizing.Encoder, batch: list[tuple[Split, str]]) -> _Shard | None:
    """The shard at `path`, if it was finished, is whole, and holds this text, encoded as `encoder` does."""
    described = path.with_suffix(".json")
    if not described.is_file():
        return None
    shard = _Shard.model_validate_json(described.read_bytes())
    same_ids = (shard.encoder, shard.tokenizer, shard.end_token_id) == (encoder.name, encoder.sha256, encoder.end)
    good = same_ids and shard.text == _text_sha256(lambda: iter(batch))
    return shard if good and file_sha256(path.with_suffix(".bin")) == shard.sha256 else None


def _write_shard(path: Path, encoder: tokenizing.Encoder, batch: list[tuple[Split, str]], first: int) -> _Shard:
    path.with_suffix(".json").unlink(missing_ok=True)
    ids = encoder.encode([text for _, text in batch], first)
    of = {side: [part for part, (its, _) in zip(ids, batch, strict=True) if its == side] for side in SPLITS}
    content = b"".join(part.tobytes() for side in SPLITS for part in of[side])
    with path.with_suffix(".bin").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    shard = _Shard(
        encoder=encoder.name,
        tokenizer=encoder.sha256,
        end_token_id=encoder.end,
        text=_text_sha256(lambda: iter(batch)),
        sha256=hashlib.sha256(content).hexdigest(),
        documents={side: len(of[side]) for side in SPLITS},
        tokens={side: sum(map(len, of[side])) for side in SPLITS},
    )
    write_atomically(path.with_suffix(".json"), shard.model_dump_json())  # last: it says that the file is whole
    return shard


def _counts(shards: list[_Shard], settings: DataSettings) -> dict[Split, SplitCounts]:
    """Sizes of both sides; raises UsageError where one of them has no documents, or not a block."""
    documents = {side: sum(shard.documents[side] for shard in shards) for side in SPLITS}
    _refuse_one_sided(settings, documents)
    counts = dict[Split, SplitCounts]()
    for side in SPLITS:
        tokens = sum(shard.tokens[side] for shard in shards)
        blocks = (tokens - 1) // settings.sequence_length
        if blocks < 1:
            raise UsageError(
                f"data settings: the {side} documents give {tokens} tokens, fewer than one block of "
                f"sequence_length {settings.sequence_length}; shorten it, or raise max_documents."
            )
        counts[side] = SplitCounts(documents=documents[side], tokens=tokens, blocks=blocks)
    return counts


def _join(shards: list[_Shard], work: Path, target: Path) -> None:
    """Write the training tokens of all shards, then the validation tokens."""
    with target.open("wb") as file:
        for side in SPLITS:
            for number, shard in enumerate(shards):
                first = 4 * (shard.tokens["training"] if side == "validation" else 0)
                with (work / f"shard-{number:06}.bin").open("rb") as part:
                    part.seek(first)
                    content = part.read(4 * shard.tokens[side])
                file.write(content)


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
                found = file_sha256(folder / name)
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
        for start in range(0, len(tokens), _CHUNK):
            refuse_unknown_ids(tokens[start : start + _CHUNK], meta.settings.vocab_size, str(folder / TOKENS_FILE))
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
