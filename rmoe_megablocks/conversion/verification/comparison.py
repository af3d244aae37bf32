"""Compares the logits of a written folder with those of the checkpoint that it was made of."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.conversion.source import Source
from rmoe_megablocks.data.embedded import embedded_corpus
from rmoe_megablocks.errors import UsageError

_HERE = "rmoe_megablocks.conversion.verification."
_MODEL = "rmoe_megablocks.huggingface"
SEQUENCES, LENGTH = 2, 128
#: of the largest logit: a wrong convention of weights, rotation or gates moves every token's by more (1e-2 and above)
TOLERANCE = 1e-4
#: a token near a tie between experts may go to another one by rounding, and those behind it see that
SHARE = 0.9


def check_available() -> None:
    """Raises UsageError where the two models cannot both be built."""
    for module, fix in (
        ("transformers", "pip install 'rmoe-megablocks[hf]'"),
        (_MODEL, "install rmoe-megablocks anew"),
    ):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"comparing logits needs {module}, which is not installed: {fix}, or add --no-verify")


def compare(source: Source, folder: Path, tokenizer: tokenizers.Tokenizer, trusts_router: bool = False) -> str:
    """The measured difference in words. Both models compute in fp32, whatever the weights are stored in.

    Args:
        trusts_router: whether both may import the module of a router type module:Class.

    Raises:
        UsageError: they differ by more than rounding; or a model could not be built, with the last line it said.
    """
    vocabulary = source.config["vocab_size"]
    length = min(LENGTH, source.config["max_position_embeddings"])
    text = embedded_corpus()[-20000:].decode(errors="replace")
    ids = tokenizers.sample_ids(tokenizer, folder, text, vocabulary, SEQUENCES * length)
    with tempfile.TemporaryDirectory(prefix="rmoe-") as scratch:
        place = Path(scratch)
        np.save(place / "ids.npy", np.array(ids, np.int64).reshape(SEQUENCES, length))
        router = [source.config["router_type"]] if trusts_router else []
        megatrons = _logits("megatron_logits", source.folder, place, router)[..., :vocabulary]
        ours = _logits("huggingface_logits", folder, place, router)
    return judge(megatrons, ours)


def judge(megatrons: np.ndarray, ours: np.ndarray) -> str:
    """Compares logits [B, S, V]. Raises UsageError where they are not those of one model."""
    if megatrons.shape != ours.shape:
        raise UsageError(f"logits differ in shape: Megatron's {megatrons.shape}, the folder's {ours.shape}")
    differences = np.abs(megatrons - ours).max(-1)
    scale = float(np.abs(megatrons).max())
    within = float((differences <= TOLERANCE * max(scale, 1e-30)).mean())
    said = (
        f"logits of {differences.size} tokens in fp32 differ from Megatron's by at most {differences.max():.1e}, where "
        f"the largest is {scale:.3g}; {within:.1%} of the tokens are within {TOLERANCE:g} of that"
    )
    if not (np.isfinite(ours).all() and within >= SHARE):
        raise UsageError(f"the folder does not compute what the checkpoint does: {said}")
    return said[0].upper() + said[1:] + "."


def _logits(module: str, model: Path, scratch: Path, router: list[str]) -> np.ndarray:
    """Runs one of the two modules beside this one in a process of its own, whose memory goes with it."""
    out = scratch / f"{module}.npy"
    command = [sys.executable, "-W", "ignore", "-m", _HERE + module, str(model.absolute()), str(scratch / "ids.npy")]
    command += [str(out), *router]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode != 0 or not out.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        last = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        raise UsageError(
            f"comparing logits: {module.partition('_')[0]}'s model could not be run ({last.strip()[:300]})"
        )
    return np.load(out)
