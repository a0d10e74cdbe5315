"""Tensor parallelism, pipeline stages, ZeRO: what knows ranks and knows no GPT and no BERT."""
