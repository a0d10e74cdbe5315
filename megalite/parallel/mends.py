"""What DeepSpeed 0.19.8 needs changed to run ZeRO under a pipeline, each change with its reason and the version it was seen in.

In: DeepSpeed's modules and objects, changed in place.  A test of tests/ranks/test_zero_mends.py (or the one named) fails when a change is
no longer needed. How the facts were found: docs/design/zero.md.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.runtime.compiler as compiler
import deepspeed.runtime.zero.linear as zero_linear
import deepspeed.utils.groups as zero_groups
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megalite.mesh import Mesh


@contextmanager
def _compiling_nothing() -> Iterator[None]:
    """DeepSpeed 0.19.8 decorates Muon's arithmetic with torch.compile, which imports the whole of torch's compiler: a fifth of the time
    until a rank knows what it needs. Muon is not offered here (optim.py).
    """
    plain, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        yield
    finally:
        compiler.compile = plain


with _compiling_nothing():
    # imported when an engine is built; here, so that ranks are forked with them
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.muon.original_muon


def start() -> None:
    """Let DeepSpeed join the running torch.distributed world.

    On a CPU DeepSpeed 0.19.8 would first compile a shared-memory all-reduce for inference, which needs a compiler and half a minute and
    is never called here.
    """
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    add_biases_out_of_place()
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        # 0.19.8 takes "oneDNN has no fast fp16 here" for "torch cannot compute in fp16"; slow will do for proofs and trials
        accelerator.is_fp16_supported = lambda: True
    read_architectures_with_letters()
    # ranges for NVIDIA's profiler around every function of ZeRO, thousands in a step
    importlib.import_module("deepspeed.utils.nvtx").enable_nvtx = False  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def read_architectures_with_letters() -> None:
    """To compile its quantizer, DeepSpeed 0.19.8 reads TORCH_CUDA_ARCH_LIST as numbers, and fails on the 9.0a of images for Hopper."""
    builder = importlib.import_module("deepspeed.ops.op_builder.builder").CUDAOpBuilder
    plain = builder.compute_capability_args

    def read(self: Any, *args: Any) -> Any:
        self._jit_arch_list = re.sub(r"(\d)[a-z]", r"\1", self._jit_arch_list or "") or None
        return plain(self, *args)

    builder.compute_capability_args = read


def leave_forwards_alone(engine: Any) -> None:
    """Around every forward pass of the whole module, DeepSpeed 0.19.8 waits for the GPU, from the third step on, to measure throughput, and
    gives every module a dictionary of its own that gathers weights of other modules. metrics.py measures, and gather.py gathers.
    """
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()


def add_biases_out_of_place() -> None:
    """Under ZeRO-3, DeepSpeed's own linear does the product and then adds the bias to it in place.

    Selective recomputation keeps the product; with DeepSpeed 0.19.8 the bias is in it already when it is added again.
    """

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return input.matmul(weight.t())
        return torch.addmm(bias, input.flatten(0, -2), weight.t()).view(*input.shape[:-1], -1)

    zero_linear.LinearFunctionForZeroStage3.forward = staticmethod(forward)


def open_secondary_groups(mesh: Mesh, size: int) -> None:
    """The groups of ZeRO++'s hierarchical partitioning: `size` neighbours among the ranks that hold the same weights.

    DeepSpeed 0.19.8 takes neighbours among all ranks of the world, which under tensor or pipeline parallelism hold other weights.
    """
    for line in mesh.lines("dp", "cp"):
        for first in range(0, len(line), size):
            group = dist.new_group(line[first : first + size])
            if mesh.rank in line[first : first + size]:
                zero_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group
