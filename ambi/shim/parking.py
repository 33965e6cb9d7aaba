"""A shim that is there before it is asked for, its driver parked: what sleeps in a start has then been slept already."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from ambi.core.errors import AmbiError
from ambi.linux import unix
from ambi.shim import shim
from ambi.shim.drivers import Parkable

END_SECONDS = 5


class Parked:
    """The zygote's side of a parked shim."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self._sock = sock

    def give(self, wanted: dict[str, str], control: int) -> bool:
        """Make it the shim of `wanted`; False when it has died meanwhile. Once only."""
        try:
            unix.send(self._sock, wanted, [control])
        except (AmbiError, OSError):
            return False
        finally:
            self.close()
        return True

    def close(self) -> None:
        self._sock.close()

    def end(self) -> None:
        """Have it remove what it prepared and end."""
        self.close()
        signal.signal(signal.SIGALRM, lambda *_: os.kill(self.pid, signal.SIGKILL))
        signal.alarm(END_SECONDS)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass
        signal.alarm(0)


def wait(driver: Parkable, zygotes: socket.socket, mine: socket.socket, run_root: str, home: int) -> int:
    """The life of a parked shim: it waits for what it is to be, or for the end of the zygote."""
    zygotes.close()
    os.setsid()
    driver.park(Path(run_root))
    try:
        message = unix.receive(mine)
    except (AmbiError, OSError):
        message = None
    mine.close()
    if message is None or len(message.fds) != 1:
        driver.unpark()
        return 0
    spec = shim.Spec(**message.body, home=home)
    return shim.supervise(spec, socket.socket(fileno=message.fds.pop()), driver)
