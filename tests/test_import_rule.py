"""Who may import whom (docs/architecture.md), read from the source of every module of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = "rmoe_megablocks"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
HOSTS = {
    "megatron": ("megatron",),
    "megablocks": ("megablocks", "stk", "grouped_gemm"),
    "huggingface": ("transformers", "safetensors", "huggingface_hub"),
}

# room -> the rooms that it may import, beside the ground floor
ALLOWED = {
    "kernels": (),
    "routing": ("kernels",),
    "torch_dist": (),
    "analysis": (
        *("compat", "data", "routing", "kernels", "megatron", "huggingface", "conversion", "evaluation"),
        *("torch_dist", "comparison"),
    ),
    "data": (),
    "compat": ("data", "routing", "kernels"),
    "megatron": ("compat", "data", "routing", "kernels", "planning", "torch_dist"),
    "megablocks": ("compat", "data", "routing", "kernels", "planning"),
    "huggingface": ("routing",),
    "launcher": ("compat", "data", "routing", "kernels", "megatron", "megablocks"),
    "planning": ("compat", "data", "routing", "kernels", "megatron", "launcher"),
    "conversion": ("compat", "data", "routing", "kernels", "megatron", "huggingface", "torch_dist"),
    "evaluation": ("compat", "data", "routing", "megatron", "huggingface", "conversion", "torch_dist"),
    "generation": ("data", "routing", "huggingface", "conversion", "evaluation"),
    "finetuning": ("data", "huggingface", "conversion", "evaluation"),
    "comparison": ("data", "routing", "launcher", "planning"),
    "sweep": ("launcher", "comparison"),
    "doctor": ("compat", "data", "routing", "kernels", "megatron", "megablocks", "launcher", "planning"),
}
# below analysis/, what it takes to record stays in recording/ and the command
RECORDERS = ("recording", "cli.py")
GROUND_FLOOR = ("errors.py", "process.py", "command_line.py", "yaml12.py", "run_lock.py")
FORBIDDEN = {room: ALLOWED.keys() - {room, *allowed} for room, allowed in ALLOWED.items()}
FORBIDDEN |= dict.fromkeys(GROUND_FLOOR, set(ALLOWED))
HOSTLESS = ("routing", "kernels", *GROUND_FLOOR)  # do not import the upstreams either


def imported(source: str, module: str) -> set[str]:
    """Full names of all modules that ``source``, of the module of this name, imports, late imports included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def rooms(names: set[str]) -> set[str]:
    """The rooms of our package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith(PACKAGE + ".")}


def violations(room: str, names: set[str]) -> set[str]:
    bad = rooms(names) & (FORBIDDEN.get(room, set()) | {"cli"})
    if room in HOSTLESS:
        upstreams = {package for packages in HOSTS.values() for package in packages}
        bad |= {name for name in names if name.split(".")[0] in upstreams}
    return bad


MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def test_every_room_is_here():
    assert {path.parts[0] for path in MODULES if len(path.parts) > 1} == ALLOWED.keys()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    names = imported((ROOT / path).read_text(), ".".join([PACKAGE, *path.with_suffix("").parts]))
    assert not violations(path.parts[0], names)


def test_only_recorders_reach_models():
    for path in MODULES:
        if path.parts[0] == "analysis" and len(path.parts) > 1 and path.parts[1] not in RECORDERS:
            names = imported((ROOT / path).read_text(), ".".join([PACKAGE, *path.with_suffix("").parts]))
            assert rooms(names) <= {"analysis", "routing", "comparison", "errors", "process", "command_line"}, path


@pytest.mark.parametrize(
    "room, source",
    [
        ("routing", "from rmoe_megablocks.megatron import arguments"),
        ("kernels", "def late():\n    import megatron.core"),
        ("megatron", "from rmoe_megablocks.launcher.config import merge"),
        ("megatron", "from rmoe_megablocks import launcher"),
        ("planning", "from rmoe_megablocks import cli"),
        ("routing", "from ..megablocks import layer"),
        ("routing", "import transformers"),
        ("huggingface", "from rmoe_megablocks.megatron import balancing"),
    ],
)
def test_a_climbing_import_is_found(room, source):
    assert violations(room, imported(source, f"{PACKAGE}.{room}.somewhere"))
