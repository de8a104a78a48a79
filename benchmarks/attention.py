"""Attention, all variants side by side: `python -m benchmarks.attention` (minutes on two cores).

On the CPU always, on CUDA where there is one. Writes results/attention-cpu (or -cuda) .json, .md and .png.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.timing import Row, compare, machine, paired, write_results
from pretrain.batch import IGNORED, Batch
from pretrain.config.model import ModelConfig
from pretrain.model.attention import attention
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout

TIME = "time of the first / time of the second"
SPEEDUP = "time of the second / time of the first"
MEMORY = "peak memory of the first / of the second"


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are those of the targets."""

    rounds: int = 5
    heads: int = 8
    width: int = 32
    """Of the heads that the others are compared with. Dual-triangle attention is measured in both readings of `the
    same width`: as many logical heads of this width, or sub-heads of this width, from half as many heads."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    target_length: int = 4096
    flex_length: int = 2048
    window: int = 128
    window_length: int = 8192
    linear_length: int = 32_768
    packed_length: int = 4096
    packed_documents: int = 8
    step_rows: int = 32
    step_length: int = 128
    step_hidden: int = 128
    cuda_hidden: tuple[int, ...] = (768, 1024)
    cuda_lengths: tuple[int, ...] = (4096, 8192, 16_384)
    cuda_sub_head: int = 64
    cuda_tokens: int = 65_536
    """Positions in a batch."""


def layout_of(rows: list[list[int]], length: int) -> AttentionLayout:
    """Rows given by the lengths of their documents, padded to `length`."""
    documents, positions = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for row, lengths in enumerate(rows):
        start = 0
        for number, n in enumerate(lengths, start=1):
            documents[row, start : start + n] = number
            positions[row, start : start + n] = torch.arange(n)
            start += n
    return AttentionLayout.from_batch(Batch(documents, documents, documents, positions))


def random_qkv(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as a model makes them: views of one projection, [B, L, n, d]."""
    generator = torch.Generator(device).manual_seed(0)
    rows, length, heads, width = shape
    projected = torch.randn(rows, length, 3, heads, width, device=device, dtype=dtype, generator=generator)
    return [x.detach().requires_grad_() for x in projected.unbind(2)]


def forward_backward(forward: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """A call that computes the output and the gradients of q, k and v."""
    gradient = torch.ones_like(forward(*inputs))
    return lambda: torch.autograd.grad(forward(*inputs), inputs, gradient)


def two_triangles(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask of flex_attention over sub-heads: even ones lower, odd ones upper."""
    return ((head % 2 == 0) & (key <= query)) | ((head % 2 == 1) & (key >= query))


def flex_forward(heads: int, length: int, device: str) -> Callable[..., Tensor]:
    """Compiled flex_attention with the two-triangle mask, made once; of q, k, v [B, L, n, d]."""
    mask = create_block_mask(two_triangles, None, 2 * heads, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sub_heads = [x.unflatten(-1, (2, -1)).flatten(2, 3).transpose(1, 2) for x in (q, k, v)]
        return compiled(*sub_heads, block_mask=mask).transpose(1, 2).unflatten(2, (heads, 2)).flatten(-2)

    return forward


# --------------------------------------------------------------------------------------------------------------- CPU


def readings(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Both readings of `the same width`, by name: logical heads and their width."""
    shapes = ((sizes.heads // 2, 2 * sizes.width), (sizes.heads, sizes.width))
    return {f"{n} heads of {d} = {2 * n} sub-heads of {d // 2}": (n, d) for n, d in shapes}


def sweep(sizes: Sizes) -> Iterator[Row]:
    """Forward and backward at each length."""
    window = sizes.window
    for length in sizes.lengths:
        layout = layout_of([[length]], length)
        calls = {}
        for kind in ("bidirectional", "causal"):
            inputs = random_qkv((1, length, sizes.heads, sizes.width), "cpu", torch.float32)
            calls[kind] = forward_backward(partial(attention, layout=layout, kind=kind), inputs)
        for name, shape in readings(sizes).items():
            inputs = random_qkv((1, length, *shape), "cpu", torch.float32)
            dual = partial(attention, layout=layout, kind="dual_triangle")
            calls[f"dual-triangle, {name}"] = forward_backward(dual, inputs)
            calls[f"windowed, W={window}, {name}"] = forward_backward(partial(dual, window=window), inputs)
        seconds = paired(calls, sizes.rounds)
        reference = f"bidirectional, {sizes.heads} heads of {sizes.width}"
        point = Row(f"cpu, forward+backward, L={length}", "", reference, TIME, curve="cpu", length=length)
        for name in calls:
            planned = replace(point, subject=name)
            if name.startswith("dual") and length == sizes.target_length:
                planned = replace(planned, sense="at most", target=0.65)
            if name.startswith("windowed") and length == sizes.window_length:
                planned = replace(planned, sense="at most", target=0.15)
            if name != "bidirectional":
                yield compare(planned, seconds[name], seconds["bidirectional"])


def against_flex(sizes: Sizes) -> Iterator[Row]:
    """Forward only: on the CPU flex_attention has no backward pass."""
    length = sizes.flex_length
    layout = layout_of([[length]], length)
    for name, (heads, width) in readings(sizes).items():
        inputs = [x.detach() for x in random_qkv((1, length, heads, width), "cpu", torch.float32)]
        flex = flex_forward(heads, length, "cpu")
        dual = partial(attention, *inputs, layout, "dual_triangle")
        with torch.inference_mode():
            torch.testing.assert_close(dual(), flex(*inputs), rtol=1e-4, atol=1e-4)
            seconds = paired({"dual": dual, "flex": partial(flex, *inputs)}, 2 * sizes.rounds)
        subject = f"dual-triangle, {name}"
        planned = Row(f"cpu, forward, L={length}", subject, "compiled flex_attention", SPEEDUP, "at least", 2.5)
        yield compare(planned, seconds["dual"], seconds["flex"], speedup=True)


def linearity(sizes: Sizes) -> Iterator[Row]:
    """Windowed triangles: the time of a token does not grow with the length."""
    lengths = [sizes.window_length * 2**k for k in range(8) if sizes.window_length * 2**k <= sizes.linear_length]
    calls = {}
    for length in lengths:
        inputs = random_qkv((1, length, sizes.heads, sizes.width), "cpu", torch.float32)
        layout = layout_of([[length]], length)
        windowed = partial(attention, layout=layout, kind="dual_triangle", window=sizes.window)
        calls[length] = forward_backward(windowed, inputs)
    seconds = paired(calls, sizes.rounds)
    per_token = {length: [s / length * 1000 for s in seconds[length]] for length in lengths}
    for length in lengths[1:]:
        name, quantity = f"cpu, windowed, W={sizes.window}, forward+backward", "time of 1,000 tokens"
        planned = Row(name, f"L={length}", f"L={lengths[0]}", f"{quantity}, first / second", "at most", 1.25)
        yield compare(planned, per_token[length], per_token[lengths[0]])


def packed(sizes: Sizes) -> Row:
    """Documents of one row, and the same documents in rows of their own, padded to the longest."""
    weights = torch.rand(sizes.packed_documents, generator=torch.Generator().manual_seed(0)) + 0.5
    lengths = [int(n) for n in (weights / weights.sum() * sizes.packed_length)]
    lengths[-1] += sizes.packed_length - sum(lengths)
    calls = {}
    for name, rows in (("packed", [lengths]), ("unpacked", [[n] for n in lengths])):
        length = max(sum(row) for row in rows)
        inputs = random_qkv((len(rows), length, sizes.heads, sizes.width), "cpu", torch.float32)
        layout = layout_of(rows, length)
        calls[name] = forward_backward(partial(attention, layout=layout, kind="dual_triangle"), inputs)
    planned = Row(
        f"cpu, {len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, forward+backward",
        f"packed in a row of {sizes.packed_length}",
        "a row each, padded",
        TIME,
        "at most",
        1.0,
    )
    seconds = paired(calls, 2 * sizes.rounds)
    return compare(planned, seconds["packed"], seconds["unpacked"])


def layout_share(sizes: Sizes) -> Row:
    """What working out the layout takes of a training step of the 1 M encoder."""
    rows, length, vocab_size = sizes.step_rows, sizes.step_length, 2048
    generator = torch.Generator().manual_seed(0)
    model = MaskedLanguageModel(ModelConfig(hidden_size=sizes.step_hidden), vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, ids, IGNORED)
    batch = Batch(ids, labels, torch.ones_like(ids), torch.arange(length).expand(rows, length))

    def step() -> None:
        optimizer.zero_grad()
        model(batch, AttentionLayout.from_batch(batch))[0].mean().backward()
        optimizer.step()

    seconds = paired({"layout": lambda: AttentionLayout.from_batch(batch), "step": step}, 2 * sizes.rounds)
    parameters = sum(p.numel() for p in model.parameters())
    planned = Row(
        f"cpu, batch {rows} x {length}",
        "the layout",
        f"a training step of {parameters / 1e6:.1f} M parameters",
        TIME,
        "at most",
        0.02,
    )
    return compare(planned, seconds["layout"], seconds["step"])


# -------------------------------------------------------------------------------------------------------------- CUDA


def cuda_rows(hidden: int, length: int, sub_head: int) -> list[Row]:
    """The three comparisons at a width and a length, not measured yet."""
    curve = f"cuda, bf16, hidden {hidden}, sub-heads of {sub_head}"
    name = f"{curve}, forward+backward, L={length}"
    point = Row(name, "dual-triangle", "", SPEEDUP, curve=curve, length=length)
    return [
        replace(point, reference="bidirectional flash SDPA", sense="at least", target=1.6),
        replace(point, reference="compiled flex_attention, cached mask", sense="at least", target=1.3),
        Row(name, "dual-triangle", "bidirectional flash SDPA", MEMORY, "at most", 1.0, unit="MiB"),
    ]


def measure_cuda(sizes: Sizes, hidden: int, length: int) -> list[Row]:
    """Fill in `cuda_rows`."""
    width = 2 * sizes.cuda_sub_head
    heads, rows = hidden // width, max(1, sizes.cuda_tokens // length)
    layout = layout_of([[length]] * rows, length).to(torch.device("cuda"))
    inputs = random_qkv((rows, length, heads, width), "cuda", torch.bfloat16)

    def bidirectional(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attention(*qkv, layout, "bidirectional")

    calls = {
        "dual": forward_backward(partial(attention, layout=layout, kind="dual_triangle"), inputs),
        "flash": forward_backward(bidirectional, inputs),
        "flex": forward_backward(flex_forward(heads, length, "cuda"), inputs),
    }
    seconds = paired(calls, 2 * sizes.rounds)
    peaks = {}
    for name in ("dual", "flash"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        calls[name]()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    flash, flex, memory = cuda_rows(hidden, length, sizes.cuda_sub_head)
    ratio = peaks["dual"] / peaks["flash"]
    memory = replace(memory, subject_value=peaks["dual"], reference_value=peaks["flash"])
    return [
        compare(flash, seconds["dual"], seconds["flash"], speedup=True),
        compare(flex, seconds["dual"], seconds["flex"], speedup=True),
        replace(memory, ratio=ratio, lowest=ratio, highest=ratio),
    ]


# --------------------------------------------------------------------------------------------------------- everything


def measure(sizes: Sizes, devices: set[str], report: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Every row, those of devices that are not among `devices` unmeasured."""
    rows: list[Row] = []
    if "cpu" in devices:
        for part in (sweep, linearity, against_flex):
            report(part.__name__)
            rows.extend(part(sizes))
        for single in (packed, layout_share):
            report(single.__name__)
            rows.append(single(sizes))
    for hidden in sizes.cuda_hidden:
        for length in sizes.cuda_lengths:
            report(f"cuda, hidden {hidden}, L={length}" if "cuda" in devices else "")
            if "cuda" in devices:
                rows.extend(measure_cuda(sizes, hidden, length))
            else:
                rows.extend(
                    replace(row, unmeasured="no GPU here") for row in cuda_rows(hidden, length, sizes.cuda_sub_head)
                )
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Times over length, and the times as ratios: a line of panels per curve."""
    points = [row for row in rows if row.ratio is not None and row.curve is not None]
    curves = list(dict.fromkeys(row.curve for row in points))
    figure = Figure(figsize=(10, 4.4 * len(curves)), layout="constrained")
    for (times, ratios), curve in zip(figure.subplots(len(curves), 2, squeeze=False), curves, strict=True):
        of_curve = [row for row in points if row.curve == curve]
        lines = {
            row.subject: {r.length: r.subject_value for r in of_curve if r.subject == row.subject} for row in of_curve
        }
        lines |= {
            r.reference: {x.length: x.reference_value for x in of_curve if x.reference == r.reference} for r in of_curve
        }
        reference = lines[of_curve[0].reference]
        for label, line in lines.items():
            times.plot(list(line), list(line.values()), marker="o", label=label)
            ratios.plot(
                list(line), [value / reference[length] for length, value in line.items()], marker="o", label=label
            )
        for axes in (times, ratios):
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(reference), [str(length) for length in reference])
            axes.set_xlabel("length in tokens")
        times.set(yscale="log", ylabel="ms", title=f"{curve}: forward + backward")
        ratios.set(ylabel=f"time / time of {of_curve[0].reference}", ylim=(0, None), title="the same, as ratios")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
    parser.add_argument("--rounds", type=int, default=5, help="of interleaved timing (5)")
    parser.add_argument("--only", choices=["cpu", "cuda"], help="leave the other device unmeasured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    there = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    devices = there & {options.only} if options.only else there
    if not devices:
        parser.error("there is no GPU here")
    on = machine()
    rows = measure(Sizes(rounds=options.rounds), devices, lambda what: print(what, flush=True) if what else None)
    name = "attention-cuda" if "cuda" in devices else "attention-cpu"
    write_results(options.out / f"{name}.json", "Attention, side by side", rows, on, f"{name}.png")
    plot(rows, options.out / f"{name}.png")
    print((options.out / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
