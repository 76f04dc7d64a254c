"""The library's modules import downwards only, so that each can be read on what stands below it."""

import ast
from pathlib import Path

import pytest
import tuning

LIBRARY = Path(tuning.__file__).parent
FLOORS = [
    {"charts", "checks", "data", "drawings", "files", "models", "plots", "records", "runs", "targets", "wrappers"},
    {"chat", "evaluate", "memory", "nf4", "prompts", "training"},  # what methods share
    {"adapter_files", "four_bit_files", "lomo", "lora", "nf4_kernel", "p_tuning", "preferences", "qlora"},  # methods
    {"methods", "simulate"},  # put the methods side by side
    {"yours"},
]
BESIDE = {  # what imports a neighbour on its own floor
    "charts": {"plots"},
    "drawings": {"plots"},
    "files": {"wrappers"},
    "models": {"files"},
    "records": {"data"},
    "runs": {"files"},
    "targets": {"wrappers"},
    "chat": {"prompts"},
    "evaluate": {"prompts"},
    "qlora": {"lora"},
    "adapter_files": {"lora"},
    "four_bit_files": {"lora", "qlora"},
}


def imports(path):
    """Names of the library's modules that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_downwards_only(path):
    if path.stem == "__init__":
        return
    below = set()
    for floor in FLOORS:
        if path.stem in floor:
            assert set(imports(path)) <= below | BESIDE.get(path.stem, set())
            return
        below |= floor
    pytest.fail(f"{path.name} stands on no floor; name it in FLOORS")
