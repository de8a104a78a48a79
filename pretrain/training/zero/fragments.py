"""What a rank holds under ZeRO, in a form that knows no rank and no stage: 1-D ranges of named parameters.

Kept for each parameter are the fp32 master weight and the optimizer's moments: AdamW's two, or Muon's momentum. A
checkpoint is these ranges from all ranks; loading copies the intersections, whatever the number of ranks or the stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.training.zero.engine import Engine


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


def fragments(engine: "Engine") -> Iterator[Fragment]:
    """Everything that this rank holds (without sharding: everything there is)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    parameter: Any  # DeepSpeed hangs what it knows of a parameter on the parameter
    for name, parameter in engine.module.named_parameters():
        for kind in ("weight", *engine.moments[name]):
            state_key = None if kind == "weight" else kind
            if engine.stage == 0:
                state = engine.torch_optimizer.state[parameter]
                whole = parameter.detach() if state_key is None else state[state_key]
                yield Fragment(kind, name, 0, whole.view(-1))
            elif engine.stage < 3:
                if (mapping := parameter._hp_mapping) is not None:
                    start = mapping.lp_fragment_address.start
                    yield Fragment(kind, name, start, mapping.get_hp_fragment(state_key).detach())
            else:
                start = rank * parameter.ds_tensor.ds_numel
                # The last ranks' pieces end in padding, or consist of it.
                if (held := min(parameter.ds_numel - start, parameter.ds_tensor.ds_numel)) > 0:
                    piece, _ = engine.zero._get_fp32_opt_state_partition(
                        parameter, release_swap_buffers=False, optim_state_key=state_key
                    )
                    yield Fragment(kind, name, start, piece.detach()[:held])


def fragments_to_save(engine: "Engine") -> Iterator[Fragment]:
    """This rank's part of a checkpoint: without sharding the ranks take turns, so that each value is written once."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for number, fragment in enumerate(fragments(engine)):
        if engine.stage > 0 or number % world_size == rank:
            yield fragment
