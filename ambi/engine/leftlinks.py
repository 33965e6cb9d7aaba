"""The host's ends of veths of runs that have ended.

They go with the namespace of the run, moments later. But whoever else holds that namespace, as somebody who has entered it
to look, keeps them, and an interface that answers for an address and a MAC that may be another instance's by then. So they
are removed: before the address is used again, and a moment after the end of the run in any case, when the kernel has mostly
done it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ambi.core.errors import AmbiError
from ambi.network.host import NetworkHost
from ambi.network.model import Nic

log = logging.getLogger(__name__)

_MOMENT_S = 1.0


class LeftLinks:
    """Safe to use from any thread."""

    def __init__(self, host: NetworkHost, later: Callable[[float, Callable[[], None]], object]) -> None:
        """later: has an action done after so many seconds."""
        self._host, self._later = host, later
        self._lock = threading.Lock()
        self._left: dict[str, Nic] = {}

    def add(self, nic: Nic) -> None:
        """The run that had `nic` has ended."""
        if nic.host_link:
            with self._lock:
                self._left[nic.host_link] = nic
            self._later(_MOMENT_S, lambda: self._remove(nic))

    def make_way(self, nic: Nic) -> None:
        """None that is left has an address of `nic`, which is about to be made."""
        wanted = {address.address for address in nic.addresses}
        with self._lock:
            found = [left for left in self._left.values() if left.network == nic.network]
        for left in found:
            if wanted & {address.address for address in left.addresses}:
                self._remove(left)

    def _remove(self, nic: Nic) -> None:
        try:
            self._host.unplug_left(nic)
        except AmbiError as error:
            log.warning("%s", error)
            return
        with self._lock:
            self._left.pop(nic.host_link, None)
