r"""Text to token ids: a byte-level BPE that is trained here, or a tokenizer that came with a model.

A tokenizer is loaded from its `tokenizer.json` alone, or from the table in a GGUF file: no pickles, no code of a
repository. Encoding gives exactly
the ids of Hugging Face's `tokenizers`, special tokens in the text read as text, nothing truncated, padded or added.

`tiktoken` gives the same ids some six times faster when it is given the same merges and the same regular expression:

    rank of a token's bytes = its id        valid where the ids rise in the order of the merges
    pattern                 = that of the pre-tokenizer, one of the forms in `_pattern`

Short documents are given to it by the hundred, joined by the end token's text, which it cuts out before anything else:
every call costs as much as a short document.

Looking ahead, which such patterns do to leave the last of several white spaces to the word behind it, costs tiktoken a
fifth to a third of its time. Documents without two white spaces in a row get the pattern without it:

    ... | \s+(?!\S) | \s+      =      ... | \s      where no \s\s is in the text

A tokenizer of any other kind is encoded by `tokenizers` itself. And one that is of the right kind is checked: document
number 0 to `FIRST_CHECKED` - 1 and every `CHECK_EVERY`-th are encoded by both. The first difference means that all
documents are encoded by `tokenizers`, those before it again, so that no file holds ids of two kinds. Which documents
are checked is a function of their number alone, hence the outcome of the corpus alone.
Source of the ranks: https://github.com/openai/tiktoken (`CoreBPE` merges the pair of lowest rank, as BPE does).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.settings import DataSettings
from muonlab.training import hub, packages

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tokenizers import Tokenizer

END_TOKEN = "<|endoftext|>"  # noqa: S105 - a token of text
"""The end token of a tokenizer that is trained here."""

FIRST_CHECKED, CHECK_EVERY = 16, 64
SMALLEST_SHARE = 0.95
"""Of the model's vocabulary, which is padded to a round number: a tokenizer that fills less is another model's."""
LONG_DOCUMENT, LONG_SPACE = 100_000, 10_000
"""Characters. tiktoken's regular expressions run out of stack on white space of some hundred thousand characters; a
document of the first length with white space of the second is encoded by `tokenizers`."""
THREADS = min(8, os.cpu_count() or 1)

Ids = npt.NDArray[np.uint32]


def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, end token included; holds the distinct words of the documents, not the documents."""
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


def load(settings: DataSettings, root: Path) -> tuple[Tokenizer, int]:
    """The tokenizer that the settings name, and the id of its end token. Folders are relative to `root`.

    Raises UsageError where it is not there, not pinned, not a fast tokenizer, without an end token, or not of the
    vocabulary that the settings give the model.
    """
    name = settings.tokenizer
    assert name is not None  # `prepare` trains one otherwise
    where = f"data settings: tokenizer {name}"
    if packages.is_package(name):
        tokenizer, token = _from_gguf(packages.gguf_file(where, name, settings.tokenizer_revision), where)
    else:
        tokenizer, token = _from_json(_tokenizer_files(name, settings.tokenizer_revision, root), where)
    tokenizer.no_truncation()  # either would be applied to every document
    tokenizer.no_padding()
    end = None if token is None else tokenizer.token_to_id(token)
    if end is None:
        raise UsageError(
            f"{where}: its tokenizer_config.json names no `eos_token` of its vocabulary (found {token!r}); documents "
            "are joined by it, so add it there."
        )
    check_vocabulary(tokenizer, settings.vocab_size, where)
    return tokenizer, end


def _from_json(files: dict[str, Path], where: str) -> tuple[Tokenizer, str | None]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    except Exception as error:  # the library raises a bare Exception
        raise UsageError(f"{where}: {files['tokenizer.json']} is not a tokenizer ({error}).") from None
    return tokenizer, _end_token(files)


def _from_gguf(file: Path, where: str) -> tuple[Tokenizer, str | None]:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of two libraries, one of which raises bare Exceptions
        raise UsageError(f"{where}: {file.name} gives no tokenizer ({str(error).partition(chr(10))[0]}).") from None
    return found.backend_tokenizer, found.eos_token


def is_fixed(settings: DataSettings, root: Path) -> bool:
    """Whether the settings settle the tokenizer. A folder, or an installed package, may hold another one tomorrow."""
    name = settings.tokenizer
    if name is None:
        return True
    on_hub = not packages.is_package(name) and hub.local_folder(name, root) is None
    return on_hub and settings.tokenizer_revision is not None


def content_of(tokenizer: Tokenizer) -> str:
    """What tokenizer.json holds of it: the same text for the same tokenizer."""
    return tokenizer.to_str(pretty=False)


def sha256_of(tokenizer: Tokenizer) -> str:
    """SHA-256 of `content_of`."""
    return hashlib.sha256(content_of(tokenizer).encode()).hexdigest()


def size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raise UsageError for a tokenizer that is not of a model with `vocab_size` embeddings."""
    size = size_of(tokenizer)
    if size > vocab_size:
        raise UsageError(
            f"{where}: it has ids up to {size - 1}, beyond the vocabulary of {vocab_size}; it is the tokenizer of "
            "another model, or vocab_size should be that of the model."
        )
    if size < SMALLEST_SHARE * vocab_size:
        raise UsageError(
            f"{where}: it has {size} ids where vocab_size is {vocab_size}; it is the tokenizer of another model, or "
            "vocab_size should be that of the model."
        )


def _tokenizer_files(name: str, revision: str | None, root: Path) -> dict[str, Path]:
    """Paths of tokenizer.json and, where they are there, of the files that name the end token."""
    wanted = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    folder = hub.local_folder(name, root)
    if folder is not None:
        found = {file: folder / file for file in wanted if (folder / file).is_file()}
        if revision is not None:
            raise UsageError(
                f"data settings: tokenizer_revision: {name} is a folder, which has no revisions; set it to null."
            )
        if "tokenizer.json" not in found:
            raise UsageError(
                f"data settings: tokenizer {name}: no tokenizer.json in {folder}; save it there as a fast tokenizer "
                "(`AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)`)."
            )
        return found
    return _from_hub(name, hub.pinned("data settings: tokenizer_revision", name, revision), wanted)


def _from_hub(name: str, revision: str, wanted: Sequence[str]) -> dict[str, Path]:
    offline = hub.go_offline_if_unreachable()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found: dict[str, Path] = {}
    for file in wanted:
        try:
            found[file] = Path(hf_hub_download(name, file, revision=revision))
        except Exception as error:  # of several libraries, without a common base
            missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if file != wanted[0] and (missing or offline):
                continue  # not every tokenizer has them; `_end_token` says what is missing
            raise hub.missing(
                f"the file {file} of", f"{name}@{revision}", setting="tokenizer", offline=offline,
                reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            ) from None  # fmt: skip
    return found


def _end_token(files: dict[str, Path]) -> str | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if file in files:
            try:
                token = json.loads(files[file].read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError):
                raise UsageError(f"{files[file]}: not a JSON object; download or save it again.") from None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


# ---------------------------------------------------------------------------------------------------- encoding


class TokenizersDiffer(Exception):
    """tiktoken gave other ids than `tokenizers` for a document."""


class Encoder:
    """Encodes documents, by tiktoken where that is possible and `fast` is asked for."""

    def __init__(self, tokenizer: Tokenizer, *, end: int, vocab_size: int, fast: bool = True) -> None:
        tokenizer.encode_special_tokens = True  # a document that spells the end token does not end there
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.end, self.sha256 = end, sha256_of(tokenizer)
        self._fast, self._size = as_tiktoken(tokenizer) if fast else None, size_of(tokenizer)
        self._single_spaced = None if self._fast is None else _without_looking_ahead(self._fast)
        self._separator = None if self._fast is None else _separator(self._fast, end)

    @property
    def name(self) -> str:
        """The library that encodes."""
        return "tokenizers" if self._fast is None else "tiktoken"

    def encode(self, documents: Sequence[str], first: int = 0) -> list[Ids]:
        """Ids of each document, the end token last. `first` is the number of the first of them in the corpus.

        Raises TokenizersDiffer where a checked document differs, IntegrityError for an id beyond the vocabulary.
        """
        encoded = self._ids(documents) if self._fast is None else self._checked(documents, first)
        if encoded:
            refuse_unknown_ids(np.concatenate(encoded), self._vocab_size, "the tokenizer")
        return encoded

    def _ids(self, documents: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
        return [np.array([*encoding.ids, self.end], dtype=np.uint32) for encoding in encodings]

    def _checked(self, documents: Sequence[str], first: int) -> list[Ids]:
        share = max(1, len(documents) // (4 * THREADS))  # a task a document costs as much as a short document
        parts = [documents[i : i + share] for i in range(0, len(documents), share)]
        with ThreadPoolExecutor(THREADS) as pool:
            ids = [of for part in pool.map(self._quickly, parts) for of in part]
        checked = [i for i in range(len(documents)) if is_checked(first + i)]
        for i, expected in zip(checked, self._ids([documents[i] for i in checked]), strict=True):
            if not np.array_equal(ids[i], expected):
                raise TokenizersDiffer(f"document {first + i}")
        return ids

    def _quickly(self, documents: Sequence[str]) -> list[Ids]:
        assert self._fast is not None
        if self._separator is None or any(len(text) > LONG_DOCUMENT or self._separator in text for text in documents):
            return [self._one(text) for text in documents]
        if self._single_spaced is None:
            return self._joined(self._fast, self._separator, documents)
        return [
            ids
            for in_a_row, some in groupby(documents, lambda text: _SPACES_IN_A_ROW.search(text) is not None)
            for ids in self._joined(self._fast if in_a_row else self._single_spaced, self._separator, list(some))
        ]

    def _joined(self, fast: Encoding, separator: str, documents: Sequence[str]) -> list[Ids]:
        joined = "".join(f"{text}{separator}" for text in documents)
        ids: Ids = fast.encode_to_numpy(joined, allowed_special={separator}, disallowed_special=())
        if ids.max() >= self._size:
            return [self._one(text) for text in documents]
        bounds = [0, *(np.flatnonzero(ids == self.end) + 1).tolist()]
        return [ids[start:stop] for start, stop in pairwise(bounds)]

    def _one(self, document: str) -> Ids:
        assert self._fast is not None
        if len(document) > LONG_DOCUMENT and re.search(rf"\s{{{LONG_SPACE}}}", document):
            return self._ids([document])[0]
        ids: Ids = self._fast.encode_to_numpy(document, disallowed_special=())
        # An id past the last stands for a byte that the tokenizer lacks.
        lacking = ids.size and ids.max() >= self._size
        return self._ids([document])[0] if lacking else np.append(ids, np.uint32(self.end))


def _without_looking_ahead(fast: Encoding) -> Encoding | None:
    """The same for texts without white space in a row; None where its pattern has another form."""
    from tiktoken import Encoding

    pattern, changed = _LOOKING_AHEAD.subn(r"\\s", fast._pat_str)
    if not changed:
        return None
    return Encoding(
        "single-spaced", pat_str=pattern, mergeable_ranks=fast._mergeable_ranks, special_tokens=fast._special_tokens
    )


def _separator(fast: Encoding, end: int) -> str | None:
    """The end token's text, where it marks the ends of joined documents without doubt.

    It does where it is a special token, and none of its beginnings is one of its ends: then it is found where it was
    put, where a document spells it, and nowhere else.
    """
    text = fast.decode([end])
    overlaps = any(text.endswith(text[:length]) for length in range(1, len(text)))
    return text if text in fast.special_tokens_set and not overlaps else None


def is_checked(number: int) -> bool:
    """Whether the document of this number is encoded twice and compared."""
    return number < FIRST_CHECKED or number % CHECK_EVERY == 0


def refuse_unknown_ids(tokens: Ids, vocab_size: int, where: str) -> None:
    """Raise IntegrityError for an id that the model has no embedding for (which torch may read past)."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise IntegrityError(
            f"{where}: token id {largest} is beyond the vocabulary of {vocab_size}; "
            "tokenizer and model must have one vocab_size."
        )


_SPACES_IN_A_ROW = re.compile(r"\s\s")
"""More than what a regular expression of tiktoken calls white space: Python counts U+001C to U+001F, too."""
_LOOKING_AHEAD = re.compile(r"(?<=[^\\]\|)(?:\\s\+\(\?=\\p\{N\}\)\|)?\\s\+\(\?!\\S\)\|\\s\+\Z")
"""The last alternatives of a pattern that looks ahead."""
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# After every digit has been cut out, white space before a digit is at the end of its piece.
_GPT2_SINGLE_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def as_tiktoken(tokenizer: Tokenizer) -> Encoding | None:
    """The same tokenizer for tiktoken; None where it is of a kind that is not known to be the same.

    A byte that the tokenizer lacks gets an id past its last.
    """
    from tiktoken import Encoding

    made: dict[str, Any] = json.loads(tokenizer.to_str())
    model, added = made["model"], {token["content"]: token["id"] for token in made["added_tokens"]}
    pattern = _pattern(made["pre_tokenizer"])
    plain = (
        model.get("type") == "BPE"
        and made["normalizer"] is None
        and pattern is not None
        and all(token["special"] for token in made["added_tokens"])  # others would be cut out of the text
        and not any(
            model.get(key)
            for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        )
    )
    if not plain:
        return None
    vocabulary, merges = model["vocab"], model["merges"]
    merged = [vocabulary.get("".join(pair)) for pair in merges]
    if None in merged or any(a >= b for a, b in pairwise(merged)):
        return None
    byte_of = _byte_of_character()
    if not all(character in byte_of for token in vocabulary if token not in added for character in token):
        return None
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items() if token not in added}
    past_the_last = size_of(tokenizer)
    for byte in range(256):  # some tokenizers lack bytes, which `tokenizers` leaves out of the text
        ranks.setdefault(bytes([byte]), past_the_last + byte)
    return Encoding("same", pat_str=str(pattern), mergeable_ranks=ranks, special_tokens=added)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that cuts a text as the pre-tokenizer does; None for a form that is not known."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    if not pre_tokenizer or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    match steps[:-1], steps[-1]["use_regex"]:
        case [], True:
            return _GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return _GPT2_SINGLE_DIGITS
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}], False:
            return str(regex)
    return None


def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable ones for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
