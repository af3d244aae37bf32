"""Logits of a written folder by the Hugging Face model, in fp32 on the CPU.

python -m rmoe_megablocks.conversion.verification.huggingface_logits FOLDER IDS.npy LOGITS.npy [ROUTER_TYPE]

A router type that is named may be imported.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import rmoe_megablocks.huggingface  # noqa: F401  registers the model type
from rmoe_megablocks.routing import get_router_type


@torch.no_grad()
def main(folder: str, ids: str, out: str, *trusted: str) -> int:
    """See the module. Raises ValueError for weights that the folder lacks, or that the model does not take."""
    for router_type in trusted:
        get_router_type(router_type)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            raise ValueError(f"{problem}: {sorted(report[problem])[:3]}")
    np.save(out, model.eval()(torch.from_numpy(np.load(ids))).logits.float().numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
