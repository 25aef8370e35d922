"""A corpus larger than memory, killed in the middle, on a full disk: the same bytes, or the old ones, never a part.

As a script it prepares the files of a folder, in small shards, and prints its progress:
    python test_training_data_streams.py FOLDER OUT SHARD_CHARACTERS [MEGABYTES]
with MEGABYTES of address space for whatever is needed beside the program itself.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import DataSettings
from muonlab.training import data, tokenizing, wiki
from muonlab.training.data import SPLITS, Meta, TokenData, prepare
from muonlab.training.tokenizing import END_TOKEN

FILES = ("tokens.bin", "tokenizer.json", "meta.json")
VOCABULARY = 400
SHARD = 20_000
"""Characters: of some 400 000."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of real articles as jsonl, and a tokenizer in the hub's layout."""
    folder = tmp_path_factory.mktemp("corpus")
    articles = list(islice(wiki.articles(), 12))
    rows = [json.dumps({"text": text}) + "\n" for article in articles for text in article.split("\n\n")]
    (folder / "text.jsonl").write_text("".join(rows))
    (folder / "own").mkdir()
    tokenizing.train(articles, VOCABULARY).save(str(folder / "own" / "tokenizer.json"))
    (folder / "own" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_TOKEN}))
    return folder


def settings(**changed: object) -> DataSettings:
    return DataSettings(
        **{"source": "files", "files": ["text.jsonl"], "tokenizer": "own", "vocab_size": VOCABULARY, **changed}
    )


def made(settings: DataSettings, out: Path, root: Path) -> tuple[Meta, list[str]]:
    said: list[str] = []
    return prepare(settings, out, progress=said.append, root=root), said


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed preparation makes, in one shard."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    made(settings(), out, corpus)
    return out


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def child(corpus: Path, out: Path, *more: str, **kept: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(corpus), str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kept)


def shards(out: Path) -> list[Path]:
    return sorted((out.parent / f".{out.name}.partial").glob("shard-*.json"))


def killed(corpus: Path, out: Path, at: int) -> None:
    """A preparation that was killed once it had finished `at` shards."""
    process = child(corpus, out, str(SHARD))
    while len(shards(out)) < at:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_number_of_shards_changes_nothing(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD_CHARACTERS", SHARD)
    made(settings(), tmp_path / "tokens", corpus)
    assert same_files(tmp_path / "tokens", whole)


def test_a_document_is_on_the_side_that_its_text_says(corpus: Path, whole: Path) -> None:
    """Twice as many documents, those of before where they were; in the order of reading within a side."""
    texts = [json.loads(line)["text"] for line in (corpus / "text.jsonl").read_text().splitlines()]
    tokens = TokenData.open(whole)
    decode = tokens.tokenizer().decode
    for side in SPLITS:
        counts = tokens.meta.splits[side]
        first = tokens.meta.splits["training"].tokens if side == "validation" else 0
        ids = np.fromfile(whole / "tokens.bin", dtype="<u4").astype(np.int64)[first : first + counts.tokens]
        ends = np.flatnonzero(ids == tokens.meta.end_token_id)
        found = [decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]
        assert found == [text for text in texts if data._side_by_text(text, settings()) == side]
        assert len(found) == counts.documents
    assert tokens.meta.split_rule == "text-hash"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 9), st.floats(0.01, 0.98))
def test_a_larger_fraction_only_adds_to_the_validation_side(text: str, seed: int, fraction: float) -> None:
    """Hence a growing validation side never takes in what was trained on by the same settings."""
    small, large = (settings(split_seed=seed, validation_fraction=f) for f in (fraction, fraction + 0.01))
    if data._side_by_text(text, small) == "validation":
        assert data._side_by_text(text, large) == "validation"


def test_the_share_on_the_validation_side_is_the_fraction() -> None:
    """Of 20 000 texts 1000 are expected; five standard deviations are 154."""
    sides = [data._side_by_text(f"text {i}", settings()) for i in range(20_000)]
    assert abs(sides.count("validation") - 1000) < 154


@pytest.mark.parametrize("trained_here", [False, True])
def test_a_killed_preparation_goes_on(
    trained_here: bool, corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tokens"
    if trained_here:  # the script reads its settings from this file
        shutil.copytree(corpus, tmp_path / "corpus")
        corpus = tmp_path / "corpus"
        (corpus / "trained_here").touch()
    killed(corpus, out, at=3)
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in shards(out)[:3]}
    monkeypatch.setattr(data, "SHARD_CHARACTERS", SHARD)
    broken = shards(out)[1].with_suffix(".bin")
    content = bytearray(broken.read_bytes())
    content[5] ^= 1
    broken.write_bytes(content)

    seen: dict[Path, int] = {}

    def look(said: str) -> None:
        if "were encoded before" in said:
            seen.update({path: path.stat().st_mtime_ns for path in finished})

    its = settings(tokenizer=None) if trained_here else settings()
    prepare(its, out, progress=look, root=corpus)
    kept = [seen[path] == finished[path] for path in sorted(finished)]
    assert kept == [True, False, True], "all but the one that was damaged are kept"
    assert [path.name for path in tmp_path.iterdir() if path.name != "corpus"] == ["tokens"]
    undisturbed = whole
    if trained_here:
        undisturbed = tmp_path / "undisturbed" / "tokens"
        made(its, undisturbed, corpus)
    assert same_files(out, undisturbed)


def test_after_a_kill_a_changed_corpus_is_encoded_anew_from_the_change_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, out = tmp_path / "corpus", tmp_path / "out" / "tokens"
    shutil.copytree(corpus, changed)
    killed(changed, out, at=2)
    lines = (changed / "text.jsonl").read_text().splitlines(keepends=True)
    (changed / "text.jsonl").write_text("".join([json.dumps({"text": "Another beginning."}) + "\n", *lines[1:]]))
    monkeypatch.setattr(data, "SHARD_CHARACTERS", SHARD)
    made(settings(), out, changed)
    made(settings(), tmp_path / "fresh" / "tokens", changed)
    assert same_files(out, tmp_path / "fresh" / "tokens")


def another_tokenizer(folder: Path) -> None:
    """The same vocabulary size and end token, other merges."""
    tokenizing.train(islice(wiki.articles(), 2), VOCABULARY).save(str(folder / "tokenizer.json"))


def another_end_token(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))


CHANGES = [another_tokenizer, another_end_token]


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_kill_a_changed_tokenizer_encodes_everything_anew(
    change: Callable[[Path], None], corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, out = tmp_path / "corpus", tmp_path / "out" / "tokens"
    shutil.copytree(corpus, changed)
    killed(changed, out, at=2)
    change(changed / "own")
    monkeypatch.setattr(data, "SHARD_CHARACTERS", SHARD)
    _, said = made(settings(), out, changed)
    assert not any("were encoded before" in line for line in said)
    made(settings(), tmp_path / "fresh" / "tokens", changed)
    assert same_files(out, tmp_path / "fresh" / "tokens")
    assert not same_files(out, whole)


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_of_another_tokenizer_is_not_copied(
    change: Callable[[Path], None], corpus: Path, tmp_path: Path
) -> None:
    own = tmp_path / "corpus"
    shutil.copytree(corpus, own)
    first, second = tmp_path / "data" / "first", tmp_path / "data" / "second"
    made(settings(), first, own)
    change(own / "own")
    _, said = made(settings(), second, own)
    assert any(line.startswith("encoding") for line in said)
    made(settings(), tmp_path / "fresh" / "tokens", own)
    assert same_files(second, tmp_path / "fresh" / "tokens")


@pytest.mark.parametrize("missing", ["text.jsonl", "own"])
def test_an_error_at_a_restart_keeps_what_is_encoded(
    missing: str, corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, out = tmp_path / "corpus", tmp_path / "out" / "tokens"
    shutil.copytree(corpus, own)
    killed(own, out, at=3)
    (own / missing).rename(own / "away")
    with pytest.raises(UsageError):
        made(settings(), out, own)
    (own / "away").rename(own / missing)
    monkeypatch.setattr(data, "SHARD_CHARACTERS", SHARD)
    _, said = made(settings(), out, own)
    assert any("were encoded before" in line for line in said)
    assert same_files(out, whole)


def test_a_tokenizer_of_a_text_that_changed_is_refused_once_and_then_trained_anew(corpus: Path, tmp_path: Path) -> None:
    changed, out, its = tmp_path / "corpus", tmp_path / "out" / "tokens", settings(tokenizer=None)
    shutil.copytree(corpus, changed)
    (changed / "trained_here").touch()
    killed(changed, out, at=2)
    with (changed / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "One document more."}) + "\n")
    with pytest.raises(UsageError, match="changed while they were read; start again"):
        made(its, out, changed)
    made(its, out, changed)
    made(its, tmp_path / "fresh" / "tokens", changed)
    assert same_files(out, tmp_path / "fresh" / "tokens")


def test_two_preparations_of_one_folder_at_once_are_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    process = child(corpus, out, str(SHARD))
    while not shards(out):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UsageError, match="another process is preparing it"):
        made(settings(), out, corpus)
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert TokenData.open(out).meta.settings == settings()


def test_the_same_settings_are_prepared_once(corpus: Path, whole: Path, tmp_path: Path) -> None:
    made(settings(), tmp_path / "first", corpus)
    _, said = made(settings(), tmp_path / "second", corpus)
    assert any("copied" in line for line in said)
    assert not any(line.startswith("encoding") for line in said)
    assert same_files(tmp_path / "second", whole)
    other, said = made(settings(split_seed=1), tmp_path / "third", corpus)
    assert any(line.startswith("encoding") for line in said)
    assert other.sha256.tokens != TokenData.open(whole).meta.sha256.tokens


def test_a_result_that_is_damaged_or_of_another_text_is_not_copied(corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "corpus"
    shutil.copytree(corpus, own)
    first = tmp_path / "data" / "first"
    made(settings(), first, own)
    good = (first / "tokens.bin").read_bytes()
    (first / "tokens.bin").write_bytes(good[:8] + bytes([good[8] ^ 1]) + good[9:])
    _, said = made(settings(), first.with_name("second"), own)
    assert any(line.startswith("encoding") for line in said)
    assert (first.with_name("second") / "tokens.bin").read_bytes() == good
    with (own / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "One document more."}) + "\n")
    _, said = made(settings(), first.with_name("third"), own)
    assert any(line.startswith("encoding") for line in said)
    assert (first.with_name("third") / "tokens.bin").stat().st_size > len(good)


def test_a_tokenizer_that_differs_from_tiktoken_encodes_everything_itself(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern is made wrong, as a new version of a library might; the bytes are those of `tokenizers`."""
    monkeypatch.setattr(tokenizing, "as_tiktoken", lambda tokenizer: None)
    made(settings(), tmp_path / "reference", corpus)
    monkeypatch.undo()
    monkeypatch.setattr(tokenizing, "_GPT2", r"\s?\S|\s+")
    monkeypatch.setattr(data, "SHARD_CHARACTERS", SHARD)
    (tmp_path / "data").mkdir()
    _, said = made(settings(), tmp_path / "data" / "tokens", corpus)
    assert any("tiktoken encodes document 0 differently" in line for line in said)
    assert same_files(tmp_path / "data" / "tokens", tmp_path / "reference")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_on_a_full_disk_the_old_result_stays_and_the_next_start_goes_on(
    corpus: Path, whole: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD_CHARACTERS", SHARD)
    out = small_disk / "tokens"
    old, _ = made(settings(max_documents=60), out, corpus)
    (small_disk / "filler").write_bytes(bytes(700_000 - 4 * 5000))
    with pytest.raises(UsageError, match="no space left on the device; make room, and the next start goes on"):
        made(settings(), out, corpus)
    assert TokenData.open(out).meta == old
    assert shards(out)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    _, said = made(settings(), out, corpus)
    assert any("were encoded before" in line for line in said)
    assert same_files(out, whole)


@pytest.mark.slow
def test_a_corpus_larger_than_memory(tmp_path: Path) -> None:
    """96 MB of text, in a process that may ask for 64 MB beside the program itself."""
    documents = [f"{i} " + "lorem ipsum dolor sit amet " * 1000 for i in range(3600)]
    with (tmp_path / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    megabytes = 64
    assert (tmp_path / "text.jsonl").stat().st_size > 1.4 * megabytes * 2**20
    (tmp_path / "own").mkdir()
    tokenizing.train(documents[:9], 300).save(str(tmp_path / "own" / "tokenizer.json"))
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_TOKEN}))
    (tmp_path / "vocabulary").write_text("285")
    process = child(
        tmp_path, tmp_path / "tokens", str(data.SHARD_CHARACTERS), str(megabytes),
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # or every thread reserves 64 MB of addresses
    )  # fmt: skip
    said, _ = process.communicate()
    assert process.returncode == 0, said
    counts = Meta.model_validate_json((tmp_path / "tokens" / "meta.json").read_bytes()).splits
    assert sum(count.documents for count in counts.values()) == len(documents)


if __name__ == "__main__":
    folder, out, characters, *rest = sys.argv[1:]
    root = Path(folder)
    its = {"tokenizer": None} if (root / "trained_here").exists() else {}
    if (root / "vocabulary").exists():
        its["vocab_size"] = int((root / "vocabulary").read_text())
    if rest:
        # What is imported late is imported before the limit: it is the program, not the corpus.
        prepare(settings(**its, max_documents=300), root / "warm", progress=lambda _: None, root=root)
        shutil.rmtree(root / "warm")
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + int(rest[0]) * 2**20,) * 2)
    data.SHARD_CHARACTERS = int(characters)
    prepare(settings(**its), Path(out), progress=lambda said: print(said, flush=True), root=root)
