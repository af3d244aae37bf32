"""The doctor's checks: each looks at one thing and says how to mend it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.compat import self_check, versions
from rmoe_megablocks.doctor import probes
from rmoe_megablocks.doctor.probes import Torch

SET_UP = "bash launch/environment.sh"
#: What the main job imports besides torch and Megatron-Core, as setup.py has it.
LIBRARIES = {
    "numpy": "numpy",
    "psutil": "psutil",
    "pyyaml": "yaml",
    "yamlcore": "yamlcore",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
}
GIB = 2**30
Bounds = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: "ok"; "fault" (the main job does not run); or, where it does without: "absent", "unused" (there, but of
            no use here), "broken" (there, but it fails) or "low" (less than is good).
        finding: what was found, in a few words.
        fix: the command or step that mends it, empty where nothing needs to be mended.
    """

    name: str
    state: str
    finding: str
    fix: str = ""


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """Python's version, which has to be a supported one."""
    found = ".".join(map(str, version))
    trouble = _trouble(found, versions.PYTHON)
    lowest = ".".join(map(str, versions.PYTHON[0]))
    if trouble:
        return Check("Python", "fault", trouble, f"install Python {lowest}, then {SET_UP}")
    return Check("Python", "ok", f"{found} ({sys.executable}){_untried(found, versions.PYTHON)}")


def check_torch(torch: Torch) -> Check:
    """torch: its version, and that it can be imported."""
    version = probes.version("torch")
    if version is None:
        return Check("torch", "fault", "not installed", SET_UP)
    trouble = _trouble(version, versions.TORCH) or torch.trouble
    if trouble:
        return Check("torch", "fault", trouble, SET_UP)
    return Check("torch", "ok", version + _untried(version, versions.TORCH))


def check_cuda(torch: Torch) -> Check:
    """What torch was built for; a toolkit on the machine is mentioned and decides nothing."""
    toolkit = shutil.which("nvcc") or (os.environ.get("CUDA_HOME") or "")
    aside = f"; toolkit at {toolkit}" + ("" if torch.gpus else " (not used: no GPU)") if toolkit else ""
    if not torch.cuda:
        fix = "" if not probes.nvidia_devices() else f"RMOE_TORCH_SPEC=<a CUDA build of torch> {SET_UP}"
        return Check("CUDA", "absent", "torch is built without CUDA" + aside, fix)
    return Check("CUDA", "ok" if torch.gpus else "unused", f"torch is built for {torch.cuda}" + aside)


def check_gpus(gpus: Sequence[str]) -> Check:
    """The GPUs that torch can use."""
    if gpus:
        kinds = {kind: gpus.count(kind) for kind in gpus}
        return Check("GPUs", "ok", ", ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    if probes.nvidia_devices():
        return Check(
            "GPUs",
            "unused",
            "there is an NVIDIA device, but torch cannot use it",
            "compare the driver (nvidia-smi) with torch's CUDA; see CUDA_VISIBLE_DEVICES; in a container: --gpus all",
        )
    return Check("GPUs", "absent", "none: runs use the CPU over gloo")


def check_megatron() -> Check:
    """Megatron-Core: a supported release, with its training loop."""
    version = probes.version("megatron-core")
    fix = f"pip install 'megatron-core~={'.'.join(map(str, versions.MEGATRON[0]))}.0'"
    if version is None:
        return Check("Megatron-Core", "fault", "not installed", fix)
    trouble = _trouble(version, versions.MEGATRON)
    if trouble:
        return Check("Megatron-Core", "fault", trouble, fix)
    if not probes.there("megatron.training"):
        return Check("Megatron-Core", "fault", f"{version} without megatron.training", fix)
    folder = versions.megatron_folder()
    missing = self_check.missing_names(folder) if folder else []
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        return Check("Megatron-Core", "fault", f"{version} lacks {missing[0]}{more}", fix)
    return Check("Megatron-Core", "ok", version + _untried(version, versions.MEGATRON))


def check_libraries() -> list[Check]:
    """The small libraries: one line if all are there, else one for what is missing."""
    missing = [name for name, module in LIBRARIES.items() if not probes.there(module)]
    if missing:
        fix = f"{sys.executable} -m pip install {' '.join(missing)}"
        return [Check("libraries", "fault", f"missing: {', '.join(missing)}", fix)]
    return [Check("libraries", "ok", ", ".join(LIBRARIES))]


def check_transformer_engine(gpu: bool) -> Check:
    """Transformer Engine: fused attention and norms, grouped experts; its use needs a GPU."""
    fix = "pip install --no-build-isolation 'transformer-engine[pytorch]'" if gpu else ""
    return _optional(
        "Transformer Engine", "transformer_engine", "transformer_engine.pytorch", "transformer-engine", fix
    )


def check_apex(gpu: bool) -> Check:
    """Apex: NVIDIA's has compiled parts; what PyPI calls apex is another project, and Megatron trips over it."""
    if not probes.there("apex"):
        fix = "not needed; NVIDIA's is built from github.com/NVIDIA/apex" if gpu else ""
        return Check("Apex", "absent", "not installed", fix)
    if not probes.there("apex.optimizers") and not probes.there("apex.multi_tensor_apply"):
        return Check("Apex", "unused", "another project of that name, not NVIDIA's", "pip uninstall apex")
    parts = [
        name for name in ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda") if probes.there(name)
    ]
    if not parts:
        return Check("Apex", "unused", "NVIDIA's, without its compiled parts", "build it from github.com/NVIDIA/apex")
    return Check("Apex", "ok", f"NVIDIA's, with {', '.join(parts)}")


def check_triton(gpu: bool) -> Check:
    """Triton comes with torch; its kernels need a GPU."""
    version = probes.version("triton")
    if version is None:
        return Check("Triton", "absent", "not installed", "pip install triton" if gpu else "")
    return Check("Triton", "ok" if gpu else "unused", version if gpu else f"{version} (not used: no GPU)")


def check_megablocks() -> list[Check]:
    """MegaBlocks, and its two compiled parts, each of which it can do without through our stand-ins."""
    version = probes.version("megablocks")
    if version is None:
        return [Check("MegaBlocks", "absent", "not installed", "rmoe install megablocks")]
    checks = [Check("MegaBlocks", "ok", version)]
    for module in ("megablocks_ops", "grouped_gemm"):
        found = _optional(f"MegaBlocks' {module}", module, module, module, "", "stand-in in plain torch")
        checks.append(found)
    return checks


def check_machine() -> Check:
    """Cores that this process may use, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB memory"
    except (ValueError, OSError):  # a system without these names: the line goes without
        memory = ""
    return Check("machine", "ok", f"{platform.system()} {platform.machine()}, {cores} cores{memory}")


def check_disk(folder: Path) -> Check:
    """Room for checkpoints where runs write."""
    try:
        folder = folder.resolve()
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:  # a working directory that was removed
        return Check("disk", "fault", f"the working directory is gone ({error.strerror})", "change to another folder")
    if not os.access(folder, os.W_OK):
        return Check("disk", "fault", f"cannot write to {folder}", "choose another folder with --runs-dir")
    if free < 1:
        return Check("disk", "fault", f"{free:.1f} GiB free in {folder}", "make room, or --runs-dir on another disk")
    # weights, master weights and two moments: 14 bytes a parameter
    note = "" if free > 60 else "a checkpoint of the 0.9B model takes 14 GiB: --runs-dir on another disk"
    return Check("disk", "ok", f"{free:.1f} GiB free in {folder}", note)


def check_shared_memory(folder: Path) -> Check:
    """/dev/shm, through which NCCL and data loaders talk within a machine."""
    if not folder.is_dir():
        return Check("shared memory", "ok", "no /dev/shm on this system")
    free = shutil.disk_usage(folder).free / GIB
    if free < 1:
        return Check("shared memory", "low", f"{free:.2f} GiB free", "docker run --shm-size=8g, or --ipc=host")
    return Check("shared memory", "ok", f"{free:.1f} GiB free")


def check_loopback(backend: str, processes: int) -> Check:
    """``processes`` processes of this machine sum a tensor over ``backend``."""
    name, trouble = f"{backend} loopback", probes.loopback_trouble(backend, processes)
    if not trouble:
        return Check(name, "ok", f"{processes} process{'es' * (processes != 1)} summed a tensor")
    variable = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}[backend]
    return Check(name, "fault", trouble, f"export {variable}=lo on one machine, else its network interface's name")


def _optional(name: str, module: str, imported: str, distribution: str, fix: str, without: str = "") -> Check:
    if not probes.there(module):
        return Check(name, "absent", "not installed" + (f": {without}" if without else ""), fix)
    trouble = probes.import_trouble(imported)
    if trouble:
        return Check(name, "broken", trouble, fix or f"pip uninstall {distribution}")
    return Check(name, "ok", probes.version(distribution) or "installed")


def _trouble(version: str, bounds: Bounds) -> str:
    return f"{version}, but {versions.text(bounds)} are supported" if versions.is_older(version, bounds) else ""


def _untried(version: str, bounds: Bounds) -> str:
    return f" (never tried: {versions.text(bounds)} were)" if versions.is_newer(version, bounds) else ""
