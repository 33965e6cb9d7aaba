"""The record that a prepared kernel directory carries, and where the guest's parts are.

    GUEST_DIR/agent-BUILD_ID                 the agent
    GUEST_DIR/RELEASE/vmlinuz                as the distribution's package has it
    GUEST_DIR/RELEASE/vmlinux                the same kernel uncompressed; absent when it could not be extracted
    GUEST_DIR/RELEASE/modules/               the modules that a guest may need, and `order`, lines of "GROUP FILE"
    GUEST_DIR/RELEASE/kernel.json            {"format": 1, "release", "package", "version", "vmlinuz_sha256", "modules"}
    GUEST_DIR/RELEASE/initramfs-HASH.cpio    agent and modules

`hyper/boot_files.py` finds them for who starts a VM.
"""

from __future__ import annotations

import json
from pathlib import Path

from ambi.core.errors import Corrupt

FORMAT = 1
RECORD = "kernel.json"


def read_record(directory: Path) -> dict[str, object]:
    """Raises Corrupt when kernel.json of `directory` is not one of this format."""
    path = directory / RECORD
    try:
        record = json.loads(path.read_bytes())
        known = record["format"] == FORMAT and isinstance(record["vmlinuz_sha256"], str)
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} is damaged: {error}", hint=f"rm -r {directory}") from error
    if not known:
        raise Corrupt(f"{path} has format {record['format']!r}, this version reads {FORMAT}", hint=f"rm -r {directory}")
    return dict(record)
