"""What a prepared token file promises: nothing leaks, nothing is padded, and the bytes follow from the settings."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from training_toy import TOY_DATA

from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.training import wiki
from muonlab.training.data import Meta, TokenData, prepare
from muonlab.training.tokenizing import END_TOKEN, Encoder, train

pytest_plugins = ["training_fixtures"]

FILES = ("tokens.bin", "tokenizer.json", "meta.json")


@pytest.fixture
def tokens(toy_data: Path) -> TokenData:
    return TokenData.open(toy_data)


def stream(tokens: TokenData, split: str) -> np.ndarray:
    """The split's tokens, read from the file without `TokenData`."""
    ids = np.fromfile(tokens.folder / "tokens.bin", dtype="<u4").astype(np.int64)
    first = tokens.meta.splits["training"].tokens
    return ids[:first] if split == "training" else ids[first:]


def documents(tokens: TokenData, split: str) -> list[str]:
    """The documents of a split, from its tokens."""
    ids = stream(tokens, split)
    ends = np.flatnonzero(ids == tokens.meta.end_token_id)
    assert ends[-1] == len(ids) - 1
    decode = tokens.tokenizer().decode
    return [decode(part[part != tokens.meta.end_token_id].tolist()) for part in np.split(ids, ends[:-1] + 1)]


def test_two_preparations_give_the_same_bytes(toy_data: Path, tmp_path: Path) -> None:
    prepare(TOY_DATA, tmp_path / "again", progress=lambda _: None)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (toy_data / name).read_bytes()


def test_every_document_is_on_one_side_whole(tokens: TokenData) -> None:
    sides = {split: documents(tokens, split) for split in ("training", "validation")}
    assert {split: len(side) for split, side in sides.items()} == {"training": 5, "validation": 1}
    assert sorted(sides["training"] + sides["validation"]) == sorted(islice(wiki.articles(), 6))
    assert {split: counts.documents for split, counts in tokens.meta.splits.items()} == {
        "training": 5,
        "validation": 1,
    }


def test_the_tokenizer_has_seen_training_documents_only(tokens: TokenData, toy_data: Path, tmp_path: Path) -> None:
    """Another validation document, the same tokenizer: the split with these seeds leaves out the same one of 6."""
    held_out = documents(tokens, "validation")[0]
    rest = [text for text in islice(wiki.articles(), 6) if text != held_out]
    assert train(rest, TOY_DATA.vocab_size).to_str() == (toy_data / "tokenizer.json").read_text()


@pytest.mark.parametrize("split", ["training", "validation"])
def test_blocks_predict_every_token_once_and_pad_nothing(tokens: TokenData, split: str) -> None:
    length, count = TOY_DATA.sequence_length, tokens.block_count(split)
    whole = stream(tokens, split)
    blocks = tokens.blocks(split, np.arange(count))
    assert blocks.shape == (count, length + 1)
    np.testing.assert_array_equal(blocks[:, 1:].ravel(), whole[1 : count * length + 1])
    np.testing.assert_array_equal(blocks[:, 0], whole[: count * length : length])
    assert len(whole) - (count * length + 1) < length


def test_text_that_spells_the_end_token_does_not_end_a_document(tokens: TokenData) -> None:
    end = tokens.meta.end_token_id
    encoder = Encoder(tokens.tokenizer(), end=end, vocab_size=TOY_DATA.vocab_size)
    ids = np.concatenate(encoder.encode([f"a{END_TOKEN}b", "c"]))
    assert np.count_nonzero(ids == end) == 2
    assert tokens.tokenizer().decode(ids[ids != end].tolist()) == f"a{END_TOKEN}bc"


def test_preparing_replaces_the_folder_and_leaves_nothing_beside_it(toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "tokens"
    for seed in (0, 1):
        prepare(TOY_DATA.model_copy(update={"split_seed": seed}), out, progress=lambda _: None)
    assert [path.name for path in out.parent.iterdir()] == ["tokens"]
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert TokenData.open(out).meta.settings.split_seed == 1
    assert TokenData.open(out).meta.sha256 != TokenData.open(toy_data).meta.sha256


def test_a_preparation_that_is_refused_leaves_the_old_folder(toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    meta = prepare(TOY_DATA, out, progress=lambda _: None)
    with pytest.raises(UsageError, match="fewer than one block"):
        prepare(TOY_DATA.model_copy(update={"sequence_length": 10**6}), out, progress=lambda _: None)
    with pytest.raises(UsageError, match="cannot be split"):
        prepare(TOY_DATA.model_copy(update={"max_documents": 1}), out, progress=lambda _: None)
    assert TokenData.open(out).meta == meta


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in FILES:
        (target / name).write_bytes((source / name).read_bytes())
    return target


def test_a_changed_file_is_refused(toy_data: Path, tmp_path: Path) -> None:
    for name in ("tokens.bin", "tokenizer.json"):
        folder = copy(toy_data, tmp_path / name)
        content = bytearray((folder / name).read_bytes())
        content[7] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(IntegrityError, match=f"{name}: its SHA-256"):
            TokenData.open(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema_version": 1}, "not a description of token data"),
        ({"extra": 1}, "not a description of token data"),
        ({"splits": {"training": {"documents": 1, "tokens": 5, "blocks": 1}}}, "says 5"),
        ({"settings": {**TOY_DATA.model_dump(), "vocab_size": 257}}, "beyond the vocabulary of 257"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    changed: dict[str, object], said: str, toy_data: Path, tmp_path: Path
) -> None:
    folder = copy(toy_data, tmp_path / "tokens")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changed}))
    with pytest.raises(IntegrityError, match=said):
        TokenData.open(folder)


def test_missing_data_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prepare the data first"):
        TokenData.open(tmp_path)


def test_text_is_attributed(tokens: TokenData) -> None:
    assert "CC BY-SA" in tokens.meta.licence
    assert "Wikipedia" in tokens.meta.attribution


@pytest.mark.slow
def test_the_tiny_workload_has_96_articles(tmp_path: Path) -> None:
    meta: Meta = prepare(TOY_DATA.model_copy(update={"max_documents": None}), tmp_path / "t", progress=lambda _: None)
    assert {split: counts.documents for split, counts in meta.splits.items()} == {
        "training": 91,
        "validation": 5,
    }
