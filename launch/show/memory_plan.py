"""`diptych plan`: what a run needs, what fits, and how long it takes."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.preparation import vocabulary_of
from launch.show.encoder import flops_table
from launch.terminal.console import compact, duration, say
from launch.terminal.tables import table
from pretrain.config.load import load_config
from pretrain.config.topology import check_topology
from pretrain.errors import UserError
from pretrain.model.summary import summarize
from pretrain.training.cost.advice import remedies
from pretrain.training.cost.flops import FlopsPerToken, flops_per_token, peak_flops
from pretrain.training.cost.hardware import GIB, USABLE, Hardware, this_processor
from pretrain.training.cost.need import Need, sent_for_attention
from pretrain.training.cost.plan import RECOMPUTE_EVERY, Choice, MemoryPlan
from pretrain.training.zero.settings import ZERO_STAGE

GPU_GIB = {"h200": 139, "h100": 79, "a100": 79}
"""GiB that torch reports."""
ASSUMED_MFU = 0.4
"""Share of the peak that a training reaches, until `benchmarks/results/` has a line of one on a GPU."""
SIZES_SHOWN = 6
"""Micro-batch sizes that a table has room for at 80 characters."""
TOKENS_PER_PARAMETER = 20
"""Hoffmann et al., arXiv 2203.15556."""


def hardware(gpu: str, nodes: int, gpus_per_node: int, peak_tflops: float | None) -> Hardware:
    """What `--gpu` and its companions mean.

    Raises:
        UserError: a name that is not known and no number of GiB.
    """
    peak = peak_tflops and peak_tflops * 1e12
    spread = {"world_size": nodes * gpus_per_node, "ranks_per_node": gpus_per_node}
    if gpu == "cpu":
        return this_processor(**spread, peak=peak)
    if gpu.lower() in GPU_GIB:
        known = peak_flops(gpu.upper())
        return Hardware(gpu.upper(), GPU_GIB[gpu.lower()] * GIB, **spread, on_gpu=True, peak=peak or known)
    try:
        gib_given = float(gpu)
    except ValueError:
        gib_given = 0.0
    if not gib_given > 0:
        raise UserError(
            f"--gpu {gpu}: neither one of {', '.join(GPU_GIB)}, cpu, nor the memory of a GPU in GiB; of others "
            "give that and their peak, for instance --gpu 180 --peak 2250"
        )
    return Hardware(f"GPU of {gib_given:g} GiB", int(gib_given * GIB), **spread, on_gpu=True, peak=peak)


def plan_for(name: str, overrides: Sequence[str], devices: Hardware) -> MemoryPlan:
    """Plan the memory of a config, which need not name a corpus.

    Raises:
        UserError: the batch or the streams cannot be divided by the devices.
    """
    config = load_config(name, overrides, beneath={"corpus": {"path": "corpora/none"}})
    check_topology(config, devices.world_size, devices.ranks_per_node)
    return MemoryPlan(config, vocabulary_of(config)[0], devices)


def show_plan(plan: MemoryPlan, mfu: float | None, console: Console) -> None:
    """Print the whole plan."""
    say(console, f"{_head(plan)}\n", "bold")
    console.print(_parameters(plan))
    console.print(_states(plan))
    console.print(_activations(plan))
    console.print(_peaks(plan))
    data = plan.config.data
    console.print(flops_table(_flops(plan), data.sequence_length, data.mask_rate))
    for line in [*_notes(plan), "", *_speed(plan, mfu), ""]:
        console.print(Text(line))
    for line in _verdict(plan):
        say(console, line)


def brief_plan(plan: MemoryPlan) -> list[str]:
    """The plan in three lines that do not depend on this machine: for comments beside a config."""
    choice = plan.recommended()
    flops = _flops(plan)
    mask_rate = plan.config.data.mask_rate
    head = f"{_head(plan)}, rows of {plan.config.data.sequence_length:,}"
    cost = (
        f"{compact(flops.total(mask_rate))} FLOPs a token ({compact(flops.total_as_full(mask_rate))} with triangles "
        f"counted as full), checkpoints of {size(plan.optimizer.checkpoint_bytes)}"
    )
    if choice is None:
        return [head, cost, f"does not fit: {', or '.join(remedies(plan))}"]
    return [head, cost, f"{_words(choice)}: {size(plan.need(choice).total)} a rank"]


def size(count: float) -> str:
    """Bytes with three figures, in MiB or GiB."""
    unit, name = (GIB, "GiB") if count >= GIB else (2**20, "MiB")
    return f"{count / unit:.3g} {name}" if count / unit < 1000 else f"{count / unit:,.0f} {name}"


def _words(choice: Choice) -> str:
    rows = f"{choice.micro_batch_size} row{'s' if choice.micro_batch_size > 1 else ''} at once"
    return f"sharding {choice.sharding}, {_again(choice.checkpoint_every)}, {rows}"


def _again(every: int) -> str:
    named = {0: "no block computed again", 1: "every block computed again", 2: "every 2nd block computed again"}
    return named.get(every, f"every {every}th block computed again")


def _head(plan: MemoryPlan) -> str:
    parameters = plan.parameters
    devices = plan.hardware
    return (
        f"{plan.run.name}: {compact(parameters, ' ').replace('G', 'B')} parameters with {plan.vocab_size:,} pieces, on "
        f"{devices.world_size} x {devices.name}, {plan.precision}"
    )


def _flops(plan: MemoryPlan) -> FlopsPerToken:
    return flops_per_token(plan.config.model, plan.vocab_size, plan.config.data.sequence_length)


class _Unit:
    """The unit of a table, by its largest number."""

    def __init__(self, largest: float) -> None:
        self.bytes, self.name = (GIB, "GiB") if largest >= GIB else (2**20, "MiB")

    def __call__(self, count: float) -> str:
        value = count / self.bytes
        return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _parameters(plan: MemoryPlan) -> Table:
    summary = summarize(plan.run.model, plan.vocab_size)
    rows = [[g.name, f"{g.parameters:,}", f"{g.parameters / summary.parameters:.1%}"] for g in summary.groups]
    return table(None, ["parameters", "number", "share"], [*rows, ["all", f"{summary.parameters:,}", ""]])


def _shardings(plan: MemoryPlan) -> list[str]:
    """Shardings that there can be: `hybrid` is for several nodes, and neither it nor `none` goes with offload."""
    several = 1 < plan.hardware.ranks_per_node < plan.hardware.world_size
    offloaded = plan.run.training.offload != "none"
    refused = {"hybrid" if offloaded or not several else "", "none" if offloaded else ""}
    return [sharding for sharding in ZERO_STAGE if sharding not in refused]


def _states(plan: MemoryPlan) -> Table:
    """States and buffers by sharding."""
    choices = [Choice(sharding, 0, plan.configured.micro_batch_size) for sharding in _shardings(plan)]
    needs = [plan.need(choice) for choice in choices]
    unit = _Unit(max(need.states.total for need in needs))
    rows = []
    for choice, need in zip(choices, needs, strict=True):
        states = need.states
        parts = (states.weights, states.gradients, states.optimizer, need.buffers.communication)
        rows.append([choice.sharding, *map(unit, parts)])
    columns = ["sharding", "weights", "gradients", "moments", "buffers"]
    return table(f"Model states of a rank, {unit.name}; weights with their fp32 master", columns, rows)


def _columns(plan: MemoryPlan) -> list[int]:
    """Micro-batch sizes to show: the larger ones, but not many beyond what fits."""
    sizes = plan.micro_batch_sizes
    fitting = [m for m in sizes if plan.fits(Choice("full", 1, m))]
    last = min(len(sizes), max(len(fitting) + 1, 1))
    return sizes[max(0, last - SIZES_SHOWN) : max(last, min(SIZES_SHOWN, len(sizes)))]


def _shown_again(plan: MemoryPlan) -> list[int]:
    return sorted({*RECOMPUTE_EVERY, plan.configured.checkpoint_every}, key=lambda every: (every > 0, -every))


def _activations(plan: MemoryPlan) -> Table:
    """Activations by what is computed again, and the logits."""
    sizes, sharding = _columns(plan), plan.configured.sharding
    made = {e: [plan.need(Choice(sharding, e, m)).activations for m in sizes] for e in _shown_again(plan)}
    unit = _Unit(max(a.peak for row in made.values() for a in row))
    rows = [[_again(every), *(unit(a.blocks + a.recomputed + a.gradients) for a in row)] for every, row in made.items()]
    some = next(iter(made.values()))
    rows.append(["logits at masked positions", *(unit(a.logits + a.logits_working) for a in some)])
    length = plan.config.data.sequence_length
    return table(f"Activations of a rank, {unit.name}, by rows of {length:,} at once", ["", *map(str, sizes)], rows)


def _peaks(plan: MemoryPlan) -> Table:
    """The peak of every choice."""
    sizes, again = _columns(plan), _shown_again(plan)
    peaks = {
        (sharding, every): [plan.need(Choice(sharding, every, m)).total for m in sizes]
        for sharding in _shardings(plan)
        for every in again
    }
    unit = _Unit(max(peak for row in peaks.values() for peak in row))
    usable = plan.hardware.usable
    rows: list[list[str | Text]] = []
    for (sharding, every), row in peaks.items():
        cells = [Text(unit(p), "green") if p <= usable else Text(f"({unit(p)})", "dim") for p in row]
        label = {0: "none", 1: "every block"}.get(every, f"1 in {every} blocks")
        rows.append([sharding if every == again[0] else "", label, *cells])
    return table(
        f"Peak of a rank, {unit.name}, by rows at once; what does not fit is in brackets",
        ["sharding", "again", *map(str, sizes)],
        rows,
        numbers_from=2,
    )


def _notes(plan: MemoryPlan) -> list[str]:
    devices, parameters = plan.hardware, plan.parameters
    notes = [
        f"fits: under {USABLE:.0%} of {size(devices.memory)} a rank; the rest is for the driver, buffers of libraries "
        "and fragmentation (assumed)",
        f"checkpoint: {size(plan.optimizer.checkpoint_bytes)} each, {plan.run.checkpoint.keep_last} kept"
        + (f", and every {plan.run.checkpoint.keep_every}th step" if plan.run.checkpoint.keep_every else ""),
        f"at its start every rank builds the whole model in fp32: {size(4 * parameters)} of host memory each; under "
        "sharding full and hybrid, only its part",
    ]
    if plan.need(plan.configured).host:
        offload, background = plan.run.training.offload, plan.run.checkpoint.background
        causes = {
            f"training.offload={offload}": offload != "none",
            "the copy to save from (checkpoint.async)": background and offload != "nvme",
        }
        where = "host memory beside the GPU" if plan.hardware.on_gpu else "counted in the peaks"
        taken = _taken(plan, lambda need: need.host)
        notes.append(f"{where}: {taken}, for {' and '.join(cause for cause, there in causes.items() if there)}")
    if plan.need(plan.configured).states.files:
        notes.append(f"training.offload_folder: {_taken(plan, lambda need: need.states.files)}")
    shared = plan.run.parallel.sequence
    if shared > 1:
        positions = plan.config.data.sequence_length // shared
        sent = size(sent_for_attention((plan.recommended() or plan.configured).applied_to(plan.config), plan.hardware))
        notes.append(
            f"every row is shared by {shared} ranks, {positions:,} positions each; for attention a rank sends {sent} "
            "to the others of its group in a step"
        )
    if plan.phase:
        notes.insert(0, f"phase {plan.phase} has the largest micro-batches; the plan is for it")
    return notes


def _taken(plan: MemoryPlan, count: Callable[[Need], int]) -> str:
    """Some bytes of a rank, as configured and as recommended."""
    now = size(count(plan.need(plan.configured)))
    best = plan.recommended()
    then = now if best is None else size(count(plan.need(best)))
    return f"{now} a rank as configured" + ("" if then == now else f", {then} as recommended")


def _speed(plan: MemoryPlan, mfu: float | None) -> list[str]:
    """Tokens a second and days, at a stated share of the peak."""
    devices = plan.hardware
    if devices.peak is None:
        return [f"speed: the peak of {devices.name} is not known; give --peak TFLOPS and --mfu SHARE"]
    share = ASSUMED_MFU if mfu is None else mfu
    said = (
        f"{share:.0%} MFU as given"
        if mfu is not None
        else (f"{share:.0%} MFU, an assumption: benchmarks/results/ has no training on a GPU yet; --mfu changes it")
    )
    per_token = _flops(plan).total(plan.config.data.mask_rate)
    every = (plan.recommended() or plan.configured).checkpoint_every
    again = 1 + (1 / every if every else 0) / 3
    tokens_per_s = devices.world_size * devices.peak * share / per_token / again
    lines = [
        f"speed: {compact(tokens_per_s)} tokens/s at {said}; triangles counted as triangles"
        + ("" if every == 0 else f", {again - 1:.0%} more work for blocks computed again")
        + ("; less by what each step waits for the host" if plan.run.training.offload != "none" else "")
    ]
    budgets = {
        f"training.tokens = {compact(plan.run.training.tokens)}": plan.run.training.tokens,
        f"{TOKENS_PER_PARAMETER} tokens per parameter": TOKENS_PER_PARAMETER * plan.parameters,
    }
    for name, tokens in budgets.items():
        seconds = tokens / tokens_per_s
        days = seconds / 86400
        lines.append(f"  {name}: {f'{days:,.1f} days' if days >= 2 else duration(seconds)}")
    return lines


def _verdict(plan: MemoryPlan) -> list[str]:
    """What the config says, whether it fits, and what to take."""
    now = plan.configured
    fits = "fits" if plan.fits(now) else "does not fit"
    lines = [f"as configured ({_words(now)}): {size(plan.need(now).total)} a rank, {fits}"]
    choice = plan.recommended()
    if choice is None:
        least = size(plan.need(plan.smallest).total)
        return [
            *lines,
            f"nothing fits: the least is {least} a rank ({_words(plan.smallest)})",
            *(f"  {remedy}" for remedy in remedies(plan)),
        ]
    if choice == now:
        return [*lines, "recommended: as it is"]
    return [*lines, f"recommended: {size(plan.need(choice).total)} a rank with", f"  {' '.join(choice.overrides)}"]
