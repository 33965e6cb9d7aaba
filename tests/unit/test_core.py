"""The shared words: errors on the wire, plans on disk, undo, loop."""

import errno
import os
from pathlib import Path, PurePosixPath

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import CommandNotFound, Corrupt, Internal, StorageFull, from_os_error, from_wire
from ambi.core.loop import POLLIN, Loop
from ambi.core.model import IdMap, IdRange, InstanceId, Isolation, VmShape
from ambi.core.plan import Directory, File, LaunchPlan, Layer, Layers, Supervision
from ambi.core.undo import Undo


def plan(**changes: object) -> LaunchPlan:
    base = LaunchPlan(
        id=InstanceId("a" * 64),
        isolation=Isolation.CONTAINER,
        config={"ociVersion": "1.0.2"},
        rootfs=Layers((Layer("7", "erofs", Path("/d/7.erofs"), 4096),), Path("/d/upper")),
        data_dir=Path("/d"),
        run_dir=Path("/r"),
        layers_dir=Path("/r/layers"),
        guest_dir=Path("/d/guest"),
    )
    return base._replace(**changes)


def test_error_keeps_class_text_and_hint_on_the_wire() -> None:
    error = from_wire(CommandNotFound("no such program", hint="install it").to_wire())
    assert type(error) is CommandNotFound
    assert (error.message, error.hint, error.exit_status) == ("no such program", "install it", 127)
    assert type(from_wire({"kind": "Nonsense", "message": "x"})) is Internal


def test_os_error_names_object_and_fix() -> None:
    error = from_os_error("cannot import 'base'", OSError(errno.ENOSPC, "No space left on device", "/var/lib/ambi"))
    assert type(error) is StorageFull
    assert error.message == "cannot import 'base': /var/lib/ambi: No space left on device"
    assert error.hint


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rootfs": Directory(Path("/x"))},
        {"vm": VmShape(vcpus=2), "isolation": Isolation.VM},
        {"id_map": IdMap((IdRange(0, 100000, 65536),), (IdRange(0, 100000, 65536),))},
        {"files": (File(PurePosixPath("/etc/hosts"), 0o644, "127.0.0.1 localhost\n"),), "stdin": True},
        {"supervision": Supervision(Path("/d/log"), 1 << 20, 3, True, True)},
    ],
)
def test_plan_survives_its_file(changed: dict[str, object]) -> None:
    assert LaunchPlan.from_json(plan(**changed).to_json()) == plan(**changed)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', "null"])
def test_damaged_plan_is_named(text: str) -> None:
    with pytest.raises(Corrupt):
        LaunchPlan.from_json(text)


def test_undo_runs_all_last_first_and_notes_failures() -> None:
    ran = []

    def fail() -> None:
        raise OSError("busy")

    with pytest.raises(ValueError) as caught, Undo() as undo:
        undo.add("first", lambda: ran.append(1))
        undo.add("second", fail)
        undo.add("third", lambda: ran.append(3))
        raise ValueError("cause")
    assert ran == [3, 1]
    assert caught.value.__notes__ == ["could not undo: second: busy"]


def test_loop_dispatches_descriptors_and_timers() -> None:
    loop, seen = Loop(), []
    reading, writing = os.pipe()
    loop.watch(reading, POLLIN, lambda _: seen.append(os.read(reading, 10)))
    loop.later(0.01, lambda: (seen.append("timer"), os.write(writing, b"x")))
    cancelled = loop.later(0.005, lambda: seen.append("never"))
    loop.cancel(cancelled)
    assert loop.run(lambda: len(seen) == 2, Deadline.after(5))
    assert seen == ["timer", b"x"]
    assert not loop.run(lambda: False, Deadline.after(0.01))
    os.close(reading)
    os.close(writing)
