"""Write a study's report: report.md with its figures beside it, and report.html, one file that needs nothing.

The same standing gives the same bytes. Nothing in the HTML is active or fetched: its policy allows inline style
and data images only, and all text is escaped.
"""

from __future__ import annotations

import base64
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.registry.record import RunRecord
from muonlab.reporting import figures
from muonlab.reporting.document import Document, Table, build
from muonlab.reporting.standing import Standing

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

FIGURES = {"forest": figures.forest, "evidence": figures.evidence, "differences": figures.differences, "losses": figures.losses}


def write_report(standing: Standing, out: Path, *, cell: RunRecord | None = None) -> list[Path]:
    """Write report.md, report.html and figures/*.svg into the folder `out`; returns the files written.

    `cell` is the one run of an experiment, shown first, and whether it belongs to the declared grid. A figure of
    an earlier report that has nothing to show any more is removed.
    """
    drawn = {name: svg for name, draw in FIGURES.items() if (svg := draw(standing)) is not None}
    document = build(standing, pictures=drawn, cell=cell)
    alternatives = figures.alternative_texts(standing)
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in FIGURES:
        path = folder / f"{name}.svg"
        if name in drawn:
            written.append(_write(path, drawn[name]))
        else:
            path.unlink(missing_ok=True)
    narrow = figures.forest(standing, narrow=True)
    html = render_html(document, drawn, alternatives, narrow={"forest": narrow} if narrow else {}, arms=_colours(standing))
    return [
        _write(out / "report.md", render_markdown(document, alternatives)),
        _write(out / "report.html", html),
        *written,
    ]


def render_markdown(document: Document, alternatives: dict[str, str]) -> str:
    """The report as Markdown (GitHub's dialect) that reads well raw, too."""
    text = _template("report.md.j2").render(document=document, alt=alternatives)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_html(
    document: Document,
    drawn: dict[str, str],
    alternatives: dict[str, str],
    *,
    narrow: dict[str, str],
    arms: dict[str, tuple[str, str]],
) -> str:
    """The report as one HTML file. `narrow`: figures for a phone; `arms`: arm -> its colour by day and by night."""
    return _template("report.html.j2").render(
        document=document, figures=drawn, narrow=narrow, alt=alternatives, arms=arms, dark=figures.DARK, paper=figures.PAPER
    ) + "\n"


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _colours(standing: Standing) -> dict[str, tuple[str, str]]:
    looks = {arm: figures.look(standing, arm).colour for arm in standing.snapshot.study.arms}
    return {arm: (colour, figures.DARK[colour]) for arm, colour in looks.items()}


def _template(name: str):  # type: ignore[no-untyped-def]
    source = resources.files("muonlab.reporting").joinpath("templates", name).read_text(encoding="utf-8")
    return _environment(html=".html" in name).from_string(source)


def _environment(*, html: bool) -> Environment:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["dark"] = figures.dark
    environment.filters["rich"] = rich_html
    environment.filters["md"] = escape_markdown
    environment.filters["md_table"] = markdown_table
    environment.filters["fenced"] = fenced
    environment.tests["block"] = lambda block, name: type(block).__name__ == name
    return environment


def data_uri(svg: str) -> str:
    """An SVG as the source of an image."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _code_parts(text: str) -> list[tuple[bool, str]]:
    """(is code, text) parts; backticks that don't pair are text."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return [(False, text)]
    return [(i % 2 == 1, part) for i, part in enumerate(parts) if part]


def rich_html(text: str) -> Markup:
    """Escaped text with its `...` as code."""
    from markupsafe import Markup

    return Markup("").join(
        Markup("<code>{}</code>").format(part) if code else Markup("{}").format(part) for code, part in _code_parts(text)
    )


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line; `...` stays code."""
    shown = []
    for code, part in _code_parts(" ".join(text.split())):
        if code:
            # In a table a pipe ends the cell even inside code.
            shown.append("`" + part.replace("|", "\\|") + "`")
        else:
            escaped = re.sub(r"([\\`*<>|~$#!&])", r"\\\1", part)
            # Inside a word an underscore is only an underscore; a bracket matters where a link could begin.
            escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)
            escaped = re.sub(r"\](?=[(\[:])", r"\\]", escaped)
            shown.append(re.sub(r"(?i)\b(https?|ftp|mailto)(?=:)|\b(www)(?=\.)", lambda m: m[0][0] + "\u200b" + m[0][1:], escaped))
    line = "".join(shown)
    return re.sub(r"^([-+=]|\d+[.)])(?=\s)", r"\\\1", line)


def markdown_table(table: Table) -> str:
    """A table whose columns also line up in the raw text."""
    head = [escape_markdown(title) for title, _ in table.columns]
    rows = [[escape_markdown(f"`{cell}`" if kind == "code" and cell else cell) for (_, kind), cell in zip(table.columns, row, strict=True)] for row in table.rows]
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    right = [kind == "number" for _, kind in table.columns]

    def line(cells: list[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def fenced(text: str) -> str:
    """A code block that no line of the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip(chr(10))}\n{fence}"
