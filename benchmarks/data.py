"""Preparing data against `datasets.map`: the same documents in, the same tokens out.

    prepare    `muonlab.training.data.prepare`, whole: the files checked, read, split, encoded in shards with the
               identity check, hashed, joined and described
    map        what a training script does: load_dataset, `map` with the tokenizer of transformers in batches of 1000,
               one process, then all ids with their end tokens in one uint32 file

Both get real text, the paragraphs of the articles of the workload `tiny`, and its BPE of 2048 tokens, trained before.
Both encode every document anew in every round; `map` writes its cache of Arrow files into a new folder each time. Their
tokens are compared, document by document, before anything is timed: where they differ the section fails. The clock is
the processor's: `prepare` uses several threads, which would be an advantage of another kind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import Comparison, Row, per_call
from benchmarks.harness import run as measure
from muonlab.registry.settings import DataSettings
from muonlab.training import data, tokenizing, wiki
from muonlab.training.tokenizing import END_TOKEN

VOCABULARY, END = 2048, 0
GOAL = 4.0
ROUNDS = 3
COPIES = 4
"""Of the text, so that what both sides do once weighs as little as in a corpus worth preparing."""


def preparation() -> Iterator[Row]:
    """A whole preparation, and its encoding alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or its threads, waiting for work, count as the peer's time
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = [text for article in wiki.articles() for text in article.split("\n\n")] * COPIES
        with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "own").mkdir()
        tokenizer = tokenizing.train(texts, VOCABULARY)
        tokenizer.save(str(folder / "own" / "tokenizer.json"))
        (folder / "own" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_TOKEN}))

        ours, peer = _prepare(folder), _mapped(folder)
        if sorted(_documents(ours())) != sorted(_documents(peer())):
            raise RuntimeError("prepare and datasets.map give other tokens: their times say nothing")
        row = measure(Comparison("prepare, whole", ours, peer, "datasets.map", GOAL, ROUNDS))
        size = sum(map(len, texts)) / 1e6
        yield replace(row, note=f"{len(texts)} documents, {size:.1f} million characters: {per_call(row)}.")

        fast, slow = (
            tokenizing.Encoder(tokenizer, end=END, vocab_size=VOCABULARY, fast=kind) for kind in (True, False)
        )
        row = measure(
            Comparison("encode, identity check included", lambda: fast.encode(texts), lambda: slow.encode(texts),
                       "tokenizers", None, ROUNDS)
        )  # fmt: skip
        yield replace(row, note=f"{per_call(row)}.")


def _prepare(folder: Path) -> Callable[[], Path]:
    settings = DataSettings(source="files", files=["text.jsonl"], tokenizer="own", vocab_size=VOCABULARY)

    def prepare() -> Path:
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        data.prepare(settings, folder / "prepared", progress=lambda _: None, root=folder)
        return folder / "prepared" / "tokens.bin"

    return prepare


def _mapped(folder: Path) -> Callable[[], Path]:
    from datasets import disable_progress_bars, load_dataset
    from transformers import PreTrainedTokenizerFast

    disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "own" / "tokenizer.json"), eos_token=END_TOKEN)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return {"input_ids": [[*of, END] for of in ids]}

    def map_and_write() -> Path:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        found = load_dataset(
            "json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(folder / "cache")
        )
        mapped = found.map(encode, batched=True, remove_columns=found.column_names)
        with (folder / "mapped.bin").open("wb") as file:
            for batch in mapped.with_format("numpy").iter(batch_size=1000):
                file.write(np.concatenate(list(batch["input_ids"])).astype(np.uint32).tobytes())
        return folder / "mapped.bin"

    return map_and_write


def _documents(path: Path) -> list[bytes]:
    """The ids of every document of a file, as bytes."""
    ids = np.fromfile(path, dtype=np.uint32)
    return [part.tobytes() for part in np.split(ids, np.flatnonzero(ids == END) + 1)]


SECTIONS = {"preparation": preparation}
