"""Whether an NVIDIA card can serve, and why not: one line each, with what would help.

Pure functions of what CUDA and the driver say, so that they are tested without either.
"""

import re

import torch

from app.runner.base import TierUnavailable

BFLOAT16_CAPABILITY = (8, 0)
"""Of the first cards with bfloat16 arithmetic (Ampere)."""
_GIB = 2**30


def find_card() -> torch.device:
    """The first card. Raises TierUnavailable."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise no_card(str(error), build=torch.version.cuda) from error
    return torch.device("cuda", 0)


def no_card(message: str, *, build: str | None) -> TierUnavailable:
    """Why there is no card: CUDA's `message`, and the CUDA version that torch was built for."""
    if build is None:
        return TierUnavailable("this torch has no CUDA", remedy="a CUDA build of torch and an NVIDIA driver")
    if found := re.search(r"driver on your system is too old \(found version (\d+)\)", message):
        major, minor = divmod(int(found[1]) // 10, 100)
        return TierUnavailable(
            f"the NVIDIA driver knows CUDA {major}.{minor} and this torch is built for CUDA {build}",
            remedy="a newer driver, or a torch built for the driver's CUDA",
        )
    if "no NVIDIA driver" in message:
        return TierUnavailable(
            "no NVIDIA driver answers", remedy="install one; a container needs --gpus all or the like to see it"
        )
    if "No CUDA GPUs are available" in message:
        return TierUnavailable(
            "the NVIDIA driver shows no card to this process", remedy="look at CUDA_VISIBLE_DEVICES and at nvidia-smi"
        )
    line = (message.strip() or "it does not say why").splitlines()[0]
    return TierUnavailable(f"CUDA does not start: {line}", remedy="--device cpu")


def check_room(weight_bytes: int, *, free: int, total: int, card: str) -> None:
    """Raise TierUnavailable where the weights do not fit into what is free on the card, before anything is on it."""
    if weight_bytes <= free:
        return
    needed = f"the weights take {weight_bytes / _GIB:.1f} GiB and {card} has"
    if weight_bytes > total:
        raise TierUnavailable(f"{needed} {total / _GIB:.1f} GiB in all", remedy="a smaller model, or --device cpu")
    raise TierUnavailable(
        f"{needed} {free / _GIB:.1f} GiB free: other processes hold {(total - free) / _GIB:.1f} GiB",
        remedy="end them (nvidia-smi names them), or --device cpu",
    )
