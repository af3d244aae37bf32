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
        *("--num-layers", "4", "--swiglu", "--lr", "2.0e-3"),
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
        ("MODEL_ARGS: {--a: !!int x}", "{path}: line 1: 'x' is not a whole number that can be read"),
        (
            "%YAML 1.1\n---\nMODEL_ARGS: {}",
            "{path}: %YAML 1.1: this file is read as YAML 1.2, leave the directive out",
        ),
        (
            "base: &base {--a: 1}\nMODEL_ARGS:\n  <<: *base",
            "{path}: line 3: merge keys (<<) are not part of YAML 1.2: use 'defaults: other.yaml'",
        ),
        ("MODEL_ARGS:\n  ? [a]\n  : 1", "{path}: line 2: a key has to be a word"),
        ("MODEL_ARGS: {}\n---\nMODEL_ARGS: {}", "{path}: line 2: not valid YAML: but found another document"),
        ("--lr: 1", "{path}: line 1: --lr belongs under MODEL_ARGS"),
        ('MODEL_ARGS: {--a: "x\\0y"}', "{path}: line 1: --a: 'x\\x00y' has a NUL character"),
        ('ENV_VARS:\n  A: "x\\0y"', "{path}: line 2: A: 'x\\x00y' has a NUL character"),
        ("ENV_VARS: {A B: 1}", "{path}: line 1: ENV_VARS: 'A B' is not the name of a variable"),
        (
            "MODEL_ARG: {--a: 1}",
            "{path}: line 1: unknown key 'MODEL_ARG' (did you mean MODEL_ARGS?) "
            "(known: defaults, ENV_VARS, MODEL_ARGS)",
        ),
        ("MODEL_ARGS:\n  --a: 1\n  --b: 2\n  --a: 3", "{path}: line 4: duplicate key '--a'"),
        ("MODEL_ARGS: [1]", "{path}: line 1: MODEL_ARGS must be a mapping, found a list"),
        ("MODEL_ARGS: {lr: 1}", "{path}: line 1: MODEL_ARGS: 'lr' is not an argument (expected --lr: value)"),
        ("MODEL_ARGS: {1: 1}", "{path}: line 1: MODEL_ARGS: 1 is not an argument (expected --1: value)"),
        (
            "MODEL_ARGS: {--a: {b: 1}}",
            "{path}: line 1: MODEL_ARGS: --a must be a value or a list of values, found a mapping",
        ),
        (
            "MODEL_ARGS: {--a: [1, null]}",
            "{path}: line 1: MODEL_ARGS: --a must be a value or a list of values, found nothing in its list",
        ),
        ("MODEL_ARGS: {--a: []}", "{path}: line 1: MODEL_ARGS: --a is an empty list (null leaves it out)"),
        ("ENV_VARS: {A: [1]}", "{path}: line 1: ENV_VARS: A must be one value, found a list"),
        ("ENV_VARS: {1: 1}", "{path}: line 1: ENV_VARS: 1 is not the name of a variable"),
        ("defaults: {a: 1}", "{path}: line 1: defaults must be a file name or a list of file names"),
        ("defaults: none.yaml", "{path}: line 1: defaults: {folder}/none.yaml does not exist"),
        (
            "MODEL_ARGS: {--save: '${RMOE_NOWHERE}/x'}",
            "{path}: line 1: --save: the environment variable RMOE_NOWHERE is not set",
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


@pytest.mark.parametrize(
    ("spelled", "value", "word"),
    [
        # a number is what it is in YAML 1.2, and reaches Megatron as it is spelled
        ("010", 10, "010"),
        ("1e-4", 1e-4, "1e-4"),
        ("1.10", 1.1, "1.10"),
        ("12e4567", float("inf"), "12e4567"),
        ("-5", -5, "-5"),
        # Python does not read these spellings
        ("0o10", 8, "8"),
        ("0x1F", 31, "31"),
        (".inf", float("inf"), "inf"),
        # numbers, times, dates and booleans of YAML 1.1, and text here
        ("1:30", "1:30", "1:30"),
        ("1_000", "1_000", "1_000"),
        ("0b11", "0b11", "0b11"),
        ("2024-01-01", "2024-01-01", "2024-01-01"),
        ("2024-13-45", "2024-13-45", "2024-13-45"),
        *((word, word, word) for word in ("no", "No", "on", "yes", "off", "y", "n", "=")),
        ("'010'", "010", "010"),
        ('"true"', "true", "true"),
    ],
)
def test_values_are_those_of_yaml_1_2(tmp_path, spelled, value, word):
    config = load_config(write(tmp_path, f"ENV_VARS:\n  A: {spelled}\nMODEL_ARGS:\n  --a: {spelled}"))
    assert (config.arguments, type(config.arguments["--a"]) is str) == ({"--a": value}, isinstance(value, str))
    assert config.env == {"A": word}
    assert to_argv(config.arguments) == ([f"--a={word}"] if word.startswith("-") else ["--a", word])


@pytest.mark.parametrize("spelled", ["null", "Null", "~", "", "false", "False", "FALSE"])
def test_what_leaves_an_argument_out(tmp_path, spelled):
    assert to_argv(load_config(write(tmp_path, f"MODEL_ARGS:\n  --a: {spelled}")).arguments) == []


def test_anchors_stand_for_their_values(tmp_path):
    assert load_config(write(tmp_path, "MODEL_ARGS: {--a: &x 07, --b: *x}")).arguments == {"--a": 7, "--b": 7}


def test_a_variable_of_the_defaults_is_taken_back_by_null(tmp_path):
    write(tmp_path, "ENV_VARS: {A: 1, B: 1}", "base.yaml")
    assert load_config(write(tmp_path, "defaults: base.yaml\nENV_VARS: {A: null}")).env == {"B": "1"}


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    assert load_config(write(tmp_path, "MODEL_ARGS: {--save: ~/x, --load: a~/b}")).arguments == {
        "--save": "/me/x",
        "--load": "a~/b",
    }


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
        # of what is typed the last one wins
        ("", "--lr 1 --seed 2 --lr 3", "--seed 2 --lr 3"),
        ("--seed 2", "--lr 1 --lr=null", "--seed 2"),
        ("--seed 2", "--swiglu --swiglu=false", "--seed 2"),
        # what takes nothing back by name may do so under another, which the parser knows
        ("--save-interval 5", "--persistent-save-interval=null", "--save-interval 5 --persistent-save-interval=null"),
        ("--seed 2", "--swiglu=false --bf16=true", "--seed 2 --swiglu=false --bf16=true"),
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
