"""report.html: one page that holds everything it needs, for a phone and for a desk. No script, nothing from a network.

What a section says is in page_sections.py; here is the frame, and the pieces that sections and the comparison share.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pretrain.evaluation.report.schema import ContextReport

Curve = Sequence[tuple[float, float]]


Cell = str | tuple[str, str]
"""Text, or text and a class of page.css."""


def page(report: ContextReport, training_curve: Curve) -> str:
    """The page of a report; `training_curve` is (tokens seen, loss) of the steps up to its checkpoint."""
    from pretrain.evaluation.report.page_sections import sections

    title = f"Context extension of {report.run}"
    facts = (
        f"Step {report.step:,} · {report.tokens_seen:,} tokens seen · trained at length {report.training_length:,} · "
        + " · ".join(f"{name}: {words}" for name, words in report.model.items())
    )
    head = (
        f'<header><p class="eyebrow">Context extension</p><h1>{escape(report.run)}</h1>'
        f'<p class="facts">{escape(facts)}</p><p class="lead">{escape(report.headline)}</p></header>'
    )
    footer = (
        f"<footer>Written by Diptych {escape(report.provenance.diptych)}, {report.provenance.written} UTC.</footer>"
    )
    return document(title, head + "".join(sections(report, training_curve)) + footer)


def document(title: str, body: str) -> str:
    """A whole HTML document."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    # The empty icon keeps a browser from asking the server for one.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )


def section(title: str, note: str, *content: str) -> str:
    """A heading, what the section shows, and cards."""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{"".join(content)}</section>'


def grid(*cards: str) -> str:
    """Cards side by side where there is room."""
    return f'<div class="grid">{"".join(cards)}</div>'


def card(title: str, content: str, note: str = "", *, wide: bool = False) -> str:
    """A titled box; `content` is HTML."""
    small = f"<p>{escape(note)}</p>" if note else ""
    return f'<div class="card{" wide" if wide else ""}"><h3>{escape(title)}</h3>{content}{small}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    text, style = cell if isinstance(cell, tuple) else (cell, "")
    return f'<td class="{style}">{escape(text)}</td>' if style else f"<td>{escape(text)}</td>"


def tiles(entries: Sequence[tuple[str, str]]) -> str:
    """Big numbers with a line under each; the first stands out."""
    boxes = [
        f'<div class="tile{" first" if number == 0 else ""}"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for number, (value, text) in enumerate(entries)
    ]
    return f'<div class="tiles">{"".join(boxes)}</div>'


def signed(value: float, interval: tuple[float, float] | None) -> tuple[str, str]:
    """A difference in nats, green or red where its interval leaves out zero and up is good."""
    style = "" if interval is None else "good" if interval[0] > 0 else "bad" if interval[1] < 0 else ""
    return f"{value:+.3f}", style
