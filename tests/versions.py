"""The oldest transformers that each fused class works on, found by running its inherited case.

python -m tests.versions [FILE ...]      search for the files of tests/fuse that are named, or all
python -m tests.versions --version V     run one version, whatever the search would take

Each version of transformers is installed alone into a folder of its own (with the versions of
huggingface_hub and tokenizers that it asks for) and stands before the environment's on the path.
A class works on a version when the tests of outputs, gradients and generation of each case that
fuses it pass. The search halves the list of versions for each file until its oldest are found; what
was run is kept in the folder and not run again (--fresh runs anew). The result is the table
`attnbias/fuse/versions.json`, read by `attnbias support`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-versions"
TABLE = ROOT / "attnbias" / "fuse" / "versions.json"
# The last release of every minor version since the interface for attention took its form.
VERSIONS = (
    "4.55.4", "4.56.2", "4.57.6", "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2",
    "5.7.0", "5.8.1", "5.9.0", "5.10.4", "5.11.0", "5.12.1", "5.13.1", "5.14.1", "5.15.1",
    "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0",
)  # fmt: skip
NEEDED = ("huggingface-hub", "tokenizers")
# The tests of the inherited case that say whether a class works: outputs, gradients, generation,
# and that the model is left as it was. The others say nothing more about a version.
TAKEN = "eval or padded or gradients or generation or bias_matters or route or undone"


# Environments -------------------------------------------------------------------------------------


def folder(version: str) -> Path:
    """Where a version of transformers lies, installed if it does not lie there yet."""
    from packaging.requirements import Requirement

    where = FOLDER / version
    if (where / ".done").is_file():
        return where
    _pip(where, f"transformers=={version}")
    (metadata,) = where.glob("transformers-*.dist-info/METADATA")
    lines = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata.read_text("utf-8"), flags=re.M)
    for wanted in map(Requirement, lines):
        name = wanted.name.replace("_", "-")
        if name in NEEDED and installed(name) not in wanted.specifier:
            _pip(where, f"{name}{wanted.specifier}")
    (where / ".done").touch()
    return where


def _pip(where: Path, what: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--target", str(where), what], check=True)


def environment(version: str) -> dict[str, str]:
    """The variables under which a process finds that version."""
    path = [] if version == installed("transformers") else [str(folder(version))]
    path += [str(ROOT), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, path))}


# One run ------------------------------------------------------------------------------------------


def run(names: Sequence[str], version: str) -> dict[str, dict[str, str]]:
    """File -> case -> "" where its tests pass on that version, else the first failure in a line."""
    report = FOLDER / f"{version}.xml"
    report.unlink(missing_ok=True)
    files = [f"tests/fuse/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-k", TAKEN]
    done = subprocess.run(
        [*command, f"--junitxml={report}", "-o", "junit_family=xunit2"],
        cwd=ROOT, env=environment(version), capture_output=True, text=True,
    )  # fmt: skip
    if not report.is_file():
        return {name: {"*": _line(done.stderr or done.stdout)} for name in names}
    found = outcomes(report.read_text("utf-8"))
    return {name: found.get(name, {"*": "no test was run"}) for name in names}


def outcomes(report: str) -> dict[str, dict[str, str]]:
    """The same from the text of pytest's report; the case "*" stands for the whole file."""
    found: dict[str, dict[str, str]] = {}
    for test in ElementTree.fromstring(report).iter("testcase"):
        where, kind = (test.get("classname") or "").rpartition(".")[::2]
        name = where.rpartition(".")[2]
        case = f"{name}::{kind}"
        if not where:  # the file could not be read
            name, case = (test.get("name") or "").rpartition(".")[2], "*"
        elif not kind.startswith("Test"):
            continue  # tests beside the cases
        here = found.setdefault(name, {})
        bad = [*test.findall("failure"), *test.findall("error")]
        if bad:
            said = _line(bad[0].get("message") or "") or _line(bad[0].text or "", last=True)
            here[case] = here.get(case) or f"{test.get('name')}: {said}"
        elif test.find("skipped") is None:
            here.setdefault(case, "")
    return found


def _line(text: str, last: bool = False) -> str:
    lines = [" ".join(one.split()) for one in text.strip().splitlines() if one.strip()]
    said = lines[-1 if last else 0] if lines else ""
    return re.sub(r"(/[\w.+-]+)+/", "", said)[:200]  # no folders of this machine


# The search ---------------------------------------------------------------------------------------


def oldest(case: str, tried: dict[str, dict[str, str]]) -> tuple[str, str]:
    """The oldest version from which on all that were run pass, and what stopped below it."""
    good, reason = "", ""
    for version in sorted(tried, key=_number, reverse=True):
        said = _of(tried[version], case)
        if said:
            reason = f"{version}: {said}"
            break
        good = version
    return good, reason


def _of(found: dict[str, str], case: str) -> str:
    return found.get("*") or found.get(case, "the case was not there")


def following(cases: Iterable[str], tried: dict[str, dict[str, str]], floor: str) -> str | None:
    """The version to run next for a file, None when all its cases are found.

    First the floor, and below it one by one until a case fails; where it fails on the floor, the
    newest, then between the newest failure and the oldest pass by halves.
    """
    if floor not in tried:
        return floor
    for case in cases:
        if VERSIONS[-1] not in tried and _of(tried[floor], case):
            return VERSIONS[-1]
        good = [v for v in tried if not _of(tried[v], case)]
        if not good or (VERSIONS[-1] in tried and VERSIONS[-1] not in good):
            continue  # it fails on the newest: nothing to search
        low = VERSIONS.index(oldest(case, tried)[0])
        bad = [VERSIONS.index(v) for v in tried if v not in good and VERSIONS.index(v) < low]
        if not bad:
            if low > 0:
                return VERSIONS[low - 1]
        elif low - max(bad) > 1:
            return VERSIONS[(low + max(bad)) // 2]
    return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


# The table ----------------------------------------------------------------------------------------


def fused_classes() -> dict[str, dict[str, str]]:
    """Case -> the classes that its model has fused, each with the name of its family."""
    from attnbias.fuse.find import find, path_of
    from tests.cases.fuse_found import cases

    found = {}
    for name, case in cases().items():
        here: dict[str, str] = {}
        for place, family in find(case().model()).places.items():
            kinds = (path_of(kind) for kind in type(place.module).__mro__)
            path = next(path for path in kinds if path in family.modules)
            here[path] = family.name
        found[name] = here
    return found


def table(runs: dict[str, Any], classes: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What is written: for each class and family the oldest version, and what stops below."""
    rows: dict[str, dict[str, Any]] = {}
    for case, paths in classes.items():
        paths = {path: one for path, one in paths.items() if path.startswith("transformers.")}
        tried = runs.get(case.partition("::")[0], {})
        if not tried:
            continue
        good, reason = oldest(case, tried)
        for path, family in paths.items():
            row = rows.setdefault(path, {"family": family, "oldest": good, "below": reason})
            row.setdefault("cases", []).append(case)
            if not good or (row["oldest"] and _number(good) > _number(row["oldest"])):
                row.update(oldest=good, below=reason)
    families: dict[str, dict[str, str]] = {}
    for row in rows.values():
        known = families.setdefault(row["family"], {"oldest": row["oldest"]})
        if not row["oldest"] or (
            known["oldest"] and _number(row["oldest"]) > _number(known["oldest"])
        ):
            known["oldest"] = row["oldest"]
    ran = sorted({version for tried in runs.values() for version in tried}, key=_number)
    return {
        "made by": "python -m tests.versions",
        "torch": installed("torch"),
        "python": platform.python_version(),
        "ran": ran,
        "families": dict(sorted(families.items())),
        "classes": dict(sorted(rows.items())),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and write the table."""
    from tests.cases.fuse_found import files

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", help="names such as test_t5; default: all with cases")
    parser.add_argument("--version", action="append", default=[], help="run this one, no search")
    parser.add_argument("--floor", default="5.2.0", help="where the search begins")
    parser.add_argument("--write", action="store_true", help="run nothing, write what was run")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    args = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    kept = FOLDER / "runs.json"
    runs = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    classes = fused_classes()
    wanted = args.files or [name for name in files() if any(_in(name, case) for case in classes)]
    wanted = [] if args.write else wanted
    if args.fresh:
        runs = {name: tried for name, tried in runs.items() if name not in wanted}
    while todo := _next(wanted, classes, runs, args.version, args.floor):
        version, names = todo
        for name, found in run(names, version).items():
            runs.setdefault(name, {})[version] = found
            bad = {case: said for case, said in found.items() if said}
            print(f"{name} on {version}: {bad or 'passed'}", flush=True)
        kept.write_text(json.dumps(runs, indent=1), "utf-8")
    TABLE.write_text(json.dumps(table(runs, classes), indent=1) + "\n", "utf-8")
    print(f"written: {TABLE.relative_to(ROOT)}")
    return 0


def _next(
    files: Sequence[str],
    classes: dict[str, dict[str, str]],
    runs: dict[str, Any],
    asked: Sequence[str],
    floor: str,
) -> tuple[str, list[str]] | None:
    """One version, with the files that are to be run on it next; None when all is done."""
    wanted: dict[str, list[str]] = {}
    for name in files:
        tried = runs.get(name, {})
        cases = [case for case in classes if _in(name, case)]
        left = [version for version in asked if version not in tried]
        version = left[0] if left else None if asked else following(cases, tried, floor)
        if version is not None:
            wanted.setdefault(version, []).append(name)
    return max(wanted.items(), key=lambda one: len(one[1]), default=None)


def _in(name: str, case: str) -> bool:
    return case.partition("::")[0] == name


if __name__ == "__main__":
    sys.exit(main())
