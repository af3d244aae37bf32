"""What is committed of a study: its comparison, curves, machine and, if analysed, what the routers do.

    python -m studies.results studies/enwik8_cpu.yaml --runs runs/enwik8_cpu --analysis analysis/enwik8_cpu/*

writes into ``studies/NAME/``, NAME being the file's:

* ``comparison.md``, ``comparison.csv``, ``runs.csv``, ``curves.svg``: as ``rmoe sweep`` left them in RUNS/comparison;
* ``curves.csv``: the validation loss of every run, in nats a token and bits a byte;
* ``machine.json``: processor, threads, versions, the code's commit, and each run's command line;
* ``analysis.csv``, ``analysis.txt``: recordings of ``rmoe analyze`` side by side, a row a figure and model.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rmoe_megablocks.comparison.runs import read_run
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report as report_error
from rmoe_megablocks.sweep import study as studies
from rmoe_megablocks.sweep.running import RECORD

FOLDER = Path(__file__).parent
COPIED = ("comparison.md", "comparison.csv", "runs.csv", "curves.svg")
LIBRARIES = ("torch", "megatron-core", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files; the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="the study's YAML file")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="its finished runs (rmoe sweep)")
    parser.add_argument("--analysis", type=Path, nargs="+", default=[], metavar="DIR", help="recordings of its runs")
    parser.add_argument("--commit", help="the code that the runs were made with (default: the one that is here)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: studies/ and the study's name")
    args = parser.parse_args(argv)
    try:
        for file in write(args.study, args.runs, args.analysis, args.out or FOLDER / args.study.stem, args.commit):
            print(file)
    except UsageError as error:
        report_error(error)
        return 2
    return 0


def write(path: Path, runs_dir: Path, recordings: Sequence[Path], out: Path, commit: str | None = None) -> list[Path]:
    """The files written. Raises UsageError if a run of the study is missing, before anything is written."""
    planned = studies.read(path).runs
    runs = {one.name: read_run(runs_dir / one.name) for one in planned}
    records = {name: runs_dir / name / RECORD for name in runs}
    comparison = runs_dir / "comparison"
    for file in (*records.values(), *(comparison / name for name in COPIED)):
        if not file.is_file():
            raise UsageError(f"{file}: no such file; finish the study first: rmoe sweep {path} --runs-dir {runs_dir}")
    analysis = _analysis(recordings) if recordings else None
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(comparison / name, out / name)
    with (out / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["variant", "seed", "iteration", "tokens", "valid_loss", "valid_bpc"])
        for one in planned:
            for line in runs[one.name].of_kind("valid"):
                figures = (line["lm_loss"], line.get("bpc"))  # bytes of a text may not be known
                rows.writerow([one.variant, one.seed, line["iteration"], line["trained_tokens"], *figures])
    commands = {name: json.loads(file.read_text())["arguments"] for name, file in records.items()}
    (out / "machine.json").write_text(json.dumps(_machine(commands, commit), indent=2) + "\n")
    written = [*COPIED, "curves.csv", "machine.json"]
    if analysis:
        analysis.frame.to_csv(out / "analysis.csv", index=False, float_format="%.6g")
        (out / "analysis.txt").write_text(analysis.text().rstrip() + "\n")
        written += ["analysis.csv", "analysis.txt"]
    return [out / name for name in written]


def _analysis(recordings: Sequence[Path]):
    from rmoe_megablocks.analysis.measuring import files
    from rmoe_megablocks.analysis.measuring.comparing.table import compare

    return compare([files.read(folder) for folder in recordings])


def _machine(commands: dict[str, list[str]], commit: str | None) -> dict:
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "threads_a_run": int(os.environ.get("OMP_NUM_THREADS", 0)) or None,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "commit": commit or _commit(),
        # of a path its name alone: a folder of this machine means nothing elsewhere
        "arguments": {
            name: [Path(word).name if word.startswith("/") else word for word in words]
            for name, words in commands.items()
        },
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    sys.exit(main())
