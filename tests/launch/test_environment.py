"""launch/environment.sh: which Python it takes, and when it makes one. The Pythons here are shell scripts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEGABLOCKS = "rmoe_megablocks.compat.megablocks.install"  # the set-up's last step

# Answers what environment.sh asks of a Python: its version, the probe ("-"), "-m venv" and "-m pip".
FAKE_PYTHON = """#!/bin/bash
home=@HOME@
case "$1" in
    --version) echo "Python @VERSION@" ;;
    -c) case "$2" in *version_info*) [[ @VERSION@ == 3.1[23].* ]] ;; *) exit 0 ;; esac ;;
    -) echo "@PROBE@" ;;
    -m)
        echo "$2" >>"$home/calls"
        case "$2" in
            venv)
                mkdir -p "$3/bin"
                printf 'version = @VERSION@\\n' >"$3/pyvenv.cfg"
                cp "$0" "$3/bin/python"
                ;;
            pip)
                echo "pip says: $*"
                sleep 0.2
                [ ! -e "$home/interrupt" ] || kill -9 $PPID "$(ps -o ppid= $PPID)"
                [ ! -e "$home/pip-fails" ]
                ;;
        esac
        ;;
esac
"""


class Machine:
    """A repository with only what the script reads, and a PATH with the Pythons a test puts there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder / "repository"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "environment.sh", self.root / "launch")
        shutil.copy(ROOT / "setup.py", self.root)
        self.variables: dict[str, str] = {}
        # hide what the real machine has under these names
        for name in ("python", "python3", "python3.12", "python3.13"):
            self.python(self.bin / name, version="3.11.4", probe="is Python 3.11")
        for name in ("pyenv", "uv"):
            self.script(self.bin / name, "#!/bin/bash\nexit 1\n")

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, path: Path, version: str = "3.12.9", probe: str = "has no torch") -> Path:
        text = FAKE_PYTHON.replace("@HOME@", str(self.folder)).replace("@VERSION@", version).replace("@PROBE@", probe)
        return self.script(path, text)

    def start(self) -> subprocess.Popen[str]:
        env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder), **self.variables}
        return subprocess.Popen(
            ["bash", str(self.root / "launch" / "environment.sh")],
            env=env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self) -> tuple[int, str, str]:
        process = self.start()
        out, err = process.communicate(timeout=30)
        return process.returncode, out.strip(), err

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        calls = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return calls


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("variable", ["PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", None])
def test_a_fit_active_python_is_used_as_it_is(machine, variable):
    path = machine.folder / "env" / "bin" / "python" if variable else machine.bin / "python3"
    machine.python(path, probe=f"ok {path}")
    if variable:
        machine.variables[variable] = str(path if variable == "PYTHON" else path.parent.parent)
    assert machine.run() == (0, str(path), "")
    assert machine.calls() == [] and not machine.venv.exists()


def test_an_active_python_that_lacks_little_is_told_so(machine):
    path = machine.python(machine.folder / "env/bin/python", probe="lacks psutil tqdm")
    machine.variables["VIRTUAL_ENV"] = str(machine.folder / "env")
    assert machine.run() == (
        1,
        "",
        f"rmoe: error: {path} has torch and megatron-core but lacks psutil tqdm: {path} -m pip install psutil tqdm\n",
    )
    assert not machine.venv.exists()


def test_without_python_312_one_line_says_how_to_get_it(machine):
    code, out, err = machine.run()
    assert (code, out) == (1, "")
    assert err.startswith("rmoe: error: no Python 3.12 or 3.13 found") and err.count("\n") == 1
    assert not machine.venv.exists()


def test_set_up_happens_once_and_again_when_requirements_change(machine):
    machine.python(machine.bin / "python3.12")
    code, out, err = machine.run()
    assert (code, out) == (0, str(machine.venv / "bin" / "python"))
    assert [line.split()[1] for line in err.splitlines()] == ["making", "installing", "environment"]
    assert machine.calls() == ["venv", "pip", MEGABLOCKS]
    assert "torch==2.11.0 megatron-core~=0.19.2 -e .[test]" in (machine.venv / "setup.log").read_text()

    assert machine.run() == (0, out, "")
    assert machine.calls() == []

    setup = machine.root / "setup.py"
    setup.write_text(setup.read_text() + "\n# not a requirement\n")
    assert machine.run() == (0, out, "")
    setup.write_text(setup.read_text().replace("tqdm>=4.60", "tqdm>=4.61"))
    assert machine.run()[0] == 0
    assert machine.calls() == ["pip", MEGABLOCKS]


def test_an_interrupted_set_up_starts_afresh(machine):
    machine.python(machine.bin / "python3.12")
    (machine.folder / "interrupt").touch()
    assert machine.run()[0] != 0
    assert machine.calls() == ["venv", "pip"]
    (machine.folder / "interrupt").unlink()
    assert machine.run()[0] == 0
    assert machine.calls() == ["venv", "pip", MEGABLOCKS]
    assert machine.run()[2] == ""


def test_a_failed_pip_shows_its_last_lines_and_is_tried_again(machine):
    machine.python(machine.bin / "python3.12")
    (machine.folder / "pip-fails").touch()
    code, out, err = machine.run()
    assert (code, out) == (1, "")
    assert "rmoe: error: pip could not install the requirements; the last lines of" in err and "pip says:" in err
    (machine.folder / "pip-fails").unlink()
    assert machine.run()[0] == 0


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_launches_at_once_set_up_once(machine):
    machine.python(machine.bin / "python3.12")
    processes = [machine.start() for _ in range(3)]
    assert [process.communicate(timeout=30)[0].strip() for process in processes] == [
        str(machine.venv / "bin/python")
    ] * 3
    assert machine.calls() == ["venv", "pip", MEGABLOCKS]


def test_a_venv_made_by_hand_is_used_if_fit(machine):
    path = machine.python(machine.venv / "bin/python", probe="ok x")
    assert machine.run() == (0, str(path), "")
    machine.variables["VIRTUAL_ENV"] = str(machine.venv)  # also when it is the active one
    assert machine.run() == (0, str(path), "")
    assert machine.calls() == []


def test_somebody_elses_venv_is_left_alone(machine):
    machine.python(machine.bin / "python3.12")
    machine.python(machine.venv / "bin/python", version="3.11.4", probe="is Python 3.11")
    code, _, err = machine.run()
    assert code == 1 and f"{machine.venv} is there, but is no environment of Python 3.12 or 3.13" in err
    assert (machine.venv / "bin/python").exists()


def test_pyenv_uv_and_python_are_asked(machine):
    """A shim that does not answer is passed over; then pyenv's versions, uv's, python3."""
    version = machine.python(machine.folder / "pyenv/versions/3.12.9/bin/python")
    machine.script(machine.bin / "pyenv", f"#!/bin/bash\necho {machine.folder}/pyenv\n")
    machine.script(machine.bin / "python3.12", "#!/bin/bash\necho 'command not found' >&2; exit 127\n")
    assert f"({version})" in machine.run()[2]

    shutil.rmtree(machine.venv)
    machine.script(machine.bin / "pyenv", "#!/bin/bash\nexit 1\n")
    uv = machine.python(machine.folder / "uv/python3.12")
    machine.script(machine.bin / "uv", f"#!/bin/bash\n[ \"$*\" = 'python find 3.12' ] && echo {uv}\n")
    assert f"({uv})" in machine.run()[2]

    shutil.rmtree(machine.venv)
    machine.script(machine.bin / "uv", "#!/bin/bash\nexit 2\n")
    python3 = machine.python(machine.bin / "python3")
    assert f"({python3})" in machine.run()[2]


def test_the_choice_of_torch_is_the_users(machine):
    machine.python(machine.bin / "python3.12")
    machine.variables["RMOE_TORCH_SPEC"] = "torch==2.11.0+cpu"
    assert machine.run()[0] == 0
    assert "torch==2.11.0+cpu megatron-core~=0.19.2 -e .[test]" in (machine.venv / "setup.log").read_text()


def test_sourcing_prepares_a_terminal(machine):
    path = machine.python(machine.folder / "env/bin/python", probe=f"ok {machine.folder}/env/bin/python")
    env = {"PATH": f"{machine.bin}:/usr/bin:/bin", "VIRTUAL_ENV": str(machine.folder / "env")}
    command = f'. {machine.root}/launch/environment.sh; echo "$RMOE_PYTHON"; command -v python; set -o | grep errexit'
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, cwd=machine.folder)
    assert done.stdout.split() == [str(path), str(path), "errexit", "off"]


def test_the_real_probe_knows_this_python():
    """The interpreter of the tests has everything the probe asks for."""
    import sys

    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(ROOT / "launch/environment.sh")], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).exists()
