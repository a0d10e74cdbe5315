"""megalite: pretrain GPT and BERT with DeepSpeed ZeRO-3 together with pipeline and tensor parallelism."""

__version__ = "0.1.0"
