"""Configuration files: what they say, how they merge with a command line, and what is told when they are wrong."""

import os
from pathlib import Path

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher.config import (
    DEFAULT_CONFIG,
    ConfigError,
    apply_environment,
    find_config,
    load_config,
    merge,
    to_argv,
)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_values_become_a_command_line(tmp_path):
    path = write(
        tmp_path,
        """
MODEL_ARGS:
  --num-layers: 4
  --swiglu: true
  --bf16: false
  --load: null
  --lr: 2.0e-3
  --data-path: [0.3, first, 0.7, second]
  --moe-layer-freq: ([0]*3+[1]*45)
  --offset: "-x"
  --text: "null"
""",
    )
    assert to_argv(load_config(path).arguments) == [
        *("--num-layers", "4", "--swiglu", "--lr", "0.002"),
        *("--data-path", "0.3", "first", "0.7", "second", "--moe-layer-freq", "([0]*3+[1]*45)"),
        *("--offset=-x", "--text", "null"),
    ]


def test_defaults_are_merged_first_and_can_be_taken_back(tmp_path):
    (tmp_path / "sub").mkdir()
    base = write(tmp_path, "ENV_VARS: {A: 1, B: 1}\nMODEL_ARGS: {--seed: 1, --swiglu: true, --lr: 1}")
    more = write(tmp_path, "MODEL_ARGS: {--seed: 2}", "more.yaml")
    twin = write(
        tmp_path / "sub",
        "defaults: [../run.yaml, ../more.yaml]\nENV_VARS: {B: 2}\nMODEL_ARGS: {--swiglu: null, --lr: 3}",
    )
    config = load_config(twin)
    assert config.env == {"A": "1", "B": "2"}
    assert to_argv(config.arguments) == ["--seed", "2", "--lr", "3"]
    assert [source.resolve() for source in config.sources] == [base, more, twin]


def test_two_defaults_may_share_a_base(tmp_path):
    write(tmp_path, "MODEL_ARGS: {--seed: 1}", "base.yaml")
    write(tmp_path, "defaults: base.yaml", "left.yaml")
    write(tmp_path, "defaults: base.yaml", "right.yaml")
    assert load_config(write(tmp_path, "defaults: [left.yaml, right.yaml]")).arguments == {"--seed": 1}


def test_environment_is_interpolated(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", "/out")
    monkeypatch.setenv("EMPTY", "")
    path = write(tmp_path, "MODEL_ARGS: {--save: '${OUT}/x', --load: '${NOWHERE:-}${EMPTY:-in}', --name: $OUT}")
    assert to_argv(load_config(path).arguments) == ["--save", "/out/x", "--load", "in", "--name", "$OUT"]


def test_environment_of_the_user_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("RMOE_TEST_A", "user")
    monkeypatch.setenv("RMOE_TEST_B", "x")  # so that it is restored
    monkeypatch.delenv("RMOE_TEST_B")
    config = load_config(write(tmp_path, "ENV_VARS: {RMOE_TEST_A: file, RMOE_TEST_B: true}"))
    apply_environment(config)
    assert (os.environ["RMOE_TEST_A"], os.environ["RMOE_TEST_B"]) == ("user", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{path} is empty"),
        ("- a", "{path}: expected the keys defaults, ENV_VARS, MODEL_ARGS, found a list"),
        ("MODEL_ARGS:\n  --a: [1", "{path}: line 2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("MODEL_ARGS:\n\t--a: 1", "{path}: line 2: not valid YAML: found character '\\t' that cannot start any token"),
        ("MODEL_ARGS: {--a: 2024-13-45}", "{path}: not valid YAML: month must be in 1..12"),
        (
            "MODEL_ARG: {--a: 1}",
            "{path}: unknown key 'MODEL_ARG' (known: defaults, ENV_VARS, MODEL_ARGS)",
        ),
        ("MODEL_ARGS:\n  --a: 1\n  --b: 2\n  --a: 3", "{path}: line 4: duplicate key '--a'"),
        ("MODEL_ARGS: [1]", "{path}: MODEL_ARGS must be a mapping, found a list"),
        ("MODEL_ARGS: {lr: 1}", "{path}: MODEL_ARGS: 'lr' is not an argument (expected --name: value)"),
        ("MODEL_ARGS: {1: 1}", "{path}: MODEL_ARGS: 1 is not an argument (expected --name: value)"),
        (
            "MODEL_ARGS: {--a: {b: 1}}",
            "{path}: MODEL_ARGS: --a must be a value or a list of values, found a mapping",
        ),
        (
            "MODEL_ARGS: {--a: [1, null]}",
            "{path}: MODEL_ARGS: --a must be a value or a list of values, found nothing in its list",
        ),
        ("MODEL_ARGS: {--a: []}", "{path}: MODEL_ARGS: --a is an empty list (null leaves it out)"),
        ("MODEL_ARGS: {--a: 2024-01-01}", "{path}: MODEL_ARGS: --a must be a value or a list of values, found date"),
        ("ENV_VARS: {A: [1]}", "{path}: ENV_VARS: A must be one value, found a list"),
        ("ENV_VARS: {1: 1}", "{path}: ENV_VARS: 1 is not the name of a variable"),
        ("defaults: {a: 1}", "{path}: defaults must be a file name or a list of file names"),
        ("defaults: none.yaml", "{folder}/none.yaml does not exist"),
        (
            "MODEL_ARGS: {--save: '${RMOE_NOWHERE}/x'}",
            "{path}: --save: the environment variable RMOE_NOWHERE is not set",
        ),
    ],
)
def test_errors_are_one_clear_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert isinstance(caught.value, UsageError)
    assert str(caught.value) == "configuration file " + message.format(path=path, folder=tmp_path)


def test_errors_about_the_file_itself(tmp_path):
    with pytest.raises(ConfigError, match="configuration file .*/none.yaml does not exist$"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory$"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text$"):
        load_config(tmp_path / "binary")


def test_a_circle_of_defaults_is_an_error(tmp_path):
    a = write(tmp_path, "defaults: b.yaml", "a.yaml")
    b = write(tmp_path, "defaults: a.yaml", "b.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(a)
    assert str(caught.value) == f"configuration files include each other in a circle: {a} -> {b} -> {a}"


def known(*options):
    return lambda option: option in options


@pytest.mark.parametrize(
    ("file", "typed", "expected"),
    [
        ("--lr 1 --seed 2", "--lr 3", "--seed 2 --lr 3"),
        ("--lr 1 --seed 2", "--lr=3", "--seed 2 --lr=3"),
        ("--lr=1 --seed 2", "--lr 3", "--seed 2 --lr 3"),
        ("--data-path 1 a 2 b --seed 2", "--data-path c", "--seed 2 --data-path c"),
        ("--seed 2", "", "--seed 2"),
        ("", "--seed 2", "--seed 2"),
        ("--lr 1 --betas -1 2", "--lr -5", "--betas -1 2 --lr -5"),
        # an option whose name begins like another's is another option
        ("--save a --save-interval 5", "--save b", "--save-interval 5 --save b"),
        # taking back
        ("--load x --seed 2", "--load=null", "--seed 2"),
        ("--load x --seed 2", "--load=false", "--seed 2 --load=false"),
        ("--swiglu --seed 2", "--swiglu=false", "--seed 2"),
        ("--swiglu --seed 2", "--no-swiglu", "--seed 2"),
        ("--no-fusion --seed 2", "--fusion", "--seed 2"),
        ("--swiglu", "--no-swiglu --seed 2", "--seed 2"),
        # the opposite is Megatron's own argument
        ("--stream --seed 2", "--no-stream", "--seed 2 --no-stream"),
        # no flag of the file's, so none of our business
        ("--rope 4 --seed 2", "--no-rope", "--rope 4 --seed 2 --no-rope"),
        ("--seed 2", "--no-unknown", "--seed 2 --no-unknown"),
    ],
)
def test_command_line_beats_the_file(file, typed, expected):
    assert merge(file.split(), typed.split(), known("--no-stream", "--no-rope")) == expected.split()


def test_default_configuration_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(None) == DEFAULT_CONFIG
    assert find_config("configs/tiny.yaml") == DEFAULT_CONFIG  # from any folder
    arguments = load_config(DEFAULT_CONFIG).arguments
    assert arguments["--moe-router-type"] == "gru"
    assert arguments["--pipeline-model-parallel-size"] == 2


def test_a_file_in_the_working_directory_comes_before_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs", "MODEL_ARGS: {--seed: 1}", "tiny.yaml")
    assert load_config(find_config("configs/tiny.yaml")).arguments == {"--seed": 1}
