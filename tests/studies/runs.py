"""Folders as finished runs leave them, with figures that are known."""

import json
from pathlib import Path


def finished(folder: Path, name: str, test: float, valid: float, iterations: int = 8, partial: str = "") -> Path:
    """A run whose entropy is 2 - iteration / 10 in layer one and .2 less in layer two; logits' std iteration / 100."""
    run = folder / name
    run.mkdir(parents=True)
    summary = {"iterations": iterations, f"test_bpc{partial}": test, f"valid_bpc{partial}": valid}
    summary["evaluation"] = {split: {"tokens": 1, "of": 1} for split in ("valid", "test")}
    (run / "summary.json").write_text(json.dumps(summary))
    with (run / "metrics.jsonl").open("w") as file:
        for iteration in range(1, iterations + 1):
            record = {"kind": "train", "iteration": iteration, "lm_loss": 3.0}
            if iteration == 1 or iteration % 2 == 0:
                entropy = 2 - iteration / 10
                record["routing"] = {"router_entropy": [entropy, entropy - 0.2], "logits_std": [iteration / 100] * 2}
            file.write(json.dumps(record) + "\n")
            if iteration % 4 == 0:
                file.write(json.dumps({"kind": "valid", "iteration": iteration, "lm_loss": 2.0}) + "\n")
    return run
