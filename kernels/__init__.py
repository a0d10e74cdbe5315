"""Fused kernels of megalite, imported as `megalite_kernels`: attention over spans, a linear map with its cross-entropy, and dropout with
its sum, in Triton, with a plain PyTorch form of everything.

Triton is imported only when a kernel runs, so this imports anywhere.
"""

from .attention import attention
from .cross_entropy import linear_cross_entropy, linear_statistics
from .dropout import draws, dropout
from .spans import Spans

__all__ = ["Spans", "attention", "draws", "dropout", "linear_cross_entropy", "linear_statistics"]
