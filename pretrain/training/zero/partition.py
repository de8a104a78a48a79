"""What one rank holds of weights, moments and gradients under ZeRO, and where: a class for each way of laying it out.

The only file that reads DeepSpeed's private attributes. What it hands out are fragments, ranges of named parameters
that know no rank and no stage: a checkpoint is the fragments of all ranks, and loading copies the intersections,
whatever the number of ranks or the stage. Kept of each parameter are the fp32 master weight and the optimizer's
moments: AdamW's two, or Muon's momentum.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.zero.muon import initial_state


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(tensor)) of one flattened parameter, as live memory of this rank."""

    kind: str
    """`weight`, or the name of a moment."""
    parameter: str
    start: int
    tensor: Tensor
    """float32 [n], a view: writing to it changes the run."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.tensor.numel()


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also of one that ZeRO has spread over ranks, leaving an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class StatePartition(ABC):
    """One rank's part of a model and its optimizer."""

    def __init__(
        self, module: nn.Module, optimizer: Any, moments: Mapping[str, Sequence[str]], *, offloaded: bool
    ) -> None:
        """`optimizer` is DeepSpeed's; `moments` names, for each parameter, what the optimizer keeps of its elements."""
        # Any: DeepSpeed hangs what it knows of a parameter on the parameter.
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._optimizer, self._moments, self._offloaded = optimizer, moments, offloaded
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that does the arithmetic, inside ZeRO's."""
        return self._optimizer.optimizer

    @abstractmethod
    def flat_parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The tensors that the torch optimizer's state is keyed by, each with its group."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Make the weights that the model computes with those of the fp32 master, on all ranks; collective."""

    @abstractmethod
    def _held(self, parameter: Any, moment: str | None) -> tuple[int, Tensor] | None:
        """Start of this rank's part of a parameter, and its weights or a moment of them; None without a part."""

    @abstractmethod
    def _gradients(self) -> dict[str, Tensor]:
        """See `own_gradients`; where they are not offloaded."""

    def fragments(self) -> Iterator[Fragment]:
        """Everything that this rank holds (without sharding: everything there is)."""
        for name, parameter in self._parameters.items():
            for kind in ("weight", *self._moments[name]):
                if (held := self._held(parameter, None if kind == "weight" else kind)) is not None:
                    yield Fragment(kind, name, *held)

    def weights(self) -> Iterator[Fragment]:
        """The fp32 weights that this rank holds."""
        return (fragment for fragment in self.fragments() if fragment.kind == "weight")

    def own(self, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
        """Return the fragments, of these that it holds, that this rank answers for: over all ranks, each value once."""
        return iter(fragments)

    def placed_weights(self) -> Iterator[tuple[Fragment, int, int]]:
        """The fp32 weights that this rank holds, each with the number of its flat parameter and its offset there."""
        flat = [tensor for _, tensor in self.flat_parameters()]
        for fragment in self.weights():
            yield fragment, *_place_in(fragment.tensor, flat)

    def own_gradients(self) -> dict[str, Tensor]:
        """The gradient of what this rank holds of each parameter, flattened, by name; between backward and step.

        It is the mean over ranks, as the engine's own norm sees it: not clipped yet.
        """
        if not self._offloaded:
            return self._gradients()
        # They are on the host in fp32, laid out as the master weights.
        flat: list[Any] = [tensor for _, tensor in self.flat_parameters()]
        return {
            fragment.parameter: flat[number].grad.view(-1)[offset : offset + fragment.tensor.numel()]
            for fragment, number, offset in self.placed_weights()
        }

    def start_moments(self, zeros_like: Callable[[Tensor], Tensor]) -> None:
        """Give the optimizer its state before the first step, in memory that `zeros_like` takes."""
        for group, parameter in self.flat_parameters():
            self.torch_optimizer.state[parameter].update(initial_state(parameter, group["moments"], zeros_like))

    def movable_weights(self) -> Iterable[Tensor]:
        """Return the fp32 weights whose memory may be replaced: none where DeepSpeed keeps views of it."""
        return ()


class Replicated(StatePartition):
    """Every rank holds everything, in torch's own tensors (stage 0)."""

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that does the arithmetic: there is no other."""
        return self._optimizer

    def flat_parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The parameters themselves."""
        return [(group, p) for group in self.torch_optimizer.param_groups for p in group["params"]]

    def refresh_weights(self) -> None:
        """Do nothing: the model computes with the master."""

    def _held(self, parameter: Any, moment: str | None) -> tuple[int, Tensor]:
        whole = parameter.detach() if moment is None else self.torch_optimizer.state[parameter][moment]
        return 0, whole.view(-1)

    def own(self, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
        """Every `world_size`-th fragment: the ranks take turns."""
        return (fragment for n, fragment in enumerate(fragments) if n % self.world_size == self.rank)

    def _gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad.view(-1) for name, parameter in self._parameters.items()}


class GroupPartition(StatePartition):
    """Each group of parameters lies end to end, and a rank holds a range of it (stages 1 and 2)."""

    def flat_parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Range of each group that this rank holds."""
        return list(
            zip(self.torch_optimizer.param_groups, self._optimizer.single_partition_of_fp32_groups, strict=True)
        )

    def start_moments(self, zeros_like: Callable[[Tensor], Tensor]) -> None:
        """Give the optimizer its state, and DeepSpeed views of it."""
        super().start_moments(zeros_like)
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def refresh_weights(self) -> None:
        """Copy this rank's range, and gather those of the others."""
        self._optimizer.update_lp_params()

    def _held(self, parameter: Any, moment: str | None) -> tuple[int, Tensor] | None:
        if (mapping := parameter._hp_mapping) is None:
            return None
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment).detach()

    def _gradients(self) -> dict[str, Tensor]:
        at = {number: _by_offset(gradients) for number, gradients in self._optimizer.averaged_gradients.items()}
        found = {}
        for name, parameter in self._parameters.items():
            if (mapping := parameter._hp_mapping) is not None:
                address = mapping.get_hp_fragment_address()
                found[name] = at[mapping.param_group_index][address.start].view(-1)[: address.numel]
        return found


class ParameterPartition(StatePartition):
    """A rank holds an equal range of every parameter; the last ranks' ranges end in padding (stage 3)."""

    def flat_parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Ranges of many parameters that this rank holds, end to end."""
        groups, group_of = self.torch_optimizer.param_groups, self._optimizer.sub_group_to_group_id
        return [(groups[group_of[n]], tensor) for n, tensor in enumerate(self._optimizer.fp32_partitioned_groups_flat)]

    def movable_weights(self) -> Iterable[Tensor]:
        """Return all that this rank holds."""
        return [tensor for _, tensor in self.flat_parameters()]

    def refresh_weights(self) -> None:
        """Copy this rank's ranges, and gather the parameters that stay whole on every rank."""
        zero = self._optimizer
        for index, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[index].data.copy_(master.data)
            zero._unflatten_partitioned_parameters(index)
        if persistent := zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _held(self, parameter: Any, moment: str | None) -> tuple[int, Tensor] | None:
        start, held = self._range(parameter)
        if held == 0:
            return None
        piece, _ = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=moment
        )
        return start, piece.detach()[:held]

    def _gradients(self) -> dict[str, Tensor]:
        averaged = self._optimizer.averaged_gradients
        of_parameter = {
            id(parameter): gradient
            for number, group in enumerate(self._optimizer.fp16_groups)
            for parameter, gradient in zip(group, averaged[number], strict=True)
        }
        return {name: of_parameter[id(p)][: self._range(p)[1]] for name, p in self._parameters.items()}

    def _range(self, parameter: Any) -> tuple[int, int]:
        """Start of this rank's range of a parameter, and its number of elements without padding."""
        size = parameter.ds_tensor.ds_numel
        start = self.rank * size
        return start, max(0, min(parameter.ds_numel - start, size))


PARTITIONS: tuple[type[StatePartition], ...] = (Replicated, GroupPartition, GroupPartition, ParameterPartition)
"""How ZeRO lays things out, by stage."""


def _place_in(view: Tensor, flat: list[Tensor]) -> tuple[int, int]:
    """The number of the flat tensor that a view of one begins in, and where."""
    for number, tensor in enumerate(flat):
        offset = int(view.storage_offset() - tensor.storage_offset())
        shared = view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if shared and 0 <= offset < tensor.numel():
            return number, offset
    raise AssertionError("a fragment of a parameter is in none of ZeRO's flat tensors")


def _by_offset(gradients: list[Tensor]) -> dict[int, Tensor]:
    """The gradients of a group, by where they begin in the rank's range of it."""
    offset, found = 0, {}
    for gradient in gradients:
        found[offset] = gradient
        offset += gradient.numel()
    return found
