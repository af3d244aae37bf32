"""The entry script as Bash and as Python, and what the launcher and a worker do with their arguments."""

import io
import os
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

import rmoe_megablocks.megatron as megatron_package
from rmoe_megablocks import process
from rmoe_megablocks.errors import UnknownArgument, UsageError
from rmoe_megablocks.launcher import __main__ as launcher
from rmoe_megablocks.launcher import agent, arguments, naming, options, worker

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "launch" / "pretrain_rmoe.sh"


@pytest.mark.parametrize("command", [["bash"], [sys.executable, "-W", "error"]], ids=["bash", "python"])
def test_help_answers_both_ways_from_any_folder(command, tmp_path):
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*command, str(ENTRY), "--help"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--config FILE" in done.stdout and "torchrun" in done.stdout


def test_help_is_one_narrow_page_of_our_own_arguments(capsys):
    assert launcher.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    for words in ("--moe-router-type TYPE", "(default 128)", "--run-name", "--help-megatron WORD"):
        assert words in page, words
    assert "torch" not in options.__dict__


def test_help_on_megatrons_arguments(capfd):
    assert launcher.main(["--help-megatron", "WARMUP-frac"]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[0] == "learning rate and weight decay:" and "--lr-warmup-fraction" in out
    assert launcher.main(["--help-megatron"]) == 0
    out = capfd.readouterr().out
    assert len(out.splitlines()) > 2000 and "--moe-router-type" in out and "--num-layers" in out
    assert launcher.main(["--help-megatron", "warm up the oven"]) == 2
    assert capfd.readouterr().err == (
        "rmoe: error: --help-megatron warm up the oven: no argument has that in its name or help\n"
    )


@pytest.mark.parametrize("command", [["bash"], [sys.executable]], ids=["bash", "python"])
def test_an_error_is_one_line_and_exit_code_2(command, tmp_path):
    env = {**os.environ, "PYTHON": sys.executable}
    argv = [*command, str(ENTRY), "--config", "none.yaml"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rmoe: error: configuration file none.yaml does not exist\n"


@pytest.fixture(autouse=True)
def own_warning_filters():
    """The launcher sets warning filters for its process, which here is the tests'."""
    with warnings.catch_warnings():
        yield


@pytest.fixture
def checked(monkeypatch):
    """Stands in for the real checks, which take seconds; records what they were given."""
    calls = []

    def check(argv, nproc_per_node=None, nnodes=1):
        calls.append((argv, nproc_per_node, nnodes))
        if "--wrong" in argv:
            raise UsageError("--wrong is wrong")
        run = types.SimpleNamespace(check_unlocked=lambda: None)
        return types.SimpleNamespace(nproc_per_node=nproc_per_node or 2, run=run)

    monkeypatch.setattr(megatron_package, "preflight", types.SimpleNamespace(check=check), raising=False)
    return calls


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("ENV_VARS: {RMOE_TEST_C: 1}\nMODEL_ARGS: {--seed: 1, --swiglu: true}")
    return path


@pytest.fixture
def started(monkeypatch):
    """The commands that would have been run."""
    runs = []
    monkeypatch.setattr(launcher, "run_agent", lambda command, env: runs.append((command, env)) or 0)
    monkeypatch.setenv("RMOE_TEST_C", "x")
    monkeypatch.delenv("RMOE_TEST_C")
    return runs


def test_the_launcher_checks_then_starts(checked, started, config, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher, "_cores", lambda: 9)
    assert launcher.main(["--config", str(config), "--lr", "1", "--seed", "2", "--nproc-per-node=4"]) == 0
    assert checked == [(["--swiglu", "--lr", "1", "--seed", "2", "--run-name", "run-lr-1-seed-2"], 4, 1)]
    [(command, env)] = started
    assert command[command.index("rmoe_megablocks.launcher.agent") + 1 :] == [
        *("--nproc-per-node=4", "--standalone", "--local-addr=127.0.0.1", "-m", "rmoe_megablocks.launcher.worker"),
        *("--config", str(config), "--lr", "1", "--seed", "2"),
    ]
    assert (env["OMP_NUM_THREADS"], env["RMOE_TEST_C"]) == ("2", "1")


def test_the_users_thread_number_is_kept(checked, started, config, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launcher.main(["--config", str(config)]) == 0
    assert started[0][1]["OMP_NUM_THREADS"] == "3"


def test_several_machines(checked, started, config):
    layout = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "first"]
    assert launcher.main(["--config", str(config), *layout]) == 0
    assert checked[0][1:] == (None, 2)
    assert started[0][0][4:9] == [
        *("--nproc-per-node=2", "--nnodes=2", "--node-rank=1", "--master-addr=first", "--master-port=29500"),
    ]


def test_dry_run_prints_and_starts_nothing(checked, started, config, capsys):
    assert launcher.main(["--config", str(config), "--dry-run", "--lr", "1"]) == 0
    assert started == []
    out = capsys.readouterr().out
    assert "export RMOE_TEST_C=1\n" in out and "#   --swiglu\n#   --lr 1\n" in out
    assert f"-m rmoe_megablocks.launcher.worker --config {config} --lr 1\n" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wrong"], "--wrong is wrong"),
        (["--config"], "--config: expected one argument"),
        (["--nproc-per-node", "two"], "--nproc-per-node: expected a positive whole number, not 'two'"),
        (["--nproc-per-node", "0"], "--nproc-per-node: expected a positive whole number, not '0'"),
        (["--nnodes", "2"], "--nnodes needs --master-addr: the address of machine 0, the same on every machine"),
        (["--nnodes", "2", "--master-addr", "a"], "--nnodes needs --node-rank: the number of this machine, from 0"),
        (
            ["--nnodes", "2", "--master-addr", "a", "--node-rank", "2"],
            "--node-rank 2 does not fit --nnodes 2: it counts from 0",
        ),
        (["--master-port", "70000"], "--master-port 70000 is not a port: the highest is 65535"),
    ],
)
def test_errors_of_the_launcher(checked, started, config, capsys, argv, message):
    assert launcher.main([*(["--config", str(config)] if argv != ["--config"] else []), *argv]) == 2
    assert capsys.readouterr().err == f"rmoe: error: {message}\n"
    assert started == []


def test_an_error_says_which_line_of_which_file_it_is_about(checked, started, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("MODEL_ARGS:\n  --seed: 1\n  --wrong: true")
    assert launcher.main(["--config", str(path)]) == 2
    assert capsys.readouterr().err == f"rmoe: error: --wrong is wrong (--wrong: {path}, line 3)\n"
    assert launcher.main(["--config", str(path), "--wrong"]) == 2
    assert capsys.readouterr().err == "rmoe: error: --wrong is wrong\n"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "{path}",
            "'{path}' is not an argument (expected --name value); a configuration file is named by --config {path}",
        ),
        ("x --seed 1", "'x' is not an argument (expected --name value)"),
        ("--save null", "--save null: write --save=null to take back what the configuration says"),
        ("--config=", "--config is empty: name a file (an unset shell variable?)"),
    ],
)
def test_what_is_typed_and_not_meant(checked, started, config, capsys, typed, message):
    argv = ["--config", str(config), *typed.format(path=config).split()]
    assert launcher.main(argv) == 2
    assert capsys.readouterr().err == f"rmoe: error: {message.format(path=config)}\n"
    assert checked == []


def test_a_misspelt_option_of_the_launcher_is_told_from_megatrons(config):
    run = arguments.resolve(["--config", str(config), "--dry-rum"])
    with pytest.raises(UsageError, match=r"^unrecognized arguments: --dry-rum \(did you mean --dry-run\?\)$"):
        with run.located_errors():
            raise UnknownArgument("--dry-rum", "--dry-rum", ["--seed", "--dry-up"])


def test_several_machines_say_where_they_meet(checked, started, config, capsys):
    layout = ["--nnodes", "2", "--node-rank", "1", "--master-port", "29511", "--master-addr"]
    assert launcher.main(["--config", str(config), *layout, "127.0.0.1"]) == 0
    assert capsys.readouterr().err == "rmoe: machine 1 of 2: meeting the others at 127.0.0.1:29511\n"
    assert launcher.main(["--config", str(config), *layout, "no.such.host.invalid"]) == 0
    assert "(this machine does not know that name now: " in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["--nproc-per-node=2", "--node_rank 0", "--master-port 29511", "--dry-run"])
def test_under_torchrun_the_layout_is_torchruns(trained, config, capsys, layout):
    assert worker.main(["--config", str(config), *layout.split()]) == 2
    name = layout.replace("=", " ").split()[0].replace("_", "-")
    assert capsys.readouterr().err.startswith(f"rmoe: error: {name} ")
    assert trained == []


def test_a_port_in_use_is_told_at_once(checked, started, config, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launcher.main(["--config", str(config), "--master-port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"rmoe: error: port {port} is in use on this machine: choose another with --master-port\n"
    )


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the training in a worker; records Megatron's arguments."""
    import signal

    before = signal.getsignal(signal.SIGINT)
    calls = []

    def main(argv):
        calls.append(argv)
        if "--wrong" in argv:
            raise UsageError("wrong")
        return 7 if "--seven" in argv else None

    monkeypatch.setattr(megatron_package, "pretrain", types.SimpleNamespace(main=main), raising=False)
    monkeypatch.setattr(process.time, "sleep", lambda _: None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    yield calls
    signal.signal(signal.SIGINT, before)


def test_a_worker_merges_and_trains(trained, started, config):
    assert worker.main(["--config", str(config), "--seed=3"]) == 0
    assert worker.main(["--config", str(config), "--seven", "--run-name", "x"]) == 7
    assert trained == [
        ["--swiglu", "--seed=3", "--run-name", "run-seed-3"],
        ["--seed", "1", "--swiglu", "--seven", "--run-name", "x"],
    ]
    assert os.environ["RMOE_TEST_C"] == "1"


def test_a_workers_usage_error_is_one_line(trained, started, config, capsys, monkeypatch):
    assert worker.main(["--config", str(config), "--wrong"]) == 2
    assert capsys.readouterr().err == "rmoe: error: wrong\n"
    monkeypatch.setenv("RANK", "1")
    assert worker.main(["--config", str(config), "--wrong"]) == 2
    assert capsys.readouterr().err == "rmoe: error: rank 1: wrong\n"


def failure(exitcode, timestamp=0):
    return types.SimpleNamespace(exitcode=exitcode, timestamp=timestamp)


@pytest.mark.parametrize(
    ("failures", "code", "line"),
    [
        ({0: failure(2), 1: failure(-15)}, 2, ""),
        (
            {0: failure(1, 5), 3: failure(9, 4)},
            9,
            "rmoe: error: rank 3 failed with exit code 9; its own message is above\n",
        ),
        ({1: failure(-9)}, 137, "rmoe: error: rank 1 was ended by SIGKILL (out of memory is the usual cause)\n"),
        ({1: failure(-11)}, 139, "rmoe: error: rank 1 was ended by SIGSEGV\n"),
        ({1: failure(-15)}, 143, ""),
    ],
)
def test_a_failed_worker_is_reported_in_one_line(failures, code, line, capsys):
    assert agent._failed(failures) == code
    assert capsys.readouterr().err == line


def test_the_launchers_options_do_not_take_megatrons():
    own, rest = options.parse(["--config", "a", "--config-logger-dir", "b", "--master", "c", "--num-layers", "4"])
    assert own.config == "a"
    assert rest == ["--config-logger-dir", "b", "--master", "c", "--num-layers", "4"]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("", "run"),
        ("--lr 1 --bf16", "run-lr-1-bf16"),
        ("--lr=1 --bf16", "run-lr-1-bf16"),
        ("--save x --log-interval 5 --runs-dir=y --lr 1", "run-lr-1"),
        ("--ckpt-step 4 --async-save --no-verify-integrity --lr 1", "run-lr-1"),
        ("--run-name mine --lr 1", "mine"),
        ("--lr -1", "run-lr--1"),
        ("--dataset data/enwik8", "run-dataset-data+enwik8"),
    ],
)
def test_a_run_is_named_after_what_makes_it(started, config, typed, name):
    megatron = arguments.resolve(["--config", str(config), *typed.split()]).megatron
    assert [megatron[i + 1] for i, token in enumerate(megatron) if token == "--run-name"] == [name]


def test_names_that_cannot_say_everything_end_in_a_digest():
    path = Path("configs/tiny.yaml")
    names = [naming.run_name(path, ["--data-path", word]) for word in ("a/b", "a_b", "a+b", "a b", "a:b", "a//b")]
    assert names[:2] == ["tiny-data-path-a+b", "tiny-data-path-a_b"]
    assert len(set(names)) == len(names)


def test_long_names_are_cut_at_a_word():
    words = [
        "--moe-router-rnn-hidden-size",
        "128",
        "--moe-router-load-balancing-type",
        "seq_aux_loss",
        "--lr",
        "0.0003",
    ]
    name = naming.run_name(Path("rmoe_enwik8_small.yaml"), [*words, "--adam-beta2", "0.98"])
    cut, _, digest = name.rpartition("-")
    assert cut == "rmoe_enwik8_small-moe-router-rnn-hidden-size-128-moe-router-load-balancing-type-seq_aux_loss-lr"
    assert len(digest) == 12
    assert name != naming.run_name(Path("rmoe_enwik8_small.yaml"), [*words, "--adam-beta2", "0.99"])


def test_progress_in_a_log_file_is_lines():
    stream = io.StringIO()
    with tqdm(total=2, desc="reading", file=process.progress_stream(stream), mininterval=0, miniters=1) as bar:
        bar.update(1)
        bar.update(1)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and all(line.startswith("reading: ") for line in lines)
    assert [line.split("|")[0] for line in lines][:3] == ["reading:   0%", "reading:  50%", "reading: 100%"]
