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

ROOMS = (
    "launcher",
    "megatron",
    "megablocks",
    "huggingface",
    "compat",
    "planning",
    "data",
    "doctor",
    "routing",
    "kernels",
    "conversion",
    "evaluation",
    "generation",
    "torch_dist",
)
AFTER = ("evaluation", "generation")  # what is done with a trained model
GROUND_FLOOR = ("errors.py", "process.py", "command_line.py", "yaml12.py", "run_lock.py")

# room -> rooms and foreign packages that nothing in it imports
FORBIDDEN = {
    "routing": {*ROOMS} - {"routing", "kernels"},
    "kernels": {*ROOMS} - {"kernels"},
    "megatron": {"launcher", "megablocks", "huggingface", "doctor", "conversion", *AFTER},
    "megablocks": {"launcher", "megatron", "huggingface", "doctor", "conversion", "torch_dist", *AFTER},
    "huggingface": {*ROOMS} - {"huggingface", "routing"},
    "compat": {
        "launcher",
        "megatron",
        "megablocks",
        "huggingface",
        "planning",
        "doctor",
        "conversion",
        "torch_dist",
        *AFTER,
    },
    "data": {*ROOMS} - {"data"},
    "launcher": {"planning", "doctor", "conversion", *AFTER},
    "torch_dist": {*ROOMS} - {"torch_dist"},
    "conversion": {"launcher", "megablocks", "planning", "doctor", *AFTER},
    "evaluation": {"launcher", "megablocks", "planning", "doctor", "generation"},
    "generation": {"launcher", "megatron", "megablocks", "planning", "doctor"},
    **dict.fromkeys(GROUND_FLOOR, set(ROOMS)),
}
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


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    names = imported((ROOT / path).read_text(), ".".join([PACKAGE, *path.with_suffix("").parts]))
    assert not violations(path.parts[0], names)


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
