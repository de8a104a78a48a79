"""What re-indexing costs, and what was chosen instead where it costs too much: `python -m benchmarks.reindexing`.

On the CPU, forward and backward, in a minute on two cores. Writes results/reindexing-cpu .json and .md. attention.py
compares dual-triangle attention with other kinds; here it is compared with other ways of computing the same.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import TIME, forward_backward, layout_of, random_qkv
from benchmarks.timing import Row, compare, machine, paired, write_results
from pretrain.model import kernels
from pretrain.model.attention import attention
from pretrain.model.layout import AttentionLayout
from pretrain.model.rotary import rotary_table, rotate


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    rounds: int = 5
    long: int = 4096
    long_heads: tuple[tuple[int, int], ...] = ((4, 64), (8, 32))
    """Logical heads and their width."""
    short: tuple[tuple[int, int, int], ...] = ((64, 128, 1), (64, 128, 2), (64, 128, 8), (32, 256, 1), (32, 256, 8))
    """Rows, length, documents a row."""
    short_heads: tuple[int, int] = (2, 64)


def random_lengths(documents: int, length: int, generator: torch.Generator) -> list[int]:
    """Of documents that fill a row, the longest up to three times the shortest."""
    weights = torch.rand(documents, generator=generator) + 0.5
    ends = (weights.cumsum(0) / weights.sum() * length).round().int().tolist()
    return [end - start for start, end in pairwise([0, *ends])]


def dual(layout: AttentionLayout) -> Callable[..., Tensor]:
    """Dual-triangle attention by `sdpa`, of q, k, v."""
    return partial(attention, layout=layout, kind="dual_triangle", kernel="sdpa")


def causal_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Nothing but torch's kernel, for both triangles in one call, of sub-heads [B, n, L, d] that lie as it likes."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def long_rows(sizes: Sizes) -> Iterator[Row]:
    """What is left to gain by moving nothing."""
    layout = layout_of([[sizes.long]], sizes.long)
    for heads, width in sizes.long_heads:
        inputs = random_qkv((1, sizes.long, heads, width), "cpu", torch.float32)
        apart = [torch.randn(1, 2 * heads, sizes.long, width // 2, requires_grad=True) for _ in range(3)]
        calls = {"dual": forward_backward(dual(layout), inputs), "kernel": forward_backward(causal_call, apart)}
        seconds = paired(calls, sizes.rounds)
        subject = f"dual-triangle, {2 * heads} sub-heads of {width // 2}"
        planned = Row(f"forward+backward, 1 x {sizes.long}", subject, "torch's causal kernel alone", TIME)
        yield compare(planned, seconds["dual"], seconds["kernel"])


def short_rows(sizes: Sizes) -> Iterator[Row]:
    """Masked, as they are computed, and re-indexed, as if they were long."""
    generator = torch.Generator().manual_seed(0)
    for rows, length, documents in sizes.short:
        packed = [random_lengths(documents, length, generator) for _ in range(rows)]
        layout = layout_of(packed, length)
        inputs = random_qkv((rows, length, *sizes.short_heads), "cpu", torch.float32)
        masked = forward_backward(dual(layout), inputs)
        with mock.patch.object(kernels, "_SHORT_ROW", 0):
            moved = forward_backward(dual(layout), inputs)

        def re_indexed(call: Callable[[], object] = moved) -> None:
            with mock.patch.object(kernels, "_SHORT_ROW", 0):
                call()

        seconds = paired({"masked": masked, "re-indexed": re_indexed}, sizes.rounds)
        name = f"forward+backward, {rows} x {length}, documents in a row: {documents}"
        yield compare(Row(name, "masked", "re-indexed", TIME), seconds["masked"], seconds["re-indexed"])


def half_precision(sizes: Sizes) -> Row:
    """bf16 on the CPU: through float32, as it is computed, and by torch's kernel."""
    rows, length, _ = sizes.short[0]
    heads, width = sizes.short_heads
    layout = layout_of([[length]] * rows, length)
    inputs = random_qkv((rows, length, heads, width), "cpu", torch.bfloat16)
    apart = [torch.randn(rows, 2 * heads, length, width // 2).bfloat16().requires_grad_() for _ in range(3)]
    calls = {"ours": forward_backward(dual(layout), inputs), "torch": forward_backward(causal_call, apart)}
    seconds = paired(calls, sizes.rounds)
    planned = Row(
        f"forward+backward, {rows} x {length}, bf16", "dual-triangle through float32", "causal kernel in bf16", TIME
    )
    return compare(planned, seconds["ours"], seconds["torch"])


def rotation(sizes: Sizes) -> Row:
    """Rotary embedding, beside the formula left to autograd."""
    rows, length, _ = sizes.short[0]
    heads, width = 2 * sizes.short_heads[0], sizes.short_heads[1] // 2
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = table = rotary_table(torch.arange(length)[None], frequencies)

    def formula(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        half = cos.shape[-1] // 2
        return torch.cat((first * cos[..., :half] - second * sin, second * cos[..., :half] + first * sin), dim=-1)

    x = torch.randn(rows, length, heads, width, requires_grad=True)
    torch.testing.assert_close(rotate(x, table), formula(x))
    calls = {
        "ours": forward_backward(partial(rotate, table=table), [x]),
        "autograd": forward_backward(formula, [x]),
    }
    seconds = paired(calls, sizes.rounds)
    planned = Row(f"forward+backward, {rows} x {length}", "rotary embedding", "its formula by autograd", TIME)
    return compare(planned, seconds["ours"], seconds["autograd"])


def main() -> None:
    """Measure, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
    parser.add_argument("--rounds", type=int, default=9, help="of interleaved timing (9)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on, sizes = machine(), Sizes(rounds=options.rounds)
    rows = [*long_rows(sizes), *short_rows(sizes), half_precision(sizes), rotation(sizes)]
    write_results(options.out / "reindexing-cpu.json", "Other ways of computing the two triangles", rows, on)
    print((options.out / "reindexing-cpu.md").read_text())


if __name__ == "__main__":
    main()
