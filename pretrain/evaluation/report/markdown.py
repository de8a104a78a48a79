"""A page as Markdown: sentences, tables, and links to the pictures beside it. Other curves are in the HTML alone."""

from collections.abc import Iterator, Sequence

from pretrain.evaluation.report.charts import HeatMap, LineChart
from pretrain.evaluation.report.section import Card, Facts, Page, ReportSection, Table


def markdown_page(page: Page) -> str:
    """Return a whole Markdown document."""
    lead = f"**{page.lead}**" if page.lead else ""
    parts = [f"# {page.title}", lead, _list(f"**{value}**: {text}" for value, text in page.figures), page.facts]
    parts += [part for section in page.sections for part in _section(section)]
    return "\n\n".join(part for part in [*parts, page.footer] if part) + "\n"


def _list(lines: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _section(section: ReportSection) -> Iterator[str]:
    yield f"## {section.title}"
    yield section.prose
    for card in section.cards:
        if content := _content(card):
            yield f"### {card.title}"
            yield content
            yield card.note
    yield _list(section.points)


def _content(card: Card) -> str:
    match card.content:
        case Table() as table:
            return markdown_table(table)
        case Facts(entries):
            return _list(f"{name}: {text}" for name, text in entries)
        case HeatMap() as chart:
            return f"Down: {chart.y_label}; across: {chart.x_label}.\n\n{markdown_table(_heat_table(chart))}"
        case LineChart() as chart:
            return f"![{card.title}]({chart.picture}.png)" if chart.picture else ""


def _heat_table(chart: HeatMap) -> Table:
    texts = [["-" if value is None else f"{value:{chart.form}}" for value in row] for row in chart.values]
    return Table(["", *chart.columns], [[name, *row] for name, row in zip(chart.rows, texts, strict=True)])


def markdown_table(table: Table) -> str:
    """Return a table; a star stands beside news that is sure."""
    rows = [[cell if isinstance(cell, str) else f"{cell[0]} *" for cell in row] for row in table.rows]
    lines = [table.header, ["---"] * len(table.header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
