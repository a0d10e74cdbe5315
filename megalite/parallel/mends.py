"""What DeepSpeed 0.19.8 needs changed to run ZeRO under a pipeline, each change with its reason and the version it was seen in.

In: DeepSpeed's modules and objects, changed in place.  A test of tests/ranks/test_zero_mends.py (or the one named) fails when a change is
no longer needed. How the facts were found: docs/design/zero.md.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

import deepspeed
import deepspeed.runtime.zero.linear as zero_linear
import deepspeed.runtime.zero.partition_parameters as zero_partition
import deepspeed.runtime.zero.partitioned_param_coordinator as zero_coordinator
import deepspeed.runtime.zero.stage3 as zero_stage3
import deepspeed.utils.groups as zero_groups
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megalite.mesh import Mesh
from megalite.parallel.gather import PRIVATE


def start() -> None:
    """Let DeepSpeed join the running torch.distributed world.

    On a CPU DeepSpeed 0.19.8 would first compile a shared-memory all-reduce for inference, which needs a compiler and half a minute and
    is never called here.
    """
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    add_biases_out_of_place()
    bound_live_parameters()
    let_go_of_what_was_gathered()
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        # 0.19.8 takes "oneDNN has no fast fp16 here" for "torch cannot compute in fp16"; slow will do for proofs and trials
        accelerator.is_fp16_supported = lambda: True
        # it starts a program to count NUMA nodes, whenever a bucket of gradients is full
        accelerator.device_count = functools.cache(accelerator.device_count)
    read_architectures_with_letters()
    # ranges for NVIDIA's profiler around every function of ZeRO, thousands in a step
    importlib.import_module("deepspeed.utils.nvtx").enable_nvtx = False  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def scope_trace_checks(group: dist.ProcessGroup) -> None:
    """ZeRO-3 checks that every rank of the WORLD walks the same modules; under a pipeline only the ranks of a stage do.

    Unmended (DeepSpeed 0.19.8), the first forward hangs until the collective's timeout.
    """

    def same_on_this_stage(ints: list[int]) -> None:
        seen: list[list[int] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(seen, list(ints), group=group)
        if any(other != seen[0] for other in seen):
            raise RuntimeError("the ranks of this stage walk different modules")

    for module in (zero_coordinator, zero_stage3, zero_partition):
        module.assert_ints_same_as_other_ranks = same_on_this_stage  # type: ignore[attr-defined]


def bound_live_parameters() -> None:
    """Let `stage3_max_live_parameters` bound what stays gathered, and not only what is fetched ahead.

    DeepSpeed 0.19.8 keeps a weight that its prefetcher saw to be needed again, however many it keeps; the trace of a whole step
    needs each again and again, so all of a stage stayed gathered whatever the limit. Above it, a module now frees its own at once.

    Below it the decision is DeepSpeed's: what is needed again within `stage3_max_reuse_distance` stays. But DeepSpeed reads the trace up to
    that distance for every module of it, also when nothing is left to decide; the trace of a whole step being long, that was two fifths of
    a small model's first three steps. Here the reading ends with the last weight that might be freed.
    """
    coordinator = zero_coordinator.PartitionedParameterCoordinator
    decide = getattr(coordinator, f"{PRIVATE}params_to_release")
    if hasattr(decide, "instead_of"):
        return

    def bounded(self: Any, module: nn.Module, step_id: int) -> set[int]:
        own: list[Any] = list(zero_coordinator.iter_params(module))
        free = {parameter.ds_id: parameter for parameter in own if not parameter.ds_persist}
        if free and getattr(self, f"{PRIVATE}n_available_params") <= getattr(self, f"{PRIVATE}max_n_available_params"):
            return set(_not_needed_soon(self, module, step_id))
        return set(free)

    @functools.cache  # as DeepSpeed's own: the trace does not change
    def _not_needed_soon(self: Any, module: nn.Module, step_id: int) -> frozenset[int]:
        fetched, order, distance = (
            getattr(self, f"{PRIVATE}{name}")
            for name in ("most_recent_step_id_param_fetched_for", "submodule_order", "max_reuse_dist_in_numel")
        )
        own: list[Any] = list(zero_coordinator.iter_params(module))
        free = {parameter.ds_id for parameter in own if not parameter.ds_persist and fetched[parameter] <= step_id}
        for at in range(step_id, len(order)):
            if not free or distance <= 0:
                break
            used: list[Any] = list(zero_coordinator.iter_params(order[at]))
            free -= {parameter.ds_id for parameter in used}
            distance -= sum(parameter.ds_numel for parameter in used)
        return frozenset(free)

    bounded.instead_of = decide  # type: ignore[attr-defined]
    setattr(coordinator, f"{PRIVATE}params_to_release", bounded)


def read_architectures_with_letters() -> None:
    """To compile its quantizer, DeepSpeed 0.19.8 reads TORCH_CUDA_ARCH_LIST as numbers, and fails on the 9.0a of images for Hopper."""
    builder = importlib.import_module("deepspeed.ops.op_builder.builder").CUDAOpBuilder
    plain = builder.compute_capability_args

    def read(self: Any, *args: Any) -> Any:
        self._jit_arch_list = re.sub(r"(\d)[a-z]", r"\1", self._jit_arch_list or "") or None
        return plain(self, *args)

    builder.compute_capability_args = read


def let_the_host_run_ahead(optimizer: Any) -> None:
    """After every backward pass DeepSpeed 0.19.8 waits until the GPU has reduced all gradients, so that the GPU has nothing to do until the
    host has called the next pass. Here the stream that computes waits, and the host does not; it must where gradients go to the host.
    """
    if not torch.cuda.is_available() or getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False):
        return
    accelerator: Any = get_accelerator()
    finish, wait = optimizer.independent_gradient_partition_epilogue, accelerator.synchronize
    stream = getattr(optimizer, "reduce_and_partition_stream", None) or optimizer.reduction_stream

    class Stream(torch.cuda.Stream):
        def synchronize(self) -> None:
            torch.cuda.current_stream().wait_stream(self)

    patient = Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)
    for name in ("reduce_and_partition_stream", "reduction_stream"):
        if hasattr(optimizer, name):
            setattr(optimizer, name, patient)

    def finish_in_order(*args: Any, **kwargs: Any) -> Any:
        accelerator.synchronize = patient.synchronize
        try:
            return finish(*args, **kwargs)
        finally:
            accelerator.synchronize = wait

    optimizer.independent_gradient_partition_epilogue = finish_in_order


def keep_gradients_of_one_rank(optimizer: Any) -> None:
    """Gradients of weights that no other rank holds are whole, and are added to their sums as they come.

    DeepSpeed 0.19.8 copies them into a bucket and together, divides them by 1, scatters them over one rank and copies them into fp32
    before it adds them: an eighth of the step of a model on one GPU.
    """
    if optimizer.offload_optimizer:
        return
    sums = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition

    def add(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        sums[parameter.ds_id].add_(parameter.grad.view(-1))  # type: ignore[attr-defined]
        parameter.grad = None

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = torch.no_grad()(add)


def let_go_of_what_was_gathered() -> None:
    """DeepSpeed 0.19.8 gathers several weights into one buffer, copies them out of it when the first is needed, and keeps the buffer until
    all have been needed: what was fetched ahead was there twice.
    """
    handle = zero_partition.AllGatherCoalescedHandle
    plain = handle.wait
    if hasattr(plain, "instead_of"):
        return

    def wait(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.partitions = []

    wait.instead_of = plain  # type: ignore[attr-defined]
    handle.wait = wait  # type: ignore[method-assign]


def add_biases_out_of_place() -> None:
    """Under ZeRO-3, DeepSpeed's own linear does the product and then adds the bias to it in place.

    Selective recomputation keeps the product; with DeepSpeed 0.19.8 the bias was in it already when it was added again, and nothing
    complained.
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
