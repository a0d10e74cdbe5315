"""Plain model + mesh -> something that can step. The only place where models and parallelism meet.

The order of things, for this rank's stage: build a layer on the meta device, cut it by the plan (tensor parallelism), draw its
weights by name, shard it (ZeRO-3); then tie, wrap the stage (ZeRO), set up the schedule (pipeline). One layer at a time, so no rank
ever holds more than one layer beside its own shard.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite import models, optim
from megalite.config import Config
from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.models import counts as costing
from megalite.models.attention import attend, positions_in, with_spans
from megalite.models.batch import HIDDEN, TOKENS
from megalite.models.layers import Block, split_vocabulary
from megalite.parallel import mends, settings, stages, tensor, zero
from megalite.parallel.context import share as share_sequence
from megalite.parallel.gradients import LossScale
from megalite.parallel.pipeline import Batch, Pipeline
from megalite.stage import Stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Report:
    """What one optimizer step says: the parts of the mean loss over the global batch, the norm of the whole mesh before clipping.

    skipped: gradients overflowed in fp16, so no weight was changed; the loss scale is lower now.
    """

    parts: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool = False

    @property
    def loss(self) -> float:
        return sum(self.parts.values())


class Engine:
    """Trains config's model on this mesh, one global batch at a time."""

    def __init__(self, config: Config, mesh: Mesh, *, document: dict[str, Any]) -> None:
        """`document` is the DeepSpeed JSON; `{}` means no ZeRO. config.model.vocab must be known."""
        self.config, self.mesh, train = config, mesh, config.train
        self.dtype = DTYPES[config.train.precision]
        self.dropout = config.model.dropout > 0 or config.model.attention_dropout > 0
        self.num_microbatches = config.train.global_batch // (mesh.dp * config.train.micro_batch)
        mends.start()
        zero.check(document)
        chosen = settings.choose(document, precision=train.precision, micro_batch=train.micro_batch, reduce=train.reduce)
        if (size := chosen.configuration["zero_optimization"].get("zero_hpz_partition_size", 1)) > 1:
            mends.open_secondary_groups(mesh, size)
        module = self._build(chosen)
        tied = {name for pair in models.tied(config.model).items() for name in pair}
        later = module.blocks() if train.schedule == "zerobubble" else None
        self.zero = zero.Zero(
            module,
            mesh=mesh,
            settings=chosen,
            optimizer=self._optimizer(module, tied, later or [], most=chosen.group),
            tied=tied,
            sequence_parallel=train.sequence_parallel,
            later=later,
        )
        if train.compile:
            self._compile(module)
        self.pipelines: dict[int, Pipeline] = {}
        self._pipeline(config.sequence)

    def _compile(self, stage: Stage) -> None:
        """Every block by itself: they have one code, so torch compiles it once. Raises UserError where ZeRO-3's weights come and go."""
        gathering = self.zero.gathering
        if gathering is not None and not gathering.all_stay:
            raise UserError(
                f"train.compile needs the weights of a stage to stay for a step, but of {gathering.num_elements:,} ZeRO-3 may keep "
                f"{gathering.limits.live:,}; raise stage3_max_live_parameters and stage3_max_reuse_distance, or do not compile"
            )
        model, like = self.config.model, {"device": self.mesh.device, "dtype": self.dtype}
        q, k = (torch.zeros(1, 1, heads, model.head_width, **like) for heads in (model.heads, model.num_kv_heads))
        attend(q, k, k, causal=True)  # kernels are put to the proof now, and not while torch traces
        torch._dynamo.config.recompile_limit = 256  # where dropout asks for a layer's place, every layer has code of its own
        for layer in stage.modules():
            if isinstance(layer, Block):
                layer.forward = torch.compile(layer.forward, dynamic=False)  # not the hooks around it

    def _pipeline(self, sequence: int) -> Pipeline:
        """The pipeline for samples of this length: what travels between stages has one shape in each."""
        if sequence not in self.pipelines:
            config, mesh = self.config, self.mesh
            rows = (config.train.micro_batch, sequence // math.prod(config.sequence_parts.values()))
            self.pipelines[sequence] = Pipeline(
                self.zero,
                mesh=mesh,
                schedule=config.train.schedule,
                num_chunks=config.num_chunks,
                num_microbatches=self.num_microbatches,
                ids=torch.empty(config.train.micro_batch, sequence // mesh.cp, dtype=torch.int64, device="meta"),
                hidden=torch.empty(*rows, config.model.width, dtype=self.dtype, device="meta"),
                loss=torch.empty(len(models.parts(config.model)), device="meta"),
            )
        return self.pipelines[sequence]

    def _build(self, chosen: settings.Settings) -> Stage:
        model, mesh = self.config.model, self.mesh
        layers, plan, tied = models.layers(model), models.plan(model), models.tied(model)
        costs = costing.layer_costs(model, self.config.sequence)
        mine = stages.assign(costs, mesh.pp * self.config.num_chunks)[mesh.pp_rank :: mesh.pp]
        chunks: list[dict[str, nn.Module]] = [{} for _ in mine]
        known: dict[str, nn.Parameter] = {}
        for number, (name, make) in ((n, layer) for n, place in enumerate(mine) for layer in layers[place.start : place.stop]):
            with torch.device("meta"):
                layer = make()
            models.name_sites(layer, name)
            tensor.cut(layer, name, plan=plan, mesh=mesh, sequence_parallel=self.config.train.sequence_parallel)
            split_vocabulary(layer, self.config.train.loss_pieces)
            self._draw(layer, known, tied)
            if chosen.stage == 3:
                zero.shard(layer, configuration=chosen.configuration, mesh=mesh, dtype=self.dtype)
            for parameter in layer.parameters():
                known[parameter.cut.name] = parameter  # type: ignore[attr-defined]
            chunks[number][name] = layer
            _trim_heap()
        return Stage(chunks, recompute=self.config.train.recompute, recompute_layers=self.config.train.recompute_layers)

    @torch.no_grad()
    def _draw(self, layer: nn.Module, known: dict[str, nn.Parameter], tied: dict[str, str]) -> None:
        """Give every parameter of a cut meta layer its initial value; a tied one whose source is on this stage becomes that very one."""
        for module in layer.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                cut = parameter.cut  # type: ignore[attr-defined]
                source = known.get(tied.get(cut.name, ""))
                if source is None:
                    full = models.draw(cut.name, cut.shape, model=self.config.model, seed=self.config.run.seed)
                    source = nn.Parameter(cut.take(full).to(self.mesh.device, self.dtype, copy=True))
                    source.cut = cut  # type: ignore[attr-defined]
                setattr(module, leaf, source)

    def _optimizer(self, module: Stage, tied: set[str], later: list[nn.Module], *, most: int) -> torch.optim.AdamW:
        """AdamW over groups of at most `most` elements: decayed or not, cut by tensor parallelism or held whole, and the tied weight.

        A group is of one chunk, laid out as its backward pass goes. ZeRO 1 and 2 cut a group's flat buffer by rank; what several ranks
        hold as copies lies in groups of its own, so that they cut it alike; as does what comes later than the rest of a pass.
        """
        rule = self.config.optimizer
        put_off = {weight for block in later for weight in block.parameters()}
        groups: dict[tuple[int, bool, bool, str], dict[str, list[nn.Parameter]]] = {}
        for parameter, chunk in reversed(module.chunks().items()):
            cut = parameter.cut  # type: ignore[attr-defined]
            kind = "tied" if cut.name in tied else "whole" if cut.dim is None else "cut"
            key = (-chunk, parameter in put_off, optim.decays(cut.name, cut.shape), kind)
            groups.setdefault(key, {}).setdefault(cut.layer, []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": rule.weight_decay * decays}
                for (_, _, decays, _), layers in sorted(groups.items(), key=lambda group: group[0])
                for parameters in optim.runs(layers.values(), most, size=Tensor.numel)
            ],
            lr=rule.lr,
            betas=rule.betas,
            eps=rule.eps,
            fused=self.mesh.device.type != "cpu",
        )

    def step(self, step: int, microbatches: list[Batch]) -> Report:
        """Take optimizer step number `step` (from 0) on this rank's microbatches of the global batch."""
        config = self.config
        lr = optim.learning_rate(step, config.optimizer, config.train.steps)
        losses = self._pipeline(length_of(microbatches)).train(list(self._deal(microbatches, step=step)))
        norm, summed = self.zero.update(lr=lr, clip=config.train.clip, beside=self._share(losses))
        return Report(parts=dict(zip(models.parts(config.model), summed, strict=True)), grad_norm=norm, lr=lr, skipped=self.zero.overflow)

    def state(self) -> dict[str, Any]:
        """The few numbers beside the pieces that a run goes on from; what data, dropout and the schedule do is a function of the step."""
        return dataclasses.asdict(self.zero.scale) if self.zero.scale else {}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """After the pieces of step `step` were loaded: go on from there."""
        if self.zero.scale and state:
            self.zero.scale = LossScale(**state)
        self.zero.restore(step - (self.zero.scale.skipped if self.zero.scale else 0))

    def validate(self, microbatches: list[Batch]) -> dict[str, float]:
        """The parts of the mean loss over one global batch, forward alone."""
        total = self._share(self._pipeline(length_of(microbatches)).validate(list(self._deal(microbatches))))
        dist.all_reduce(total)
        return dict(zip(models.parts(self.config.model), total.tolist(), strict=True))

    def predict(self, microbatches: list[Batch]) -> tuple[dict[str, float], list[Tensor]]:
        """`validate`, and on the last stage what a task's head put out for each microbatch (nothing elsewhere)."""
        module: Any = self.zero.engine.module
        head: Any = module.get_submodule("head") if self.mesh.last_stage else None
        if head is not None:
            head.answers = []
        found = self.validate(microbatches)
        answers = []
        if head is not None:
            answers, head.answers = head.answers, None
        return found, answers

    def _deal(self, microbatches: list[Batch], *, step: int | None = None) -> Iterator[Batch]:
        """This rank's part of every sequence, with what every target counts in the mean over the global batch, on every stage alike.

        The number of targets of a BERT batch differs from rank to rank, and samples may count differently; the mean is over all of them.
        ZeRO averages gradients over the ranks that hold the same weights, so the weights of a rank's targets add up to their number
        times its share. A step's number switches dropout on.
        """
        mesh, sequence_parallel = self.mesh, self.config.train.sequence_parallel
        batches = [{name: value.to(mesh.device, non_blocking=True) for name, value in batch.items()} for batch in microbatches]
        targets = torch.stack([models.weigh(batch)[1].sum() for batch in batches]).sum()
        dist.all_reduce(targets, group=mesh.group("dp"))
        first = mesh.dp_rank * len(batches)
        begins = mesh.cp_rank == 0 and not (sequence_parallel and mesh.tp_rank)  # whether this rank has the tokens that pairs are judged by
        for number, batch in enumerate(batches, start=first):
            name, counts = models.weigh(batch)
            batch[name] = counts * (mesh.num_copies / targets)
            if "next_sentence" in batch:
                share = begins * mesh.num_copies / self.config.train.global_batch
                batch["pair_weights"] = torch.full(batch["next_sentence"].shape, share, device=mesh.device)
            places = torch.arange(batch["ids"].shape[1], device=mesh.device).expand_as(batch["ids"])
            batch["places"] = places
            batch["positions"] = positions_in(batch["documents"]) if "documents" in batch else places
            if step is not None and self.dropout:
                samples = torch.arange(len(places), device=mesh.device) + number * len(places)
                batch["samples"] = models.sample_keys(samples, seed=self.config.run.seed, step=step)
            batch = with_spans(batch, model=self.config.model, dtype=self.dtype)
            yield share_sequence(batch, mesh, tokens=TOKENS, hidden=HIDDEN, sequence_parallel=sequence_parallel)

    def _share(self, losses: list[Tensor]) -> Tensor:
        """What this rank adds to the parts of the mean loss over the global batch: the last stage its sums, averaged over dp and cp."""
        if self.mesh.last_stage and self.mesh.tp_rank == 0:
            return torch.stack(losses).sum(0) / self.mesh.num_copies
        return torch.zeros(len(models.parts(self.config.model)), device=self.mesh.device)


def start_mesh(config: Config, rank: int) -> Mesh:
    """The mesh of this config on the ranks that run."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    assert config.mesh.dp is not None and rank == dist.get_rank()
    return Mesh.start(**config.mesh.degrees, device=device)


def length_of(microbatches: list[Batch]) -> int:
    """How long the samples of a step are."""
    return microbatches[0]["ids"].shape[1]


def _trim_heap() -> None:
    """Give freed pages back to the system: whole layers come and go between small shards that stay, and glibc would keep the holes.

    Without it a rank's memory was seen to grow by most of the model while building (4 ranks, ZeRO-3, CPU). Elsewhere than glibc: nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
