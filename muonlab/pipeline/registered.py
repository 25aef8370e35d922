"""The registration of a study as git keeps it: experiments/<study>/registration.json."""

from __future__ import annotations

from pydantic import ValidationError

from muonlab.pipeline.layout import Layout
from muonlab.registry.errors import IntegrityError
from muonlab.registry.files import write_atomically
from muonlab.registry.snapshot import Registration


def read_registration(layout: Layout, slug: str) -> Registration | None:
    """The registration of a study, or None before its first run. Raises IntegrityError on a file that is none."""
    path = layout.main / "experiments" / slug / "registration.json"
    if not path.exists():
        return None
    try:
        return Registration.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise IntegrityError(
            f"experiments/{slug}/registration.json: it is not a registration, so it was edited; take it back from git."
        ) from None


def write_registration(layout: Layout, slug: str, registration: Registration) -> None:
    """Write the file; its folder is made where there is none."""
    path = layout.main / "experiments" / slug / "registration.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, registration.model_dump_json(indent=2) + "\n")
