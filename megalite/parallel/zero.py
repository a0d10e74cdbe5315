"""The one door to DeepSpeed: ZeRO 0 to 3 around the layers of one pipeline stage.

In: this rank's layers, its mesh, the DeepSpeed JSON.  Out: `backward` for one microbatch, `update` for one optimizer step, and
`pieces` (see pieces.py): what this rank owns of every parameter. The norm, clipping, the sum of tied gradients, checkpoints and the
tests all read pieces, so they are the same for every stage.

ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054. What DeepSpeed 0.19.8 needs to do this under a pipeline is in mends.py and, where it is a
matter of how it is called, below; docs/design/zero.md tells how it was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import deepspeed.comm.mori  # this one and the next two only so that ranks are forked with them: an engine imports them when it is built
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.utils.groups as zero_groups
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.comm.coalesced_collectives import all_to_all_quant_reduce
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import Tensor, nn

from megalite.config import suggest
from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.parallel import gradients, mends
from megalite.parallel.buckets import FlatBuckets, ShardedBuckets
from megalite.parallel.gather import Gathering, Limits
from megalite.parallel.later import Later
from megalite.parallel.pieces import Flat, Piece, Sharded
from megalite.parallel.settings import Settings
from megalite.parallel.sums import Exchange, MicrobatchSums, StepSums, Sums


def check(document: dict[str, Any]) -> None:
    """Raises UserError for a key or value of zero_optimization that DeepSpeed does not know, or that this machine cannot do."""
    zero = document.get("zero_optimization", {})
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
        found = []
        for detail in error.errors():
            key, said = str(detail["loc"][0]), detail["msg"][0].lower() + detail["msg"][1:]
            wrong = f"= {detail['input']!r}: {said}"
            if detail["type"] == "extra_forbidden":
                wrong = f"is unknown to DeepSpeed{suggest(key, known)}"
            found.append(f"zero_optimization.{key} {wrong}")
        raise UserError("; ".join(found)) from None
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
    if quantized and get_accelerator().device_name() == "cpu":  # type: ignore[union-attr]
        raise UserError(f"zero_optimization.{quantized[0]} needs a GPU, for which DeepSpeed compiles its quantizer; take it out")


def _exchange(inner: Any) -> Exchange | None:
    """ZeRO++'s quantized reduction, where the JSON asks for it and there is more than one node."""
    accelerator: Any = get_accelerator()
    groups = getattr(inner, "all2all_process_group", None)  # of stage 3 alone
    if groups is None or dist.get_world_size() <= accelerator.device_count():
        return None
    return lambda gradient: all_to_all_quant_reduce([gradient], groups)[0]


class _Axes:
    """What DeepSpeed asks of a model-parallel unit. It is told of data parallelism alone; the other axes are ours."""

    def __init__(self, mesh: Mesh, group: dist.ProcessGroup) -> None:
        self._data, self._alone = group, mesh.group("alone")

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def _rank(self) -> int:
        return 0

    def _size(self) -> int:
        return 1

    def _group(self) -> dist.ProcessGroup:
        return self._alone

    get_model_parallel_rank = get_tensor_model_parallel_rank = get_pipeline_model_parallel_rank = _rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size = get_pipeline_model_parallel_world_size = _size
    get_model_parallel_group = get_tensor_model_parallel_group = get_pipeline_model_parallel_group = _group


def shard(layer: nn.Module, *, configuration: dict[str, Any], mesh: Mesh, dtype: torch.dtype) -> None:
    """Replace the parameters of a layer that was just built by this rank's ZeRO-3 partition of them, in place."""
    group = mesh.group("copies")
    deepspeed.zero.Init(
        module=layer,
        data_parallel_group=group,
        zero_param_parallel_group=zero_groups._get_zero_param_intra_parallel_group(),
        config_dict_or_path=configuration,
        dtype=dtype,
        mpu=_Axes(mesh, group),
    )


class Zero:
    """A DeepSpeed engine around one stage. `forward` and `backward` per microbatch, and one `update` per step.

    `before_update(pieces)` may be set to look at the final gradients: reduced, tied copies summed, not yet clipped.
    """

    def __init__(
        self,
        stage: nn.Module,
        *,
        mesh: Mesh,
        settings: Settings,
        optimizer: torch.optim.Optimizer,
        tied: set[str],
        sequence_parallel: bool = False,
        later: Sequence[nn.Module] | None = None,
    ) -> None:
        """`stage.in_order()` lists its layers; `later`: those whose weights' gradients are put off, if passes are halved (later.py)."""
        configuration, zero_stage = settings.configuration, settings.stage
        self.mesh, self.forward = mesh, stage
        self.partial = sequence_parallel  # gradients of what tensor-parallel ranks hold as copies come in parts
        group = mesh.group("alone" if zero_stage == 0 else "copies")
        self.engine, *_ = deepspeed.initialize(
            model=stage, optimizer=optimizer, mpu=_Axes(mesh, group), config=configuration, dist_init_required=False
        )
        if not (configuration.get("wall_clock_breakdown") or configuration.get("memory_breakdown")):  # which want to see them
            mends.leave_forwards_alone(self.engine)
        self.inner: Any = self.engine.optimizer
        self.sharded = zero_stage == 3
        self.before_update: Callable[[list[Piece]], None] | None = None
        self.owned = (Sharded if self.sharded else Flat)(
            self.inner, mesh=mesh, tied=tied, replicated=zero_stage == 0, folder=settings.folder
        )
        self.sums = self._sums(settings)
        self.later = None if later is None else Later(later, self.sums)
        cuts = [parameter.cut for parameter in stage.parameters()]  # type: ignore[attr-defined]
        self.uneven = mesh.tp > 1 and any(part % mesh.tp for cut in cuts for part in cut.parts)
        self.scale = gradients.LossScale() if configuration["fp16"]["enabled"] else None
        self.overflow = False
        self.refuse: Callable[[float], bool] | None = None  # norm -> whether to leave this update out; asked on every rank
        self._norm, self._clip = 0.0, 0.0
        self._beside, self._summed = torch.empty(0), []  # what `update` hands to `_finish`, and what comes back
        self._step, self.inner.step = self.inner.step, self._finish
        # The norm is taken over the whole mesh, once, by `_finish`; DeepSpeed would take one per parameter group and hang where
        # stages differ in their groups.
        # It drops a step that overflows, and so those that `_finish` says: stages 1 and 2 check if told to, stage 3 outside fp16 only
        # whether the norm is finite (offloaded gradients have a norm of their own).
        self.inner.get_grad_norm_direct = lambda *_, **__: torch.full((), math.inf if self.overflow else 0.0, device=mesh.device)
        self.inner.complete_grad_norm_calculation_for_cpu_offload = self.inner.get_grad_norm_direct
        self.inner.check_overflow = lambda *_, **__: setattr(self.inner, "overflow", self.overflow)
        self.inner.check_grad_overflow = True
        self.gathering: Gathering | None = None
        if self.sharded:
            self.inner.parameter_offload.fwd_pre_hook.remove()
            zero: Any = self.engine
            limits = Limits(min(zero.zero_max_live_parameters(), zero.zero_max_reuse_distance()), zero.zero_prefetch_bucket_size())
            self.gathering = Gathering(
                stage.in_order(),  # type: ignore[operator]
                self.inner.parameter_offload,
                limits,
                device=mesh.device,
                quantized=zero.zero_quantized_weights(),
            )

    def _sums(self, settings: Settings) -> Sums:
        group, device, inner = self.mesh.group("copies"), self.mesh.device, self.inner
        num_ranks, exchange = dist.get_world_size(group), _exchange(inner)
        if self.sharded:
            buckets = ShardedBuckets(inner, num_ranks=num_ranks, most=1 if exchange else settings.bucket)
        else:
            buckets = FlatBuckets(inner)
        alone = num_ranks == 1 and not any(bucket.host is not None for bucket in buckets.every)  # nothing to send, and nowhere else to go
        if settings.reduce == "step" or alone:
            return StepSums(buckets, group, device=device, whole=settings.stage == 0)
        return MicrobatchSums(
            buckets,
            group,
            device=device,
            dtype=settings.dtype,
            overlap=settings.configuration["zero_optimization"].get("overlap_comm") is not False,
            divide=settings.divide or num_ranks,
            exchange=exchange,
        )

    @contextmanager
    def step(self, num_microbatches: int) -> Iterator[None]:
        """Around all microbatches of one optimizer step."""
        self.sums.begin(num_microbatches)
        yield
        if self.gathering:
            self.gathering.end_step()

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Go back from a scalar, or from what a stage put out and the gradient that it received of it."""
        if self.later:
            with self.later.hold():
                output.backward(gradient)
        else:
            output.backward(gradient)
            self.sums.end_pass()

    def aside(self) -> AbstractContextManager[None]:
        """Around forwards that are no training step (validation)."""
        return self.gathering.aside() if self.gathering else nullcontext()

    def update(self, *, lr: float, clip: float, beside: Tensor) -> tuple[float, list[float]]:
        """Finish the reduction, clip to `clip` (0: not at all), take one AdamW step.

        Returns the gradient norm of the whole mesh and the sum of every rank's `beside` (n,). The device may still be at the update.
        """
        for group in self.inner.optimizer.param_groups:
            group["lr"] = lr
        self._clip, self._beside = clip, beside
        self.engine.step()
        return self._norm, self._summed

    @torch.no_grad()
    def _finish(self) -> None:
        """Before DeepSpeed's optimizer: the sums, also those over other ranks, unscale, norm, clip, then the step, or none on overflow."""
        self.sums.reduce()
        pieces = self.pieces()
        gradients.complete(pieces, self.mesh, partial=self.partial, uneven=self.uneven)
        if self.scale:
            gradients.multiply(pieces, 1 / self.scale.value)
        if self.before_update is not None:
            self.before_update(pieces)
        self._norm, self._summed = gradients.norm(pieces, self.mesh, beside=self._beside)
        overflow = self.scale is not None and not math.isfinite(self._norm)
        self.overflow = overflow or (self.refuse is not None and self.refuse(self._norm))
        if self._clip and self._clip < self._norm < math.inf:
            gradients.multiply(pieces, self._clip / (self._norm + 1e-6))
        self._step()
        if self.scale:
            self.scale.update(overflow=overflow)

    def pieces(self) -> list[Piece]:
        """What this rank owns, parameter by parameter, in a fixed order. Padding is left out."""
        return self.owned.pieces()

    def restore(self, steps: int) -> None:
        """After pieces were written from outside (a checkpoint): renew the weights the model computes with; `steps` were taken."""
        self.owned.restore(steps)
