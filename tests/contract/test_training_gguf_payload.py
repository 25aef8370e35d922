"""A GGUF file of a package is read as data: one that would run code, or is no GGUF, is refused in a sentence."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from training_toy import TOY

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import WorkloadSettings
from muonlab.training import model as models


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("head", [b"", b"GGUF\x03\x00\x00\x00"], ids=["pickle", "pickle-behind-a-head"])
def test_a_gguf_that_would_run_code_is_refused(head: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (pip install 'muonlab[smollm2]')")
    pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'muonlab[smollm2]')")
    (tmp_path / "payload").mkdir()
    (tmp_path / "payload" / "model.gguf").write_bytes(head + pickle.dumps(Payload(tmp_path / "ran")))
    about = tmp_path / "payload-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: payload\nVersion: 1.0\n")
    (about / "RECORD").write_text("payload/model.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = WorkloadSettings(**{**TOY.model_dump(), "model": {"pretrained": "package:payload", "revision": "1.0"}})
    with pytest.raises(UsageError) as caught:
        models.build(settings, seed=0)
    assert "of payload is not a whole GGUF file" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()
