"""Where things lie on the host: the data root, the run root and the socket.

data root (survives a boot; /var/lib/ambi)          run root (a boot forgets it; /run/ambi)
  format.json        {"format": N}                    engine.lock   held by the engine, its pid inside
  state.db           instances, names, events         engine.json   how to start this engine again (argv)
  images/            the image store                  notify.sock   shims tell the engine here that they ended
  guest/             kernels, initramfs               zygote.sock   requests for shims
  instances/ID/      see ambi/engine/README.md        instances/ID/ shim.sock, shim.json, console
  volumes/NAME/      named volumes: _data/ or disk.img  netd.sock    DNS and published ports
                                                      layers/NAME   mount points, seen by zygote and shims only
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

FORMAT = 1  # of the data root as a whole; raised when an older binary must not open it

DEFAULT_DATA_ROOT = Path("/var/lib/ambi")
DEFAULT_RUN_ROOT = Path("/run/ambi")
DEFAULT_SOCKET = DEFAULT_RUN_ROOT / "ambi.sock"
SOCKET_GROUP = "ambi"  # members may use the engine, which is the same as being root


class Roots(NamedTuple):
    """The three places that name an engine. All absolute."""

    data: Path = DEFAULT_DATA_ROOT
    run: Path = DEFAULT_RUN_ROOT
    socket: Path = DEFAULT_SOCKET

    @classmethod
    def of(cls, data: str | os.PathLike[str], run: str | os.PathLike[str], socket: str | os.PathLike[str]) -> Roots:
        return cls(*(Path(os.path.abspath(p)) for p in (data, run, socket)))

    @property
    def format_file(self) -> Path:
        return self.data / "format.json"

    @property
    def state_db(self) -> Path:
        return self.data / "state.db"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def guest(self) -> Path:
        return self.data / "guest"

    @property
    def engine_lock(self) -> Path:
        return self.run / "engine.lock"

    @property
    def engine_json(self) -> Path:
        return self.run / "engine.json"

    @property
    def notify_socket(self) -> Path:
        return self.run / "notify.sock"

    @property
    def zygote_socket(self) -> Path:
        return self.run / "zygote.sock"

    @property
    def volumes(self) -> Path:
        return self.data / "volumes"

    @property
    def netd_socket(self) -> Path:
        return self.run / "netd.sock"

    @property
    def layers(self) -> Path:
        return self.run / "layers"

    def instance_data(self, instance_id: str) -> Path:
        return self.data / "instances" / instance_id

    def instance_run(self, instance_id: str) -> Path:
        return self.run / "instances" / instance_id
