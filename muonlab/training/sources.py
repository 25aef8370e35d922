"""Where documents come from: one at a time, in a fixed order, whatever the size of the corpus.

    gensim-wiki   the articles inside the gensim wheel (`wiki`)
    files         jsonl, jsonl.gz, parquet (a row is a document) and txt (a file is a document), in the order of the
                  patterns and within one by name, no file twice
    hub           a data set of the Hugging Face hub at a pinned revision, or a folder in its layout

Parquet, txt and hub go through the same `datasets.load_dataset` and the same `_texts`; files are streamed, so that
nothing is copied. One's own jsonl is read by `_jsonl`, line by line, once to check it before anything is encoded and
once to encode it: the library's reader turns the number 5 into the text "5", takes texts that all look like dates for
dates, reads a missing field as null, and counts rows from the start of a chunk.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from muonlab.registry.errors import MuonlabError, UsageError, nearest
from muonlab.registry.settings import DataSettings
from muonlab.training import hub, wiki

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SplitRule = Literal["permutation", "text-hash"]

BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet", ".txt": "text"}
"""The format of a file by how its name ends, as `load_dataset` calls it."""
ROWS = 256
"""Documents that are in memory at once while reading."""


class SourceError(UsageError):
    """The reading of a data set broke off."""


@dataclass(frozen=True)
class Source:
    """A corpus. `read` starts anew at the first document every time it is called."""

    licence: str
    attribution: str
    split_rule: SplitRule
    total: int | None
    """Number of documents, where it is known before they are read."""
    read: Callable[[], Iterator[str]]


def open_source(settings: DataSettings, root: Path) -> Source:
    """Find the corpus and check what can be checked at once; paths are relative to `root`.

    Raises UsageError, one sentence, for a pattern without files, an empty or broken file, a missing field, a revision
    that is not pinned, or a hub that cannot be reached.
    """
    found = {"gensim-wiki": _wiki, "files": _files, "hub": _hub}[settings.source](settings, root)
    limit = settings.max_documents

    def read() -> Iterator[str]:
        return islice(found.read(), limit)

    total = found.total if limit is None or found.total is None else min(found.total, limit)
    return Source(found.licence, found.attribution, found.split_rule, total or limit, read)


def is_fixed(settings: DataSettings, root: Path) -> bool:
    """Whether name and revision settle what is read. What a folder holds may be another thing tomorrow."""
    if settings.source == "hub":
        assert settings.dataset is not None  # DataSettings refuses it
        return hub.local_folder(settings.dataset, root) is None and settings.revision is not None
    return settings.source == "gensim-wiki"


def _wiki(settings: DataSettings, root: Path) -> Source:
    documents = list(islice(wiki.articles(), settings.max_documents))
    return Source(wiki.LICENCE, wiki.ATTRIBUTION, "permutation", len(documents), lambda: iter(documents))


# ------------------------------------------------------------------------------------------------ one's own files


def _files(settings: DataSettings, root: Path) -> Source:
    paths = find_files(settings.files, root)
    limit, total = settings.max_documents, 0
    for path in paths:
        if path.stat().st_size == 0:
            raise UsageError(f"{_shown(path, root)}: the file is empty; leave it out of `files`, or write it again.")
        total += _check(path, _shown(path, root), settings.text_field, None if limit is None else limit - total)
        if limit is not None and total >= limit:
            break

    def read() -> Iterator[str]:
        for builder, group in groupby(paths, key=lambda path: BUILDERS[_format(path)]):
            if builder == "json":
                for path in group:
                    yield from _jsonl(path, _shown(path, root), settings.text_field)
                continue
            members = [str(path) for path in group]
            where = f"{_shown(Path(members[0]), root)}{f' and {len(members) - 1} more' if len(members) > 1 else ''}"
            try:
                yield from _texts(_load_files(builder, members), _field(builder, settings), where)
            except SourceError:
                for name in members:  # the reader looks ahead of max_documents: say what it stumbled over
                    _check(Path(name), _shown(Path(name), root), settings.text_field, None)
                raise

    names = ", ".join(settings.files)
    return Source(
        licence="as the owner of the files says",
        attribution=f"{len(paths)} files: {names}",
        split_rule="text-hash",
        total=total,
        read=read,
    )


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def find_files(patterns: list[str], root: Path) -> list[Path]:
    """Files of the patterns: pattern by pattern, by name within one, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(str(Path(glob.escape(str(root))) / pattern), recursive=True))
        paths = [path for path in map(Path, matches) if path.is_file()]
        if not paths:
            raise UsageError(
                f"data settings: files: {pattern!r} matches no file in {root}; patterns are relative to the "
                f"repository (`**` goes into folders).{_nearest_file(pattern, root)}"
            )
        for path in paths:
            if _format(path) not in BUILDERS:
                raise UsageError(
                    f"data settings: files: {_shown(path, root)} (by {pattern!r}) is of no known format; "
                    f"allowed: {', '.join(BUILDERS)}."
                )
        found |= dict.fromkeys(paths)
    return list(found)


def _nearest_file(pattern: str, root: Path) -> str:
    folder = (root / pattern).parent
    return nearest(Path(pattern).name, [path.name for path in folder.iterdir()]) if folder.is_dir() else ""


def _format(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _field(builder: str, settings: DataSettings) -> str:
    return "text" if builder == "text" else settings.text_field


def _load_files(builder: str, members: list[str]) -> IterableDataset:
    from datasets import load_dataset

    _quiet()
    whole_files = {"sample_by": "document"} if builder == "text" else {}
    return load_dataset(builder, data_files=members, split="train", streaming=True, **whole_files)


def _check(path: Path, where: str, field: str, limit: int | None) -> int:
    """Number of documents of a file, up to `limit` where there is one; raises UsageError for one that is not sound."""
    if _format(path) == ".parquet":
        with _refused(where):
            documents = _check_parquet(path, where, field)
    elif _format(path) == ".txt":
        documents = 1
        with _refused(where), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                _decoded(line, f"{where}, line {number}")
    else:
        documents = sum(1 for _ in islice(_jsonl(path, where, field), limit))
    if not documents:
        raise UsageError(f"{where}: the file holds no documents; leave it out of `files`, or write it again.")
    return documents


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """Turn what goes wrong in opening and unpacking a file into UsageError."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{where}: not a whole gzip file ({error}); write it again.") from None
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror}).") from None


def _jsonl(path: Path, where: str, field: str) -> Iterator[str]:
    """Texts of a jsonl file, exactly as they stand there; raises UsageError for the first line without one."""
    with _refused(where), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of(line, f"{where}, line {number}", field)


def _text_of(line: bytes, at: str, field: str) -> str:
    """The text of a line, by orjson where it can: what it takes, it takes as json does, and sooner."""
    try:
        row = orjson.loads(line)
    except ValueError:  # NaN, which json takes, or something that is to be said in json's words
        try:
            row = json.loads(_decoded(line, at))
        except ValueError as error:
            raise UsageError(f"{at}: not JSON ({error}); every line is one object like {{{field!r}: ...}}.") from None
    if not isinstance(row, dict):
        raise UsageError(f"{at}: found a {type(row).__name__}; every line is one object like {{{field!r}: ...}}.")
    text = row.get(field)
    if not isinstance(text, str):
        raise _no_text(at, field, row.keys(), type(text).__name__)
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{at}: {field!r} holds half of a surrogate pair, which is no text; mend it.") from None
    return text


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8, in which the file "
            "should be throughout; convert it (`iconv -f latin1 -t utf-8` where it is Latin-1)."
        ) from None


def _check_parquet(path: Path, where: str, field: str) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, int(file.metadata.num_rows)
    except pa.ArrowInvalid as error:
        raise UsageError(f"{where}: not a Parquet file ({str(error).splitlines()[0]}); write it again.") from None
    kind = schema.field(field).type if field in schema.names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise _no_text(where, field, schema.names, str(kind))
    return rows


def _no_text(where: str, field: str, names: Any, found: str) -> UsageError:
    listed = sorted(map(str, names))
    if field in listed:
        return UsageError(f"{where}: {field!r} holds no text but {found}; mend the row, or set text_field to another.")
    return UsageError(
        f"{where}: no field {field!r}, which text_field names; found: {', '.join(listed) or 'none'}."
        f"{nearest(field, listed)}"
    )


# ------------------------------------------------------------------------------------------------------- the hub


def _hub(settings: DataSettings, root: Path) -> Source:
    name = settings.dataset
    assert name is not None  # DataSettings refuses it
    folder = hub.local_folder(name, root)
    if folder and settings.revision is not None:
        raise UsageError(f"data settings: revision: {name} is a folder, which has no revisions; set it to null.")
    revision = None if folder else hub.pinned("data settings: revision", name, settings.revision)
    opened = _load_hub(settings, folder, revision)
    columns = opened.column_names
    if columns is not None and settings.text_field not in columns:
        raise _no_text(f"data set {name}", settings.text_field, columns, "nothing")
    return Source(
        licence=f"as the card of {name} says",
        attribution=f"{name}{f', {settings.config}' if settings.config else ''}, split {settings.split}"
        + (f", revision {revision} (https://huggingface.co/datasets/{name})" if revision else ""),
        split_rule="text-hash",
        total=None if settings.streaming else len(opened),
        read=lambda: _texts(opened, settings.text_field, f"data set {name}"),
    )


def _load_hub(settings: DataSettings, folder: Path | None, revision: str | None) -> Dataset | IterableDataset:
    offline = False if folder else hub.go_offline_if_unreachable()
    from datasets import load_dataset

    _quiet()
    name = str(folder) if folder else settings.dataset
    where = f"data settings: dataset {settings.dataset}"
    try:
        return load_dataset(
            name, settings.config, split=settings.split, revision=revision, streaming=settings.streaming
        )
    except (ConnectionError, FileNotFoundError) as error:
        if folder:
            raise UsageError(f"{where}: no data files in the folder {folder} ({_first_line(error)}).") from None
        raise hub.missing(
            "the data set", f"{name}@{revision}", setting="dataset", offline=offline, reason=_first_line(error)
        ) from None
    except Exception as error:  # the library's errors have no common base, and say what is wrong in their first line
        raise UsageError(f"{where}: cannot be read as config {settings.config!r}, split {settings.split!r}: "
                         f"{_first_line(error)}") from error  # fmt: skip


def _quiet() -> None:
    """No bars, and no log of an error that is raised as well."""
    import logging

    from datasets import disable_progress_bars
    from datasets.utils.logging import set_verbosity

    disable_progress_bars()
    set_verbosity(logging.CRITICAL)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None and type(error).__name__ == "DatasetGenerationError":
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _texts(dataset: Dataset | IterableDataset, field: str, where: str) -> Iterator[str]:
    """Texts of a data set, `ROWS` in memory at a time."""
    read = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=ROWS):
            if field not in table.column_names:
                raise _no_text(f"{where}, document {read + 1}", field, table.column_names, "nothing")
            for text in table.column(field).to_pylist():
                read += 1
                if not isinstance(text, str):
                    raise _no_text(f"{where}, document {read}", field, table.column_names, type(text).__name__)
                yield text
    except (MuonlabError, GeneratorExit):
        raise
    except Exception as error:  # see `_load_hub`
        raise SourceError(
            f"{where}: reading stopped after {read} documents ({_first_line(error)}); what is encoded is kept for the "
            "next start."
        ) from error
