"""Tensors that live in files: what an optimizer keeps is on a local disk, and the kernel brings in the pages that a step touches.

In: a folder on a fast local disk (NVMe).  Out: CPU tensors over mapped files, which everything else handles like any other: the update,
the norm, checkpoints. A file's name is taken away as soon as it is mapped, so nothing is left behind however the run ends.

DeepSpeed's own NVMe offload hides master weights, moments and gradients inside a swapper, group by group; the norm of the whole mesh,
tied weights and checkpoints that belong to the model all need them where they can be read.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from megalite.errors import UserError


def zeros_like(tensor: Tensor, folder: Path) -> Tensor:
    """A tensor of zeros in a file of `folder`. Raises UserError where the folder cannot be written or the disk is too small."""
    size = max(1, tensor.numel() * tensor.element_size())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix="megalite-")
    except OSError as error:
        raise UserError(f"offload_optimizer.nvme_path = {folder} cannot be written ({error.strerror}); choose another folder") from None
    try:
        os.posix_fallocate(handle, 0, size)  # now, and not in the middle of a step, when a full disk would be a bus error
        found = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise UserError(
            f"offload_optimizer.nvme_path = {folder} has no room for {size / 2**30:.2f} GiB more ({error.strerror}); free some or use "
            "more data-parallel ranks"
        ) from None
    finally:
        os.close(handle)
        Path(name).unlink()
    return found.view(tensor.shape)


def move(tensor: Tensor, folder: Path) -> None:
    """Put a tensor's values into a file, in place: who holds the tensor sees the file from now on."""
    found = zeros_like(tensor, folder)
    found.copy_(tensor)
    tensor.data = found
