"""Installs `megatron_eagle` and `eagle_kernels`; the pinned CPU environment is constraints-cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megatron-eagle",
    version=re.search(r'__version__ = "(.+)"', (HERE / "megatron_eagle" / "__init__.py").read_text())[1],
    description="Eagle 2.5 long-context vision-language training on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2504.15271"},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["vision-language model", "long context", "video", "Megatron-Core", "Eagle 2.5"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Environment :: GPU :: NVIDIA CUDA :: 13",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatron_eagle", "megatron_eagle.*"]),
        "eagle_kernels",
    ],
    # No kernels/__init__.py: a top-level package named `kernels` would be taken by transformers
    # for Hugging Face's `kernels` library.
    package_dir={"eagle_kernels": "kernels/eagle_kernels"},
    entry_points={
        "console_scripts": ["megatron-eagle = megatron_eagle.__main__:start"],
        "vllm.general_plugins": ["eagle2_5 = megatron_eagle.hf_model.vllm_plugin:register"],
    },
    package_data={
        "megatron_eagle": ["py.typed"],
        "eagle_kernels": ["py.typed"],
        "megatron_eagle.inference": ["*.html"],
        "megatron_eagle.rehearsal": ["*.cpp"],
        "megatron_eagle.eagle_video": ["*.yaml"],
        "megatron_eagle.eagle_video.prompts": ["*.txt"],
    },
    install_requires=[
        "torch>=2.7",  # the first whose Triton is 3.3, the oldest that the kernels are written for
        "numpy",
        "megatron-core>=0.16.1,<0.20",  # `make test-megatron` runs the newest of them
        "einops",  # megatron-core imports it without declaring it
        "psutil",  # without it megatron-core's checkpoint save hangs
        "transformers>=4.51",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "pyarrow",
        "av",
        "pillow",
        "pypdfium2",
        "pyyaml",
        "tqdm",
        "tensorboard",
    ],
    extras_require={
        "media": ["lmdb", "simplejpeg", "pillow-heif"],  # databases, the warnings of libjpeg, HEIC
        "remote": ["s3fs", "gcsfs", "huggingface_hub", "aiohttp", "fsspec", "yarl"],  # media elsewhere
        "dali": ["nvidia-dali-cuda120==2.4.0"],
        "dali-cuda13": ["nvidia-dali-cuda130==2.4.0"],
        "gpu": [
            "transformer-engine[pytorch]>=1.10",
            "flash-attn>=2.7",
            "nvidia-cudnn-frontend",
            "triton>=3.3",
        ],  # Apex: see the Dockerfile
        "demo": ["scikit-image==0.26.0", "matplotlib"],
        "serve": ["fastapi", "starlette", "pydantic", "uvicorn", "python-multipart"],  # the demo page
        "vllm": ["vllm>=0.32,<0.34", "aiohttp"],  # serves exports; a server can also do without this project
        "monitor": ["wandb", "nvidia-resiliency-ext>=0.4.1,<0.8"],  # metrics elsewhere, straggler detection
        "cluster": ["faiss-cpu", "ray==2.60.0"],  # selection and preprocessing on many machines
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "accelerate",  # exports with weights on a disk
            "playwright",  # drives a Chromium that is installed already
            "liger-kernel==0.8.5",  # a peer that tests and benchmarks compare with
            "faiss-cpu",
            "lmdb",
            "simplejpeg",
            "webdataset",  # writes and reads the archives that tests compare with
            "s3fs",
            "gcsfs",
            "aiohttp",
            "moto[server]",  # an S3 server of this machine
            "pillow-heif",
            "ruff==0.17.5",
            "import-linter==2.17",
            "mypy==2.4.1",
            "types-PyYAML",
            "types-tqdm",
            "pytest-cov",
        ],
    },
)
