"""Configuration files: what they say in YAML 1.2, what is no configuration, and files that name others."""

from tests.odd_inputs.case import Case


def configured(*arguments, env="", typed="--dry-run"):
    """A run whose configuration adds these lines of MODEL_ARGS to tiny.yaml; the dry run prints what became of it."""

    def files(folder):
        from tests.odd_inputs.server import REPOSITORY

        lines = "".join(f"  {line}\n" for line in arguments)
        variables = f"ENV_VARS:\n  {env}\n" if env else ""
        text = f"defaults: {REPOSITORY}/configs/tiny.yaml\n{variables}MODEL_ARGS:\n{lines}"
        (folder / "run.yaml").write_text(text)

    return {"command": f"pretrain --config run.yaml {typed}", "files": files}


def plain(text):
    return {"command": "pretrain --config run.yaml", "files": {"run.yaml": text}}


def says(*lines, absent=()):
    def check(outcome):
        printed = outcome.out.splitlines()
        for line in lines:
            assert f"#   {line}" in printed or f"export {line}" in printed, (line, outcome.out)
        for name in absent:
            assert not any(line.startswith(f"#   {name}") for line in printed), (name, outcome.out)
        assert not outcome.new, f"left behind: {outcome.new}"

    return check


CASES = [
    Case("YAML: 010 is ten", **configured("--seed: 010"), works=says("--seed 010")),
    Case("YAML: 0o10 is eight", **configured("--seed: 0o10"), works=says("--seed 8")),
    Case("YAML: 0x1F is 31", **configured("--seed: 0x1F"), works=says("--seed 31")),
    Case("YAML: 1e-3 is a number", **configured("--lr: 1e-3"), works=says("--lr 1e-3")),
    Case(
        "YAML: a name that is a number keeps its spelling",
        **configured("--run-name: 1.10"),
        works=says("--run-name 1.10"),
    ),
    Case(
        "YAML: 1:30 for a number",
        **configured("--train-iters: 1:30"),
        refused="--train-iters.*'1:30'.*run.yaml, line 3",
    ),
    Case("YAML: no for a name", **configured("--run-name: no"), works=says("--run-name no")),
    Case(
        "YAML: yes for a flag", **configured("--bf16: yes"), refused="--bf16.*'yes'.*true in a file.*run.yaml, line 3"
    ),
    Case("YAML: off for a flag", **configured("--swiglu: off"), refused="--swiglu.*'off'.*run.yaml, line 3"),
    Case("YAML: a date for a name", **configured("--run-name: 2024-01-01"), works=says("--run-name 2024-01-01")),
    Case("YAML: .nan for a number", **configured("--lr: .nan"), refused="--lr.*nan.*run.yaml, line 3"),
    Case(
        "YAML: null, ~ and nothing",
        **configured("--seed: ~", "--lr-warmup-fraction:"),
        works=says(absent=["--seed", "--lr-warmup"]),
    ),
    Case("YAML: None for null", **configured("--num-layers: None"), refused="--num-layers.*'None'.*run.yaml, line 3"),
    Case("YAML: a number in quotes", **configured("--seed: '5'"), works=says("--seed 5")),
    Case(
        "YAML: a key twice", **configured("--seed: 1", "--seed: 2"), refused="run.yaml: line 4: duplicate key '--seed'"
    ),
    Case("YAML: a merge key", **plain("x: &x {a: 1}\nMODEL_ARGS: {<<: *x}"), refused="run.yaml: line 2: merge keys"),
    Case("YAML: an anchor", **configured("--seed: &s 7", "--eval-iters: *s"), works=says("--seed 7", "--eval-iters 7")),
    Case("YAML: an unknown tag", **configured("--seed: !!python/name:os.system x"), refused="run.yaml: line 3: .*tag"),
    Case("YAML: %YAML 1.1", **plain("%YAML 1.1\n---\nMODEL_ARGS: {}"), refused="run.yaml: %YAML 1.1"),
    Case(
        "YAML: two documents",
        **plain("MODEL_ARGS: {}\n---\nMODEL_ARGS: {}"),
        refused="run.yaml: line 2: .*another document",
    ),
    Case("YAML: a tab", **plain("MODEL_ARGS:\n\t--seed: 1"), refused="run.yaml: line 2: "),
    Case("YAML: brackets without end", **plain("MODEL_ARGS: [1"), refused="run.yaml: line 1: "),
    Case("YAML: an empty value", **configured('--dataset: ""'), refused="--dataset.*empty.*run.yaml, line 3"),
    Case(
        "YAML: an empty variable", **configured("--dataset: ${NOWHERE:-}"), refused="--dataset.*empty.*run.yaml, line 3"
    ),
    Case(
        "YAML: a variable that is not set", **configured("--dataset: ${NOWHERE}"), refused="line 3: --dataset.*NOWHERE"
    ),
    Case("YAML: a list for one value", **configured("--seed: [1, 2]"), refused="--seed.*1 2.*run.yaml, line 3"),
    Case(
        "YAML: a mapping for a value", **configured("--seed: {a: 1}"), refused="run.yaml: line 3: .*--seed.*a mapping"
    ),
    Case(
        "YAML: null in a list",
        **configured("--data-path: [a, null]"),
        refused="run.yaml: line 3: .*--data-path.*nothing",
    ),
    Case("YAML: a key without --", **configured("lr: 1"), refused="run.yaml: line 3: .*'lr'.*--lr: value"),
    Case("YAML: a key with underscores", **configured("--num_layers: 1"), refused="--num_layers.*--num-layers.*line 3"),
    Case(
        "YAML: a misspelt key",
        **configured("--train-itres: 1"),
        refused="--train-itres.*--train-iters.*run.yaml, line 3",
    ),
    Case("YAML: a NUL character", **configured(r'--run-name: "a\0b"'), refused="line 3: --run-name.*NUL"),
    Case("YAML: half a character", **configured(r'--run-name: "\ud800"'), refused="line 3: --run-name.*characters"),
    Case(
        "YAML: an argument outside MODEL_ARGS", **plain("--seed: 1"), refused="line 1: --seed belongs under MODEL_ARGS"
    ),
    Case("YAML: an unknown section", **plain("MODEL_ARG: {}"), refused="line 1: .*MODEL_ARG.*did you mean MODEL_ARGS"),
    Case(
        "YAML: a list of arguments", **plain("MODEL_ARGS:\n  - --seed"), refused="line 1: MODEL_ARGS must be a mapping"
    ),
    Case("YAML: ENV_VARS with numbers", **configured("--seed: 1", env="A: 010"), works=says("A=010")),
    Case("YAML: ENV_VARS with true", **configured("--seed: 1", env="A: true"), works=says("A=1")),
    Case("YAML: ENV_VARS with a list", **configured("--seed: 1", env="A: [1]"), refused="line 3: ENV_VARS: A.*a list"),
    Case(
        "YAML: ENV_VARS with a bad name", **configured("--seed: 1", env="'A=B': 1"), refused="line 3: ENV_VARS: 'A=B'"
    ),
    Case("configuration: an empty file", **plain(""), refused="run.yaml is empty"),
    Case("configuration: comments alone", **plain("# nothing\n"), refused="run.yaml is empty"),
    Case("configuration: a word", **plain("hello"), refused="run.yaml: expected the keys defaults"),
    Case(
        "configuration: a folder",
        "pretrain --config x",
        files={"x": None},
        refused="configuration file x is a directory",
    ),
    Case(
        "configuration: bytes", "pretrain --config x", files={"x": b"\xff\xfe\x00\x80"}, refused="x is not UTF-8 text"
    ),
    Case("configuration: not there", "pretrain --config none.yaml", refused="none.yaml does not exist"),
    Case("configuration: an empty name", "pretrain --config=", refused="--config is empty"),
    Case("configuration: without --config", "pretrain run.yaml", files={"run.yaml": ""}, refused="--config run.yaml"),
    Case("defaults: itself", **plain("defaults: run.yaml"), refused="in a circle.*run.yaml -> .*run.yaml"),
    Case(
        "defaults: not there",
        **plain("defaults: none.yaml"),
        refused="run.yaml: line 1: defaults: none.yaml does not exist",
    ),
    Case("defaults: a number", **plain("defaults: 1"), refused="run.yaml: line 1: defaults must be a file name"),
    Case(
        "rmoe plan: a misread configuration",
        "rmoe plan x.yaml",
        files={"x.yaml": "MODEL_ARGS: 1"},
        refused="x.yaml: line 1",
    ),
]
