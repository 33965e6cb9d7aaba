"""Restart policies, pause and update, by a real engine and real containers."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.errors import Conflict, InvalidRequest, NotModified
from ambi.core.model import InstanceId, Status
from ambi.core.roots import Roots
from ambi.engine.engine import Engine
from ambi.engine.health import Health
from ambi.engine.types import CreateSpec
from tests.kernel.test_engine_life import Opened, created, opened_with_busybox, output, shim_pid, soon, until

MEBI = 1 << 20


@pytest.fixture(scope="module")
def opened(busybox_tar: Path) -> Iterator[Opened]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    roots = Roots.of(base / "data", base / "run", base / "run" / "ambi.sock")
    roots.run.mkdir(mode=0o711)
    with opened_with_busybox(roots, busybox_tar) as it:
        yield it
    shutil.rmtree(base)


@pytest.fixture
def engine(opened: Opened) -> Iterator[Engine]:
    yield opened.engine
    for instance in opened.engine.list(all=True, filters={}):
        opened.engine.remove(instance.id, force=True)


def policy(name: str, most: int = 0) -> dict[str, object]:
    return {"Name": name, "MaximumRetryCount": most}


def actions(engine: Engine, id: str) -> list[str]:
    past = engine.events(0, time.time_ns(), {"container": [id]})
    return [event.action for event in past if event is not None]


def status(engine: Engine, id: str) -> Status:
    return engine.get(id).state.status


def waits_for_restart(engine: Engine, *argv: str) -> InstanceId:
    """An instance that has ended some times, and has a second or so before its next start."""
    id = created(engine, *(argv or ("false",)), RestartPolicy=policy("always"))
    engine.start(id)
    until(lambda: engine.get(id).restart_count >= 3 and status(engine, id) is Status.RESTARTING, "the third restart")
    return id


def test_on_failure_ends_after_its_number_of_restarts(engine: Engine) -> None:
    id = created(engine, "sh", "-c", "echo run; exit 3", RestartPolicy=policy("on-failure", 2))
    engine.start(id)
    assert engine.wait(id, "next-exit").result(soon()).code == 3
    until(lambda: status(engine, id) is Status.EXITED, "the end of the restarts")
    instance = engine.get(id)
    assert (instance.restart_count, instance.state.exit_code, output(engine, id)) == (2, 3, b"run\n" * 3)
    assert actions(engine, id) == ["create"] + ["start", "die"] * 3
    engine.start(id)
    assert engine.get(id).restart_count <= 1  # counted anew


def test_on_failure_leaves_a_success_alone(engine: Engine) -> None:
    id = created(engine, "true", RestartPolicy=policy("on-failure"))
    engine.start(id)
    until(lambda: engine.get(id).state.finished_ns > 0, "the end")
    assert status(engine, id) is Status.EXITED


def test_what_can_be_done_while_a_restart_is_waited_for(engine: Engine) -> None:
    id = waits_for_restart(engine)
    with pytest.raises(Conflict, match=f"You cannot remove a restarting container {id}. Stop the container before"):
        engine.remove(id)
    with pytest.raises(Conflict, match="is restarting, wait until the container is running"):
        engine.pause(id)
    with pytest.raises(Conflict, match="is restarting, wait until the container is running"):
        engine.exec_create(id, {"Cmd": ["true"]})
    with pytest.raises(NotModified):
        engine.start(id)
    assert [instance.id for instance in engine.list(all=False, filters={})] == [id]
    engine.stop(id)
    state = engine.get(id).state
    assert (state.status, state.exit_code) == (Status.EXITED, 1) and actions(engine, id)[-1] == "stop"
    with pytest.raises(NotModified):
        engine.stop(id)
    engine.remove(id)


@pytest.mark.parametrize("verb", ["kill", "remove"])
def test_a_restart_is_called_off(engine: Engine, verb: str) -> None:
    id = waits_for_restart(engine)
    if verb == "kill":
        engine.kill(id)
        assert status(engine, id) is Status.EXITED
    else:
        engine.remove(id, force=True)
        assert not engine.list(all=True, filters={})


def test_a_stopped_one_stays_stopped_and_a_killed_shim_comes_back(engine: Engine, opened: Opened) -> None:
    id = created(engine, "sleep", "1000", RestartPolicy=policy("always"))
    engine.start(id)
    os.kill(shim_pid(opened.roots, id), 9)
    until(lambda: engine.get(id).restart_count == 1 and status(engine, id) is Status.RUNNING, "the restart")
    engine.stop(id, 0)
    engine.close()
    engine = opened.again()
    assert status(engine, id) is Status.EXITED and engine.get(id).state.exit_code == 137


def test_an_engine_that_was_away_goes_on_with_restarts(engine: Engine, opened: Opened) -> None:
    id = waits_for_restart(engine)
    count = engine.get(id).restart_count
    engine.close()
    engine = opened.again()
    until(lambda: engine.get(id).restart_count > count, "one more restart")


def test_after_a_boot_policies_apply(engine: Engine, opened: Opened) -> None:
    """Another boot is told by its id alone, so what runs is ended, and then looks as the last boot left it."""
    asked = {"always": True, "unless-stopped": True, "no": False, "on-failure": False}  # name to: stopped by the user
    ids = {name: created(engine, "sleep", "1000", RestartPolicy=policy(name)) for name in asked}
    ids["never started"] = created(engine, "sleep", "1000", RestartPolicy=policy("always"))
    for name, stopped in asked.items():
        engine.start(ids[name])
        if stopped:
            engine.stop(ids[name], 0)
    for name in ("no", "on-failure"):
        engine.stop(ids[name], 0)
    engine.close()
    with sqlite3.connect(opened.roots.state_db) as db:
        db.execute("UPDATE instances SET boot_id='another'")
        db.execute("UPDATE instances SET status='running', held=0 WHERE id=?", (ids["on-failure"],))
    db.close()
    engine = opened.again()
    for name in ("always", "on-failure"):
        until(lambda name=name: status(engine, ids[name]) is Status.RUNNING, name)  # type: ignore[misc]
    assert status(engine, ids["unless-stopped"]) is status(engine, ids["no"]) is Status.EXITED
    assert status(engine, ids["never started"]) is Status.CREATED


def test_pause_and_what_it_keeps_out(engine: Engine, opened: Opened) -> None:
    id = created(engine, "sleep", "1000", name="held")
    with pytest.raises(Conflict, match=f"Container {id} is not running"):
        engine.pause(id)
    engine.start(id)
    with pytest.raises(Conflict, match=f"Container {id} is not paused"):
        engine.unpause(id)
    engine.pause(id)
    with pytest.raises(Conflict, match=f"Container {id} is already paused"):
        engine.pause(id)
    with pytest.raises(Conflict, match="is paused, unpause the container before exec"):
        engine.exec_create(id, {"Cmd": ["true"]})
    with pytest.raises(Conflict, match="cannot start a paused container, try unpause instead"):
        engine.start(id)
    with pytest.raises(Conflict, match=f"You cannot remove a paused container {id}. Unpause and then stop the container"):
        engine.remove(id)
    engine.close()
    engine = opened.again()
    assert status(engine, id) is Status.PAUSED
    engine.unpause(id)
    assert status(engine, id) is Status.RUNNING
    engine.pause(id)
    engine.stop(id, 0)
    told = actions(engine, id)
    assert told[told.index("start") :] == ["start", "pause", "unpause", "pause", "kill", "unpause", "kill", "die", "stop"]
    assert status(engine, id) is Status.EXITED
    engine.start(id)
    engine.pause(id)
    engine.kill(id)
    assert engine.get(id).state.exit_code == 137
    engine.start(id)
    engine.pause(id)
    engine.remove(id, force=True)


def test_update_holds_now_and_later(engine: Engine, opened: Opened) -> None:
    id = created(engine, "sleep", "1000", Memory=64 * MEBI)
    engine.start(id)
    assert engine.update(id, {"Memory": 96 * MEBI, "PidsLimit": 20, "CpuShares": 0, "Devices": []}) == []
    assert engine.usage(id).memory_limit_bytes == 96 * MEBI
    with pytest.raises(InvalidRequest, match="Minimum memory limit allowed is 6MB"):
        engine.update(id, {"Memory": MEBI})
    with pytest.raises(InvalidRequest, match="--device cannot be changed"):
        engine.update(id, {"Devices": [{"PathOnHost": "/dev/null"}], "PidsLimit": 30})
    engine.stop(id, 0)
    engine.update(id, {"RestartPolicy": policy("on-failure", 3)})
    engine.close()
    engine = opened.again()
    host = engine.get(id).spec.host
    assert (host["Memory"], host["PidsLimit"], host["RestartPolicy"]["Name"]) == (96 * MEBI, 20, "on-failure")
    engine.start(id)
    assert engine.usage(id).memory_limit_bytes == 96 * MEBI
    assert actions(engine, id).count("update") == 2


def checked(engine: Engine, test: str, **check: object) -> InstanceId:
    """A started instance with a health check of 100 ms."""
    times = {"Interval": 100_000_000, "Retries": 2, **check}
    config = {"Image": "busybox", "Cmd": ["sleep", "1000"], "Healthcheck": {"Test": ["CMD-SHELL", test], **times}}
    id = engine.create(None, CreateSpec(config, {"NetworkMode": "none"}, {}))[0]
    engine.start(id)
    return id


def health(engine: Engine, id: str) -> Health:
    found = engine.get(id).health
    assert found is not None
    return found


def test_health_comes_and_goes(engine: Engine) -> None:
    id = checked(engine, "echo probed; test -e /well")
    assert health(engine, id).status == "starting"
    until(lambda: health(engine, id).status == "unhealthy", "two failures")
    assert [instance.id for instance in engine.list(False, {"health": ["unhealthy"]})] == [id]
    exec_id = engine.exec_create(id, {"Cmd": ["touch", "/well"]})
    engine.exec_start(exec_id, None)
    until(lambda: health(engine, id).status == "healthy", "a success")
    found = health(engine, id)
    assert found.failures == 0 and found.results[-1].code == 0 and found.results[-1].output == "probed\n"
    until(lambda: len(health(engine, id).results) == 5, "five results")
    told = actions(engine, id)
    assert [action for action in told if action.startswith("health_status")] == [
        "health_status: unhealthy",
        "health_status: healthy",
    ]
    command = "/bin/sh -c echo probed; test -e /well"
    assert f"exec_create: {command}" in told and f"exec_start: {command}" in told and "exec_die" in told
    engine.stop(id, 0)
    assert health(engine, id).status == "unhealthy"  # as docker has it


def test_a_probe_that_hangs_is_killed(engine: Engine, opened: Opened) -> None:
    id = checked(engine, "echo begun; exec sleep 998", Timeout=300_000_000, Retries=1)
    until(lambda: health(engine, id).status == "unhealthy", "the timeout")
    result = health(engine, id).results[0]
    assert result.code == -1 and result.output == "Health check exceeded timeout (0.3s): begun\n"
    assert sum("sleep 998" in row["command"] for row in engine.top(id)) <= 1


def test_failures_of_the_start_period_do_not_count(engine: Engine) -> None:
    period = {"StartPeriod": 3600 * 10**9, "StartInterval": 50_000_000}
    id = checked(engine, "test -e /well", Interval=3600 * 10**9, Retries=1, **period)
    until(lambda: len(health(engine, id).results) >= 3, "three probes")
    assert health(engine, id) == health(engine, id)._replace(status="starting", failures=0)
    exec_id = engine.exec_create(id, {"Cmd": ["touch", "/well"]})
    engine.exec_start(exec_id, None)
    until(lambda: health(engine, id).status == "healthy", "a success")


def test_no_probe_while_it_is_paused(engine: Engine) -> None:
    id = checked(engine, "true")
    until(lambda: health(engine, id).status == "healthy", "a success")
    engine.pause(id)
    before = len(actions(engine, id))
    time.sleep(0.4)
    assert len(actions(engine, id)) <= before + 1 and health(engine, id).status == "healthy"
    engine.unpause(id)
    last = health(engine, id).results[-1].start_ns
    until(lambda: health(engine, id).results[-1].start_ns > last, "a probe after the pause")


def test_health_is_watched_by_the_next_engine(engine: Engine, opened: Opened) -> None:
    id = checked(engine, "true")
    until(lambda: health(engine, id).status == "healthy", "a success")
    engine.close()
    engine = opened.again()
    until(lambda: health(engine, id).status == "healthy", "a success again")


def test_a_program_that_is_not_there_is_a_failure(engine: Engine) -> None:
    config = {"Image": "busybox", "Cmd": ["sleep", "1000"]}
    check = {"Test": ["CMD", "nowhere"], "Interval": 50_000_000, "Retries": 1}
    id = engine.create(None, CreateSpec({**config, "Healthcheck": check}, {"NetworkMode": "none"}, {}))[0]
    engine.start(id)
    until(lambda: health(engine, id).status == "unhealthy", "the failure")
    assert health(engine, id).results[0].code == -1 and "nowhere" in health(engine, id).results[0].output


@pytest.mark.parametrize(
    ("check", "text"),
    [
        ({"Interval": 1000}, "Interval in Healthcheck cannot be less than 1ms"),
        ({"Timeout": -1}, "Timeout in Healthcheck cannot be less than 1ms"),
        ({"Retries": -1}, "Retries in Healthcheck cannot be negative"),
        ({"Test": ["FOO", "x"]}, "Unknown healthcheck type 'FOO'"),
    ],
)
def test_a_check_that_cannot_be(engine: Engine, check: dict[str, object], text: str) -> None:
    config = {"Image": "busybox", "Cmd": ["true"], "Healthcheck": {"Test": ["CMD", "true"], **check}}
    with pytest.raises(InvalidRequest, match=text):
        engine.create(None, CreateSpec(config, {"NetworkMode": "none"}, {}))


def test_a_policy_and_rm_exclude_each_other(engine: Engine) -> None:
    spec = {"AutoRemove": True, "RestartPolicy": policy("always"), "NetworkMode": "none"}
    with pytest.raises(InvalidRequest, match="can't create 'AutoRemove' container with restart policy"):
        engine.create(None, CreateSpec({"Image": "busybox", "Cmd": ["true"]}, spec, {}))
    id = created(engine, "true", AutoRemove=True)
    with pytest.raises(Conflict, match="AutoRemove is enabled"):
        engine.update(id, {"RestartPolicy": policy("always")})
