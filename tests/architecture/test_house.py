"""The rules of the house that no linter knows."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cli", "client", "conf", "finetuning", "privacy", "protocol", "server", "simulations", "strategies")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400


def test_there_are_modules_to_check() -> None:
    assert len(MODULES) > 50


@pytest.mark.parametrize(
    "path", [*MODULES, *sorted(p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py"))], ids=str
)
def test_no_file_is_long(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=str)
def test_all_is_chosen_and_true(path: Path) -> None:
    module = import_module(".".join(path.with_suffix("").parts))
    chosen = getattr(module, "__all__", None)
    assert chosen is not None
    assert sorted(set(chosen)) == sorted(chosen)
    assert all(hasattr(module, name) for name in chosen)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    assert not called & {"eval", "exec"}
    # torch.load reads pickles; tensors are stored and sent as safetensors.
    source = (ROOT / path).read_text()
    assert "torch.load(" not in source
    assert "allow_pickle=True" not in source
    assert "unsafe_load" not in names


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "privacy"], ids=str)
def test_privacy_draws_from_no_global_generator(path: Path) -> None:
    source = (ROOT / path).read_text()
    assert not re.search(r"torch\.(randn|rand|normal|manual_seed)\(|np\.random|import random\b|\.normal_\(", source)


def test_layers_are_kept() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_the_layer_contract_catches_a_planted_import(tmp_path: Path) -> None:
    """The contract itself must be able to fail."""
    for path in MODULES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    (tmp_path / "privacy" / "bad.py").write_text("import client\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert result.returncode != 0
    assert "privacy.bad -> client" in result.stdout


def test_help_is_instant_because_torch_stays_out() -> None:
    heavy = ("torch", "flwr", "hydra", "transformers")
    code = f"import sys; import cli.main; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
