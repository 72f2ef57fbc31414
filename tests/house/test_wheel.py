"""The wheel: holds the package alone, installs in a clean environment, imports and runs."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What may lie in the package besides code: catalogue rows, and the page's own templates.
PLAIN = {".py", ".json", ".typed", ".html", ".j2", ".css", ".js"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tree as it stands with the build tools already installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        (metadata,) = [name for name in sizes if name.endswith(".dist-info/METADATA")]
        required = [
            line
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
    inside = [name for name in sizes if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in inside} == {"attnbias"}
    assert {Path(name).suffix for name in inside} <= PLAIN
    # Test-time registers are a method, not a test.
    named = [name.lower().replace("test_time", "").replace("test-time", "") for name in inside]
    assert not [name for name in named if "test" in name]
    assert "attnbias/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in sizes)
    assert sum(sizes.values()) < 3_000_000  # text alone: no weights, no data, no compiled files
    # torch is the only hard dependency.
    assert len(required) == 1, required
    assert required[0].startswith("Requires-Dist: torch"), required


def test_installs_in_a_clean_environment_and_imports(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    # torch is lent from the running environment: a path in a .pth file brings none of its own
    # .pth files along, so the checkout itself stays out of sight.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = "import attnbias; print(attnbias.__file__, attnbias.__version__)"
    where = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert str(site) in where
    script = python.parent / "attnbias"
    listed = subprocess.run(
        [script, "list", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert {row["id"] for row in json.loads(listed.stdout)} >= {"alibi", "zerotuning"}
