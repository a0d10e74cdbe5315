"""The schedule: one optimizer step's microbatches through the stages, by torch.distributed.pipelining.

In: a `Zero` around this rank's layers, the microbatches.  Out: the losses on the last stage, gradients reduced or kept everywhere.
Every stage reads its own ids, labels and masks, so one tensor travels between stages: the hidden state. One stage is a pipeline of
one, by the same path.

GPipe: Huang et al. 2018, arXiv:1811.06965. 1F1B: Narayanan et al. 2019 (PipeDream), flushed as in Narayanan et al. 2021, arXiv:2104.04473.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from megalite.mesh import Mesh
from megalite.parallel.zero import Zero

Batch = dict[str, Tensor]
SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class _Stage(PipelineStage):
    """The seam between torch's schedule and DeepSpeed: backward goes through `Zero.backward`."""

    zero: Zero

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        output = bwd_kwargs["stage_output"]
        if self.is_last:
            scalar = output.sum()
        else:
            (hidden,) = output if isinstance(output, (tuple, list)) else (output,)
            (received,) = bwd_kwargs["output_grads"]
            scalar = (hidden * received).sum()
        self.zero.backward(scalar)
        return tuple(getattr(value, "grad", None) for value in bwd_kwargs["input_values"]), None


class Pipeline:
    """Runs training and validation steps of `num_microbatches` microbatches.

    `hidden` (b, s, d) and `loss` (parts,) are meta tensors: what travels between stages, what the last one puts out.
    """

    def __init__(self, zero: Zero, *, mesh: Mesh, schedule: str, num_microbatches: int, hidden: Tensor, loss: Tensor) -> None:
        self.zero, self.mesh, self.num_microbatches = zero, mesh, num_microbatches
        ids = torch.empty(hidden.shape[:2], dtype=torch.int64, device="meta")
        hidden, loss = hidden.requires_grad_(), loss.requires_grad_()  # decides whether a gradient is sent back
        self.stage = _Stage(
            zero.engine,
            mesh.pp_rank,
            mesh.pp,
            mesh.device,
            input_args=(ids if mesh.first_stage else hidden,),
            output_args=(loss if mesh.last_stage else hidden,),
            group=mesh.group("pp"),
        )
        self.stage.zero = zero
        self.schedule = SCHEDULES[schedule](self.stage, num_microbatches, loss_fn=lambda output, _: output, scale_grads=False)

    def train(self, microbatches: list[Batch]) -> list[Tensor]:
        """Forward and backward of every microbatch; their losses (parts,) on the last stage, nothing elsewhere."""
        with self.zero.step():
            return self._run(microbatches)

    def validate(self, microbatches: list[Batch]) -> list[Tensor]:
        """Forward alone."""
        with torch.no_grad(), self.zero.untraced():
            return self._run(microbatches, train=False)

    def _run(self, microbatches: list[Batch], *, train: bool = True) -> list[Tensor]:
        losses: list[Tensor] = []
        targets: list[None] = [None] * len(microbatches)
        args = [(batch["ids"],) if self.stage.is_first else () for batch in microbatches]
        kwargs = [{"batch": batch} for batch in microbatches]
        schedule = self.schedule
        self.stage.has_backward = schedule._has_backward = train
        self.stage.clear_runtime_states()
        schedule._step_microbatches(args, kwargs, targets, losses, return_outputs=False)
        return [loss.detach() for loss in losses]
