"""The layers of docs/architecture.md hold: a package imports only from those below it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "computron"

COMMON = {"config", "errors", "metrics"}
BELOW: dict[str, set[str]] = {
    "memory": {"_transfer", "errors"},
    "models": {"memory", *COMMON},
    "execution": {"models", "memory", *COMMON},
    "scheduling": set(),
    "routing": set(),
    "simulation": {"scheduling", "routing", "errors"},
    "profiling": {"simulation", "errors"},
    "group": {"models", *COMMON},
    "node": {"group", "scheduling", "execution", "models", "memory", "_transfer", *COMMON},
    "parameter_service": {*COMMON},
    "api": {"node", "group", "scheduling", "execution", "models", "memory", *COMMON},
    "config": {"errors", "_toml"},
    "_toml": {"errors"},
    "errors": set(),
    "metrics": set(),
}
FREE = {"cli", "__main__", "__init__"}  # may import anything


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.update(f"{module}.{alias.name}" if module == "computron" else module for alias in node.names)
    return found


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


FILES = sorted(p for p in ROOT.rglob("*.py") if part_of(p) not in FREE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_part_imports_only_from_the_parts_below_it(path: Path) -> None:
    part = part_of(path)
    assert part in BELOW, f"{part} has no place in the layers: give it one here and in docs/architecture.md"
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("computron.")}
    assert ours - {part} <= BELOW[part]


def outside(path: Path) -> set[str]:
    """What is imported from other projects, by its top name."""
    return {name.split(".")[0] for name in imports_of(path)} - {"computron"} - set(sys.stdlib_module_names)


PURE = [path for path in FILES if part_of(path) in {"scheduling", "routing"}]
SIMULATION = [path for path in FILES if part_of(path) == "simulation"]


@pytest.mark.parametrize("path", PURE, ids=lambda p: str(p.relative_to(ROOT)))
def test_scheduling_and_routing_import_only_the_standard_library(path: Path) -> None:
    assert not outside(path)


@pytest.mark.parametrize("path", SIMULATION, ids=lambda p: str(p.relative_to(ROOT)))
def test_simulation_computes_with_numbers_and_only_reports_draw(path: Path) -> None:
    drawing = {"matplotlib", "rich"} if "report" in path.parts else set()
    assert outside(path) <= {"numpy", "msgspec"} | drawing


PACKING = [path for path in FILES if path.is_relative_to(ROOT / "parameter_service" / "packing")]
PACKED = [path for path in FILES if path.is_relative_to(ROOT / "parameter_service" / "simulation")]


@pytest.mark.parametrize("path", PACKING, ids=lambda p: str(p.relative_to(ROOT)))
def test_packing_imports_only_itself_and_the_standard_library(path: Path) -> None:
    assert not outside(path)
    assert all(name.startswith("computron.parameter_service.packing") for name in ours(path))


@pytest.mark.parametrize("path", PACKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_simulation_of_packing_imports_packing_and_numbers(path: Path) -> None:
    assert outside(path) <= {"numpy", "msgspec"}
    below = ("computron.parameter_service.packing", "computron.parameter_service.simulation")
    assert all(name.startswith(below) for name in ours(path))


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.startswith("computron.")}


def test_every_part_is_covered() -> None:
    assert {part_of(path) for path in FILES} <= set(BELOW)
    assert len(FILES) > 20
