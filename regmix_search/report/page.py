"""Pages of headed tables and figures, as HTML and as Markdown: for reports that need no template of their own."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from regmix_search.report.numerals import markdown_cell

Rows = Sequence[Sequence[str]]  # the first is the head
Section = tuple[str, Sequence[Rows], Sequence[str]]  # title, tables, and what only HTML has: figures


def write_html(title: str, words: str, notes: Sequence[str], sections: Sequence[Section], colours: int) -> str:
    """One file without links. Figures may use the styles d0 to d<colours - 1>, hues around the wheel."""
    hues = [f"hsl({round(360 * i / max(1, colours))} 60% 45%)" for i in range(colours)]
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    css += "".join(f"svg .s-d{i} {{ stroke: {c}; }} svg .f-d{i} {{ fill: {c}; }}\n" for i, c in enumerate(hues))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{css}</style>'
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(words)}</p>"]
    parts += [f'<p class="note">{html.escape(text)}</p>' for text in notes]
    for heading, tables, figures in sections:
        parts += [f"<h2>{html.escape(heading)}</h2>", *map(_table, tables), *figures]
    return f"<!doctype html><html lang=en><head>{head}</head><body><main>{''.join(parts)}</main></body></html>\n"


def write_markdown(title: str, words: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The same page without its figures."""
    parts = [f"# {title}", words, *notes]
    for heading, tables, _ in sections:
        parts.append(f"## {heading}")
        for head, *rows in tables:
            lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([*map(markdown_cell, row)] for row in rows)]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _table(rows: Rows) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = "".join(f"<{tag}{' class=l' * (j == 0)}>{html.escape(c)}</{tag}>" for j, c in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
