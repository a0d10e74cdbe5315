"""What a GPU can do: dense peak FLOP/s by number format, memory, memory bandwidth; from the vendors' data sheets.

In: a device's name, as `torch.cuda.get_device_name` gives it.  Out: a `Gpu`, or None for a CPU, a slice of a GPU (MIG) and whatever is not
in the table; model FLOP utilisation is then null rather than guessed. Peaks are those without sparsity, of tensor cores that accumulate
in fp32; "fp32" is the plain fp32 unit, which PyTorch uses unless TF32 is allowed. Memory is the nominal size: a driver keeps a little.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 1 << 30
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    name: str
    pattern: str  # of the names under which drivers report it, all of it, in lower case
    memory_bytes: int
    bandwidth: float  # bytes/s of its memory
    peak_flops: dict[str, float]  # FLOP/s by number format

    def peak(self, precision: str) -> float | None:
        """FLOP/s in that format (fp32, tf32, bf16, fp16, fp8); None where the GPU has no unit for it."""
        return self.peak_flops.get(precision)


def _peaks(**tflops: float) -> dict[str, float]:
    return {precision: value * TERA for precision, value in tflops.items()}


GPUS = (
    # NVIDIA H100 Tensor Core GPU data sheet, SXM column; it prints sparse figures, these are half of them
    Gpu("H100 SXM", "h100 80gb hbm3", 80 * GIB, 3.35e12, _peaks(fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9)),
    # the same data sheet, PCIe column
    Gpu("H100 PCIe", "h100 pcie", 80 * GIB, 2.0e12, _peaks(fp32=51.2, tf32=378, bf16=756, fp16=756, fp8=1513)),
    # NVIDIA H200 data sheet, SXM column: the H100's processor with other memory
    Gpu("H200", "h200", 141 * GIB, 4.8e12, _peaks(fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9)),
    # NVIDIA A100 data sheet, which prints dense figures beside the sparse ones: A100 40GB PCIe and SXM
    Gpu("A100 40GB", r"a100-(pcie|sxm4?)-40gb", 40 * GIB, 1.555e12, _peaks(fp32=19.5, tf32=156, bf16=312, fp16=312)),
    # the same, A100 80GB SXM
    Gpu("A100 80GB SXM", r"a100-sxm4?-80gb", 80 * GIB, 2.039e12, _peaks(fp32=19.5, tf32=156, bf16=312, fp16=312)),
    # the same, A100 80GB PCIe
    Gpu("A100 80GB PCIe", r"a100 80gb pcie|a100-pcie-80gb", 80 * GIB, 1.935e12, _peaks(fp32=19.5, tf32=156, bf16=312, fp16=312)),
    # NVIDIA Blackwell architecture data sheet, HGX B200 at 1000 W; it prints sparse figures, these are half of them (fp32 as printed)
    Gpu("B200", "b200", 180 * GIB, 8.0e12, _peaks(fp32=80, tf32=1100, bf16=2250, fp16=2250, fp8=4500)),
    # NVIDIA V100 data sheet, SXM2 and PCIe columns; no bf16 in the tensor cores of Volta
    Gpu("V100 SXM 16GB", r"v100-sxm2-16gb", 16 * GIB, 0.9e12, _peaks(fp32=15.7, fp16=125)),
    Gpu("V100 SXM 32GB", r"v100-sxm2-32gb", 32 * GIB, 0.9e12, _peaks(fp32=15.7, fp16=125)),
    Gpu("V100 PCIe 16GB", r"v100-pcie-16gb", 16 * GIB, 0.9e12, _peaks(fp32=14.0, fp16=112)),
    Gpu("V100 PCIe 32GB", r"v100-pcie-32gb", 32 * GIB, 0.9e12, _peaks(fp32=14.0, fp16=112)),
    # NVIDIA L40S data sheet, the figures without sparsity
    Gpu("L40S", "l40s", 48 * GIB, 0.864e12, _peaks(fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, fp8=733)),
    # NVIDIA Ada GPU architecture white paper, table of the RTX 4090, tensor cores with fp32 accumulation
    Gpu("RTX 4090", "geforce rtx 4090", 24 * GIB, 1.008e12, _peaks(fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2, fp8=330.3)),
    # AMD Instinct MI300X data sheet, the figures without sparsity
    Gpu("MI300X", r"instinct mi300x( oam| vf)?", 192 * GIB, 5.3e12, _peaks(fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, fp8=2614.9)),
)


def find(device_name: str) -> Gpu | None:
    """The GPU of that name; None for a CPU, part of a GPU or an unknown one."""
    bare = re.sub(r"^(nvidia|amd|tesla)\s+", "", device_name.strip().lower())
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, bare)), None)
