"""What a person may hand to a preparation or a training that is wrong: one sentence, and nothing is written over.

Each is handed to the stage that a study runs. What only a model that was loaded can tell (a sequence that is too long
for it, a token beyond its vocabulary) is in contract/test_training_pretrained and unit/test_training_tokenizing.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT, TOY_PARAMS

DATA = {"source": "files", "files": ["corpus.jsonl"], "vocab_size": 300, "sequence_length": 32}
GOOD = [json.dumps({"text": f"Document {i} has words enough for a block or two, and says so {i} times. " * 20})
        for i in range(40)]  # fmt: skip
FILES, EARLIER = ("tokens.bin", "tokenizer.json", "meta.json"), "what an earlier preparation made"


def corpus(*lines: str | bytes) -> Callable[[Path], None]:
    content = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    return lambda root: (root / "corpus.jsonl").write_bytes(content) and None


def tokenizer_of_another_model(root: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    (root / "other").mkdir()
    Tokenizer(BPE(vocab={"<eos>": 0, "a": 1}, merges=[])).save(str(root / "other" / "tokenizer.json"))
    (root / "other" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')


CASES: dict[str, tuple[dict[str, Any], Callable[[Path], None], list[str]]] = {
    "one document": ({}, corpus(GOOD[0]), ["1 document"]),
    "an empty file": ({}, corpus(), ["corpus.jsonl", "the file is empty"]),
    "broken JSON on line 7": ({}, corpus(*GOOD[:6], '{"text": "broken', *GOOD), ["corpus.jsonl, line 7: not JSON"]),
    "mixed encodings": ({}, corpus(*GOOD[:6], b'{"text": "caf\xe9"}', *GOOD), ["line 7", "0xe9", "not UTF-8"]),
    "a tokenizer from another model": (
        {"data": {**DATA, "tokenizer": "other"}},
        tokenizer_of_another_model,
        ["it has 2 ids where vocab_size is 300", "the tokenizer of another model"],
    ),
    "a sequence longer than the corpus": ({"data": {**DATA, "sequence_length": 10**6}}, corpus(*GOOD), ["one block"]),
    "a batch that does not divide": (
        {"micro_batch_size": 3, "batch_size": 4},
        corpus(*GOOD),
        ["micro_batch_size is 3, which does not divide batch_size = 4"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_a_sentence_and_nothing_is_written_over(tmp_path: Path, case: str) -> None:
    changes, made, words = CASES[case]
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["toy"]["settings"] |= {"data": DATA, **changes}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "dvc.yaml").touch()
    corpus(*GOOD)(tmp_path)
    made(tmp_path)
    before = tmp_path / "data" / "toy"
    before.mkdir(parents=True)
    for name in FILES:
        (before / name).write_text(EARLIER)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare_data", "toy"], cwd=tmp_path, env={**kept, "PYTHONPATH": str(PROJECT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("muonlab: ")
    for word in words:
        assert word in sentence
    assert {path.name: path.read_text() for path in before.iterdir()} == dict.fromkeys(FILES, EARLIER)
