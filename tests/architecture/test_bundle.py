"""What `flwr run` sends to every site holds no code and no data (docs/decisions/0002-empty-bundle.md)."""

import io
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ".info/CONTENT"
PLANTED = {
    "data/private_rows.jsonl": '{"text": "patient has"}\n',
    "data/private_rows.json": '[{"text": "patient has"}]\n',
    "private_rows.jsonl": '{"text": "patient was"}\n',
    "private_rows.json": '[{"text": "patient was"}]\n',
    "private_rows.py": "ROWS = ['patient was']\n",
    "rows.toml": 'text = "patient was"\n',
    "rows.yml": "text: patient was\n",
    "LICENSE": "patients may read this\n",
    "data/pyproject.toml": '[project]\nname = "patient"\n',
    "secrets.yaml": "key: hunter2\n",
    "notes.md": "the ward of 3 May\n",
    "client/planted.py": "print('beside the data')\n",
    "server.py": "print('in the way of the installed package')\n",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The bundle of the project's files, with private ones planted among them."""
    project = tmp_path_factory.mktemp("bundle") / "cloister"
    for name in project_files():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, project / name)
    for name, content in PLANTED.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(content)
    return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(project)))


def project_files() -> list[str]:
    """Every file that git tracks, or in a source tree without git, every file of the packages."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    files = [path for package in packages for path in (ROOT / package).rglob("*") if path.is_file()]
    return ["pyproject.toml", *(str(path.relative_to(ROOT)) for path in files)]


def test_the_bundle_is_one_file_and_its_manifest(bundle: zipfile.ZipFile) -> None:
    assert sorted(bundle.namelist()) == [MANIFEST, "pyproject.toml"]
    assert [line.split(",")[0] for line in bundle.read(MANIFEST).decode().splitlines()] == ["pyproject.toml"]


def test_nothing_planted_is_in_the_bundle(bundle: zipfile.ZipFile) -> None:
    everything = b"".join(bundle.read(name) for name in bundle.namelist())

    assert PLANTED
    for content in PLANTED.values():
        assert content.strip().encode() not in everything


def test_the_bundle_names_apps_that_it_does_not_hold(bundle: zipfile.ZipFile) -> None:
    config = tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]

    assert config["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert config["config"] == {
        "overrides": "data.partition.sites=[harbor,northgate]",
        "experiment": "",
        "digest": "",
        "run": "",
        "resume": "",
    }


def test_both_apps_are_loaded_from_the_installed_package(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    """What Flower does with a bundle: unpack it, put it first on the path, import the two references."""
    bundle.extractall(tmp_path)
    program = (
        "import sys; from pathlib import Path; from flwr.supercore.object_ref import load_app\n"
        "folder = sys.argv[1]\n"
        "for reference in ('server.app:app', 'client.app:app'):\n"
        "    load_app(reference, RuntimeError, folder)\n"
        "assert sys.path[0] == folder, sys.path\n"
        "print(sys.modules['server.app'].__file__, sys.modules['client.app'].__file__, sep='\\n')\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert loaded.returncode == 0, loaded.stderr
    files = [Path(line) for line in loaded.stdout.splitlines() if line.endswith("app.py")]
    assert [file.parent.name for file in files] == ["server", "client"]
    assert not any(file.is_relative_to(tmp_path) for file in files)
