"""Numbers in declarations are those of YAML 1.2: what DVC writes as 1e-05 is read as a number. Bad YAML is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from muonlab.registry import yamlfile
from muonlab.registry.errors import UsageError
from muonlab.registry.yamlfile import read_yaml

ROUND = st.builds(lambda digit, power: float(f"{digit}e{power}"), st.integers(-9, 9), st.integers(-300, 300))
"""Numbers that are written without a point."""


@given(value=ROUND | st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_dvc_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    written = io.StringIO()
    YAML().dump({"value": value}, written)
    path = tmp_path_factory.getbasetemp() / "float.yaml"
    path.write_text(written.getvalue())
    assert read_yaml(path) == {"value": value}


@pytest.mark.parametrize("text", ["1e5x", "e5", "1e", "--1e5", "a1e5", "1e-5-2"])
def test_a_name_with_an_e_in_it_stays_a_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "name.yaml"
    path.write_text(f"value: {text}\n")
    assert read_yaml(path) == {"value": text}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *((opening * 200_000, "RecursionError") for opening in ("[", "{a: ", "- ", "? ")),
        ("? " * 250, "line 1: a key must be a plain value"),
        ("? [1]\n: 2\n", "line 1: a key must be a plain value"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: the key 'b' stands twice"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases are not allowed here"),
        ("a: 1\nb: [\n", "line 3: expected the node content"),
    ],
)
def test_what_no_declaration_needs_is_refused_in_a_sentence(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml") as refused:
        read_yaml(path)
    assert found in str(refused.value)


def test_both_parsers_read_the_same_in_every_declaration_here() -> None:
    root = Path(__file__).parents[2]
    for path in (root / "params.yaml", *sorted(root.glob("experiments/*/study.yaml"))):
        text = path.read_text()
        assert yamlfile._is_plain(text), path
        quick, strict = (yamlfile.yaml.load(text, Loader=loader)
                         for loader in (yamlfile._QuickLoader, yamlfile._StrictLoader))  # fmt: skip
        assert quick == strict
