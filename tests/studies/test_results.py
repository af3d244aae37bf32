"""What is committed of a study, from runs of a stand-in."""

import csv
import json

import pytest

from rmoe_megablocks.errors import UsageError
from studies import results
from tests.sweep.test_sweep import file, stand_in, sweep  # noqa: F401  fixtures


def test_files_of_a_study(file, stand_in, capsys):  # noqa: F811
    runs, out = file.parent / "runs", file.parent / "out"
    assert sweep(file, "--only", "seed1", "--jobs", "2") == 0
    with pytest.raises(UsageError, match="one-seed2"):
        results.write(file, runs, [], out)
    assert not out.exists()
    assert sweep(file, "--jobs", "2") == 0
    capsys.readouterr()
    assert results.main([str(file), "--runs", str(runs), "--out", str(out), "--commit", "abc"]) == 0
    assert {path.name for path in out.iterdir()} == {*results.COPIED, "curves.csv", "machine.json"}
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "machine.json")
    with (out / "curves.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    of_run = [json.loads(line) for line in (runs / "two-seed2" / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in of_run if line["kind"] == "valid"]
    found = [row for row in rows if (row["variant"], row["seed"]) == ("two", "2")]
    assert valid and [int(row["iteration"]) for row in found] == [line["iteration"] for line in valid]
    assert [float(row["valid_loss"]) for row in found] == [line["lm_loss"] for line in valid]
    machine = json.loads((out / "machine.json").read_text())
    assert machine["commit"] == "abc" and machine["torch"] and str(file.parent) not in json.dumps(machine)
    assert machine["arguments"]["two-seed2"][:2] == ["--config", "tiny.yaml"]
