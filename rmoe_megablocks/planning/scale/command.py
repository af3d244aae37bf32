"""``rmoe plan CONFIG --nodes 1:1250``: the command's part."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.planning.scale import cost, hardware, report, search
from rmoe_megablocks.planning.settings import Settings


def run(args: argparse.Namespace, name: str, settings: Settings) -> int:
    """Prints the estimates; 1 if the model fits nowhere. Raises UsageError for bad input."""
    try:
        counts = search.node_counts(args.nodes)
    except ValueError:
        raise UsageError(f"--nodes {args.nodes}: expected N, N,M,... or FIRST:LAST") from None
    machine = hardware.parse(args.hardware)
    if not settings.global_batch_size:
        raise UsageError("--nodes needs --global-batch-size: it is what is shared out")
    pairs, missing = [], []
    for nodes in tqdm(counts, desc="rmoe: nodes", leave=False, disable=None):
        found = search.best(settings, nodes, machine)
        if found is None:
            missing.append(f"{nodes} nodes: no layout fits their memory")
            continue
        plain = cost.step_time(cost.without_router(found.settings), found.world_size, machine)
        pairs.append(report.Pair(found, plain))
    if args.json:
        described = {"config": name, "hardware": vars(machine), "estimates": [report.as_dict(pair) for pair in pairs]}
        json.dump(described | {"warnings": missing}, sys.stdout, indent=2)
        print()
    else:
        print(report.text(name, machine, pairs, missing))
    if args.figure and pairs:
        report.draw(name, pairs, args.figure)
    return 0 if pairs else 1
