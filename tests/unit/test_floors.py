"""The four floors: imports point down only (docs/design/0001-floors.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = {"ambi.core", "ambi.linux"}
MAY_IMPORT: dict[str, set[str]] = {
    "ambi.core": set(),
    "ambi.linux": {"ambi.core"},
    "images": BASE,
    "runtime": BASE,
    "hyper": BASE,
    "ambi.shim": BASE,
    "ambi.network": BASE,
    "ambi.engine": BASE | {"ambi.shim", "ambi.network", "images", "runtime", "hyper"},
    "ambi.api": BASE | {"ambi.engine", "ambi.shim", "ambi.network", "images", "runtime", "hyper"},
    "ambi.client": {"ambi.core"},
    "ambi.cli": {"ambi.core", "ambi.client"},
    "ambi.lab": {"ambi.core", "ambi.client"},
    "ambi.bench": {"ambi.core", "ambi.client"},
}
CTYPES = {"ambi.linux", "hyper.kvm"}


def unit_of(module: str) -> str | None:
    """The row of MAY_IMPORT that a module belongs to, None for foreign ones."""
    parts = module.split(".")
    if parts[0] == "ambi":
        return ".".join(parts[:2]) if len(parts) > 1 else None
    return parts[0] if parts[0] in MAY_IMPORT else None


def sources() -> list[tuple[str, Path]]:
    found = []
    for top in ("ambi", "images", "runtime", "hyper"):
        for path in sorted((ROOT / top).rglob("*.py")):
            found.append((".".join(path.relative_to(ROOT).with_suffix("").parts), path))
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("module,path", sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_down(module: str, path: Path) -> None:
    here = unit_of(module)
    for name in imported(path):
        there = unit_of(name)
        if there is not None and there != here:
            assert here is not None and there in MAY_IMPORT[here], f"{module} must not import {name}"
        if name.split(".")[0] in ("ctypes", "_ctypes"):
            assert any(module.startswith(unit) for unit in CTYPES), f"{module} must not use ctypes"


def test_every_floor_has_a_readme() -> None:
    for unit in MAY_IMPORT:
        folder = ROOT / unit.replace(".", "/")
        if folder.exists():
            text = (folder / "README.md").read_text()
            assert "Way in:" in text and "May import:" in text, folder
