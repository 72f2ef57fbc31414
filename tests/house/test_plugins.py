"""Another package adds a rule or a statistic by an entry point alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attnbias import plugins
from attnbias.errors import AttnbiasError

Install = Callable[..., None]


class Base:
    """Stands for the base class of a group."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a tiny package, as pip would lay it out, for the length of one test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def lay_out(package: str, points: dict[str, str], code: str, group: str) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")
        made.append(package)

    yield lay_out
    for package in made:
        sys.modules.pop(package, None)


GOOD = "from tests.house.test_plugins import Base\nclass Extra(Base):\n    pass\n"


@pytest.mark.parametrize("group", plugins.GROUPS)
def test_a_plugin_is_found_and_loaded_when_asked(install: Install, group: str) -> None:
    assert plugins.load(group, "Extra", Base) is None
    install("tiny_plugin", {"Extra": "tiny_plugin:Extra"}, GOOD, group)
    assert "Extra" in plugins.names(group)
    assert "tiny_plugin" not in sys.modules
    loaded = plugins.load(group, "Extra", Base)
    assert loaded is not None
    assert issubclass(loaded, Base)
    assert loaded.__module__ == "tiny_plugin"
    (other,) = set(plugins.GROUPS) - {group}
    assert plugins.load(other, "Extra", Base) is None


def test_bad_plugins_are_named(install: Install) -> None:
    group = "attnbias.rules"
    install("broken_plugin", {"Broken": "broken_plugin:Broken"}, "raise OSError('no disk')", group)
    install("alien_plugin", {"Alien": "alien_plugin:Alien"}, "class Alien: ...", group)
    install("first_twin", {"Twin": "first_twin:Extra"}, GOOD, group)
    install("second_twin", {"Twin": "second_twin:Extra"}, GOOD, group)
    with pytest.raises(AttnbiasError, match=r"broken_plugin.*cannot be imported: no disk"):
        plugins.load(group, "Broken", Base)
    with pytest.raises(AttnbiasError, match=r"alien_plugin.*expected a subclass of .*Base"):
        plugins.load(group, "Alien", Base)
    with pytest.raises(AttnbiasError, match=r"more than one package.*first_twin, second_twin"):
        plugins.load(group, "Twin", Base)


def test_unknown_group() -> None:
    with pytest.raises(AttnbiasError, match="no plugin group"):
        plugins.names("attnbias.layers")
