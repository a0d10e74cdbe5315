"""Fused kernels of megalite, imported as `megalite_kernels`: attention over spans, a linear map with its cross-entropy, and dropout with
its sum, in Triton, with a plain PyTorch form of everything.

Triton is imported only when a kernel runs, so this imports anywhere.

transformers looks for a package called kernels, and finds this folder where the working directory is the root of a clone. Under that name
nothing is in it: the operators would be registered a second time, by modules that are others than these.
"""

if __name__ == "megalite_kernels":
    from .attention import attention
    from .cross_entropy import linear_cross_entropy, linear_statistics
    from .dropout import draws, dropout
    from .spans import Spans

    __all__ = ["Spans", "attention", "draws", "dropout", "linear_cross_entropy", "linear_statistics"]
