#!/usr/bin/env bash
# The Python environment of a run. Sourced by the other scripts, and good for a terminal too:
#
#   . launch/environment.sh       then python, torchrun and rmoe are the environment's
#   bash launch/environment.sh    sets up, says which Python it is
#
# The first of these that is fit is taken:
#   1. the active Python ($PYTHON, a virtual environment, conda, a container's), if it has torch, megatron-core (or a
#      Megatron-LM checkout on its path) and the few libraries beside them, in releases that
#      rmoe_megablocks/compat/versions.py takes: it is used as it is, and nothing is installed into it;
#   2. .venv in the repository, if complete;
#   3. a new .venv, made with a Python 3.12 or 3.13 found on this machine, with the releases pinned below.
#
# Variables: PYTHON           the Python to use (1.) or to make .venv with (3.)
#            RMOE_TORCH_SPEC  what pip installs as torch (default torch==2.11.0; a path to a wheel will do)
#            RMOE_MEGATRON_SPEC  and as Megatron (default megatron-core~=0.19.2)
#            PIP_INDEX_URL    and pip's other settings: where packages come from
#            RMOE_NEEDS       further distributions the environment must have (tests/run.sh: pytest ruff ...)
# Result:    RMOE_PYTHON, and PATH and PYTHONPATH where needed. No "set -e" here: this may be somebody's terminal.

_rmoe_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
_rmoe_venv=$_rmoe_root/.venv
_rmoe_stamp=$_rmoe_venv/.rmoe-complete # written last: its presence and content say that a set-up has finished
_rmoe_building=$_rmoe_venv/.rmoe-building # present while a set-up runs, and after one that was interrupted
_rmoe_log=$_rmoe_venv/setup.log

_rmoe_torch=torch==2.11.0
_rmoe_megatron=megatron-core~=0.19.2

_rmoe_say() { printf 'rmoe: %s\n' "$*" >&2; }

# Prints "ok EXECUTABLE" (behind a shim), "lacks NAME ..." (besides torch and megatron-core) or why it is not fit.
# Looks at metadata and files only: importing torch takes seconds.
_rmoe_probe() {
    "$1" - "${RMOE_NEEDS:-}" "$_rmoe_root/rmoe_megablocks/compat/versions.py" 2>/dev/null <<'PYTHON'
import importlib.metadata
import importlib.util
import runpy
import sys


def verdict(needs, versions):
    python = "%d.%d" % sys.version_info[:2]
    if versions["is_older"](python, versions["PYTHON"]):
        return "is Python " + python
    torch = versions["torch_version"]()
    if versions["is_older"](torch, versions["TORCH"]):
        return "has torch %s" % torch if torch else "has no torch"
    folder = versions["megatron_folder"]()
    megatron = folder and versions["megatron_version"](folder)
    if versions["is_older"](megatron, versions["MEGATRON"]):
        return "has megatron-core %s" % megatron if megatron else "has no megatron-core"
    modules = {"numpy": "numpy", "psutil": "psutil", "pyyaml": "yaml", "yamlcore": "yamlcore"}
    modules |= {"sentencepiece": "sentencepiece", "tqdm": "tqdm"}
    lacks = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    for name in needs:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacks.append(name)
    return "lacks " + " ".join(lacks) if lacks else "ok " + sys.executable


print(verdict(sys.argv[1].split(), runpy.run_path(sys.argv[2])))
PYTHON
}

_rmoe_active_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v -- "$PYTHON"
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        printf '%s\n' "$VIRTUAL_ENV/bin/python"
    elif [ -n "${CONDA_PREFIX:-}" ]; then
        printf '%s\n' "$CONDA_PREFIX/bin/python"
    else
        command -v python3 || command -v python
    fi
}

# What a finished set-up depends on: the requirements in setup.py, the choice of torch, the Python of .venv.
_rmoe_fingerprint() {
    {
        sed -n '/^# >>> requirements/,/^# <<< requirements/p' "$_rmoe_root/setup.py"
        printf '%s\n' "${RMOE_TORCH_SPEC:-$_rmoe_torch}" "${RMOE_MEGATRON_SPEC:-$_rmoe_megatron}"
        sed -n 's/^version *= *//p' "$_rmoe_venv/pyvenv.cfg" 2>/dev/null
    } | cksum
}

_rmoe_venv_complete() {
    [ -x "$_rmoe_venv/bin/python" ] && [ ! -e "$_rmoe_building" ] || return 1
    if [ -e "$_rmoe_stamp" ]; then
        [ "$(cat -- "$_rmoe_stamp")" = "$(_rmoe_fingerprint)" ]
    else
        # made by hand: judged by what is in it
        [[ $(_rmoe_probe "$_rmoe_venv/bin/python") == ok* ]]
    fi
}

_rmoe_is_python() {
    [ -n "$1" ] && "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' >/dev/null 2>&1
}

# Prints a Python 3.12 or 3.13. Each candidate is asked: pyenv's python3.12 is a shim that exists without answering.
_rmoe_find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.13; do
        if _rmoe_is_python "$candidate"; then
            command -v -- "$candidate"
            return
        fi
    done
    if command -v pyenv >/dev/null; then
        for candidate in "$(pyenv root 2>/dev/null)"/versions/3.1[23]*/bin/python; do
            if _rmoe_is_python "$candidate"; then
                printf '%s\n' "$candidate"
                return
            fi
        done
    fi
    if command -v uv >/dev/null; then
        for candidate in 3.12 3.13; do
            candidate=$(uv python find "$candidate" 2>/dev/null)
            if _rmoe_is_python "$candidate"; then
                printf '%s\n' "$candidate"
                return
            fi
        done
    fi
    for candidate in python3 python; do
        if _rmoe_is_python "$candidate"; then
            command -v -- "$candidate"
            return
        fi
    done
    return 1
}

_rmoe_failed() {
    _rmoe_say "error: $1; the last lines of $_rmoe_log:"
    tail -n 15 -- "$_rmoe_log" >&2
    return 1
}

_rmoe_build() {
    local base
    if [ -e "$_rmoe_building" ] || ! _rmoe_is_python "$_rmoe_venv/bin/python"; then
        if [ -e "$_rmoe_venv" ] && [ ! -e "$_rmoe_building" ] && [ ! -e "$_rmoe_stamp" ]; then
            _rmoe_say "error: $_rmoe_venv is there, but is no environment of Python 3.12 or 3.13: move it away," \
                "or activate yours"
            return 1
        fi
        # An interrupted pip can leave packages that look installed, so the set-up starts afresh (from pip's cache).
        if ! base=$(_rmoe_find_python); then
            _rmoe_say "error: no Python 3.12 or 3.13 found (looked at \$PYTHON, python3.12, python3.13, pyenv, uv, python3):" \
                "install one with your package manager, 'pyenv install 3.12' or 'uv python install 3.12', or name it in PYTHON"
            return 1
        fi
        _rmoe_say "making .venv with $("$base" --version 2>&1) ($base)"
        mkdir -p -- "$_rmoe_venv" && : >"$_rmoe_building" || return 1
        # The marker survives: --clear is done by hand, so that no moment is without it.
        find "$_rmoe_venv" -mindepth 1 -maxdepth 1 ! -name .rmoe-building -exec rm -rf -- {} +
        if ! "$base" -m venv "$_rmoe_venv" >"$_rmoe_log" 2>&1; then
            _rmoe_failed "$base cannot make a virtual environment (on Debian and Ubuntu: apt install python3.12-venv)"
            return 1
        fi
    else
        : >"$_rmoe_building" || return 1
    fi
    rm -f -- "$_rmoe_stamp"
    _rmoe_say "installing torch, megatron-core and the rest (several minutes the first time; log: $_rmoe_log)"
    if ! (cd -- "$_rmoe_root" && "$_rmoe_venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        "${RMOE_TORCH_SPEC:-$_rmoe_torch}" "${RMOE_MEGATRON_SPEC:-$_rmoe_megatron}" -e ".[test]") >>"$_rmoe_log" 2>&1; then
        _rmoe_failed "pip could not install the requirements"
        return 1
    fi
    # Optional, for --moe-backend megablocks: without it the rest works, and 'rmoe install megablocks' tries again.
    if ! "$_rmoe_venv/bin/python" -m rmoe_megablocks.compat.megablocks.install >>"$_rmoe_log" 2>&1; then
        _rmoe_say "MegaBlocks could not be installed (see $_rmoe_log); all but --moe-backend megablocks works"
    fi
    _rmoe_fingerprint >"$_rmoe_stamp.new" && mv -f -- "$_rmoe_stamp.new" "$_rmoe_stamp" && rm -f -- "$_rmoe_building" ||
        return 1
    _rmoe_say "environment ready"
}

# Two launches at once must not fill the same .venv; the second waits and finds it complete.
_rmoe_set_up() {
    if ! command -v flock >/dev/null; then
        _rmoe_build
        return
    fi
    (
        if ! flock -n 9; then
            _rmoe_say "waiting for another set-up of $_rmoe_venv"
            flock 9
        fi
        _rmoe_venv_complete || _rmoe_build
    ) 9>"$_rmoe_root/.venv.lock"
}

_rmoe_use() {
    RMOE_PYTHON=$1
    local bin
    bin=$(dirname -- "$1")
    case ":$PATH:" in
        ":$bin:"*) ;;
        *) PATH=$bin:$PATH ;;
    esac
    export RMOE_PYTHON PATH
    # An installed package is imported from where it is installed; otherwise the repository goes on the path. Not
    # asked in the repository's folder, where the current directory would answer, nor of a .venv set up here.
    local question='import importlib.util as u, sys; sys.exit(u.find_spec("rmoe_megablocks") is None)'
    if { [ "$1" != "$_rmoe_venv/bin/python" ] || [ ! -e "$_rmoe_stamp" ]; } && ! (cd / && "$1" -c "$question"); then
        export PYTHONPATH="$_rmoe_root${PYTHONPATH:+:$PYTHONPATH}"
    fi
}

rmoe_environment() {
    local active verdict
    active=$(_rmoe_active_python) || active=
    if [ -n "$active" ] && ! [ "$(dirname -- "$active")" -ef "$_rmoe_venv/bin" ]; then
        verdict=$(_rmoe_probe "$active") || verdict=
        case $verdict in
            ok*)
                _rmoe_use "${verdict#ok }"
                return
                ;;
            lacks*)
                _rmoe_say "error: $active has torch and megatron-core but $verdict: $active -m pip install ${verdict#lacks }"
                return 1
                ;;
        esac
    fi
    _rmoe_venv_complete || _rmoe_set_up || return 1
    _rmoe_use "$_rmoe_venv/bin/python"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    rmoe_environment || exit 1
    printf '%s\n' "$RMOE_PYTHON"
else
    rmoe_environment
fi
