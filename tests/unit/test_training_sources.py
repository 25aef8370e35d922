"""Documents come in a fixed order, the same from every format; what is not a corpus is refused in a sentence."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from muonlab.registry.errors import UsageError, explain
from muonlab.registry.settings import DataSettings
from muonlab.training import sources

TEXTS = [f"Document {i}: naïve — {'word ' * i}\n\nsecond paragraph" for i in range(600)]
COMMIT = "0123456789" * 4


def rows(texts: list[str]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The same documents as jsonl, jsonl.gz, parquet and in two halves; and a folder in the hub's layout."""
    (tmp_path / "all.jsonl").write_text(rows(TEXTS))
    with gzip.open(tmp_path / "all.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows(TEXTS))
    table = pa.table({"text": TEXTS, "id": range(len(TEXTS))})
    parquet.write_table(table, tmp_path / "all.parquet", row_group_size=100)
    (tmp_path / "halves").mkdir()
    (tmp_path / "halves" / "a.jsonl").write_text(rows(TEXTS[:250]))
    parquet.write_table(table.slice(250), tmp_path / "halves" / "b.parquet")
    (tmp_path / "set" / "part").mkdir(parents=True)
    shutil.copy(tmp_path / "all.parquet", tmp_path / "set" / "part" / "train-00000-of-00001.parquet")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: part\n  data_files:\n  - split: train\n    path: part/*\n---\n"
    )
    return tmp_path


def of_files(*patterns: str, **changed: object) -> DataSettings:
    return DataSettings(source="files", files=list(patterns), **changed)


def of_folder(**changed: object) -> DataSettings:
    return DataSettings(source="hub", dataset="set", config="part", **changed)


def read(settings: DataSettings, root: Path) -> list[str]:
    return list(sources.open_source(settings, root).read())


@pytest.mark.parametrize("pattern", ["all.jsonl", "all.jsonl.gz", "all.parquet", "halves/*", "**/[ab].*"])
def test_every_format_gives_the_same_documents_in_order(pattern: str, corpus: Path) -> None:
    found = sources.open_source(of_files(pattern), corpus)
    assert list(found.read()) == TEXTS
    assert list(found.read()) == TEXTS, "a second reading starts anew"
    assert found.total == len(TEXTS)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_in_the_hubs_layout_needs_no_network_and_no_revision(streaming: bool, corpus: Path) -> None:
    assert read(of_folder(streaming=streaming), corpus) == TEXTS


def test_a_slice_of_a_split(corpus: Path) -> None:
    assert read(of_folder(split="train[10%:20%]"), corpus) == TEXTS[60:120]


def test_files_come_in_the_order_of_the_patterns_and_none_twice(corpus: Path) -> None:
    assert read(of_files("halves/b.parquet", "halves/*"), corpus) == TEXTS[250:] + TEXTS[:250]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name, text in (("b.txt", "second\n\nfile"), ("a.txt", "first\nfile")):
        (tmp_path / name).write_text(text)
    assert read(of_files("*.txt"), tmp_path) == ["first\nfile", "second\n\nfile"]


def test_no_more_than_max_documents_are_read(corpus: Path) -> None:
    """What lies behind them may be anything."""
    with (corpus / "all.jsonl").open("a") as file:
        file.write("not JSON\n")
    assert read(of_files("all.jsonl", max_documents=600), corpus) == TEXTS
    with pytest.raises(UsageError, match=r"all\.jsonl, line 601: not JSON"):
        read(of_files("all.jsonl"), corpus)


def test_a_bad_file_that_the_reader_meets_behind_max_documents_is_named(tmp_path: Path) -> None:
    for name, text in (("a.txt", b"good"), ("b.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UsageError, match=r"b\.txt, line 1: byte 4 of the line \(0xe9\) is not UTF-8"):
        read(of_files("*.txt", max_documents=1), tmp_path)


@pytest.mark.parametrize("name", ["dates.jsonl", "dates.jsonl.gz"])
def test_text_that_looks_like_another_type_is_taken_as_it_stands(name: str, tmp_path: Path) -> None:
    """A reader that guesses types makes dates of them, and would give them back in another form."""
    dates = ["2020-01-05", "2020-01-05 12:00:00", "2020-01-05T12:00:00Z"]
    content = rows(dates).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(of_files(name), tmp_path) == dates


GOOD = [json.dumps({"text": text}).encode() for text in TEXTS[:20]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "broken', "bad.jsonl, line 7: not JSON"),
        (b'{"text": "caf\xe9"}', "bad.jsonl, line 7: byte 14 of the line (0xe9) is not UTF-8"),
        (b'{"body": "text"}', "bad.jsonl, line 7: no field 'text', which text_field names; found: body."),
        (b'{"text": null}', "bad.jsonl, line 7: 'text' holds no text but NoneType"),
        (b'{"text": 5}', "bad.jsonl, line 7: 'text' holds no text but int"),
        (b'["text"]', "bad.jsonl, line 7: found a list"),
        (b'{"text": "\\ud800"}', "bad.jsonl, line 7: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(line: bytes, said: str, tmp_path: Path) -> None:
    content = b"\n".join([*GOOD[:6], line, *GOOD[7:]])
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        sources.open_source(of_files("bad.jsonl"), tmp_path)
    assert said in str(refusal.value)
    with gzip.open(tmp_path / "bad.jsonl.gz", "wb") as file:
        file.write(content)
    with pytest.raises(UsageError) as refusal:
        sources.open_source(of_files("bad.jsonl.gz"), tmp_path)
    assert said.replace(".jsonl", ".jsonl.gz") in str(refusal.value)


@given(
    text=st.text(),
    other=st.text(st.characters()) | st.floats() | st.integers(),
    ascii=st.booleans(),
)
def test_a_line_gives_the_text_that_json_gives(text: str, other: object, ascii: bool) -> None:
    """Beside fields that one of its readers refuses: NaN, halves of pairs, integers of any length."""
    row = json.dumps({"text": text, "other": other}, ensure_ascii=ascii)
    line = row.encode(errors="surrogatepass")
    try:
        expected = json.loads(line.decode())["text"]
    except UnicodeDecodeError:
        with pytest.raises(UsageError, match="is not UTF-8"):
            sources._text_of(line, "line 1", "text")
    else:
        assert sources._text_of(line, "line 1", "text") == expected == text


def test_blank_lines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_bytes(b"\n\n".join(GOOD) + b"\n \n")
    assert read(of_files("blank.jsonl"), tmp_path) == TEXTS[:20]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"", "the file is empty"),
        ("x.jsonl", b"\n\n", "holds no documents"),
        ("x.txt", b"", "the file is empty"),
        ("x.txt", "one\ntwo é".encode("latin-1"), "x.txt, line 2: byte 5 of the line (0xe9) is not UTF-8"),
        ("x.jsonl", '{"text": "x"}\n'.encode("utf-16"), "x.jsonl, line 1: byte 1 of the line (0xff) is not UTF-8"),
        ("x.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b"".join(GOOD), mtime=0)[:-20], "not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b"".join(GOOD), mtime=0)[:10] + b"\xff" * 40, "not a whole gzip file"),
        ("x.parquet", b"no parquet", "not a Parquet file"),
        ("x.csv", b"text\nx", "of no known format; allowed: .jsonl, .jsonl.gz, .parquet, .txt."),
    ],
)
def test_a_file_that_is_no_corpus_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        sources.open_source(of_files("x.*"), tmp_path)
    assert said in str(refusal.value)


@pytest.mark.parametrize("settings", [of_files("all.parquet"), of_folder(), of_folder(streaming=True)])
@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("txt", "no field 'txt', which text_field names; found: id, text. Did you mean 'text'?"),
        ("id", "'id' holds no text but int"),
    ],
)
def test_a_field_that_is_not_text_is_refused(settings: DataSettings, field: str, said: str, corpus: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        read(settings.model_copy(update={"text_field": field}), corpus)
    assert said in str(refusal.value)


def test_a_pattern_without_files_is_refused_with_the_nearest(corpus: Path) -> None:
    with pytest.raises(UsageError, match=r"'al\.jsonl' matches no file .* Did you mean 'all\.jsonl'\?"):
        sources.open_source(of_files("all.parquet", "al.jsonl"), corpus)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": "prat"}, "cannot be read as config 'prat', split 'train': .*'part'"),
        ({"split": "test"}, "cannot be read as config 'part', split 'test': .*'train'"),
        ({"revision": COMMIT}, "is a folder, which has no revisions"),
    ],
)
def test_a_part_that_a_folder_lacks_is_refused(changed: dict[str, str], said: str, corpus: Path) -> None:
    with pytest.raises(UsageError, match=said):
        read(DataSettings(**{**of_folder().model_dump(), **changed}), corpus)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0" * 39])
def test_a_hub_revision_must_be_pinned(revision: str | None, tmp_path: Path) -> None:
    settings = DataSettings(source="hub", dataset="HuggingFaceFW/fineweb-edu", revision=revision)
    with pytest.raises(UsageError, match="set it to a commit, the 40 hex digits"):
        sources.open_source(settings, tmp_path)


@pytest.mark.parametrize("streaming", [True, False])
def test_without_a_hub_the_refusal_is_quick_and_says_how_to_supply_it(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the hub's client, five attempts took 23 s here."""
    import datasets.config
    import huggingface_hub.constants

    for module in (datasets.config, huggingface_hub.constants):  # put back, for the tests that follow
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    settings = DataSettings(
        source="hub", dataset="HuggingFaceFW/fineweb-edu", config="sample-10BT", revision=COMMIT, streaming=streaming
    )
    began = time.monotonic()
    with pytest.raises(UsageError) as refusal:
        sources.open_source(settings, tmp_path)
    assert time.monotonic() - began < 10
    for part in ("HuggingFaceFW/fineweb-edu", "does not answer", "HF_HOME", "`dataset` name the folder"):
        assert part in str(refusal.value)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "files"}, "files names none"),
        ({"source": "hub"}, "dataset names none"),
        ({"files": ["a.jsonl"]}, "files is set, which only source files reads"),
        ({"source": "files", "files": ["a.txt"], "streaming": True}, "streaming is set, which only source hub reads"),
        ({"source": "hub", "dataset": "a/b", "streaming": True, "split": "train[:1%]"}, "cannot be streamed"),
        ({"tokenizer_revision": COMMIT}, "tokenizer names none"),
    ],
)
def test_settings_that_do_not_go_together_cannot_be_built(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        DataSettings(**settings)
    assert said in str(explain(error.value, "params.yaml"))
