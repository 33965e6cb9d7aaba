"""What a test can need of the machine. Each function answers None when it is met, else why not."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _program(name: str, package: str) -> Callable[[], str | None]:
    def need() -> str | None:
        path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
        return None if shutil.which(name, path=path) else f"{name} is not installed (Debian package {package})"

    return need


def _root() -> str | None:
    return None if os.geteuid() == 0 else "not root"


@functools.cache
def _kvm() -> str | None:
    from hyper.kvm.probe import problem

    return problem()


def _kvm_device() -> str | None:
    """Met by one that only emulates, too."""
    return None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no /dev/kvm that may be opened"


@functools.cache
def _guest() -> str | None:
    missing = _program("qemu-system-x86_64", "qemu-system-x86")()
    if missing:
        return missing
    from tests.harness import guest_dir

    try:
        guest_dir()
    except Exception as error:  # whatever it was, it is the reason
        return f"no guest kernel: {error}"
    return None


def _cgroup_v2() -> str | None:
    return None if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "cgroup v2 is not the only hierarchy"


def _cgroup_v1() -> str | None:
    return None if Path("/sys/fs/cgroup/memory").exists() else "no cgroup v1 controllers"


@functools.cache
def _gcc_12() -> str | None:
    """The compiler that made the machine code which we carry as text; another one makes other bytes of the same source."""
    if missing := _program("gcc", "gcc")():
        return missing
    version = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    return None if version == "12" else f"gcc here is version {version}"


@functools.cache
def _compose_1() -> str | None:
    if missing := _program("docker-compose", "docker-compose")():
        return missing
    said = subprocess.run(["docker-compose", "version", "--short"], capture_output=True, text=True, check=False).stdout
    return None if said.startswith("1.") else f"docker-compose here is version {said.strip()}"


def _compose_2() -> str | None:
    path = ROOT / "build" / "peers" / "docker-compose"
    return None if path.exists() else f"{path} is missing (scripts/package/compose2.sh)"


NEEDS: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "qemu": _guest,
    "kvm": _kvm,
    "kvm-device": _kvm_device,
    "cgroup-v1": _cgroup_v1,
    "cgroup-v2": _cgroup_v2,
    "docker": _program("docker", "docker.io"),
    "dockerd": _program("dockerd", "docker.io"),
    "ufw": _program("ufw", "ufw"),
    "firewalld": _program("firewalld", "firewalld"),
    "iptables": _program("iptables", "iptables"),
    "runc": _program("runc", "runc"),
    "rpm": _program("rpmbuild", "rpm"),
    "berkeley": _program("db5.3_load", "db5.3-util"),
    "skopeo": _program("skopeo", "skopeo"),
    "podman": _program("podman", "podman"),
    "buildah": _program("buildah", "buildah"),
    "registry": _program("docker-registry", "docker-registry"),
    "compose-1": _compose_1,
    "compose-2": _compose_2,
    "strace": _program("strace", "strace"),
    "gcc": _program("gcc", "gcc"),
    "gcc-12": _gcc_12,
}


def machine_kind() -> str:
    """`kvm-lab` inside scripts/kvm-lab, `kvm` where KVM runs Linux, else `tcg`: the column of allowed_skips.txt."""
    return os.environ.get("AMBI_TEST_MACHINE") or ("tcg" if _kvm() else "kvm")
