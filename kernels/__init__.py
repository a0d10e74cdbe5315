"""Triton kernels of megalite, imported as `megalite_kernels`. None is part of the package yet: attention is PyTorch's SDPA."""
