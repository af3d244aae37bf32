"""Model and tokenizer of a folder, ours or any causal language model's that transformers knows, for commands."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import rmoe_megablocks.huggingface  # noqa: F401  registers the model type
from rmoe_megablocks.errors import UsageError


def prepare(folder: Path, trusts_router: bool = False) -> None:
    """Raises UsageError unless ``folder`` is a model's; imports its router's module where that is asked for."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    path = folder / "config.json"
    try:
        said = json.loads(path.read_bytes())
        kind = said.get("router_type")
    except FileNotFoundError:
        raise UsageError(f"{folder} is no model's folder: it has no config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as a JSON object ({error})") from error
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if isinstance(kind, str) and ":" in kind:
        if not trusts_router:
            raise UsageError(f"{path}: the router type {kind} is code; if you trust it, add --trust-router-code")
        try:
            importlib.import_module(kind.partition(":")[0])
        except ImportError as error:
            raise UsageError(f"{path}: the router type {kind} cannot be imported ({error})") from error


def config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of ``folder``. Raises UsageError, one line, unless it is of a causal language model."""
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    found = _or_one_line(folder, lambda: AutoConfig.from_pretrained(os.fspath(folder), **options))
    # asked here, as the library's own answer lists all of its models, which takes seconds
    if type(found) not in AutoModelForCausalLM._model_mapping and not getattr(found, "auto_map", None):
        raise UsageError(f"{folder} holds a model of type {found.model_type}, which is no causal language model")
    return found


def model(
    folder: Path, dtype: torch.dtype | str, device: torch.device, trust_remote_code: bool = False
) -> torch.nn.Module:
    """The causal language model of ``folder``, in evaluation mode; of dtype "auto" as it is stored.

    Raises:
        UsageError: one line, for a folder of another task, weights that are missing, damaged or too many, code of its
            own that was not trusted.
    """
    config(folder, trust_remote_code)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    found, report = _or_one_line(
        folder,
        lambda: AutoModelForCausalLM.from_pretrained(
            os.fspath(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        ),
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            name = sorted(map(str, report[problem]))[0]
            raise UsageError(f"{folder} does not hold the model that its config.json describes: {problem}, as {name}")
    return found.to(device).eval()


def tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``folder``. Raises UsageError, one line, if it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UsageError(f"{folder} has no tokenizer: export it with one (rmoe export --tokenizer)")
    return _or_one_line(
        folder,
        lambda: AutoTokenizer.from_pretrained(
            os.fspath(folder), local_files_only=True, trust_remote_code=trust_remote_code
        ),
    )


def _or_one_line(folder: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever somebody's folder makes the library raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if "trust_remote_code" in str(error):
            raise UsageError(f"{folder} has code of its own: if you trust it, add --trust-remote-code") from error
        raise UsageError(f"{folder} cannot be loaded: {lines[0][:300]}") from error
