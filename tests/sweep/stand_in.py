"""In the launcher's place: leaves a made-up run, fails, or waits for a signal, as its arguments ask."""

import argparse
import signal
import sys
import time
from pathlib import Path

from tests.comparison import made_up


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("runs-dir", "run-name", "seed", "moe-router-type", "fail", "wait"):
        parser.add_argument(f"--{name}")
    args, _ = parser.parse_known_args(argv)
    folder, name = Path(args.runs_dir), args.run_name
    if args.fail:
        print("first line\nrmoe: error: no luck")
        return 3
    if args.wait:
        signal.signal(signal.SIGTERM, lambda *_: (folder / f"{name}.saved").touch() or sys.exit(143))
        (folder / f"{name}.waits").touch()
        time.sleep(60)
    print("iteration 20/20")
    seed, router = int(args.seed), args.moe_router_type
    made_up.write(folder, router, seed, 3.0 + 0.1 * seed + (router == "gru")).rename(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
