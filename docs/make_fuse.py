"""The tables of `docs/fuse.md`, from the families themselves and what was run.

python docs/make_fuse.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script from anywhere

from attnbias.fuse import FAMILIES  # noqa: E402
from attnbias.fuse.known import REFUSED, oldest, versions  # noqa: E402

PAGE = ROOT / "docs" / "fuse.md"
NAV = "  - Fusing: fuse.md\n"


def _name(path: str) -> str:
    home, _, name = path.rpartition(".")
    model = home.removeprefix("transformers.models.").partition(".")[0]
    return f"`{model}.{name}`" if home.startswith("transformers.") else f"`{path}`"


def families() -> str:
    """Every family with its classes, and the oldest transformers of each."""
    lines = ["| family | bias | classes | transformers |", "|---|---|---|---|"]
    for family in sorted(FAMILIES, key=lambda one: one.name):
        groups: dict[str, list[str]] = {}
        for path in family.modules:
            groups.setdefault(oldest(path, family.name), []).append(_name(path))
        for since, names in groups.items():
            own = not any(path.startswith("transformers.") for path in family.modules)
            said = "not needed" if own else f"{since} or newer" if since else "not run"
            lines.append(f"| {family.name} | {family.form} | {', '.join(names)} | {said} |")
    return "\n".join(lines)


def stops() -> str:
    """What stops each class on the version before its oldest."""
    found: dict[str, list[str]] = {}
    for path, row in versions().get("classes", {}).items():
        if row["below"]:
            said = row["below"].replace("|", "\\|").replace("`", "'")
            found.setdefault(said, []).append(_name(path))
    lines = ["| classes | the version that fails, and its first failure |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {', '.join(names)} | {said} |" for said, names in found.items())]
    )


def refused() -> str:
    """The classes that are refused, by reason."""
    found: dict[str, list[str]] = {}
    for path, reason in REFUSED.items():
        found.setdefault(reason, []).append(_name(path))
    lines = ["| classes | why |", "|---|---|"]
    return "\n".join([*lines, *(f"| {', '.join(names)} | {why} |" for why, names in found.items())])


def text(page: str) -> str:
    """The page with its tables made anew."""
    for name, make in (("families", families), ("stops", stops), ("refused", refused)):
        begin = f"<!-- {name}: made by `python docs/make_fuse.py` -->\n"
        head, _, rest = page.partition(begin)
        end = f"<!-- /{name} -->"
        page = head + begin + "\n" + make() + "\n\n" + end + rest.partition(end)[2]
    return page


def navigation(old: str) -> str:
    """`mkdocs.yml` with the page after that of models."""
    after = "  - Models: hub.md\n"
    return old if NAV in old else old.replace(after, after + NAV)


if __name__ == "__main__":
    PAGE.write_text(text(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    nav = ROOT / "mkdocs.yml"
    nav.write_text(navigation(nav.read_text(encoding="utf-8")), encoding="utf-8")
