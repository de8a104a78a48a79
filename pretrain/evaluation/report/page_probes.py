"""The sections of report.html that show tasks, attention and costs; see page_sections.py."""

from collections.abc import Sequence

from pretrain.evaluation.context.attention_statistics import EDGE
from pretrain.evaluation.context.interventions import title_of
from pretrain.evaluation.report.charts import HeatMap, Line, heat_map, line_chart
from pretrain.evaluation.report.page import Cell, card, grid, section, table
from pretrain.evaluation.report.schema import AttentionResult, ContextReport, TaskResult


def tasks_section(report: ContextReport) -> str:
    """Accuracy by length, by distance and depth, and by triangle."""
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
    chart = line_chart(lines, x_label="context", y_label="% right", log_x=True, x_name=lambda x: f"{x:g}x", zero=True)
    cards = [card("Accuracy by length", chart)]
    for name in names:
        longest = max((t for t in plain if t.task == name), key=lambda t: t.multiple)
        cards.append(card(f"{name} at {longest.multiple:g}x: distance by depth", _task_map(longest)))
    if any(t.reading != "plain" for t in report.tasks):
        cards.append(card("Which triangle carries the answer (% right)", _carriers(report.tasks), wide=True))
    note = (
        "Random tokens with a pair hidden in them: a key beside its marker, or a passage repeated. The encoder must "
        f"find the first half to fill the second; guessing among the candidates is right {plain[0].chance:.0%} of the "
        "time. An encoder that was never taught such a task may stay at chance at any length."
    )
    return section("Tasks that need no data", note, grid(*cards))


def _carriers(tasks: Sequence[TaskResult]) -> str:
    """The whole encoder beside each triangle switched off, by the side on which the answer stands."""
    readings = ["plain", *dict.fromkeys(t.reading for t in tasks if t.reading != "plain")]
    by_key = {(t.task, t.multiple, t.reading): t for t in tasks}
    rows = [
        [f"{task}, {multiple:g}x", words]
        + [f"{100 * _side_accuracy(by_key[task, multiple, r], side):.0f}" for r in readings]
        for task, multiple, _ in dict.fromkeys((t.task, t.multiple, 0) for t in tasks if t.reading != "plain")
        for side, words in (("past", "before the question"), ("future", "after it"))
    ]
    return table(["task", "answer stands", "whole encoder", *(title_of(r) for r in readings[1:])], rows)


def _side_accuracy(task: TaskResult, side: str) -> float:
    cells = [c for c in task.cells if c.side == side]
    return sum(c.accuracy * c.answers for c in cells) / max(sum(c.answers for c in cells), 1)


def _task_map(task: TaskResult) -> str:
    """Rows: where the pair lies, and on which side the answer; columns: how far away it is."""
    places = list(
        dict.fromkeys((c.side, c.depth) for c in sorted(task.cells, key=lambda c: (c.side == "future", c.depth)))
    )
    distances = sorted({c.distance for c in task.cells})
    by_place = {(c.side, c.depth, c.distance): 100 * c.accuracy for c in task.cells}
    words = {"past": "before", "future": "after"}
    chart = HeatMap(
        rows=[f"{words[side]}, {depth:.0%}" for side, depth in places],
        columns=[f"{d:,}" for d in distances],
        values=[[by_place.get((side, depth, d)) for d in distances] for side, depth in places],
        low=100 * task.chance,
        high=100,
        form=".0f",
    )
    return heat_map(
        chart, x_label="distance in tokens", y_label="answer stands, depth of the pair (% right; white: chance or less)"
    )


def ablations_section(report: ContextReport) -> str:
    """Loss with one triangle off."""
    rows: list[list[Cell]] = [
        [
            title_of(r.reading),
            f"{r.multiple:g}x",
            f"{r.loss:.3f}",
            (f"{-r.gain:+.3f}", "bad" if r.gain_interval[1] < 0 else ""),
        ]
        for r in report.ablations
    ]
    note = "The outputs of one triangle's sub-heads are zeroed in every layer: what is lost is what they carried."
    header = ["encoder", "context", "loss", "above the whole encoder at 1x"]
    return section("One triangle off", note, grid(card("Loss on the same targets", table(header, rows), wide=True)))


def attention_section(report: ContextReport) -> str:
    """What each triangle looks at, by length."""
    triangles = list(dict.fromkeys(a.triangle for a in report.attention))
    multiples = sorted({a.multiple for a in report.attention})

    def mean(field: str, triangle: str, multiple: float) -> float:
        values = [getattr(a, field) for a in report.attention if (a.triangle, a.multiple) == (triangle, multiple)]
        return max(values) if field == "largest_logit" else sum(values) / len(values)

    def line(field: str, triangle: str, label: str, factor: float = 1.0, *, muted: bool = False) -> Line:
        return Line(label, [(m, factor * mean(field, triangle, m)) for m in multiples], muted=muted)

    def chart(lines: Sequence[Line], y_label: str) -> str:
        return line_chart(lines, x_label="context", y_label=y_label, log_x=True, x_name=lambda x: f"{x:g}x", zero=True)

    even = line("uniform_entropy", triangles[0], "attending to all evenly", muted=True)
    edges = [
        line(f"{edge}_tokens", triangle, f"{triangle}, {edge} {EDGE}", 100)
        for triangle in triangles
        for edge, other in (("first", "future"), ("last", "past"))
        if triangle != other
    ]
    cards = [
        card("Entropy", chart([*(line("entropy", t, t) for t in triangles), even], "nats")),
        card("Largest logit", chart([line("largest_logit", t, t) for t in triangles], "before the softmax")),
        card(
            "Mass on the window's edges",
            chart(edges, "% of the attention"),
            "By queries that do not stand beside that edge: what sinks there.",
        ),
        card("Attention by distance", _distances(report.attention), "Mean over layers."),
    ]
    layers = table(
        ["layer", "triangle", "span", "context", "entropy", "largest logit", f"first {EDGE}", f"last {EDGE}"],
        [
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
            for a in sorted(report.attention, key=lambda a: (a.layer, a.triangle, a.multiple))
        ],
    )
    note = "How each triangle attends as rows grow: means over layers, heads and sampled queries."
    return section(
        "Attention",
        note,
        grid(*cards),
        f"<details><summary>Every layer</summary>{grid(card('', layers, wide=True))}</details>",
    )


def _distances(results: Sequence[AttentionResult]) -> str:
    """A line for each triangle at the training length and at the longest."""
    lines = []
    for triangle in dict.fromkeys(a.triangle for a in results):
        for multiple in dict.fromkeys((1.0, max(a.multiple for a in results))):
            own = [a.by_distance for a in results if (a.triangle, a.multiple) == (triangle, multiple)]
            means = [100 * sum(column) / len(own) for column in zip(*own, strict=True)]
            lines.append(Line(f"{triangle}, {multiple:g}x", list(enumerate(means)), dashed=multiple == 1))
    longest = max(len(line.points) for line in lines)
    return line_chart(
        lines,
        x_label="tokens away, from",
        y_label="% of the attention",
        x_ticks=range(0, longest, 2),
        x_name=lambda k: f"{2 ** (int(k) - 1):,}" if k else "0",
        zero=True,
    )


def costs_section(report: ContextReport) -> str:
    """One mask at a time, speed and memory, and what was left out."""
    cards = []
    if report.pseudo:
        rows = [
            [f"{p.multiple:g}x", f"{p.targets}", f"{p.masked_loss:.3f}", f"{p.single_loss:.3f}", f"{p.correlation:.2f}"]
            for p in report.pseudo
        ]
        header = ["context", "targets", "many masks", "one mask", "r"]
        cards.append(
            card(
                "One mask at a time",
                table(header, rows),
                "Pseudo-perplexity costs a whole row for each target. How far the cheap loss agrees with it.",
            )
        )
    rows = [
        [
            f"{s.multiple:g}x",
            f"{s.tokens_per_s:,.0f}",
            "-" if s.peak_memory_bytes is None else f"{s.peak_memory_bytes / 2**20:,.0f} MiB",
        ]
        for s in report.speed
    ]
    where = f"On {report.provenance.device}, {report.provenance.ranks} rank(s); memory beyond what was held before."
    cards.append(card("Speed and memory", table(["context", "tokens/s", "peak memory"], rows), where))
    if report.skipped:
        reasons: list[list[Cell]] = [[title_of(what), (why, "why")] for what, why in report.skipped.items()]
        cards.append(card("Not measured", table(["what", ""], reasons), wide=True))
    return section("What it costs, and what was left out", "", grid(*cards))
