"""A page as HTML that holds everything it needs, for a phone and for a desk. No script, nothing from a network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pretrain.evaluation.report.charts import HeatMap, LineChart
from pretrain.evaluation.report.section import Card, Facts, Page, ReportSection, Table, TableCell
from pretrain.evaluation.report.svg import heat_map_svg, line_chart_svg


def html_page(page: Page) -> str:
    """Return a whole HTML document."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    header = f'<p class="eyebrow">{escape(page.kind)}</p><h1>{escape(page.heading)}</h1>'
    body = (
        f"<header>{header}{_paragraph(page.facts, 'facts')}{_paragraph(page.lead, 'lead')}</header>"
        f"{_tiles(page.figures)}{''.join(map(_section, page.sections))}<footer>{escape(page.footer)}</footer>"
    )
    # The empty icon keeps a browser from asking the server for one.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if text else ""


def _tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Return big numbers with a line under each; the first stands out."""
    boxes = [
        f'<div class="tile{" first" if number == 0 else ""}"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for number, (value, text) in enumerate(figures)
    ]
    return f'<div class="tiles">{"".join(boxes)}</div>' if boxes else ""


def _section(section: ReportSection) -> str:
    open_cards = "".join(_card(card) for card in section.cards if not card.folded)
    folded = "".join(
        f'<details><summary>{escape(card.title)}</summary><div class="card">{_content(card)}</div></details>'
        for card in section.cards
        if card.folded
    )
    points = "".join(f"<li>{escape(point)}</li>" for point in section.points)
    grid = f'<div class="grid">{open_cards}</div>' if open_cards else ""
    heading = f"<h2>{escape(section.title)}</h2>{_paragraph(section.prose, 'note')}"
    return f"<section>{heading}{grid}{folded}{f'<ul>{points}</ul>' if points else ''}</section>"


def _card(card: Card) -> str:
    return f'<div class="card{" wide" if card.wide else ""}"><h3>{escape(card.title)}</h3>{_content(card)}</div>'


def _content(card: Card) -> str:
    match card.content:
        case Table() as table:
            shown = _table(table)
        case Facts(entries):
            shown = f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in entries)}</dl>"
        case LineChart() as chart:
            shown = line_chart_svg(chart)
        case HeatMap() as chart:
            shown = heat_map_svg(chart)
    return shown + _paragraph(card.note)


def _table(table: Table) -> str:
    """Return a table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: TableCell) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    text, style = cell
    return f'<td class="{style}">{escape(text)}</td>'
