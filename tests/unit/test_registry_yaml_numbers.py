"""Numbers in declarations are those of YAML 1.2: what DVC writes as 1e-05 is read as a number."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

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
