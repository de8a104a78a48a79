"""Sections of the context report on tasks, attention and costs; see sections.py."""

from collections.abc import Sequence

from pretrain.evaluation.report.charts import HeatMap, Line, LineChart
from pretrain.evaluation.report.schema import EDGE_TOKENS, AttentionResult, ContextReport, TaskResult
from pretrain.evaluation.report.section import Card, Facts, ReportSection, Table, TableCell, over_context, signed
from pretrain.evaluation.report.titles import title_of


def tasks_section(report: ContextReport) -> ReportSection | None:
    """Return accuracy by length, by distance and depth, and by triangle."""
    if not report.tasks:
        return None
    plain = [t for t in report.tasks if t.reading == "plain"]
    names = list(dict.fromkeys(t.task for t in plain))
    lines = [
        Line(
            name,
            [(t.multiple, 100 * t.accuracy) for t in plain if t.task == name],
            [(100 * t.accuracy_interval[0], 100 * t.accuracy_interval[1]) for t in plain if t.task == name],
        )
        for name in names
    ]
    ends = (plain[0].multiple, plain[-1].multiple)
    lines.append(Line("chance", [(x, 100 * plain[0].chance) for x in ends], muted=True))
    cards = [Card("Accuracy by length", over_context(lines, "% right"))]
    for name in names:
        longest = max((t for t in plain if t.task == name), key=lambda t: t.multiple)
        cards.append(Card(f"{name} at {longest.multiple:g}x: distance by depth", _task_map(longest)))
    rows = [
        [
            t.task,
            title_of(t.reading),
            f"{t.multiple:g}x",
            f"{t.accuracy:.1%}",
            "{:.1%} to {:.1%}".format(*t.accuracy_interval),
            str(t.answers),
        ]
        for t in report.tasks
    ]
    cards.append(
        Card("Every task", Table(["task", "encoder", "context", "accuracy", "95 %", "answers"], rows), folded=True)
    )
    if any(t.reading != "plain" for t in report.tasks):
        cards.append(Card("Which triangle carries the answer (% right)", _carriers(report.tasks), wide=True))
    prose = (
        "Random tokens with a pair hidden in them: a key beside its marker, or a passage repeated. The encoder must "
        f"find the first half to fill the second; guessing among the candidates is right {plain[0].chance:.0%} of the "
        "time. An encoder that was never taught such a task may stay at chance at any length."
    )
    return ReportSection("Tasks that need no data", prose, cards)


def _carriers(tasks: Sequence[TaskResult]) -> Table:
    """Return the whole encoder beside each triangle switched off, by the side on which the answer stands."""
    off = list(dict.fromkeys(t.reading for t in tasks if t.reading != "plain"))
    by_key = {(t.task, t.multiple, t.reading): t for t in tasks}
    rows = [
        [f"{task}, {multiple:g}x", words]
        + [f"{100 * _side_accuracy(by_key[task, multiple, name], side):.0f}" for name in ("plain", *off)]
        for task, multiple in dict.fromkeys((t.task, t.multiple) for t in tasks if t.reading != "plain")
        for side, words in (("past", "before the question"), ("future", "after it"))
    ]
    return Table(["task", "answer stands", "whole encoder", *map(title_of, off)], rows)


def _side_accuracy(task: TaskResult, side: str) -> float:
    cells = [c for c in task.cells if c.side == side]
    return sum(c.accuracy * c.answers for c in cells) / max(sum(c.answers for c in cells), 1)


def _task_map(task: TaskResult) -> HeatMap:
    """Return accuracy by where the pair lies and on which side the answer, and by how far away it is."""
    by_place = {(c.side == "future", c.depth, c.distance): 100 * c.accuracy for c in task.cells}
    places = sorted({(is_after, depth) for is_after, depth, _ in by_place})
    distances = sorted({distance for *_, distance in by_place})
    return HeatMap(
        rows=[f"{'after' if is_after else 'before'}, {depth:.0%}" for is_after, depth in places],
        columns=[f"{d:,}" for d in distances],
        values=[[by_place.get((*place, d)) for d in distances] for place in places],
        x_label="distance in tokens",
        y_label="answer stands, depth of the pair (% right; white: chance or less)",
        low=100 * task.chance,
        high=100,
        form=".0f",
    )


def ablations_section(report: ContextReport) -> ReportSection | None:
    """Return the loss with one triangle off."""
    if not report.ablations:
        return None
    rows: list[list[TableCell]] = [
        [
            title_of(r.reading),
            f"{r.multiple:g}x",
            f"{r.loss:.3f}",
            signed(-r.gain, (-r.gain_interval[1], -r.gain_interval[0]), up_is_good=False),
        ]
        for r in report.ablations
    ]
    prose = "The outputs of one triangle's sub-heads are zeroed in every layer: what is lost is what they carried."
    table = Table(["encoder", "context", "loss", "above the whole encoder at 1x"], rows)
    return ReportSection("One triangle off", prose, [Card("Loss on the same targets", table, wide=True)])


def attention_section(report: ContextReport) -> ReportSection | None:
    """Return what each triangle looks at, by length."""
    if not report.attention:
        return None
    triangles = list(dict.fromkeys(a.triangle for a in report.attention))

    def line(field: str, triangle: str, label: str, factor: float = 1.0, *, muted: bool = False) -> Line:
        return Line(label, _over_layers(report.attention, field, triangle, factor), muted=muted)

    even = line("uniform_entropy", triangles[0], "attending to all evenly", muted=True)
    edges = [
        line(f"{edge}_tokens", triangle, f"{triangle}, {edge} {EDGE_TOKENS}", 100)
        for triangle in triangles
        for edge, other in (("first", "future"), ("last", "past"))
        if triangle != other
    ]
    cards = [
        Card("Entropy", over_context([*(line("entropy", t, t) for t in triangles), even], "nats")),
        Card("Largest logit", over_context([line("largest_logit", t, t) for t in triangles], "before the softmax")),
        Card(
            "Mass on the window's edges",
            over_context(edges, "% of the attention"),
            "By queries that do not stand beside that edge: what sinks there.",
        ),
        Card("Attention by distance", _distances(report.attention), "Mean over layers."),
        Card("Every layer", _layer_table(report.attention), folded=True),
    ]
    prose = "How each triangle attends as rows grow: means over layers, heads and sampled queries."
    return ReportSection("Attention", prose, cards)


def _over_layers(
    results: Sequence[AttentionResult], field: str, triangle: str, factor: float
) -> list[tuple[float, float]]:
    """Return (length, `factor` times the mean over layers), of the largest logit the largest."""
    points = []
    for multiple in sorted({a.multiple for a in results}):
        values = [getattr(a, field) for a in results if (a.triangle, a.multiple) == (triangle, multiple)]
        value = max(values) if field == "largest_logit" else sum(values) / len(values)
        points.append((multiple, factor * value))
    return points


def _layer_table(results: Sequence[AttentionResult]) -> Table:
    edges = (f"first {EDGE_TOKENS}", f"last {EDGE_TOKENS}")
    rows = [
        [
            f"{a.layer}",
            a.triangle,
            "global" if a.window is None else f"{a.window:,}",
            f"{a.multiple:g}x",
            f"{a.entropy:.2f} of {a.uniform_entropy:.2f}",
            f"{a.largest_logit:.1f}",
            f"{a.first_tokens:.1%}",
            f"{a.last_tokens:.1%}",
        ]
        for a in sorted(results, key=lambda a: (a.layer, a.triangle, a.multiple))
    ]
    return Table(["layer", "triangle", "span", "context", "entropy", "largest logit", *edges], rows)


def _distances(results: Sequence[AttentionResult]) -> LineChart:
    """Return a line for each triangle at the training length and at the longest."""
    lines = []
    for triangle in dict.fromkeys(a.triangle for a in results):
        for multiple in dict.fromkeys((1.0, max(a.multiple for a in results))):
            own = [a.by_distance for a in results if (a.triangle, a.multiple) == (triangle, multiple)]
            means = [100 * sum(column) / len(own) for column in zip(*own, strict=True)]
            lines.append(Line(f"{triangle}, {multiple:g}x", list(enumerate(means)), dashed=multiple == 1))
    return LineChart(
        lines,
        x_label="tokens away, from",
        y_label="% of the attention",
        x_ticks=range(0, max(len(line.points) for line in lines), 2),
        x_name=lambda k: f"{2 ** (int(k) - 1):,}" if k else "0",
        zero=True,
    )


def costs_section(report: ContextReport) -> ReportSection:
    """Return one mask at a time, speed and memory, and what was left out."""
    cards = []
    if report.pseudo:
        rows = [
            [f"{p.multiple:g}x", f"{p.targets}", f"{p.masked_loss:.3f}", f"{p.single_loss:.3f}", f"{p.correlation:.2f}"]
            for p in report.pseudo
        ]
        table = Table(["context", "targets", "loss, many masked", "loss, one masked", "correlation"], rows)
        note = "Pseudo-perplexity costs a whole row for each target. How far the cheap loss agrees with it."
        cards.append(Card("One mask at a time", table, note))
    speeds = [
        [
            f"{s.multiple:g}x",
            f"{s.tokens_per_s:,.0f}",
            "-" if s.peak_memory_bytes is None else f"{s.peak_memory_bytes / 2**20:,.0f} MiB",
        ]
        for s in report.speed
    ]
    where = f"On {report.provenance.device}, {report.provenance.ranks} rank(s); memory beyond what was held before."
    cards.append(Card("Speed and memory", Table(["context", "tokens/s", "peak memory"], speeds), where))
    if report.skipped:
        reasons = Facts([(title_of(what), why) for what, why in report.skipped.items()])
        cards.append(Card("Not measured", reasons, wide=True))
    return ReportSection("What it costs, and what was left out", "", cards)
