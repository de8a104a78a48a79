"""The sections of report.html, each from a `ContextReport` to HTML; a section without numbers is left out."""

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape

from pretrain.evaluation.context.interventions import MEANINGS, TITLES, title_of
from pretrain.evaluation.report.charts import HeatMap, Line, heat_map, line_chart
from pretrain.evaluation.report.page import Curve, card, grid, section, signed, table, tiles
from pretrain.evaluation.report.page_probes import ablations_section, attention_section, costs_section, tasks_section
from pretrain.evaluation.report.schema import ContextReport, ReadingResult


def sections(report: ContextReport, training_curve: Curve) -> Iterator[str]:
    """All of the page under its head."""
    yield _tiles(report)
    yield _curves(report)
    if report.context_need is not None:
        yield _needing(report)
    if report.profiles:
        yield _profiles(report)
    if report.readings:
        yield _readings(report)
    if report.tasks:
        yield tasks_section(report)
    if report.ablations:
        yield ablations_section(report)
    if report.attention:
        yield attention_section(report)
    yield costs_section(report)
    yield _how_to_read(report)
    yield _what_was_run(report, training_curve)


def _times(report: ContextReport) -> dict[float, str]:
    """Length -> how an axis writes it."""
    return {float(r.length): f"{r.multiple:g}x" for r in report.results}


def _tiles(report: ContextReport) -> str:
    longest = report.results[-1]
    best = max((r for r in report.results if r.multiple > 1), key=lambda r: r.gain, default=None)
    extended = report.effective_multiple > 1
    entries = [
        (
            f"{report.effective_multiple:g}x" if extended else "none",
            f"effective extension: {report.effective_length:,} tokens"
            if extended
            else f"no extension beyond the {report.training_length:,} tokens of the training",
        ),
        (f"{report.used_multiple:g}x", "each length up to here is better than the one before"),
        (f"{report.held_multiple:g}x", f"loss held up to here, of {longest.multiple:g}x measured"),
    ]
    if best is not None:
        entries.append((f"{best.gain:+.3f}", f"gain over the crop in nats, at {best.multiple:g}x"))
    needing = [r for r in report.results if r.multiple > 1 and r.needing_gain is not None]
    if needing and report.context_need is not None:
        most = max(needing, key=lambda r: r.needing_gain or 0)
        entries.append((f"{most.needing_gain:+.3f}", f"gain of the tokens that need context, at {most.multiple:g}x"))
    return tiles(entries)


def _curves(report: ContextReport) -> str:
    times = _times(report)

    def by_length(x: float) -> str:
        return times.get(x, f"{x:,.0f}")

    results = report.results
    ends = (float(results[0].length), float(results[-1].length))
    loss = Line("this encoder", [(r.length, r.loss) for r in results], [r.loss_interval for r in results])
    unigram = Line("token frequencies alone", [(x, report.unigram_loss) for x in ends], muted=True)
    long = [r for r in results if r.multiple >= 1]
    gain = Line("gain over the window of 1x", [(r.length, r.gain) for r in long], [r.gain_interval for r in long])
    mark = [(float(report.training_length), "trained")]
    charts = grid(
        card(
            "Loss by context length",
            line_chart(
                [loss, unigram],
                x_label="context",
                y_label="nats per masked token",
                log_x=True,
                x_name=by_length,
                marks=mark,
            ),
            "Flat or falling to the right: the encoder reads on. Rising: it loses its way.",
        ),
        card(
            "Gain over the crop",
            line_chart(
                [gain], x_label="context", y_label="nats per masked token", log_x=True, x_name=by_length, zero=True
            ),
            "Above zero: what lies beyond the training length helps. Zero: the encoder might as well be cropped.",
        ),
    )
    rows = [
        [
            (f"{r.multiple:g}x", "own"),
            f"{r.length:,}",
            f"{r.loss:.3f}",
            "{:.3f} to {:.3f}".format(*r.loss_interval),
            f"{r.perplexity:,.1f}",
            f"{r.masked_accuracy:.1%}",
            signed(r.gain, r.gain_interval if r.multiple > 1 else None),
            "{:+.3f} to {:+.3f}".format(*r.gain_interval),
            "" if r.step_gain is None else signed(r.step_gain, r.step_gain_interval),
        ]
        for r in results
    ]
    header = [
        "context",
        "tokens",
        "loss",
        "95 %",
        "perplexity",
        "accuracy",
        "gain over 1x",
        "95 %",
        "over the one before",
    ]
    note = f"The same {report.targets:,} masked tokens of {report.documents} documents, seen from nested windows."
    return section("Loss and gain", note, charts, grid(card("Every length", table(header, rows), wide=True)))


def _needing(report: ContextReport) -> str:
    need = report.context_need
    assert need is not None
    times = _times(report)
    results = [r for r in report.results if r.multiple >= 1 and r.needing_gain is not None]
    needing = Line(
        "tokens that need context",
        [(r.length, r.needing_gain or 0) for r in results],
        [r.needing_gain_interval or (0, 0) for r in results],
    )
    average = Line("all tokens", [(r.length, r.gain) for r in results])
    helped = Line("helped", [(r.length, 100 * r.helped) for r in results])
    hurt = Line("hurt", [(r.length, 100 * r.hurt) for r in results])
    over_context = partial(line_chart, x_label="context", log_x=True, x_name=lambda x: times.get(x, ""), zero=True)
    charts = grid(
        card(
            "Gain over the crop",
            over_context([needing, average], y_label="nats per masked token"),
        ),
        card(
            "Targets helped and hurt",
            over_context([helped, hurt], y_label="% of the targets"),
            f"Whose loss is lower, or higher, than at 1x by more than {need.threshold:g} nats.",
        ),
    )
    note = (
        f"An average hides the few tokens that far context can help. {need.targets:,} of the {report.targets:,} "
        f"targets need context: their loss falls by more than {need.threshold:g} nats from {need.short_length} tokens "
        f"to {report.training_length}, both within the training length, so the choice looks at nothing that is judged "
        "here."
    )
    return section("Tokens that need context", note, charts)


def _profiles(report: ContextReport) -> str:
    cards = []
    for by, title, x_label, scale in (
        ("position", "Loss by position in the window", "place of the target, % of the window", 100),
        ("edge_distance", "Gain by distance to the nearer edge", "tokens to the edge, from", 1),
        ("document_length", "Gain by length of the document", "tokens of the document, from", 1),
    ):
        chosen = [p for p in report.profiles if p.by == by and (by == "position" or p.multiple > 1) and p.bins]
        if not chosen:
            continue
        lows = sorted({b.low for p in chosen for b in p.bins})
        values: list[list[float | None]] = []
        for profile in chosen:
            of_low = {b.low: b.loss if by == "position" else b.gain for b in profile.bins}
            values.append([of_low.get(low) for low in lows])
        numbers = [v for row in values for v in row if v is not None]
        reach = max(abs(min(numbers)), abs(max(numbers)), 0.05)
        chart = HeatMap(
            rows=[f"{p.multiple:g}x" for p in chosen],
            columns=[f"{low * scale:,.0f}" for low in lows],
            values=values,
            low=min(numbers) - 0.1 if by == "position" else -reach,
            high=max(numbers) if by == "position" else reach,
            middle=None if by == "position" else 0.0,
            form=".2f" if by == "position" else "+.2f",
        )
        cards.append(card(title, heat_map(chart, x_label=x_label, y_label="context")))
    note = (
        "Where in its window a target stands. A loss that rises towards the edges wants context on both sides; one "
        "that rises everywhere beyond 1x has lost its positions. Bins of fewer than 20 targets are left out."
    )
    return section("By position", note, grid(*cards))


def _reading_lines(results: Sequence[ReadingResult]) -> list[Line]:
    names = dict.fromkeys(r.reading for r in results)
    return [
        Line(title_of(name), [(r.multiple, r.gain) for r in results if r.reading == name], dashed=name == "plain")
        for name in names
    ]


def _reading_rows(results: Sequence[ReadingResult]) -> tuple[list[str], list[list[str | tuple[str, str]]]]:
    multiples = sorted({r.multiple for r in results})
    header = ["reading", *(f"gain at {m:g}x" for m in multiples), "cost at 1x"]
    rows: list[list[str | tuple[str, str]]] = []
    for name in dict.fromkeys(r.reading for r in results):
        own = {r.multiple: r for r in results if r.reading == name}
        cells = [signed(own[m].gain, own[m].gain_interval) if m in own else "-" for m in multiples]
        last = own[max(own)]
        low, high = last.regression_interval
        cost = (f"{last.regression:+.3f}", "bad" if low > 0 else "good" if high < 0 else "")
        rows.append([title_of(name), *cells, cost])
    return header, rows


def _readings(report: ContextReport) -> str:
    header, rows = _reading_rows(report.readings)
    lines = _reading_lines(report.readings)
    meanings = "".join(
        f"<dt>{escape(TITLES[name])}</dt><dd>{escape(meaning)}</dd>"
        for name, meaning in MEANINGS.items()
        if any(r.reading == name for r in report.readings)
    )
    note = (
        f"The same weights, read otherwise, on {report.reading_windows} windows. Gain over the plain window of 1x; "
        "cost at 1x: what a reading that is set for the longest length adds to the loss at the training length. Green "
        "and red: the 95 % interval leaves out zero."
    )
    content = [grid(card("Gain by reading and length", table(header, rows) + f"<dl>{meanings}</dl>", wide=True))]
    if len({r.multiple for r in report.readings}) > 1:
        chart = line_chart(
            lines, x_label="context", y_label="gain in nats", log_x=True, x_name=lambda x: f"{x:g}x", zero=True
        )
        content = [grid(card("Gain over the crop", chart, wide=False), card("What they do", f"<dl>{meanings}</dl>"))]
        content.append(grid(card("Gain by reading and length", table(header, rows), wide=True)))
    for recalibration in report.recalibrations:
        header, rows = _reading_rows(recalibration.results)
        title = f"After {recalibration.tokens:,} more tokens, at length {recalibration.length:,}"
        content.append(grid(card(title, table(header, rows), wide=True)))
    return section("Ways to read long rows", note, *content)


def _how_to_read(report: ContextReport) -> str:
    note = (
        f"{report.windows} blocks of {report.training_length} tokens were drawn from {report.documents} documents of "
        f"the {report.split} split of {report.corpus}, and {report.targets:,} of their tokens masked. At every length "
        "exactly these are predicted; only the context around the block grows, nested and equally masked. Gain is the "
        "loss from the window of the training length minus the loss from the longer one, on the same tokens."
    )
    rules = (
        "Intervals are 95 %, from 1,000 resamplings of the documents: targets of one document are not independent.",
        "The effective length is the longest one up to which, at every length on the way, the loss is no worse than at "
        "1x (within 1 %, or within the interval of the difference) and the gain is above zero with its interval.",
        "A held loss alone does not show that far context is used: a cropped encoder holds it too.",
        f"Token frequencies alone cost {report.unigram_loss:.3f} nats on these tokens; the unigram entropy of the "
        f"training split is {report.unigram_entropy:.3f}.",
    )
    return section("How to read it", note, f"<ul>{''.join(f'<li>{escape(rule)}</li>' for rule in rules)}</ul>")


def _what_was_run(report: ContextReport, training_curve: Curve) -> str:
    p = report.provenance
    entries = [
        ("command", p.command),
        ("config", f"{p.config}, seed {p.seed}"),
        ("checkpoint", f"step {report.step}, sha256 {p.checkpoint_sha256}"),
        ("corpus", f"{p.corpus}, {report.split} split, fingerprint {p.fingerprint}"),
        ("tokenizer", f"sha256 {p.tokenizer_sha256}"),
        ("settings", ", ".join(f"{key} {value}" for key, value in report.settings.items())),
        ("budget", report.budget or "none"),
        ("software", f"Diptych {p.diptych}, torch {p.torch}, {p.device}, {p.ranks} rank(s)"),
    ]
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in entries if value)
    cards = [card("Provenance", f"<dl>{facts}</dl>", wide=len(training_curve) < 2)]
    if len(training_curve) >= 2:
        step = max(1, len(training_curve) // 400)
        kept = [*training_curve[::step], training_curve[-1]]
        ticks = [kept[-1][0] * k / 4 for k in range(5)]
        path = line_chart_of_training(kept, ticks, report)
        cards.append(card("Training curve", path))
    return section("What was run", "The same command writes the same numbers.", grid(*cards))


def line_chart_of_training(kept: Curve, ticks: Sequence[float], report: ContextReport) -> str:
    """Loss over tokens seen."""
    lines = [
        Line(
            "token frequencies alone",
            [(kept[0][0], report.unigram_entropy), (kept[-1][0], report.unigram_entropy)],
            muted=True,
        ),
        Line("training loss", kept, plain=True),
    ]
    return line_chart(
        lines,
        x_label="million tokens seen",
        y_label="nats per masked token",
        x_ticks=ticks,
        x_name=lambda x: f"{x / 1e6:.2g}",
    )
