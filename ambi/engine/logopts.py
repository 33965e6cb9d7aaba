"""`--log-driver` and `--log-opt`: what the shim writes."""

from __future__ import annotations

from pathlib import Path

from ambi.core.errors import InvalidRequest
from ambi.core.plan import Supervision
from ambi.engine.body import Body

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}  # go-units FromHumanSize


def supervision(config: Body, host: Body, log: Path) -> Supervision:
    """Raises InvalidRequest for another driver or option."""
    settings = host.object("LogConfig")
    driver, options = settings.text("Type"), settings.texts("Config")
    stdin, once = config.flag("OpenStdin"), config.flag("StdinOnce")
    if driver not in ("", "json-file", "none"):
        raise InvalidRequest(f"--log-driver {driver} is not supported", hint="use json-file or none")
    if driver == "none":
        if options:
            raise InvalidRequest(
                f"--log-opt {next(iter(options))}: log driver none has no options", hint="leave --log-opt out"
            )
        return Supervision(open_stdin=stdin, stdin_once=once)
    for name in options:
        if name not in ("max-size", "max-file"):
            raise InvalidRequest(
                f"unknown log opt '{name}' for json-file log driver", hint="log options: max-size and max-file"
            )
    size = _size(options["max-size"]) if "max-size" in options else 0
    count = options.get("max-file", "1")
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise InvalidRequest("max-file cannot be less than 1", hint="--log-opt max-file=1")
    if int(count) > 1 and not size:
        raise InvalidRequest("max-file cannot be specified without max-size", hint="add --log-opt max-size=10m")
    return Supervision(log, size, int(count), stdin, once)


def log_path(config_host: dict[str, object], data_dir: Path, instance: str) -> Path | None:
    settings = config_host.get("LogConfig")
    none = isinstance(settings, dict) and settings.get("Type") == "none"
    return None if none else data_dir / f"{instance}-json.log"


def _size(text: str) -> int:
    """Bytes of `10m`. 0 and less mean never, as Docker's -1."""
    if text == "-1":
        return 0
    plain = text.strip().lower().removesuffix("ib").removesuffix("b")
    number, unit = (plain[:-1], plain[-1]) if plain and plain[-1].isalpha() else (plain, "")
    try:
        size = int(float(number) * _UNITS[unit])
        if size <= 0:
            raise ValueError(text)
    except (KeyError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"invalid size: '{text}' for log option max-size") from error
    return size
