"""The tokens that the tests of `muonlab.training` share, prepared once a session. See `training_toy`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the prepared toy tokens."""
    from training_toy import TOY_DATA

    from muonlab.training.data import prepare

    folder = tmp_path_factory.mktemp("toy") / "tokens"
    prepare(TOY_DATA, folder, progress=lambda _: None)
    return folder
