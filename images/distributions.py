"""Where the packages of a Debian or Ubuntu release come from: sources.list lines, and the date of the archive's state.

What this host's own apt knows of the release comes first: its mirrors, proxies and keys serve here too. A release that it
does not know comes from the distribution's public mirror, and only when the distribution's keyring is there to check the
signatures by.
"""

from __future__ import annotations

import calendar
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import Internal, InvalidRequest, NotFound, Unavailable, Unsupported

_FIELDS = "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)|$(SUITE)"
_INFO = Path("/usr/share/distro-info")  # package distro-info-data: versions and code names
_RELEASE_BYTES, _ANSWER_S = 1 << 20, 20.0
_WORDS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-+.")


class Distribution(NamedTuple):
    """archives: of its public mirror, the address and what is put behind the release's name for each suite of it."""

    name: str
    origin: str
    components: tuple[str, ...]
    archives: tuple[tuple[str, str], ...]
    keyring: Path
    package: str


DEBIAN = Distribution(
    "debian", "Debian", ("main",),
    (
        ("http://deb.debian.org/debian", ""),
        ("http://deb.debian.org/debian", "-updates"),
        ("http://deb.debian.org/debian-security", "-security"),
    ),
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"), "debian-archive-keyring",
)  # fmt: skip
UBUNTU = Distribution(
    "ubuntu", "Ubuntu", ("main", "universe"),
    (
        ("http://archive.ubuntu.com/ubuntu", ""),
        ("http://archive.ubuntu.com/ubuntu", "-updates"),
        ("http://security.ubuntu.com/ubuntu", "-security"),
    ),
    Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"), "ubuntu-keyring",
)  # fmt: skip
_ALL = {it.name: it for it in (DEBIAN, UBUNTU)}


class Sources(NamedTuple):
    """lines: of a sources.list. epoch: the newest date of the release files, 0 when it is not known."""

    lines: list[str]
    epoch: int


def parse(suite: str) -> tuple[Distribution, str]:
    """`bookworm`, `debian:bookworm`, `debian:12`, `ubuntu:noble` or `ubuntu:24.04`: the distribution and the code name.

    Raises Unsupported for another distribution, InvalidRequest for what is no name.
    """
    name, colon, release = suite.rpartition(":")
    found = _ALL.get(name) if colon else DEBIAN
    if found is None:
        raise Unsupported(f"cannot make {suite}: only Debian and Ubuntu are made here", hint="for example debian:bookworm")
    check_word(release)
    return found, _code_name(found, release) if release[0].isdigit() else release


def check_word(word: str) -> None:
    if not word or not _WORDS.issuperset(word) or word[0] in "-+.":
        raise InvalidRequest(f"'{word}' is neither a suite nor a package")


def _code_name(distribution: Distribution, version: str) -> str:
    """By Debian's and Ubuntu's own tables: version, code name, series, ... a line."""
    try:
        rows = (_INFO / f"{distribution.name}.csv").read_text().splitlines()[1:]
    except OSError:
        rows = []
    for row in rows:
        number, _, rest = row.partition(",")
        if number.split()[:1] == [version]:  # `24.04 LTS`
            return rest.split(",")[1]
    raise NotFound(
        f"{distribution.name} {version} has no code name in {_INFO}",
        hint=f"give the code name, as in {distribution.name}:{'bookworm' if distribution is DEBIAN else 'noble'}",
    )


def sources(distribution: Distribution, release: str) -> Sources:
    """Raises NotFound (no such release), Unsupported (no apt, no keyring), Unavailable (no mirror)."""
    if shutil.which("apt-get") is None:
        raise Unsupported(f"apt is missing: {distribution.origin} images are made on Debian and Ubuntu hosts")
    return _of_this_host(distribution, release) or _of_the_mirror(distribution, release)


def _of_this_host(distribution: Distribution, release: str) -> Sources | None:
    """From apt's own lists; None when it knows nothing of the release."""
    asked = subprocess.run(
        ["apt-get", "indextargets", "--format", f"{_FIELDS}|$(METAKEY)|$(FILENAME)", "Identifier: Packages"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if asked.returncode:
        raise Internal(f"apt-get indextargets failed: {asked.stderr.strip()}")
    suites: dict[tuple[str, str, str], set[str]] = {}
    epoch = 0
    for row in asked.stdout.splitlines():
        origin, code, uri, wanted, component, key, *_, file = row.split("|")
        if origin == distribution.origin and component in distribution.components and _belongs(code, wanted, release):
            signed = f"[signed-by={key}] " if key.startswith("/") else ""
            suites.setdefault((signed, uri, wanted), set()).add(component)
            epoch = max(epoch, _date_beside(file))
    lines = [f"deb {signed}{uri} {wanted} {' '.join(sorted(names))}" for (signed, uri, wanted), names in suites.items()]
    return Sources(sorted(lines), epoch) if lines else None


def _belongs(code: str, wanted: str, release: str) -> bool:
    """The release itself, its updates and its security archive; no backports."""
    suites = (release, f"{release}-updates", f"{release}-security", f"{release}/updates")
    return code in suites or wanted in suites


def _date_beside(packages_file: str) -> int:
    """The `Date:` of the release file that belongs to an index in apt's lists."""
    base = Path(packages_file)
    stem = base.name.partition("_dists_")
    suite = stem[2]
    for component in ("_main_", "_universe_"):
        suite = suite.partition(component)[0]
    for name in ("InRelease", "Release"):
        try:
            return _date((base.parent / f"{stem[0]}_dists_{suite}_{name}").read_text(errors="replace"))
        except OSError:
            continue
    return 0


def _of_the_mirror(distribution: Distribution, release: str) -> Sources:
    if not os.access(distribution.keyring, os.R_OK):
        raise Unsupported(
            f"{distribution.origin} {release} cannot be checked: its keyring {distribution.keyring} is missing",
            hint=f"apt-get install {distribution.package}, or put the keyring there",
        )
    lines, epoch = [], 0
    for address, behind in distribution.archives:
        text = _release_file(distribution, f"{address}/dists/{release}{behind}/InRelease", release)
        epoch = max(epoch, _date(text))
        parts = " ".join(distribution.components)
        lines.append(f"deb [signed-by={distribution.keyring}] {address} {release}{behind} {parts}")
    return Sources(lines, epoch)


def _release_file(distribution: Distribution, url: str, release: str) -> str:
    """Only its date is used, before anybody has checked it: mmdebstrap checks the signature when it gets it again."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            return str(answer.read(_RELEASE_BYTES).decode(errors="replace"))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise NotFound(
                f"{distribution.origin} has no release {release}: {url} is not there",
                hint="look at the spelling; a release that has ended must be in /etc/apt/sources.list",
            ) from None
        raise Unavailable(f"{url} cannot be got: {error}", hint="try again later") from error
    except OSError as error:
        raise Unavailable(
            f"the mirror of {distribution.origin} cannot be reached: {url}: {error}",
            hint="see that the network is up, or name a mirror in /etc/apt/sources.list and run apt-get update",
        ) from error


def _date(text: str) -> int:
    for line in text.splitlines():
        if line.startswith("Date: "):
            try:
                return calendar.timegm(time.strptime(line[6:].strip(), "%a, %d %b %Y %H:%M:%S %Z"))
            except ValueError:
                return 0
    return 0
