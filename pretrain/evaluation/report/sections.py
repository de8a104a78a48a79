"""What the context report says, section by section, in order; a section without numbers is left out."""

from collections.abc import Sequence

from pretrain.evaluation.report.charts import HeatMap, Line, LineChart
from pretrain.evaluation.report.probe_sections import ablations_section, attention_section, costs_section, tasks_section
from pretrain.evaluation.report.schema import ContextReport, InterventionResult, LossProfile
from pretrain.evaluation.report.section import (
    NATS,
    Card,
    Facts,
    Page,
    ReportSection,
    Table,
    TableCell,
    over_context,
    signed,
)
from pretrain.evaluation.report.titles import INTERVENTION_MEANINGS, INTERVENTION_TITLES, title_of

_DRAWN_STEPS = 400
"""Points of the training curve, at most."""


def report_page(report: ContextReport, training: Sequence[dict[str, float]]) -> Page:
    """Return the whole report.

    Args:
        report: its numbers.
        training: records of the run's metrics.jsonl up to the report's checkpoint.
    """
    sections = (
        _curves(report),
        _needing(report),
        _profiles(report),
        _interventions(report),
        tasks_section(report),
        ablations_section(report),
        attention_section(report),
        costs_section(report),
        _how_to_read(report),
        _what_was_run(report, training),
    )
    facts = [
        f"Step {report.step:,}",
        f"{report.tokens_seen:,} tokens seen",
        f"trained at length {report.training_length:,}",
        *(f"{name}: {words}" for name, words in report.model.items()),
    ]
    return Page(
        title=f"Context extension of {report.run}",
        kind="Context extension",
        heading=report.run,
        facts=" · ".join(facts),
        lead=report.headline,
        figures=_figures(report),
        sections=[section for section in sections if section is not None],
        footer=f"Written by Diptych {report.provenance.diptych}, {report.provenance.written} UTC.",
    )


def _figures(report: ContextReport) -> list[tuple[str, str]]:
    longest = report.results[-1]
    long = [r for r in report.results if r.multiple > 1]
    extension = f"effective extension: {report.effective_length:,} tokens"
    if report.effective_multiple <= 1:
        extension = f"no extension beyond the {report.training_length:,} tokens of the training"
    figures = [
        (f"{report.effective_multiple:g}x" if report.effective_multiple > 1 else "none", extension),
        (f"{report.used_multiple:g}x", "each length up to here is better than the one before"),
        (f"{report.held_multiple:g}x", f"loss held up to here, of {longest.multiple:g}x measured"),
    ]
    if long:
        best = max(long, key=lambda r: r.gain)
        figures.append((f"{best.gain:+.3f}", f"gain over the crop in nats, at {best.multiple:g}x"))
    if gains := [(r.needing_gain, r.multiple) for r in long if r.needing_gain is not None]:
        gain, multiple = max(gains)
        figures.append((f"{gain:+.3f}", f"gain of the tokens that need context, at {multiple:g}x"))
    return figures


def length_table(report: ContextReport) -> Table:
    """Return a row for each length."""
    header = ["context", "tokens", "loss", "95 %", "perplexity", "masked accuracy", "gain over 1x", "95 %"]
    rows: list[list[TableCell]] = [
        [
            f"{r.multiple:g}x",
            str(r.length),
            f"{r.loss:.3f}",
            "{:.3f} to {:.3f}".format(*r.loss_interval),
            f"{r.perplexity:.1f}",
            f"{r.masked_accuracy:.1%}",
            signed(r.gain, r.gain_interval if r.multiple > 1 else None),
            "{:+.3f} to {:+.3f}".format(*r.gain_interval),
            "-" if r.step_gain is None else signed(r.step_gain, r.step_gain_interval),
        ]
        for r in report.results
    ]
    return Table([*header, "over the one before"], rows)


def _curves(report: ContextReport) -> ReportSection:
    results = report.results
    long = [r for r in results if r.multiple >= 1]
    loss = Line("this encoder", [(r.multiple, r.loss) for r in results], [r.loss_interval for r in results])
    ends = (results[0].multiple, results[-1].multiple)
    unigram = Line("token frequencies alone", [(x, report.unigram_loss) for x in ends], muted=True)
    gain = Line("gain over the window of 1x", [(r.multiple, r.gain) for r in long], [r.gain_interval for r in long])
    cards = [
        Card(
            "Loss by context length",
            over_context([loss, unigram], NATS, zero=False, marks=[(1.0, "trained")], picture="loss_by_length"),
            "Flat or falling to the right: the encoder reads on. Rising: it loses its way.",
        ),
        Card(
            "Gain over the crop",
            over_context([gain], NATS, picture="gain_by_length"),
            "Above zero: what lies beyond the training length helps. Zero: the encoder might as well be cropped.",
        ),
        Card(
            "Every length",
            length_table(report),
            "A difference that is coloured, or has a star, is sure: its 95 % interval leaves out zero.",
            wide=True,
        ),
    ]
    note = f"The same {report.targets:,} masked tokens of {report.documents} documents, seen from nested windows."
    return ReportSection("Loss and gain", note, cards)


def _needing(report: ContextReport) -> ReportSection | None:
    need = report.context_need
    if need is None:
        return None
    results = [
        (r, r.needing_loss, r.needing_gain, r.needing_gain_interval)
        for r in report.results
        if r.needing_loss is not None and r.needing_gain is not None and r.needing_gain_interval is not None
    ]
    long = [found for found in results if found[0].multiple >= 1]
    needing = Line("tokens that need context", [(r.multiple, gain) for r, _, gain, _ in long], [i for *_, i in long])
    average = Line("all tokens", [(r.multiple, r.gain) for r, *_ in long])
    helped = Line("helped", [(r.multiple, 100 * r.helped) for r, *_ in long])
    hurt = Line("hurt", [(r.multiple, 100 * r.hurt) for r, *_ in long])
    rows = [
        [
            f"{r.multiple:g}x",
            f"{loss:.3f}",
            f"{gain:+.3f}",
            "{:+.3f} to {:+.3f}".format(*interval),
            f"{r.helped:.1%}",
            f"{r.hurt:.1%}",
        ]
        for r, loss, gain, interval in results
    ]
    table = Table(["context", "loss of tokens that need context", "gain over 1x", "95 %", "helped", "hurt"], rows)
    prose = (
        f"An average hides the few tokens that far context can help. {need.targets:,} of the {report.targets:,} "
        f"targets need context: their loss falls by more than {need.threshold:g} nats from {need.short_length} tokens "
        f"to {report.training_length}, both within the training length, so the choice looks at nothing that is judged "
        "here. Helped and hurt: the share of all targets whose loss is lower, or higher, than at 1x by more than that."
    )
    cards = [
        Card("Gain over the crop", over_context([needing, average], NATS)),
        Card("Targets helped and hurt", over_context([helped, hurt], "% of the targets")),
        Card("Every length", table, wide=True),
    ]
    return ReportSection("Tokens that need context", prose, cards)


def _profiles(report: ContextReport) -> ReportSection | None:
    if not report.profiles:
        return None
    cards = []
    for by, title, x_label, scale in (
        ("position", "Loss by position in the window", "place of the target, % of the window", 100),
        ("edge_distance", "Gain by distance to the nearer edge", "tokens to the edge, from", 1),
        ("document_length", "Gain by length of the document", "tokens of the document, from", 1),
    ):
        chosen = [p for p in report.profiles if p.by == by and (by == "position" or p.multiple > 1) and p.bins]
        if chosen:
            cards.append(Card(title, _profile_map(chosen, x_label, scale, is_loss=by == "position")))
    prose = (
        "Where in its window a target stands. A loss that rises towards the edges wants context on both sides; one "
        "that rises everywhere beyond 1x has lost its positions. Bins of fewer than 20 targets are left out."
    )
    return ReportSection("By position", prose, cards)


def _profile_map(profiles: Sequence[LossProfile], x_label: str, scale: float, *, is_loss: bool) -> HeatMap:
    """Return losses, or gains around a white zero, by length and bin."""
    lows = sorted({b.low for p in profiles for b in p.bins})
    by_low = [{b.low: b.loss if is_loss else b.gain for b in p.bins} for p in profiles]
    numbers = [value for of_profile in by_low for value in of_profile.values()]
    reach = max(0.05, *map(abs, numbers))
    return HeatMap(
        rows=[f"{p.multiple:g}x" for p in profiles],
        columns=[f"{low * scale:,.0f}" for low in lows],
        values=[[of_profile.get(low) for low in lows] for of_profile in by_low],
        x_label=x_label,
        y_label="context",
        low=min(numbers) - 0.1 if is_loss else -reach,
        high=max(numbers) if is_loss else reach,
        middle=None if is_loss else 0.0,
        form=".2f" if is_loss else "+.2f",
    )


def intervention_table(results: Sequence[InterventionResult]) -> Table:
    """Return gain over the crop by intervention and length, and its cost at 1x when set for the longest length."""
    multiples = sorted({r.multiple for r in results})
    rows: list[list[TableCell]] = []
    for name in dict.fromkeys(r.reading for r in results):
        own = {r.multiple: r for r in results if r.reading == name}
        gains = [signed(own[m].gain, own[m].gain_interval) if m in own else "-" for m in multiples]
        last = own[max(own)]
        rows.append([title_of(name), *gains, signed(last.regression, last.regression_interval, up_is_good=False)])
    return Table(["intervention", *(f"gain at {m:g}x" for m in multiples), "cost at 1x"], rows)


def _interventions(report: ContextReport) -> ReportSection | None:
    names = dict.fromkeys(r.reading for r in report.readings)
    if not names:
        return None
    meanings = [(INTERVENTION_TITLES[name], text) for name, text in INTERVENTION_MEANINGS.items() if name in names]
    cards = [Card("What they do", Facts(meanings))] if meanings else []
    if len({r.multiple for r in report.readings}) > 1:
        lines = [
            Line(
                title_of(name), [(r.multiple, r.gain) for r in report.readings if r.reading == name], dashed=number == 0
            )
            for number, name in enumerate(names)
        ]
        cards.insert(0, Card("Gain over the crop", over_context(lines, "gain in nats"), wide=not meanings))
    cards.append(Card("Gain by intervention and length", intervention_table(report.readings), wide=True))
    for after in report.recalibrations:
        title = f"After {after.tokens:,} more tokens, at length {after.length:,}"
        cards.append(Card(title, intervention_table(after.results), wide=True))
    prose = (
        f"The same weights, read otherwise, on the first {report.reading_windows} windows. Gain over the plain window "
        "of 1x; cost at 1x: what an intervention that is set for the longest length adds to the loss at the training "
        "length. A number that is coloured, or has a star, is sure: its 95 % interval leaves out zero."
    )
    return ReportSection("Ways to read long rows", prose, cards)


def _how_to_read(report: ContextReport) -> ReportSection:
    prose = (
        f"{report.windows} blocks of {report.training_length} tokens were drawn from {report.documents} documents of "
        f"the {report.split} split of {report.corpus}, and {report.targets:,} of their tokens masked. At every length "
        "exactly these are predicted; only the context around the block grows, nested and equally masked. Loss is in "
        "nats per masked token. Gain is the loss from the window of the training length minus the loss from the longer "
        "one, on the same tokens: above zero, with its interval, the encoder uses what lies beyond its training length."
    )
    points = (
        "Intervals are 95 %, from 1,000 resamplings of the documents: targets of one document are not independent.",
        "The effective length is the longest one up to which, at every length on the way, the loss is no worse than at "
        "1x (within 1 %, or within the interval of the difference) and the gain is above zero with its interval.",
        "A held loss alone does not show that far context is used: a cropped encoder holds it too.",
        f"Token frequencies alone cost {report.unigram_loss:.3f} nats on these tokens; the unigram entropy of the "
        f"training split is {report.unigram_entropy:.3f}.",
    )
    return ReportSection("How to read it", prose, points=points)


def _what_was_run(report: ContextReport, training: Sequence[dict[str, float]]) -> ReportSection:
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
    curve = _training_chart(report, training)
    cards = [Card("Provenance", Facts([(name, text) for name, text in entries if text]), wide=curve is None)]
    if curve is not None:
        cards.append(Card("Training curve", curve))
    return ReportSection("What was run", "The same command writes the same numbers.", cards)


def _training_chart(report: ContextReport, training: Sequence[dict[str, float]]) -> LineChart | None:
    """Return loss over tokens seen; None where no step was logged."""
    losses = [(r["tokens"], r["loss"]) for r in training if "loss" in r]
    validations = [(r["tokens"], r["validation_loss"]) for r in training if "validation_loss" in r]
    if not losses:
        return None
    kept = [*losses[:: max(1, len(losses) // _DRAWN_STEPS)], losses[-1]]
    ends = [(tokens, report.unigram_entropy) for tokens in (kept[0][0], kept[-1][0])]
    lines = [Line("token frequencies alone", ends, muted=True), Line("training loss", kept, plain=True)]
    return LineChart(
        [*lines, *([Line("validation loss", validations)] if validations else [])],
        x_label="million tokens seen",
        y_label=NATS,
        x_ticks=[kept[-1][0] * k / 4 for k in range(5)],
        x_name=lambda x: f"{x / 1e6:.2g}",
        picture="training_curve",
    )
