#!/usr/bin/env bash
# The tests with other releases, in an environment of its own that is kept for the next time:
#
#   bash tests/versions.sh torch=2.9.1 python=3.13 [megatron=0.19.0] [folder=DIR] [-- PYTEST ARGUMENTS]
#   bash tests/versions.sh torch=2.14.1 megatron=/path/to/Megatron-LM -- tests/existing_job tests/distributed
#
# torch and python are versions (default: 2.11.0 and 3.12), megatron is a version of megatron-core or the folder of a
# checkout, which then comes first on the path. Without anything behind "--" all tests run; "-- none" runs none. An
# environment with CUDA's libraries takes about 7 GB below .versions/, or in DIR.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf 'versions: %s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 2
}

torch=2.11.0 python=3.12 megatron=0.19.2 folder=
while [ $# -gt 0 ]; do
    case $1 in
        torch=* | python=* | megatron=* | folder=*) printf -v "${1%%=*}" '%s' "${1#*=}" ;;
        --)
            shift
            break
            ;;
        -h | --help)
            sed -n '2,/^set/{/^# \{0,1\}/s///p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "$1 is none of torch=, python=, megatron=, folder= and --" ;;
    esac
    shift
done

checkout=
if [ -d "$megatron" ]; then
    [ -f "$megatron/megatron/core/package_info.py" ] || fail "megatron=$megatron: no Megatron-LM checkout"
    checkout=$(cd -- "$megatron" && pwd -P)
    megatron=0.19.2 # beside it, for its compiled helper and what it requires
elif [[ ! $megatron =~ ^[0-9] ]]; then
    fail "megatron=$megatron: neither a version nor a folder"
fi
folder=${folder:-$root/.versions/python$python-torch$torch-megatron$megatron}

# Prints a Python of the version that was asked for.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "python$python" "$(pyenv root 2>/dev/null)"/versions/"$python"*/bin/python \
        ~/.pyenv/versions/"$python"*/bin/python "$(uv python find "$python" 2>/dev/null)"; do
        [ -n "$candidate" ] || continue
        if [[ $("$candidate" --version 2>/dev/null) == "Python $python"* ]]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

requirements() {
    "$folder/bin/python" - "$root/setup.py" <<'PYTHON'
import sys

block = open(sys.argv[1]).read().partition("# >>> requirements")[2].partition("# <<< requirements")[0]
names = {}
exec(block, names)
print("\n".join(names["INSTALL_REQUIRES"] + names["EXTRAS_REQUIRE"]["test"]))
PYTHON
}

# The requirements as the pinned releases satisfy them; MegaBlocks; the repository itself, for the rmoe command.
make_environment() {
    local wanted
    if [ ! -x "$folder/bin/python" ]; then
        python=$(find_python) || fail "no Python $python found (python$python, pyenv, uv, or name it in PYTHON)"
        say "making $folder with $python"
        "$python" -m venv "$folder"
    fi
    mapfile -t wanted < <(requirements)
    say "installing torch $torch and megatron-core $megatron into $folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$torch" \
        "megatron-core==$megatron" "setuptools>=64" "${wanted[@]}"
    (cd -- "$root" && "$folder/bin/python" -m rmoe_megablocks.compat.megablocks.install)
}

stamp="torch $torch megatron-core $megatron $(cksum <"$root/setup.py")"
if [ "$(cat -- "$folder/versions.txt" 2>/dev/null)" != "$stamp" ]; then
    make_environment
    printf '%s\n' "$stamp" >"$folder/versions.txt"
fi
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$root"
[ "${1:-}" != none ] || exit 0

export PYTHON=$folder/bin/python
unset VIRTUAL_ENV CONDA_PREFIX
[ -z "$checkout" ] || export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" -W ignore -c 'import megatron.core as m, platform, torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, Megatron-Core {m.__version__} of {m.__path__[0]}")'
exec bash "$root/tests/run.sh" "$@"
