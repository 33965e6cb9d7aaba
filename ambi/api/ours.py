"""`/ambi`: what Docker's API has no words for. Not versioned; fields are only ever added.

GET  /ambi/engine                                   {version, pid, zygote_pid, started, data_root, run_root, socket, ...}
POST /ambi/engine/stop                              204; the engine ends, instances run on
GET  /ambi/doctor                                   [{name, status: ok|warning|problem, detail, hint}]
POST /ambi/images/bootstrap?suite=&name=&packages=  progress; the last line is {"status": image id}
POST /ambi/images/verify?repair=                    progress, and {"finding": {kind, name, problem, images, repaired, hint}}
POST /ambi/images/copy?from=&to=&all=               an archive is the body or the answer; see `images.copy`
GET  /ambi/images/sbom?name=&format=                the document itself, `spdx` (default) or `cyclonedx`
POST /ambi/instances/ID/mounts                      {"Volume": SOURCE:TARGET[:MODE]}: 204; for the rest of the run
DELETE /ambi/instances/ID/mounts?target=&force=     204
"""

from __future__ import annotations

import os
import signal

from ambi.api.exchange import JSON_HEADERS, NO_CONTENT, Call, Reply, json_reply
from ambi.api.progress import ProgressStream
from ambi.api.router import Route
from ambi.api.words import rfc3339_nano
from ambi.core.errors import InvalidRequest


def engine(call: Call) -> Reply:
    it = call.engine.info()
    return json_reply({
        "version": it.version,
        "pid": it.pid,
        "zygote_pid": it.zygote_pid,
        "started": rfc3339_nano(it.started_ns),
        "data_root": str(it.data_root),
        "run_root": str(it.run_root),
        "socket": str(it.socket),
        "layer_form": it.layer_form[0],
        "layer_form_reason": it.layer_form[1],
        "running": it.running,
        "paused": it.paused,
        "stopped": it.stopped,
        "images": it.images,
    })  # fmt: skip


def stop_engine(call: Call) -> None:
    """SIGTERM to ourselves is the one way to end; the answer leaves before the signal does anything."""
    call.connection.reply(NO_CONTENT.status, NO_CONTENT.headers, b"")
    os.kill(os.getpid(), signal.SIGTERM)


def doctor(call: Call) -> Reply:
    return json_reply([check._asdict() for check in call.engine.doctor()])


def bootstrap(call: Call) -> None:
    query = call.query
    suite = query.text("suite")
    if not suite:
        raise InvalidRequest("suite must name a release", hint="for example suite=bookworm")
    packages = tuple(package for text in query.all("packages") for package in text.replace(",", " ").split())
    with ProgressStream(call) as progress:
        image = call.engine.images.bootstrap(suite, query.text("name"), packages=packages, progress=progress)
        progress.line({"status": image.id})


def verify(call: Call) -> None:
    with ProgressStream(call) as progress:
        progress.line({"status": "Checking"})
        for finding in call.engine.images.verify(repair=call.query.flag("repair"), progress=progress):
            progress.line({"finding": finding._asdict()})


def bill_of_materials(call: Call) -> Reply:
    name = call.query.text("name")
    if not name:
        raise InvalidRequest("name must be an image", hint="for example name=debian:bookworm")
    data = call.engine.images.bill_of_materials(name, call.query.text("format") or "spdx")
    return Reply(200, data, JSON_HEADERS)


def attach_volume(call: Call) -> Reply:
    volume = call.json_body().get("Volume")
    if not isinstance(volume, str) or not volume:
        raise InvalidRequest("Volume must be SOURCE:TARGET[:MODE]", hint='for example {"Volume": "/srv/data:/data:ro"}')
    call.engine.attach_volume(call.name, volume)
    return NO_CONTENT


def detach_volume(call: Call) -> Reply:
    target = call.query.text("target")
    if not target:
        raise InvalidRequest("target must be a path inside", hint="for example target=/data")
    call.engine.detach_volume(call.name, target, force=call.query.flag("force"))
    return NO_CONTENT


ROUTES = (
    Route("GET", "/ambi/engine", engine),
    Route("POST", "/ambi/engine/stop", stop_engine),
    Route("GET", "/ambi/doctor", doctor),
    Route("POST", "/ambi/images/bootstrap", bootstrap),
    Route("POST", "/ambi/images/verify", verify),
    Route("GET", "/ambi/images/sbom", bill_of_materials),
    Route("POST", "/ambi/instances/{}/mounts", attach_volume),
    Route("DELETE", "/ambi/instances/{}/mounts", detach_volume),
)
