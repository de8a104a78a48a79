"""`diptych evaluate` and `compare`: measure a trained encoder, or train small ones on a synthetic task."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.commands.arguments import RunName, RunsFolder, parse_count, parse_duration, parse_lengths, resumable
from launch.terminal.console import make_console, say

app = typer.Typer(no_args_is_help=True, help="Measure a trained encoder.")
probe_app = typer.Typer(no_args_is_help=True, help="Train small encoders on a synthetic task, to compare their kinds.")


app.add_typer(probe_app, name="probe")


class _Attention(StrEnum):
    """Kinds of encoders. Typer knows no lists of `Literal`."""

    DUAL_TRIANGLE = "dual_triangle"
    BIDIRECTIONAL = "bidirectional"
    CAUSAL = "causal"


class _Positions(StrEnum):
    """How an encoder is told where its tokens stand."""

    NONE = "none"
    ROTARY = "rotary"
    LEARNED = "learned"


class _Pattern(StrEnum):
    """What the layers of an encoder see, and how they are told where."""

    LOCAL_GLOBAL = "local_global"
    ROTARY = "rotary"
    NONE = "none"


_Lengths = Annotated[
    str | None,
    typer.Option(metavar="0.5x,1x,2x,...", help="Multiples of the training length; by default as configured."),
]
_Budget = Annotated[
    float | None,
    typer.Option(
        metavar="TIME", parser=parse_duration, help="Time limit, for instance 90s, 10m, 1h: less is measured."
    ),
]
_Recalibrate = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        parser=parse_count,
        help="Also train so many tokens (2M) at the longest length, and measure again.",
    ),
]


@app.command("context")
def evaluate_context(
    run: RunName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the evaluation section, for instance windows=64."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Checkpoint to read; by default the newest.")] = None,
    lengths: _Lengths = None,
    split: Annotated[
        Literal["valid", "test"] | None, typer.Option(help="Documents to read; by default as configured.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="CORPUS", help="Folder of another corpus of the same tokenizer.")
    ] = None,
    budget: _Budget = None,
    full: Annotated[bool, typer.Option("--full", help="Several times as many windows, samples and tasks.")] = False,
    recalibrate: _Recalibrate = None,
    nproc: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that share the work.")] = 1,
    folder: RunsFolder = Path("runs"),
) -> None:
    """Read sequences longer than those trained on, and see whether what is far away is used.

    Writes report.html, report.md and report.json into the run's folder: loss by context length, the gain over a crop,
    ways to read long rows, tasks, attention. Ctrl-C keeps what is done; the same command goes on.

    [bold]Example:[/bold] diptych evaluate context quickstart --lengths 0.5x,1x,2x,4x --budget 5m --nproc 2
    """
    from launch.evaluate import evaluate_context as evaluate_run
    from launch.run_list import find_run
    from pretrain.evaluation.context.request import Request

    changes = [*(overrides or []), *([f"split={split}"] if split else [])]
    with resumable():
        request = Request(
            run_folder=find_run(run, folder).path,
            step=step,
            lengths=tuple(parse_lengths(lengths)) if lengths else None,
            corpus=corpus and corpus.absolute(),
            overrides=tuple(f"evaluation.{change.removeprefix('evaluation.')}" for change in changes),
            full=full,
            budget_s=budget,
        )
        command = ["diptych", *sys.argv[1:]]
        evaluate_run(request, make_console(), num_ranks=nproc, recalibrate=recalibrate, command=command)


@probe_app.command("argmax")
def evaluate_probe_argmax(
    attention: Annotated[
        list[_Attention] | None, typer.Option(help="A kind of attention; repeatable. By default all three.")
    ] = None,
    positions: Annotated[
        list[_Positions] | None, typer.Option(help="A kind of positions; repeatable. By default none and rotary.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train each kind with the seeds 0 to N - 1.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 1000,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go.")] = Path("probes/argmax"),
) -> None:
    """Which encoders know where the largest of 64 values stands?

    Trains a small encoder of each kind and seed, and writes a table, a plot and results.json. Finished trainings are
    kept: interrupt it anywhere and run it again. About ten minutes on two cores.

    [bold]Example:[/bold] diptych evaluate probe argmax --attention dual_triangle --positions none --seeds 1
    """
    from launch.probe import argmax

    kinds = dict.fromkeys(attention or _Attention)
    told = dict.fromkeys(positions or (_Positions.NONE, _Positions.ROTARY))
    with resumable():
        argmax(out, [a.value for a in kinds], [p.value for p in told], seeds, steps, make_console())


@probe_app.command("passkey")
def evaluate_probe_passkey(
    attention: Annotated[
        list[_Attention] | None,
        typer.Option(help="A kind of attention; repeatable. By default dual_triangle and bidirectional."),
    ] = None,
    pattern: Annotated[
        list[_Pattern] | None,
        typer.Option(
            help="Of layers; repeatable. local_global: a local rotary one, then a global one without positions."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train each kind with the seeds 0 to N - 1.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 1800,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go.")] = Path("probes/passkey"),
) -> None:
    """Which encoders find a key, in rows up to 16 times as long as they learned it on?

    Trains a small encoder of each kind and seed on rows of up to 128 tokens, reads rows of up to 2,048, and writes
    tables, a plot and results.json. Finished trainings are kept: interrupt it anywhere and run it again.

    [bold]Example:[/bold] diptych evaluate probe passkey --attention dual_triangle --pattern local_global --seeds 1
    """
    from launch.probe import passkey

    kinds = dict.fromkeys(attention or (_Attention.DUAL_TRIANGLE, _Attention.BIDIRECTIONAL))
    layers = dict.fromkeys(pattern or _Pattern)
    with resumable():
        passkey(out, [a.value for a in kinds], [p.value for p in layers], seeds, steps, make_console())


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names or folders of runs, or folders that hold runs.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the comparison goes.")] = Path("comparison"),
    evaluation: Annotated[
        str, typer.Option(metavar="NAME", help="Which report of each run: the folder's name in its evaluation/.")
    ] = "context",
    folder: RunsFolder = Path("runs"),
) -> None:
    """Compare the context reports of several runs.

    Writes compare.html and compare.md: loss and gain by context length. Runs that differ in nothing but their seed are
    averaged. A folder of runs, such as a sweep's, stands for all runs in it that have a report.

    [bold]Example:[/bold] diptych compare quickstart bidirectional --out comparison
    """
    from launch.run_list import runs_meant
    from launch.terminal.tables import table
    from pretrain.evaluation.report.compare import comparison_table, read_run_kinds, write_comparison

    console, found = make_console(), []
    for name in runs:
        meant = runs_meant([name], folder)
        written = [run for run in meant if run.report(evaluation).is_file()]
        # Of a sweep, what there is so far; of a run that is named, an error.
        if len(written) < len(meant) and written:
            say(console, f"{name}: {len(meant) - len(written)} of {len(meant)} runs have no report, and are left out")
        found += written or meant
    kinds = read_run_kinds(found, evaluation)
    write_comparison(out, kinds)
    numbers = comparison_table(kinds)
    compared = table("Context extension compared", numbers.header, numbers.texts)
    compared.columns[0].no_wrap = True
    console.print(compared)
    say(console, f"comparison: {(out / 'compare.html').absolute()}, compare.md")
