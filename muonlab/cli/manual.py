"""docs/cli.md, made from the commands themselves: `make docs`.

Every command with its whole help, and the keys of the JSON object that `--json` prints, from the docstrings of the
answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from muonlab.cli import main

if TYPE_CHECKING:
    from muonlab.pipeline.answer import Answer

WIDTH = 100

OPENING = """# The command line

Made from the commands by `make docs`; edit their help texts, not this page.

`muon` answers on standard output and says what it does on standard error, so that its answers can be piped. A refusal
is one sentence: where, what was found, what is allowed, what to do.

| exit code | |
|---|---|
| 0 | done; a diverged run and a NO_GO are results, not failures |
| 1 | a NO_GO under `--fail-on-no-go`; `doctor`: not usable; `calibrate`: a promise is broken |
| 2 | usage, or input that is refused before anything is written |
| 3 | cells failed, or runs are missing |
| 4 | over budget |
| 5 | the evidence contradicts itself |

`baseline`, `nolah` and `pretrain` hand over to dvc, and exit with its codes.

## Shell completion

Commands, options, their choices and the names of studies complete with Tab after one of these lines (bash 4.4 or newer,
zsh, fish). They need `muon` on PATH: in a shell where .venv is active, or with .venv/bin on PATH.

```
eval "$(_MUON_COMPLETE=bash_source muon)"          # in ~/.bashrc
eval "$(_MUON_COMPLETE=zsh_source muon)"           # in ~/.zshrc
_MUON_COMPLETE=fish_source muon | source           # in ~/.config/fish/completions/muon.fish
```
"""


def answers() -> Mapping[str, Sequence[type[Answer]]]:
    """Command -> what its --json prints."""
    from muonlab.pipeline.accept import Accepted
    from muonlab.pipeline.advice import Advice
    from muonlab.pipeline.archive import ArchiveAnswer
    from muonlab.pipeline.doctor import Doctor
    from muonlab.pipeline.plan import Plan
    from muonlab.pipeline.remote.places import RemoteList
    from muonlab.pipeline.remote.runs import RemoteRun
    from muonlab.pipeline.running import Running
    from muonlab.pipeline.selecting import Selected
    from muonlab.pipeline.sharing import Committed
    from muonlab.pipeline.studies import StudyCard, StudyList, StudyRun, StudyStatus, TuningRun
    from muonlab.pipeline.until_decided import DecidedRun
    from muonlab.pipeline.verify import Verification

    return {
        "muon study list": (StudyList,),
        "muon study show": (StudyCard,),
        "muon study plan": (Plan,),
        "muon study run": (StudyRun, DecidedRun, TuningRun, RemoteRun),
        "muon study status": (StudyStatus,),
        "muon study select": (Selected,),
        "muon next": (Advice,),
        "muon archive": (ArchiveAnswer,),
        "muon accept": (Accepted,),
        "muon verify": (Verification,),
        "muon status": (Running,),
        "muon commit": (Committed,),
        "muon doctor": (Doctor,),
        "muon remote list": (RemoteList,),
        "muon remote follow": (RemoteRun,),
    }


def page() -> str:
    """The whole of docs/cli.md."""
    documented = answers()
    parts = [OPENING]
    for title, commands in main.chapters().items():
        parts.append(f"\n## {title}\n")
        for command in commands:
            for name, context in _walk(command, "muon"):
                parts.append(f"\n### {name}\n\n```\n{context.get_help()}\n```\n")
                for answer in documented.get(name, ()):
                    about = "" if len(documented[name]) == 1 else f", {_first_sentence(answer)}"
                    parts.append(f"\nKeys of `{name} --json`{about}:\n\n" + "".join(_keys(answer)))
    return "".join(parts)


def _walk(command: click.Command, before: str) -> Iterator[tuple[str, click.Context]]:
    name = f"{before} {command.name}"
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    # Inherited from `muon` where it is run; here every page has its own context.
    context.help_option_names = ["-h", "--help"]
    yield name, context
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from _walk(child, name)


def _first_sentence(answer: type[Answer]) -> str:
    text = (answer.__doc__ or "").strip().partition(".")[0]
    return text[0].lower() + text[1:]


def _keys(answer: type[Answer]) -> Iterator[str]:
    schema = answer.model_json_schema(mode="serialization")
    yield "| key | | |\n|---|---|---|\n"
    yield from _rows(schema, schema.get("$defs", {}), "")


def _rows(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[str]:
    for key, found in schema["properties"].items():
        name, inner = _type(found, definitions)
        meaning = " ".join(found.get("description", "").split())
        yield f"| `{path}{key}` | {name} | {meaning} |\n"
        if inner is not None:
            step = {"list": "[].", "object": ".*."}.get(name.split(" of ")[0], ".")
            yield from _rows(inner, definitions, f"{path}{key}{step}")


def _type(found: dict[str, Any], definitions: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """What a reader calls the type, and the schema of the objects in it, if there are any."""
    if "$ref" in found:
        named = definitions[found["$ref"].rpartition("/")[2]]
        return ("object", named) if "properties" in named else _type(named, definitions)
    if "enum" in found:
        return "string", None
    if "anyOf" in found:
        kinds = [_type(kind, definitions) for kind in found["anyOf"]]
        names = list(dict.fromkeys(name for name, _ in kinds))
        if len(names) > 3:
            names = ["value"]
        return " or ".join(names), next((inner for _, inner in kinds if inner is not None), None)
    if found.get("type") == "array":
        name, inner = _type(found["items"], definitions)
        return f"list of {_plural(name)}", inner
    if found.get("type") == "object" and isinstance(found.get("additionalProperties"), dict):
        name, inner = _type(found["additionalProperties"], definitions)
        return f"object of {_plural(name)}", inner
    return str(found.get("type", "value")), None


def _plural(name: str) -> str:
    first, _, rest = name.partition(" ")
    return f"{first}s {rest}".rstrip()


if __name__ == "__main__":
    from muonlab.pipeline.layout import Layout

    (Layout.find().root / "docs" / "cli.md").write_text(page(), encoding="utf-8")
