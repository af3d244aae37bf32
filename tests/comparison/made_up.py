"""Folders of runs that were never trained, with figures that a test can compute in its head."""

import json
from pathlib import Path

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
ITERATIONS, TOKENS = 20, 1000


def write(folder: Path, router: str, seed: int, test: float, seconds: float = 1.0, **changed) -> Path:
    """A run called ROUTER-seedN: its loss falls from 5 by .1 an iteration, plus ``test``."""
    run = folder / "-".join(
        [router, f"seed{seed}", *(f"{name}{value}".replace("/", "_") for name, value in changed.items())]
    )
    run.mkdir(parents=True)
    arguments = {"moe_router_type": router, "seed": seed, "lr": 2e-3, "run_name": run.name, "mock_data": True}
    arguments |= {"moe_router_rnn_hidden_size": 64 if router == "gru" else 128, "global_batch_size": 16} | changed
    (run / "arguments.json").write_text(json.dumps(arguments))
    lines = [
        {"kind": "train", "iteration": i, "lm_loss": 5 - 0.1 * i + test, "tokens": TOKENS, "seconds": seconds}
        for i in range(1, ITERATIONS + 1)
    ]
    lines += [
        {"kind": "valid", "iteration": i, "lm_loss": 4 - 0.1 * i + test, "trained_tokens": i * TOKENS} for i in (10, 20)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {split: {"tokens": 50, "of": 50} for split in ("valid", "test")}
    summary = {"router": router, "iterations": ITERATIONS, "test_bpc": test, "valid_bpc": test - 0.1}
    summary |= {"peak_memory_bytes": 2**30, "evaluation": evaluation}
    (run / "summary.json").write_text(json.dumps(summary))
    lines = ["defaults: " + str(TINY), "MODEL_ARGS:", f"  --moe-router-type: {router}"]
    lines += ["  --moe-router-rnn-hidden-size: null"] * (router != "gru")
    (run / "config.yaml").write_text("\n".join(lines) + "\n")
    return run
