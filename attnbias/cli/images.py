"""`attnbias observe MODEL --image FILE`: where a model looks in an image, as a page over it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbias.errors import AttnbiasError, Refused

if TYPE_CHECKING:
    from attnbias.report.towers import TowersSeen

ASK = "Describe the image."
"""What a model that writes about images is asked where no text is given."""


def run(args: argparse.Namespace, settings: tuple[tuple[str, str], ...]) -> int:
    """Measure, write the files asked for (all or none), print the findings; returns 0."""
    from attnbias.cli.loading import text_of
    from attnbias.cli.observe import OUTPUTS, _title, layer_numbers
    from attnbias.report.files import check_targets, write_all

    targets = {name: path for name in OUTPUTS if (path := getattr(args, name, None)) is not None}
    check_targets(targets.values())
    layers = layer_numbers(args.layers)
    text = None if args.text is None else text_of(args.text)
    picture = _opened(args.image)
    model, processor, revision, kind = load(args)
    inputs = inputs_of(kind, processor, picture, text, args.model)
    seen = see(
        model, processor, inputs, kind, name=_title(args.model), revision=revision, layers=layers,
        image=args.image.name, settings=settings,
    )  # fmt: skip
    write_all({path: content(name, seen) for name, path in targets.items()})
    tell(seen, targets)
    return 0


def load(args: argparse.Namespace) -> tuple[Any, Any, str, str]:
    """Model, processor, identity and kind: "image-text", "vision" or "dual"."""
    from attnbias.cli.loading import load_for

    options = {
        "device": args.device, "dtype": args.dtype, "revision": args.revision,
        "trust_remote_code": args.trust_remote_code,
    }  # fmt: skip
    for kind in ("image-text", "dual", "vision"):
        try:
            return (*load_for(kind, args.model, **options), kind)
        except Refused:
            continue
    raise Refused(
        f"{args.model!r} takes no image; give a vision model, a model of images and text, or leave "
        "--image out"
    )


def inputs_of(
    kind: str, processor: Any, picture: Any, text: str | None, name: str
) -> dict[str, Any]:
    """The keyword arguments of one forward."""
    if kind == "vision":
        if text is not None:
            raise AttnbiasError(f"{name!r} reads images alone; leave --text out")
        return dict(processor(images=picture, return_tensors="pt"))
    if kind == "dual":
        words = [(text or ASK).strip()]
        return dict(processor(text=words, images=picture, return_tensors="pt", truncation=True))
    from attnbias.hub import prompt

    return dict(prompt(processor, (text or ASK).strip(), image=picture).inputs)


def see(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    kind: str,
    *,
    name: str,
    revision: str = "",
    layers: Any = "all",
    image: str = "",
    settings: tuple[tuple[str, str], ...] = (),
) -> TowersSeen:
    """Every part of the page that the model and its input have."""
    from attnbias import __version__
    from attnbias.hub.device import runs_on
    from attnbias.report.looking import SEED, see_image
    from attnbias.report.modalities import see_image_in_text, see_modalities
    from attnbias.report.towers import ImageSeen, ModalitySeen, TowersSeen

    device = runs_on(model)
    given = {key: value.to(device) for key, value in inputs.items()}
    parts: list[ImageSeen | ModalitySeen] = []
    notes: list[tuple[str, str]] = []
    drawn = {"processor": processor, "layers": layers, "name": image}
    makers: list[Any] = [see_image]
    if kind == "image-text":
        parts.append(see_modalities(model, given, layers=layers))
        makers.append(see_image_in_text)
    for maker in makers:
        try:
            parts.append(maker(model, given, **drawn))
        except Refused as error:
            notes.append(("Not drawn over the image", str(error)))
    if not parts:
        raise Refused(notes[0][1])
    controls = f"patches shuffled and weights drawn with seed {SEED}"
    return TowersSeen(
        name, revision, type(model).__name__, __version__, tuple(parts),
        (*settings, ("Controls", controls), *notes),
    )  # fmt: skip


def content(name: str, seen: TowersSeen) -> bytes:
    """The bytes of one output: "report", "png", "csv" or "json"."""
    from attnbias.report import overlay, tower_page
    from attnbias.report.towers import ImageSeen

    if name == "png":
        images = [part for part in seen.parts if isinstance(part, ImageSeen)]
        if not images:
            raise AttnbiasError("--png: nothing could be drawn over the image")
        return overlay.png(images[0])
    makers = {
        "report": tower_page.render, "csv": tower_page.to_csv, "json": tower_page.to_json,
    }  # fmt: skip
    return makers[name](seen)


def tell(seen: TowersSeen, targets: dict[str, Path]) -> None:
    """Print the findings and the names of the files written."""
    from rich.console import Console
    from rich.text import Text

    from attnbias.report.clean import visible
    from attnbias.report.tower_page import findings

    console = Console(highlight=False)
    for line in findings(seen):
        console.print(Text(f"- {visible(line)}"))
    for path in targets.values():
        console.print(Text(f"written: {path}"))


def _opened(path: Path) -> Any:
    from attnbias.hub.images import opened

    try:
        return opened(path)
    except AttnbiasError as error:
        raise AttnbiasError(f"--image {str(path)!r} is not an image that can be read") from error
