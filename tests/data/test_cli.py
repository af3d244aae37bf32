import argparse
import subprocess
import sys

import pytest

from rmoe_megablocks.data import DatasetMetadata, cli


def rmoe(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="rmoe")
    cli.add_arguments(parser.add_subparsers(dest="command", required=True))
    return cli.run(parser.parse_args(argv))


def test_prepare_and_info(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"x" * 900)
    (tmp_path / "b.txt").write_bytes(b"y" * 200)
    out = str(tmp_path / "out")
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert rmoe("data", "prepare", *inputs, "--output", out, "--split", "800/100/100B", "--append-eod") == 0
    output, bars = capsys.readouterr()
    assert "writing: 100%" in bars
    table = [line.split() for line in output.splitlines()[:4]]
    assert table[0] == ["split", "bytes", "tokens", "documents", "bytes/token"]
    assert table[1] == ["train", "800", "801", "1", "0.999"]
    assert "end of document: 256" in output and "100 bytes unused" in output and "b.txt, 200 bytes" in output
    assert rmoe("data", "info", out) == 0
    assert capsys.readouterr() == (output, "")
    assert rmoe("data", "info", out + "/valid") == 0


def test_options_reach_prepare(tmp_path, models, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "the of the"}\n' * 10)
    out = str(tmp_path / "out")
    argv = ["data", "prepare", str(tmp_path / "a.jsonl"), "--output", out, "--split", "80%,10%,10%"]
    argv += ["--tokenizer", "sentencepiece", "--tokenizer-model", str(models["default"]), "--json-key", "body"]
    assert rmoe(*argv) == 0
    assert "line breaks" in capsys.readouterr().err
    assert rmoe(*argv) == 2
    assert rmoe(*argv, "--overwrite") == 0
    metadata = DatasetMetadata.load(out)
    assert (metadata.tokenizer, metadata.splits["train"].documents, metadata.eod_id) == ("sentencepiece", 8, None)


def test_an_error_is_one_line(tmp_path, capsys):
    argv = ["data", "prepare", str(tmp_path / "gone"), "--output", str(tmp_path / "out"), "--split", "x"]
    assert rmoe(*argv) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("rmoe: error: split 'x' is not understood") and error.count("\n") == 1
    assert rmoe("data", "info", str(tmp_path)) == 2
    assert "dataset.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["data"], ["data", "prepare"], ["data", "prepare", "x", "--output", "y"]])
def test_incomplete_commands(argv):
    with pytest.raises(SystemExit) as end:
        rmoe(*argv)
    assert end.value.code == 2


def test_importing_the_data_room_is_quick():
    code = "import sys, rmoe_megablocks.data.cli; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
