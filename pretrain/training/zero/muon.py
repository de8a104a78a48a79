"""Muon for the matrices between hidden layers, AdamW for the rest, over whole parameters or ZeRO's flat pieces of them.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by the semi-orthogonal matrix
nearest to its momentum: by U V^T where the momentum is U S V^T. That needs the whole matrix, and under ZeRO a rank has
pieces. So each matrix that several ranks hold is brought together on one of them, made orthogonal there, and sent back;
momentum, weights and gradient stay where ZeRO has them. DeepSpeed's own Muon is not used: it takes the gradient norm
of what Newton-Schulz has made, so that clipping scales the update itself, and sees q, k and v as one matrix.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic: steep at zero, so that five steps bring nearly every singular value to between 0.7 and 1.2."""
ROUND = 2**26
"""Elements that one rank brings together at once, unless a single matrix has more."""


@dataclass(frozen=True)
class Matrix:
    """A parameter that Muon moves: `blocks` matrices of one shape on top of each other."""

    name: str
    rows: int
    """Rows of all blocks together."""
    columns: int
    blocks: int = 1

    @property
    def numel(self) -> int:
        """Elements of all blocks."""
        return self.rows * self.columns

    @property
    def products(self) -> int:
        """What a Newton-Schulz step costs, up to a factor."""
        return self.numel * min(self.rows // self.blocks, self.columns)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened matrix, at `offset` in the flat tensor that a rank holds."""

    matrix: str
    start: int
    length: int
    offset: int


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Bring the singular values near 1, each matrix for itself: [..., A, B] in float32 or bfloat16, returned the same.

    Zero stays zero. Singular values that are tiny beside the largest need more steps.
    """
    a, b, c = COEFFICIENTS
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def orthogonal_update(momentum: Tensor, matrix: Matrix, steps: int, update_rms: float) -> Tensor:
    """The step for a learning rate of 1, from the flattened momentum of a whole matrix; both [numel], of one dtype.

    Its root mean square is about `update_rms` for every shape (Liu et al., arXiv 2502.16982, section 2.2). Blocks are
    made orthogonal one by one: q, k and v are different maps that only share a parameter. Made orthogonal as one, the
    singular values of all three together would be near 1, and a block with small gradients would hardly move.
    """
    shape = matrix.blocks, matrix.rows // matrix.blocks, matrix.columns
    return newton_schulz(momentum.view(shape), steps).mul_(update_rms * max(shape[1:]) ** 0.5).reshape(-1)


def initial_state(
    parameter: Tensor, moments: Iterable[str], zeros_like: Callable[[Tensor], Tensor] = torch.zeros_like
) -> dict[str, Tensor]:
    """Return the state of a (flat) parameter before the first step: a step count, float32 [], and zeros."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **{name: zeros_like(parameter) for name in moments}}


class Round:
    """Matrices that are spread over ranks: each comes together on the rank that owns it, all at the same time."""

    def __init__(self, owned: Sequence[tuple[Matrix, int]], pieces: Sequence[Mapping[str, Piece]], rank: int) -> None:
        """`owned` are matrices and their owners; `pieces` are those of each rank, by the name of the matrix."""
        ranks = range(len(pieces))
        self.own = [matrix for matrix, owner in owned if owner == rank]
        sent = [[pieces[rank][m.name] for m, owner in owned if owner == to and m.name in pieces[rank]] for to in ranks]
        coming = [[pieces[r][m.name] for m in self.own if m.name in pieces[r]] for r in ranks]
        self.sent, self.coming = list(chain(*sent)), list(chain(*coming))
        self._counts = tuple([sum(p.length for p in group) for group in groups] for groups in (sent, coming))

    def run(
        self, empty: Tensor, read: Callable[[Piece], Tensor], make: Callable[[Tensor, Matrix], Tensor]
    ) -> Iterable[tuple[Piece, Tensor]]:
        """`make` of every matrix, from what `read` gives for pieces; collective. Returns this rank's pieces of it.

        `empty` is a tensor of no elements with the device and dtype of what is exchanged.
        """
        sent_counts, coming_counts = self._counts
        mine = torch.cat([empty, *(read(piece) for piece in self.sent)])
        others = empty.new_empty(sum(coming_counts))
        dist.all_to_all_single(others, mine, coming_counts, sent_counts)
        arrived = list(zip(self.coming, others.split([piece.length for piece in self.coming]), strict=True))
        for matrix in self.own:
            parts = [(piece, part) for piece, part in arrived if piece.matrix == matrix.name]
            whole = torch.cat([part for _, part in sorted(parts, key=lambda pair: pair[0].start)])
            made = make(whole, matrix)
            for piece, part in parts:
                part.copy_(made[piece.start : piece.start + piece.length])
        dist.all_to_all_single(mine, others, sent_counts, coming_counts)
        return zip(self.sent, mine.split([piece.length for piece in self.sent]), strict=True)


class Parts:
    """What is in one flat tensor: matrices that this rank has whole, and those that it shares with others."""

    def __init__(self, matrices: Sequence[Matrix], pieces: Sequence[Mapping[str, Piece]], rank: int) -> None:
        """`pieces` are those of each rank, by the name of the matrix; they must be the same on every rank."""
        for matrix in matrices:
            held = sorted((p[matrix.name].start, p[matrix.name].length) for p in pieces if matrix.name in p)
            ends = [0, *(start + length for start, length in held)]
            whole = ends[:-1] == [start for start, _ in held] and ends[-1] == matrix.numel
            assert whole, f"ranks hold {held} of the {matrix.numel} elements of {matrix.name}"
        alone = [m for m in matrices if any(m.name in p and p[m.name].length == m.numel for p in pieces)]
        self.whole = [(m, pieces[rank][m.name]) for m in alone if m.name in pieces[rank]]
        spread = owners([m for m in matrices if m not in alone], pieces)
        self.rounds = [Round(owned, pieces, rank) for owned in rounds(spread, len(pieces))]


def owners(matrices: Sequence[Matrix], pieces: Sequence[Mapping[str, Piece]]) -> list[tuple[Matrix, int]]:
    """Each matrix with a rank that holds much of it; of these the one with the least to do so far."""
    work = [0] * len(pieces)
    found = []
    for matrix in matrices:
        held = [p[matrix.name].length if matrix.name in p else 0 for p in pieces]
        owner = min((r for r in range(len(pieces)) if 2 * held[r] >= max(held)), key=lambda r: work[r])
        work[owner] += matrix.products
        found.append((matrix, owner))
    return found


def rounds(owned: Sequence[tuple[Matrix, int]], world_size: int) -> list[list[tuple[Matrix, int]]]:
    """Cut where an owner would have more than ROUND elements at once."""
    cut: list[list[tuple[Matrix, int]]] = []
    elements = [0] * world_size
    for matrix, owner in owned:
        if not cut or (elements[owner] and elements[owner] + matrix.numel > ROUND):
            cut.append([])
            elements = [0] * world_size
        cut[-1].append((matrix, owner))
        elements[owner] += matrix.numel
    return cut


class Muon(torch.optim.Optimizer):
    """Groups with `matrices` are moved by Muon, those without by AdamW (fused)."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], dtype: torch.dtype) -> None:
        """`dtype` is what Newton-Schulz computes and ranks exchange. Parameters are whole until `take_pieces`."""
        super().__init__(groups, {"matrices": None, **defaults})
        self._dtype = dtype
        self._parts: dict[Tensor, Parts] = {}
        for group in self.param_groups:
            for parameter, matrix in zip(group["params"], group["matrices"] or (), strict=False):
                self._parts[parameter] = Parts([matrix], [{matrix.name: Piece(matrix.name, 0, matrix.numel, 0)}], 0)

    def take_pieces(self, flat: Sequence[Tensor], pieces: Sequence[Sequence[Sequence[Piece]]], rank: int) -> None:
        """Take ZeRO's flat tensors for the parameters from now on.

        Args:
            flat: all of them.
            pieces: for every rank and each of `flat`, the pieces of parameters in it.
            rank: of this process.
        """
        known = {m.name: m for group in self.param_groups for m in group["matrices"] or ()}
        self._parts, covered = {}, set()
        for number, tensor in enumerate(flat):
            held = [{piece.matrix: piece for piece in of_rank[number]} for of_rank in pieces]
            names = list(dict.fromkeys(name for of_rank in held for name in of_rank))
            if any(name in known for name in names):
                # KeyError: a flat tensor that holds both kinds.
                self._parts[tensor] = Parts([known[name] for name in names], held, rank)
                covered |= set(names)
        assert covered == known.keys(), f"ZeRO has no piece of {sorted(known.keys() - covered)}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; collective once parameters are in pieces."""
        assert closure is None
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moving:
                if not self.state[parameter]:
                    self.state[parameter].update(initial_state(parameter, group["moments"]))
            if group["matrices"] is None:
                self._adamw(moving, group)
            else:
                for parameter in moving:
                    self._muon(parameter, group)

    def _adamw(self, moving: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in moving]
        adamw(
            moving,
            [parameter.grad for parameter in moving if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, rate = self.state[parameter], group["momentum"]
        assert parameter.grad is not None
        weight, momentum, gradient = parameter.view(-1), state["momentum"].view(-1), parameter.grad.reshape(-1)
        state["step"] += 1
        momentum.lerp_(gradient, 1 - rate)
        weight.mul_(1 - group["lr"] * group["weight_decay"])

        def read(piece: Piece) -> Tensor:
            here = slice(piece.offset, piece.offset + piece.length)
            ahead = gradient[here].lerp(momentum[here], rate) if group["nesterov"] else momentum[here]
            return ahead.to(self._dtype)

        def make(whole: Tensor, matrix: Matrix) -> Tensor:
            return orthogonal_update(whole, matrix, group["steps"], group["update_rms"])

        def move(piece: Piece, update: Tensor) -> None:
            weight[piece.offset : piece.offset + piece.length].add_(update, alpha=-group["lr"])

        parts = self._parts[parameter]
        for matrix, piece in parts.whole:
            move(piece, make(read(piece), matrix))
        empty = gradient.new_empty(0, dtype=self._dtype)
        for turn in parts.rounds:
            for piece, update in turn.run(empty, read, make):
                move(piece, update)


def working_bytes(largest: int, shared: int, element: int) -> int:
    """Estimate the bytes that Muon takes while it moves, beside states and gradients.

    Args:
        largest: elements of the largest matrix.
        shared: elements of the matrices that ranks bring together.
        element: bytes of one in Newton-Schulz.
    """
    iteration = (math.ceil(4 / element) + 5) * element * largest
    return iteration + 3 * element * min(shared, max(ROUND, largest))
