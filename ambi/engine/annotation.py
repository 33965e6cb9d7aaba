"""`--annotation NAME=VALUE`: what config.json carries beside the specification, and what of it means something here.

`ambi.vsock`: a VM with AF_VSOCK sockets to its host. `auto` chooses its number there (CID), another value is that number.
"""

from __future__ import annotations

from ambi.core.errors import InvalidRequest
from ambi.core.model import Isolation
from ambi.engine.body import Body

OURS = "ambi."
VSOCK = "ambi.vsock"
AUTO = "auto"
_LOWEST_CID, _HIGHEST_CID = 3, 0xFFFF_FFFE  # linux/vm_sockets.h: 0 to 2 and the last one have meanings of their own


def wanted(host: Body) -> dict[str, str]:
    """HostConfig.Annotations."""
    return host.texts("Annotations")


def check(host: Body, isolation: Isolation) -> None:
    """Raises InvalidRequest for those of our own that mean nothing, or cannot be."""
    for name, value in wanted(host).items():
        if not name:
            raise InvalidRequest("an annotation without a name", hint="--annotation NAME=VALUE")
        if name != VSOCK:
            if name.startswith(OURS):
                raise InvalidRequest(f"--annotation {name} means nothing here", hint=f"{VSOCK} is the only one of ours")
            continue
        if isolation is not Isolation.VM:
            raise InvalidRequest(
                f"--annotation {name} is not supported for a container, whose kernel is the host's",
                hint="leave it out, or run it as a VM: --isolation vm",
            )
        if value != AUTO and not (value.isdecimal() and _LOWEST_CID <= int(value) <= _HIGHEST_CID):
            raise InvalidRequest(
                f"--annotation {name}={value} is no number of a VM",
                hint=f"{name}={AUTO}, or a number from {_LOWEST_CID} to {_HIGHEST_CID} that no other VM has",
            )


def has_vsock(host: Body) -> bool:
    return VSOCK in wanted(host)
