"""Annotations of an instance: whose they are, and what ours can be."""

from __future__ import annotations

import pytest

from ambi.core.errors import InvalidRequest
from ambi.core.model import Isolation
from ambi.engine import annotation, security
from ambi.engine.body import Body
from ambi.linux.seccomp_profile import default_profile

FAMILY = [{"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}]  # AF_VSOCK


def host(**given: str) -> Body:
    return Body("HostConfig", {"Annotations": {name.replace("_", "."): value for name, value in given.items()}})


def test_others_pass_and_ours_are_checked() -> None:
    for isolation in Isolation:
        annotation.check(host(com_example="x"), isolation)
    for value in ("auto", "3", "4294967294"):
        annotation.check(host(ambi_vsock=value), Isolation.VM)
    for isolation, given, text in (
        (Isolation.CONTAINER, host(ambi_vsock="auto"), "not supported for a container"),
        (Isolation.VM, host(ambi_vsock="2"), "ambi.vsock=2 is no number"),
        (Isolation.VM, host(ambi_vsock="4294967295"), "is no number"),
        (Isolation.VM, host(ambi_vsock="yes"), "ambi.vsock=yes is no number"),
        (Isolation.VM, host(ambi_vsock=""), "is no number"),
        (Isolation.VM, host(ambi_init="1"), "ambi.init means nothing"),
        (Isolation.VM, Body("HostConfig", {"Annotations": {"": "x"}}), "without a name"),
    ):
        with pytest.raises(InvalidRequest, match=text) as caught:
            annotation.check(given, isolation)
        assert caught.value.hint


def test_sockets_to_the_host_pass_the_filter_of_a_vm_that_asks_for_them_alone() -> None:
    options = security.SecurityOptions(False, "")
    for given, wanted in ((host(), False), (host(ambi_vsock="auto"), True)):
        profile = security.seccomp(given, options, ("CAP_CHOWN",))
        assert profile is not None
        assert any(entry.get("args") == FAMILY for entry in profile["syscalls"]) is wanted
    assert default_profile(()) == default_profile((), vsock=False)
