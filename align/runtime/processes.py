"""What the processes of a distributed run tell each other, beside the loss: first weights, mean gradients, and a wish to stop."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def same_on_all(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace the values of `tensors` by those of the first process, in place."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in tensors:
        dist.broadcast(tensor.data, group_src=0, group=group)


def average_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each parameter's gradient by its mean over processes, in place: what DistributedDataParallel does after backward."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for parameter in parameters:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= dist.get_world_size(group)


def any_rank(flag: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether `flag` is true on any process; all processes of the group must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value)
