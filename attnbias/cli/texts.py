"""`attnbias observe MODEL --text FILE`: one text, alone or beside another run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    from attnbias.report.data import ReportData

OUTPUTS = ("report", "png", "svg", "csv", "json")


def add(parser: argparse.ArgumentParser) -> None:
    """The options of a text that need a line of their own."""
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        help="a second run beside the first on the page: another text (a file), another model (a "
        "folder or hub name), a recipe of rules for the same model, or a report saved by --json",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the main figure as SVG")
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="every map and the words as PNG and SVG"
    )


def check_unused(args: argparse.Namespace, given: str) -> None:
    """Refuse the options of a text where something else is observed."""
    for name in ("compare", "svg", "figures"):
        if getattr(args, name) is not None:
            raise AttnbiasError(f"--{name} goes with --text, not with {given}; leave one out")


def run(args: argparse.Namespace, settings: Sequence[tuple[str, str]]) -> int:
    """Measure, write the files asked for (all or none), print the summary; returns 0."""
    from attnbias.cli import observe
    from attnbias.report.files import check_targets, write_all

    targets = {name: path for name in OUTPUTS if (path := getattr(args, name)) is not None}
    check_targets(targets.values())
    if args.figures is not None and not args.figures.is_dir():
        raise AttnbiasError(f"--figures {str(args.figures)!r} is not a folder; make it first")
    if args.compare is not None and args.report is None:
        raise AttnbiasError("--compare shows two runs on a page; write --report FILE as well")
    saved = _saved(args.model)
    if saved is not None and args.text is not None:
        raise AttnbiasError(f"{args.model!r} is a saved report; leave --text out")
    second = None if args.compare is None else _Second(args.compare)
    if saved is None:
        data, other = _measured(args, settings, second)
    else:
        data, other = saved, None if second is None else second.report
        if second is not None and other is None:
            raise AttnbiasError(
                f"--compare {args.compare!r}: a saved report is compared with another saved report"
            )
    contents = {path: content(name, data, other) for name, path in targets.items()}
    if args.figures is not None:
        from attnbias.report.page import figures

        contents |= {args.figures / name: one for name, one in figures(data).items()}
    write_all(contents)
    observe.tell(data, targets, other)
    return 0


def content(name: str, data: ReportData, other: ReportData | None = None) -> bytes:
    """The bytes of one output: "report", "png", "svg", "csv" or "json"; the page may show two."""
    from attnbias.report import files, page

    if name == "report":
        return page.render(data, other)
    makers = {
        "png": page.png, "svg": page.svg, "csv": files.to_csv, "json": files.to_json,
    }  # fmt: skip
    return makers[name](data)


class _Second:
    """What --compare names: a saved report, a recipe, a text, or a model."""

    def __init__(self, name: str) -> None:
        self.report: ReportData | None = None
        self.text: str | None = None
        self.recipe: Any = None
        self.model: str | None = None
        path = Path(name)
        if not path.is_file():
            self.model = name
            return
        kind = _json(path)
        if kind is None:
            from attnbias.cli.loading import text_of

            self.text = text_of(name, "--compare")
        elif "rules" in kind:
            from attnbias.steer import Recipe

            self.recipe = Recipe.load(name)
        else:
            self.report = _saved(name)


def _json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file with the ending .json; None for any other file."""
    if path.suffix.lower() != ".json":
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AttnbiasError(f"{str(path)!r} is not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise AttnbiasError(f"{str(path)!r} is not a saved report: it holds no object")
    return found


def _saved(name: str) -> ReportData | None:
    """The report in a .json file; None for a folder or a name."""
    from attnbias.report.data import ReportData

    path = Path(name)
    if not path.is_file() or path.suffix.lower() != ".json":
        return None
    return ReportData.from_dict(_json(path))


def _measured(
    args: argparse.Namespace, settings: Sequence[tuple[str, str]], second: _Second | None
) -> tuple[ReportData, ReportData | None]:
    from attnbias.cli import observe
    from attnbias.cli.loading import load, text_of
    from attnbias.report.collect import collect

    if args.text is None:
        raise AttnbiasError(
            "--text FILE, --image FILE or --corpus FILE must be given; see attnbias observe --help"
        )
    layers = observe.layer_numbers(args.layers)
    text = text_of(args.text)
    options = {
        "device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code,
    }  # fmt: skip
    loaded = load(args.model, revision=args.revision, **options)

    def of(model: Any, words: str, name: str, rules: Sequence[Any] = ()) -> ReportData:
        return collect(
            model[0], model[1], words, name=observe._title(name), revision=model[2], layers=layers,
            max_tokens=args.max_tokens, progress=True, rules=rules,
            settings=(*settings, ("Precision and device", observe._where(model[0]))),
        )  # fmt: skip

    data = of(loaded, text, args.model)
    if second is None or second.report is not None:
        return data, None if second is None else second.report
    if second.text is not None:
        return data, of(loaded, second.text, args.model)
    if second.recipe is not None:
        if second.recipe.model != args.model:
            print(
                f"attnbias: note: the recipe was made for {second.recipe.model!r}, the model is "
                f"{args.model!r}",
                file=sys.stderr,
            )
        rules = tuple(second.recipe.rules)
        made = of(loaded, text, args.model, rules)
        told = ("Rules", f"{Path(args.compare).name}: {', '.join(map(_short, rules))}")
        return data, replace(made, settings=(*made.settings, told))
    assert second.model is not None
    return data, of(load(second.model, **options), text, second.model)


def _short(rule: Any) -> str:
    told = repr(rule)
    return told if len(told) <= 200 else f"{told[:200]} ..."
