"""Fused kernels of megalite, imported as `megalite_kernels`: attention over spans, in Triton, with a plain PyTorch form of everything.

Triton is imported only when a kernel runs, so this imports anywhere.
"""

from .attention import attention
from .spans import Spans

__all__ = ["Spans", "attention"]
