"""The processes that share a run: one, or as many as torchrun started. Each takes its rows of every step.

Gradients are summed over the processes, so a step is the same however many there are. The first one writes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Workers:
    """This process's place among them."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes, in one message."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # (num_parameters,)
        distributed.all_reduce(flat)
        for gradient, piece in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Join those of torchrun where it started this process; else be the only one."""
    has_cuda = torch.cuda.is_available()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers(0, 1, torch.device("cuda" if has_cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if has_cuda else "gloo")
    try:
        yield Workers(distributed.get_rank(), count, device)
    finally:
        distributed.destroy_process_group()
