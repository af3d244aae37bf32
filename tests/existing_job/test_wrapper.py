"""The wrapper with a script that does what pretrain_gpt.py of Megatron-Core 0.19 does, see stock_script.py."""

import re

import pytest

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.megatron import existing_job
from tests.checkpoints import assert_same_tensors, load_tensors
from tests.existing_job.jobs import GRU, OWN_ENTRY, ROOT, STOCK, STOCK_SCRIPT, WRAPPER, as_own_entry, losses, start

SCRIPT = [*WRAPPER, str(STOCK_SCRIPT)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Every job that the tests look at, all running at once; a function that waits for one of them."""
    folder = tmp_path_factory.mktemp("jobs")
    started = {
        "wrapped gru": start(folder / "1", SCRIPT, [*GRU, "--stock-script-says", "hello"]),
        "own gru": start(folder / "2", ["-c", OWN_ENTRY], [*GRU, "--runs-dir", str(folder / "2/runs")]),
        "wrapped linear": start(folder / "3", SCRIPT, []),
        "stock": start(folder / "4", ["-c", STOCK, str(STOCK_SCRIPT)], []),
        "own model": start(folder / "5", SCRIPT, [*GRU, "--stock-script-builds-the-model"]),
        "asserted": start(folder / "7", SCRIPT, [*GRU, "--fp16", "--bf16"]),
        "refused": start(folder / "6", SCRIPT, [*GRU, "--cuda-graph-impl", "local"]),
    }
    yield started.__getitem__
    for job in started.values():
        job.process.kill()
        job.process.wait()


def test_a_stock_script_trains_with_the_router_as_our_own_entry_does(jobs):
    (wrapped_code, wrapped), (own_code, own) = jobs("wrapped gru").end(), jobs("own gru").end()
    assert (wrapped_code, own_code) == (0, 0), wrapped[-2000:] + own[-2000:]
    assert "the script's own argument: hello" in wrapped
    assert re.findall("^CPU mode adds: (.*)$", wrapped, re.MULTILINE) == [" ".join(megatron_cpu.ARGUMENTS)]
    assert len(losses(wrapped)) == 4 + 3 and as_own_entry(losses(wrapped)) == losses(own)
    assert_same_tensors(jobs("wrapped gru").checkpoint, jobs("own gru").checkpoint)
    assert "rnn_router.cell.weight_hh" in load_tensors(jobs("wrapped gru").checkpoint)


def test_without_the_option_it_trains_as_stock(jobs):
    (wrapped_code, wrapped), (stock_code, stock) = jobs("wrapped linear").end(), jobs("stock").end()
    assert (wrapped_code, stock_code) == (0, 0), wrapped[-2000:] + stock[-2000:]
    assert len(losses(wrapped)) == 4 + 3 and losses(wrapped) == losses(stock)
    assert_same_tensors(jobs("wrapped linear").checkpoint, jobs("stock").checkpoint)
    assert losses(wrapped) != losses(jobs("wrapped gru").end()[1])


def test_a_script_that_builds_its_own_model_is_refused(jobs):
    code, output = jobs("own model").end()
    assert code == 2
    assert output.splitlines()[-1] == (
        f"rmoe: error: --moe-router-type gru: {STOCK_SCRIPT} does not build its model with gpt_config_from_args, "
        "as pretrain_gpt.py of Megatron-Core 0.19 and later does, so the router cannot be put in"
    )


def test_what_the_router_cannot_do_is_refused_before_anything_starts(jobs):
    code, output = jobs("refused").end()
    assert code == 2
    assert output.splitlines()[-1].startswith("rmoe: error: --moe-router-type gru does not work with --cuda-graph-impl")


def test_what_megatron_asserts_is_one_line_under_its_traceback(jobs):
    code, output = jobs("asserted").end()
    assert code == 2
    *above, last = output.splitlines()
    assert last.startswith("rmoe: error: Megatron requires no --bf16 with --fp16 (arguments.py:"), last
    assert last.endswith("; the traceback is above") and "AssertionError" in above[-1]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--help"], 0, ""),
        ([], 2, "rmoe: error: name a training script: python -m rmoe_megablocks.megatron.run pretrain_gpt.py"),
        (["none.py"], 2, "rmoe: error: none.py does not exist: the first argument is the training script"),
    ],
)
def test_help_and_a_missing_script(argv, code, message, capsys):
    from rmoe_megablocks.megatron import run

    assert run.main(argv) == code
    out, err = capsys.readouterr()
    assert err.startswith(message) and err.count("\n") == (code != 0)
    assert ("pretrain_gpt.py ARGUMENTS --moe-router-type gru" in out) == (code == 0)


def test_the_patch_uses_what_there_is():
    text = (ROOT / "patches/megatron-lm/core_v0.19.0.patch").read_text()
    imported = re.search(r"^\+from rmoe_megablocks\.megatron\.existing_job import (.*)$", text, re.MULTILINE)
    for name in imported.group(1).split(", "):
        assert callable(getattr(existing_job, name))
        assert len(re.findall(rf"^\+.*\b{name}\(", text, re.MULTILINE)) == 1
