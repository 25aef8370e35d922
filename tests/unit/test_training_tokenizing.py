"""tiktoken gives the ids of `tokenizers`, or is not used; a tokenizer that does not fit is refused in a sentence."""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.settings import DataSettings
from muonlab.training import tokenizing, wiki
from muonlab.training.tokenizing import END_TOKEN, Encoder, TokenizersDiffer

VOCABULARY = 600
CUT_BY_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTTERS = {
    "words": BYTES,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "split": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUT_BY_THREE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
"""How the tokenizers of GPT-2, SmolLM2 and those made for tiktoken cut a text."""
SPACES = ["".join(some) for some in product(" \n\u3000\x1c\xa0", repeat=3)] * 20


@pytest.fixture(scope="module")
def trained() -> str:
    """With tokens of several white spaces: without them it would not matter where those are cut."""
    return tokenizing.train([*islice(wiki.articles(), 4), *SPACES], VOCABULARY).to_str()


def tokenizer_with(trained: str, **parts: object) -> Tokenizer:
    tokenizer = Tokenizer.from_str(trained)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def both(tokenizer: Tokenizer) -> tuple[Encoder, Encoder]:
    return tuple(Encoder(tokenizer, end=0, vocab_size=VOCABULARY, fast=fast) for fast in (True, False))


def same(encoder: Encoder, reference: Encoder, documents: list[str]) -> bool:
    pairs = zip(encoder.encode(documents, 17), reference.encode(documents, 17), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("cutter", CUTTERS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.text("a1 \n\t'sé,.²٣")))
def test_any_text_has_the_same_ids(trained: str, cutter: str, documents: list[str]) -> None:
    """From document 17 on: not one of those that are compared in any case."""
    fast, reference = both(tokenizer_with(trained, pre_tokenizer=CUTTERS[cutter]))
    assert (fast.name, reference.name) == ("tiktoken", "tokenizers")
    assert same(fast, reference, documents)


@pytest.mark.parametrize("cutter", CUTTERS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("a1 é.²\n\u3000\x1c\xa0", max_size=4), min_size=1))
def test_a_pattern_that_looks_ahead_is_not_needed_where_spaces_stand_alone(
    trained: str, cutter: str, documents: list[str]
) -> None:
    """Short documents, many of which have no two of them in a row, between others that have."""
    fast, reference = both(tokenizer_with(trained, pre_tokenizer=CUTTERS[cutter]))
    assert fast._single_spaced is not None
    assert "(?!" not in fast._single_spaced._pat_str
    assert same(fast, reference, documents * 4 * tokenizing.THREADS)


@pytest.mark.parametrize("pattern", [r"a\s+(?!\S)|\s+", r"\|\s+(?!\S)|\s+", r"\w+|\s+(?!\S)", r"\w+|\s+"])
def test_a_pattern_of_another_form_is_taken_as_it_is(trained: str, pattern: str) -> None:
    cutter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast, _ = both(tokenizer_with(trained, pre_tokenizer=cutter))
    assert fast.name == "tiktoken"
    assert fast._single_spaced is None


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.lists(st.sampled_from([END_TOKEN, END_TOKEN[:5], END_TOKEN[5:], " ", "a", "<", ">"]))))
def test_parts_of_the_end_token_end_no_document(trained: str, pieces: list[list[str]]) -> None:
    """Documents are joined by it before they are encoded."""
    documents = ["".join(piece) for piece in pieces]
    fast, reference = both(Tokenizer.from_str(trained))
    assert fast.name == "tiktoken"
    assert same(fast, reference, documents * 4 * tokenizing.THREADS)


@pytest.mark.parametrize("end", ["<e>", "aba"])
def test_an_end_token_that_overlaps_itself_joins_nothing(trained: str, end: str) -> None:
    """`ab` and `aba` in a row hold an `aba` that nobody put there."""
    tokenizer = Tokenizer.from_str(trained)
    tokenizer.add_special_tokens([AddedToken(end, special=True)])
    number = tokenizer.token_to_id(end)
    fast, reference = (Encoder(tokenizer, end=number, vocab_size=VOCABULARY + 1, fast=fast) for fast in (True, False))
    assert fast.name == "tiktoken"
    assert same(fast, reference, ["ab", "<", "a ab", "", "e>"] * 4 * tokenizing.THREADS)


@pytest.mark.slow
@pytest.mark.parametrize("cutter", CUTTERS)
def test_every_character_is_cut_alike(trained: str, cutter: str) -> None:
    fast, reference = both(tokenizer_with(trained, pre_tokenizer=CUTTERS[cutter]))
    alike = [range(0x3400, 0xD7FF), range(0xD800, 0xF900)]  # ideographs and syllables; surrogates and private use
    characters = [chr(point) for point in range(0x10000) if not any(point in block for block in alike)]
    documents = [
        "".join(f"a{c}b 1{c}2 {c}{c}.{c} {c}\n" for c in characters[i : i + 512])
        for i in range(0, len(characters), 512)
    ]
    assert same(fast, reference, documents)


def test_endless_white_space_is_encoded_all_the_same(trained: str) -> None:
    """tiktoken's regular expressions run out of stack on it."""
    fast, reference = both(tokenizer_with(trained))
    assert same(fast, reference, [" " * 2_000_000, "\n " * 500_000 + "x"])


def test_a_byte_that_a_tokenizer_lacks_is_left_out_by_both(trained: str) -> None:
    made = json.loads(trained)
    del made["model"]["vocab"][next(c for c, i in made["model"]["vocab"].items() if len(c) == 1 and ord(c) == 0x104)]
    fast, reference = both(Tokenizer.from_str(json.dumps(made)))
    assert fast.name == "tiktoken"
    assert same(fast, reference, ["a\x04b", "plain", "\x04"])


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a"), "removed"), BYTES])},
    ],
)
def test_another_kind_of_tokenizer_is_left_to_its_library(trained: str, parts: dict[str, object]) -> None:
    assert both(tokenizer_with(trained, **parts))[0].name == "tokenizers"


def test_a_token_that_is_cut_out_of_the_text_is_left_to_its_library(trained: str) -> None:
    tokenizer = tokenizer_with(trained)
    tokenizer.add_tokens([AddedToken("the", normalized=False)])
    assert both(tokenizer)[0].name == "tokenizers"


def test_a_difference_in_a_checked_document_is_raised_and_elsewhere_is_not(trained: str) -> None:
    """All merges taken away behind the encoder's back: the same kind of tokenizer, but not the same."""
    encoder = both(tokenizer_with(trained))[0]
    made = json.loads(trained)
    made["model"]["merges"] = []
    other = both(Tokenizer.from_str(json.dumps(made)))[1]
    encoder._tokenizer = other._tokenizer
    documents = ["and the other"] * 4
    encoder.encode(documents, 17)
    with pytest.raises(TokenizersDiffer, match="document 64"):
        encoder.encode(documents, 62)
    with pytest.raises(TokenizersDiffer, match="document 0"):
        encoder.encode(documents, 0)


def save(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def named(name: str, vocab_size: int = VOCABULARY, **changed: object) -> DataSettings:
    return DataSettings(tokenizer=name, vocab_size=vocab_size, **changed)


@pytest.mark.parametrize("token", [END_TOKEN, {"content": END_TOKEN, "special": True}])
def test_a_folder_is_loaded_with_its_end_token(token: object, trained: str, tmp_path: Path) -> None:
    save(tmp_path / "own", tokenizer_with(trained), eos_token=token)
    tokenizer, end = tokenizing.load(named("own"), tmp_path)
    assert (tokenizer.get_vocab(), end) == (Tokenizer.from_str(trained).get_vocab(), 0)


def test_what_transformers_saves_is_loaded(trained: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer_with(trained), eos_token=END_TOKEN)
    fast.save_pretrained(tmp_path / "saved")
    tokenizer, end = tokenizing.load(named("saved"), tmp_path)
    text = next(wiki.articles())
    (ids,) = Encoder(tokenizer, end=end, vocab_size=VOCABULARY).encode([text])
    assert ids.tolist() == [*fast(text)["input_ids"], 0]


def test_truncation_and_padding_that_were_saved_are_not_applied(trained: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(trained)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    save(tmp_path / "own", tokenizer, eos_token=END_TOKEN)
    loaded, end = tokenizing.load(named("own"), tmp_path)
    for encoder in (Encoder(loaded, end=end, vocab_size=VOCABULARY, fast=fast) for fast in (True, False)):
        assert [len(ids) for ids in encoder.encode(["a", "zq " * 9])] == [2, 28]


def test_the_settings_settle_a_tokenizer_that_is_trained_here_or_pinned_on_the_hub_alone(
    trained: str, tmp_path: Path
) -> None:
    save(tmp_path / "own", tokenizer_with(trained), eos_token=END_TOKEN)
    commit = {"tokenizer_revision": "0" * 40}
    for its, fixed in (
        (DataSettings(), True),
        (named("a/b", **commit), True),
        (named("a/b"), False),
        (named("own"), False),
        (named("package:some", tokenizer_revision="1.0"), False),
    ):
        assert tokenizing.is_fixed(its, tmp_path) == fixed, its.tokenizer


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (named("own", 2048), "it has 600 ids where vocab_size is 2048; it is the tokenizer of another model"),
        (named("own", 599), "it has ids up to 599, beyond the vocabulary of 599; it is the tokenizer of another model"),
        (named("own", tokenizer_revision="0" * 40), "own is a folder, which has no revisions"),
        (named("empty"), "no tokenizer.json in"),
        (named("broken"), "is not a tokenizer"),
        (named("endless"), "names no `eos_token`"),
        (named("strange"), "names no `eos_token` of its vocabulary (found '<eos>')"),
        (named("./none"), "no such folder"),
        (named("a/b"), "tokenizer_revision: found null for a/b of the hub; set it to a commit"),
        (named("package:no-such-package"), "is not installed"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    settings: DataSettings, said: str, trained: str, tmp_path: Path
) -> None:
    save(tmp_path / "own", tokenizer_with(trained), eos_token=END_TOKEN)
    save(tmp_path / "endless", tokenizer_with(trained))
    save(tmp_path / "strange", tokenizer_with(trained), eos_token="<eos>")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError) as refusal:
        tokenizing.load(settings, tmp_path)
    assert said in str(refusal.value)


def test_a_token_beyond_the_vocabulary_is_an_error(trained: str) -> None:
    with pytest.raises(IntegrityError, match="beyond the vocabulary of 300"):
        Encoder(tokenizer_with(trained), end=0, vocab_size=300).encode([next(wiki.articles())])
