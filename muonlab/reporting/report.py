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
from muonlab.registry.study import Study
from muonlab.reporting import figures
from muonlab.reporting.document import Document, Table, build
from muonlab.reporting.figures import paper
from muonlab.reporting.figures.forest import forest
from muonlab.reporting.standing import Standing

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


def write_report(standing: Standing, out: Path, *, cell: RunRecord | None = None, partial: bool = False) -> list[Path]:
    """Write report.md, report.html and figures/*.svg into the folder `out`; returns the files written.

    `cell` is the one run of an experiment, shown first, and whether it belongs to the declared grid. A `partial`
    report is made while the study runs: it says so on top and gives no verdict. A figure of an earlier report that
    has nothing to show any more is removed.
    """
    found = figures.draw(standing, partial=partial)
    drawn = [name for name, svg in found.items() if svg is not None]
    document = build(standing, pictures=drawn, cell=cell, partial=partial)
    narrow = forest(standing, narrow=True, verdicts=not partial)
    return write_document(
        document,
        found,
        figures.alternative_texts(standing),
        out,
        narrow={"forest": narrow} if narrow else {},
        arms=colours(standing.snapshot.study),
    )


def write_document(
    document: Document,
    found: dict[str, str | None],
    alternatives: dict[str, str],
    out: Path,
    *,
    narrow: dict[str, str],
    arms: dict[str, tuple[str, str]],
) -> list[Path]:
    """Write a document as report.md and report.html, and its figures; None in `found` removes an earlier one.

    `alternatives`, `narrow`, `arms`: as for `render_html`. Returns the files written.
    """
    drawn = {name: svg for name, svg in found.items() if svg is not None}
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in found:
        path = folder / f"{name}.svg"
        if name in drawn:
            written.append(_write(path, drawn[name]))
        else:
            path.unlink(missing_ok=True)
    html = render_html(document, drawn, alternatives, narrow=narrow, arms=arms)
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
    return (
        _template("report.html.j2").render(
            document=document,
            figures=drawn,
            narrow=narrow,
            alt=alternatives,
            arms=arms,
            dark=paper.DARK,
            paper=paper.PAPER,
            wide=figures.WIDE,
        )
        + "\n"
    )


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def colours(study: Study) -> dict[str, tuple[str, str]]:
    """Arm -> its colour by day and by night."""
    looks = {arm: paper.look_in(study, arm).colour for arm in study.arms}
    return {arm: (colour, paper.DARK[colour]) for arm, colour in looks.items()}


def _template(name: str) -> Template:
    from jinja2 import DictLoader, Environment, StrictUndefined, select_autoescape

    source = resources.files("muonlab.reporting").joinpath("templates", name).read_text(encoding="utf-8")
    environment = Environment(
        loader=DictLoader({name: source}),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), disabled_extensions=("md.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": data_uri,
        "dark": paper.dark,
        "rich": rich_html,
        "anchor": anchor,
        "md": escape_markdown,
        "md_table": markdown_table,
        "fenced": fenced,
    }
    environment.tests["block"] = lambda block, name: type(block).__name__ == name
    return environment.get_template(name)


def data_uri(svg: str) -> str:
    """An SVG as the source of an image."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def anchor(title: str) -> str:
    """The name by which a link finds a section."""
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))


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
        Markup("<code>{}</code>").format(part) if code else Markup("{}").format(part)
        for code, part in _code_parts(text)
    )


def escape_markdown(text: str) -> str:
    """A paragraph or list item that Markdown shows as it is, on one line; `...` stays code."""
    line = escape_inline(text, cell=False)
    # What begins a line can be a list, a heading, a quote or a rule.
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    return re.sub(r"^(?=>|[-+#=]+(?:\s|$))", r"\\", line)


def escape_inline(text: str, *, cell: bool = True) -> str:
    """Text inside a line, or in a table's cell, that Markdown shows as it is; `...` stays code."""
    shown: list[str] = []
    for code, part in _code_parts(" ".join(text.split())):
        if code:
            # In a table a pipe ends the cell even inside code. A zero-width space keeps two codes apart.
            apart = "\u200b" if shown and shown[-1].endswith("`") else ""
            shown.append(f"{apart}`{part.replace('|', chr(92) + '|') if cell else part}`")
            continue
        escaped = re.sub(r"([\\`*|~$])", r"\\\1", part)
        # Only where a tag, an entity, an image, emphasis or a link could begin: the raw text is read, too.
        escaped = re.sub(r"<(?=[A-Za-z/!?])|&(?=#|[A-Za-z0-9]+;)|!(?=\[)|\](?=[(\[:])", r"\\\g<0>", escaped)
        escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)
        # A bare address would become a link: a zero-width space inside keeps it text.
        shown.append(re.sub(r"(?i)\b(h|f|m|w)(?=(?:ttps?|tp|ailto):|ww\.)", "\\1\u200b", escaped))
    return "".join(shown)


def markdown_table(table: Table) -> str:
    """A table whose columns also line up in the raw text."""
    head = [escape_inline(title) for title, _ in table.columns]
    rows = [
        [
            _strong(escape_inline(f"`{cell}`" if kind == "code" and cell else cell), (y, x) in table.strong)
            for x, ((_, kind), cell) in enumerate(zip(table.columns, row, strict=True))
        ]
        for y, row in enumerate(table.rows)
    ]
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    right = [kind == "number" for _, kind in table.columns]

    def line(cells: list[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def _strong(text: str, stands_out: bool) -> str:
    return f"**{text}**" if stands_out and text else text


def fenced(text: str) -> str:
    """A code block that no line of the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip(chr(10))}\n{fence}"
