"""What a worker knows of the others: its rank, their number, and sums over all. Alone, it is rank 0 of 1."""

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def collective_device() -> torch.device:
    """Where tensors must lie that workers exchange."""
    return torch.device("cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu")


def sum_over_workers(*values: float, device: torch.device) -> list[float]:
    """Each value summed over all workers; every worker must call this at the same point."""
    if world_size() == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()
