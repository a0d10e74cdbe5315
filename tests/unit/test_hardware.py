"""The table of GPUs says what the data sheets say, and nothing about what it does not know."""

import pytest

from megalite.hardware import GIB, GPUS, find


@pytest.mark.parametrize(
    ("device", "precision", "tflops", "gib", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4, 80, 3.35e12),
        ("NVIDIA H100 PCIe", "bf16", 756, 80, 2.0e12),
        ("NVIDIA H200", "bf16", 989.4, 141, 4.8e12),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312, 40, 1.555e12),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156, 40, 1.555e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5, 80, 2.039e12),
        ("NVIDIA A100 80GB PCIe", "fp16", 312, 80, 1.935e12),
        ("NVIDIA B200", "bf16", 2250, 180, 8.0e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125, 32, 0.9e12),
        ("Tesla V100-PCIE-16GB", "fp32", 14.0, 16, 0.9e12),
        ("NVIDIA L40S", "bf16", 362.05, 48, 0.864e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2, 24, 1.008e12),
        ("AMD Instinct MI300X", "bf16", 1307.4, 192, 5.3e12),
    ],
)
def test_a_gpu_is_found_under_the_name_its_driver_gives(device, precision, tflops, gib, bandwidth):
    gpu = find(device)
    assert gpu is not None
    assert gpu.peak(precision) == pytest.approx(tflops * 1e12)
    assert (gpu.memory_bytes, gpu.bandwidth) == (gib * GIB, bandwidth)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H20",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40",
        "AMD Instinct MI300A",
    ],
)
def test_a_cpu_a_slice_and_a_relative_with_other_peaks_are_unknown(device):
    assert find(device) is None


def test_volta_has_no_bf16():
    assert find("Tesla V100-SXM2-16GB").peak("bf16") is None


def test_peaks_are_dense_and_grow_as_formats_shrink():
    for gpu in GPUS:
        order = [gpu.peak_flops[name] for name in ("fp32", "tf32", "bf16", "fp8") if name in gpu.peak_flops]
        assert order == sorted(order)
        assert gpu.peak_flops["fp16"] == gpu.peak_flops.get("bf16", gpu.peak_flops["fp16"])
