"""Towers over images: the numbers beside eager maps, the figure and the page beside the numbers."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError, Refused
from attnbias.observe.grid import Grid
from attnbias.report import overlay, tower_page
from attnbias.report.looking import moved, see_image, shuffle_patches
from attnbias.report.modalities import modalities, see_image_in_text, see_modalities
from attnbias.report.towers import (
    FOLLOWED,
    RANDOM,
    SHUFFLED,
    ImageSeen,
    ModalitySeen,
    Picture,
    Surface,
    TowersSeen,
)
from tests.steer import models

VISION = ("vit", "dinov2", "clip vision", "llava", "gemma3", "qwen2_vl")


def eager(subject: models.Subject, tower: str = "vision") -> list[Tensor]:
    """The maps (images, heads, N, N) of each layer of a tower, read off the eager modules."""
    import attnbias as ab

    twin = subject.eager()
    maps: dict[str, list[Tensor]] = {}
    hooks = [
        twin.get_submodule(site.name).register_forward_hook(
            lambda module, args, out, name=site.name: maps.setdefault(name, []).append(out[1])
        )
        for site in ab.sites(subject.model)
        if site.tower == tower
    ]
    with torch.no_grad():
        subject.run(twin)
    for hook in hooks:
        hook.remove()
    return [torch.cat([one.reshape(-1, *one.shape[-3:]) for one in found]).double()
            for found in maps.values()]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in VISION if n != "qwen2_vl"])
def test_surfaces_are_the_eager_maps_over_the_patches(name: str) -> None:
    subject = models.MAKERS[name]()
    seen = see_image(subject.model, subject.inputs, image=1, controls=False)
    grid = Grid.of(subject.model, subject.inputs)
    whole = torch.stack([p[1] for p in eager(subject)])
    tokens = whole.shape[-1]
    assert tokens == grid.start + grid.patches
    found = {one.key: one.values for one in seen.surfaces}
    received = whole.mean(-2)[..., grid.start :].unflatten(-1, (grid.rows, grid.columns)) * tokens
    assert torch.allclose(found["received"], received, atol=1e-4)
    numbers = {one.key: one for one in seen.numbers}
    assert numbers["entropy"].values == pytest.approx(
        -torch.xlogy(whole, whole).sum(-1).mean(-1), abs=1e-4
    )
    assert numbers["share patches"].values == pytest.approx(
        whole[..., grid.start :].sum(-1).mean(-1), abs=1e-5
    )
    if grid.start:
        row = whole[..., 0, grid.start :].unflatten(-1, (grid.rows, grid.columns)) * tokens
        assert torch.allclose(found["given"], row, atol=1e-4)
        assert numbers["share class"].values == pytest.approx(whole[..., 0].mean(-1), abs=1e-5)


def test_blocks_of_patches_are_laid_out_as_the_image_is() -> None:
    """Qwen2-VL reads 2 x 2 blocks: an image whose patches say where they are must come back."""
    subject = models.MAKERS["qwen2_vl"]()
    rows = columns = 4
    order = [
        (2 * a + c, 2 * b + d) for a in range(2) for b in range(2) for c in range(2)
        for d in range(2)
    ]  # fmt: skip
    lines = torch.stack([torch.full((3 * 2 * 4 * 4,), float(r * columns + c)) for r, c in order])
    inputs = {**subject.inputs, "pixel_values": torch.cat([lines * 0 - 1, lines])}
    grid = Grid.of(subject.model, inputs, image=1)
    assert (grid.rows, grid.columns, grid.start) == (rows, columns, 0)
    seen = see_image(subject.model, inputs, image=1, controls=False)
    shown = seen.picture.pixels[2::4, 2::4, 0].double()
    want = torch.arange(16.0).reshape(4, 4) / 15 * 255
    assert torch.allclose(shown, want.double(), atol=1)
    assert grid.cells(grid.positions()[2, 3]).tolist() == [2, 3]


def test_class_tokens_and_registers_are_told_apart() -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4,
        num_register_tokens=3,
    )  # fmt: skip
    model = Dinov2WithRegistersModel(config).eval()
    seen = see_image(model, {"pixel_values": models.pixels(1)}, controls=False)
    assert [one.key for one in seen.numbers] == [
        "share class", "share patches", "share registers", "entropy",
    ]  # fmt: skip
    total = sum(one.values for one in seen.numbers[:3])
    assert torch.allclose(torch.as_tensor(total), torch.ones(1, 2, dtype=torch.float64), atol=1e-5)


def test_shuffled_patches_go_where_the_order_says() -> None:
    grid = Grid(2, 3, 1)
    pixels = torch.arange(2 * 1 * 4 * 6.0).reshape(2, 1, 4, 6)
    order = moved(grid.patches, 0)
    assert not bool((order == torch.arange(6)).any())
    mixed = shuffle_patches({"pixel_values": pixels}, grid, order, image=1)["pixel_values"]
    assert torch.equal(mixed[0], pixels[0])
    for place, patch in enumerate(order.tolist()):
        (r, c), (a, b) = divmod(place, 3), divmod(patch, 3)
        assert torch.equal(
            mixed[1, 0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2],
            pixels[1, 0, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2],
        )


def test_controls_tell_content_from_place() -> None:
    """Without position embeddings attention follows the patch; with them alone it stays."""
    for content in (True, False):
        subject = models.MAKERS["vit"]()
        embeddings = subject.model.vit.embeddings
        with torch.no_grad():
            if content:
                embeddings.position_embeddings.zero_()
            else:
                embeddings.patch_embeddings.projection.weight.zero_()
        seen = see_image(subject.model, subject.inputs)
        (surface, _) = seen.surfaces
        own = surface.mean()
        follows = overlay.correlation(own, surface.mean(control=FOLLOWED))
        stays = overlay.correlation(own, surface.mean(control=SHUFFLED))
        assert (follows > 0.999) == content
        assert (stays > 0.999) == (not content)
        assert not torch.allclose(own, surface.mean(control=RANDOM))


@pytest.mark.parametrize("name", models.VLMS)
def test_shares_by_modality_are_sums_of_the_eager_map(name: str) -> None:
    subject = models.MAKERS[name]()
    row = subject.row(0)
    seen = see_modalities(subject.model, row)
    assert seen.groups == {"first": 1, "image 0": 4, "text": 11}
    one = models.Subject(name, subject.model, row)
    whole = torch.stack([p[0] for p in eager(one, "text")])
    columns = {"first": slice(0, 1), "image 0": slice(2, 6)}
    found = {number.key: number for number in seen.numbers}
    text_rows = [1, *range(6, 16)]
    for group, keys in columns.items():
        asked = whole[:, :, [r for r in text_rows if r >= 2]][..., keys].sum(-1).mean(-1)
        assert torch.allclose(found[f"text->{group}"].values, asked, atol=1e-5)
        last = whole[:, :, -1][..., keys].sum(-1)
        assert torch.allclose(found[f"last->{group}"].values, last, atol=1e-5)
    assert found["last->image 0"].even == pytest.approx(4 / 16)
    assert RANDOM in found["last->text"].controls


@pytest.mark.parametrize("name", models.VLMS)
def test_the_last_token_over_the_image_is_its_row_of_the_map(name: str) -> None:
    subject = models.MAKERS[name]()
    row = subject.row(0)
    seen = see_image_in_text(subject.model, row)
    whole = torch.stack([p[0] for p in eager(models.Subject(name, subject.model, row), "text")])
    want = whole[:, :, -1, 2:6].reshape(3, 4, 2, 2) * 16
    assert torch.allclose(seen.surfaces[0].values, want, atol=1e-4)
    assert seen.picture.pixels.shape == (16, 16, 3)
    with pytest.raises(AttnbiasError, match="no image 3"):
        see_image_in_text(subject.model, row, image=3)
    if name == "llava":
        three = {
            **row,
            "input_ids": torch.cat([row["input_ids"][:, :5], row["input_ids"][:, 6:]], 1),
        }
        with pytest.raises(Refused, match="form no grid"):
            see_image_in_text(subject.model, three)


def test_what_stands_out_is_named_and_what_does_not_is_not() -> None:
    even = torch.ones(1, 2, 3, 3)
    spot = even.clone()
    spot[..., 1, 2] = 9.0

    def told(values: Tensor, place: Tensor, patch: Tensor, random: Tensor) -> str:
        controls = {SHUFFLED: place, FOLLOWED: patch, RANDOM: random}
        return overlay.verdict(Surface("received", "T", "m", (0,), values, controls))

    assert told(even, even, even, even).startswith("No strong bias found: no patch receives 2")
    assert told(spot, spot, even, spot).startswith("No strong bias found: the highest patch")
    assert told(spot, spot, spot.flip(-1), even).startswith("A bias to a place in the image")
    assert told(spot, spot.flip(-1), spot, even).startswith("Attention follows what the patches")
    assert "by neither" in told(spot, spot.flip(-1), spot.flip(-2).flip(-1), even)


def test_what_cannot_be_drawn_is_refused() -> None:
    subject = models.MAKERS["llava"]()
    row = subject.row(0)
    with pytest.raises(AttnbiasError, match="pixel_values"):
        see_image(subject.model, {"input_ids": row["input_ids"]})
    with pytest.raises(AttnbiasError, match="one row"):
        see_modalities(subject.model, subject.inputs)
    with pytest.raises(AttnbiasError, match="no image"):
        modalities(subject.model, {"input_ids": models.tokens(1) % 80})
    from transformers import SwinConfig, SwinModel

    swin = SwinModel(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                   window_size=4)
    )  # fmt: skip
    with pytest.raises(Refused, match="not the patches"):
        see_image(swin.eval(), {"pixel_values": models.pixels(1)})


def test_the_model_is_left_as_it_was() -> None:
    subject = models.MAKERS["vit"]()
    model = subject.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    see_image(model, subject.inputs)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# The figure ---------------------------------------------------------------------------------------


def made(name: str = "<b>&\u202e.png") -> ImageSeen:
    values = torch.arange(2 * 3 * 6.0).reshape(2, 3, 2, 3) / 10
    values[1, 2, 0, 1] = 9.0
    surface = Surface(
        "received", "Attention received", "How much.", (0, 4), values,
        {SHUFFLED: values.flip(-1), FOLLOWED: values * 2, RANDOM: torch.ones_like(values)},
    )  # fmt: skip
    pixels = (torch.arange(8 * 12 * 3) % 251).byte().reshape(8, 12, 3)
    return ImageSeen("vision", Picture(pixels, name), (surface,))


def test_the_figure_is_whole_and_says_its_numbers() -> None:
    seen = made()
    figure = overlay.svg(seen, "received", 4, 2)
    root = tree.fromstring(figure)
    space = "{http://www.w3.org/2000/svg}"
    image = root.find(f".//{space}image")
    assert image is not None
    href = image.get("href") or ""
    assert href.startswith("data:image/png;base64,")
    assert decoded(base64.b64decode(href.split(",")[1])) == seen.picture.pixels.tolist()
    assert len(re.findall(r"https?://", figure)) == 1  # the name space alone
    discs = [one for one in root.iter(f"{space}circle") if one.get("style") is None]
    values = seen.surfaces[0].head(4, 2)
    areas = torch.tensor([float(one.get("r") or 0) ** 2 for one in discs])
    assert torch.allclose(areas / areas.max(), values.flatten() / values.max(), atol=0.02)
    assert "row 1, column 2: 9.0×" in (root.get("aria-label") or "")
    marks = [one for one in root.iter(f"{space}text") if one.get("class") == "mark"]
    assert marks[0].text == "1"


def decoded(png: bytes) -> Any:
    import io

    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB")).tolist()


def test_png_and_fragment() -> None:
    seen = made()
    assert overlay.png(seen).startswith(b"\x89PNG")
    piece = overlay.fragment(seen, "received", 0)
    assert overlay.fragment(seen) in seen._repr_html_()
    cells = [float(x) for x in re.findall(r"<td>([\d.]+)</td>", piece)]
    want = seen.surfaces[0].mean(0).flatten().tolist()
    assert cells == pytest.approx(want, abs=0.006)
    assert "script" not in piece
    for wrong, match in (("given", "was not seen"), ("received", "head is named")):
        with pytest.raises(AttnbiasError, match=match):
            overlay.svg(seen, wrong, None, 0)
    with pytest.raises(AttnbiasError, match="layers"):
        overlay.svg(seen, "received", 3)


def test_words_come_from_the_numbers_and_their_controls() -> None:
    text = overlay.says(made().surfaces[0], 4, 2)
    assert "row 1, column 2: 9.0×" in text
    assert "with random weights it is at row 1, column 1: 1.0×" in text
    assert "+1.00 with that of the shuffled image when each patch is followed" in text


def whole() -> TowersSeen:
    subject = models.MAKERS["llava"]()
    parts = (
        see_image(subject.model, subject.row(0), name="<script>alert(1)</script>"),
        see_modalities(subject.model, subject.row(0)),
    )
    return TowersSeen("<script>x</script>", "abc", "Llava", "1", parts, (("Command", "a < b"),))


def test_the_page_holds_its_numbers_and_runs_nothing() -> None:
    seen = whole()
    page = tower_page.render(seen)
    assert page == tower_page.render(seen)
    text = page.decode()
    assert "<script" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert seen.parts[0].picture.sha256 in text  # type: ignore[union-attr]
    assert "default-src 'none'" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    rows = tower_page.to_csv(seen).decode().splitlines()
    assert rows[0] == "tower,statistic,of,layer,head,value"
    modal = next(part for part in seen.parts if isinstance(part, ModalitySeen))
    one = next(number for number in modal.numbers if number.key == "last->image 0")
    line = next(r for r in rows if r.startswith("text,last->image 0,this input,1,2,"))
    assert float(line.rsplit(",", 1)[1]) == float(one.values[1, 2])
    assert f"{100 * float(one.values[1, 2]):.1f}%" in text
    data = json.loads(tower_page.to_json(seen))
    assert data["facts"]["Command"] == "a < b"
    assert data["surfaces"][0]["values"] == seen.parts[0].surfaces[0].values.tolist()  # type: ignore[union-attr]


# Encoder-decoders ---------------------------------------------------------------------------------


def sharp(kind: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A tiny T5, BART or Whisper with sharpened heads, and one row of its inputs."""
    ids = {"decoder_input_ids": models.tokens(1, 7, seed=5)}
    if kind == "bart":
        subject = models.bart("cross")
        return subject.model, {"input_ids": models.tokens(1, 11), **ids}
    if kind == "t5":
        from tests.observe.models import t5_model

        return t5_model(), {"input_ids": models.tokens(1, 11) % 60, "decoder_input_ids":
                            ids["decoder_input_ids"] % 60}  # fmt: skip
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=models.VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = models.sharpen(models.redraw(WhisperModel(config)).eval(), 5.0)
    sound = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))
    return model, {"input_features": sound, **ids}


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_cross_attention_is_that_of_the_eager_map(kind: str) -> None:
    import copy

    from attnbias.report.crossing import see_cross

    model, inputs = sharp(kind)
    seen = see_cross(model, inputs)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        out = twin(**inputs, output_attentions=True)
    whole = torch.stack([p[0] for p in out.cross_attentions]).double()
    keys = whole.shape[-1]
    assert len(seen.source) == keys
    assert len(seen.target) == 7
    assert torch.allclose(seen.received, whole.mean(-2) * keys, atol=1e-4)
    found = {one.key: one for one in seen.numbers}
    entropy = -torch.xlogy(whole, whole).sum(-1).mean(-1)
    assert torch.allclose(found["entropy"].values, entropy, atol=1e-4)
    assert torch.allclose(found["most"].values, whole.mean(-2).amax(-1), atol=1e-5)
    assert torch.allclose(found["last"].values, whole[..., -1].mean(-1), atol=1e-5)
    assert float(found["entropy"].values.min()) < 0.9 * found["entropy"].even
    assert not torch.allclose(found["last"].values, found["last"].controls[RANDOM])
    if kind == "whisper":
        assert seen.source[:3] == ("0.00 s", "0.02 s", "0.04 s")
    page = TowersSeen(kind, "", kind, "1", (seen,))
    text = tower_page.render(page).decode()
    mean = seen.received.flatten(0, 1).mean(0)
    assert f"<td>{float(mean.max()):.2f}</td>" in text
    assert json.loads(tower_page.to_json(page))["sources"][0]["source"][0] == seen.source[0]


def test_cross_attention_needs_names_that_fit() -> None:
    from attnbias.report.crossing import see_cross

    model, inputs = sharp("bart")
    named = see_cross(model, inputs, source=[f"w{n}" for n in range(11)], controls=False)
    assert named.source[2] == "w2"
    with pytest.raises(AttnbiasError, match="source must name 11"):
        see_cross(model, inputs, source=["a"], controls=False)
    with pytest.raises(AttnbiasError, match="one row"):
        see_cross(model, {k: v.expand(2, -1) for k, v in inputs.items()}, controls=False)
    with pytest.raises(Refused, match="no cross tower"):
        see_cross(models.MAKERS["vit"]().model, {})


# The command --------------------------------------------------------------------------------------


def test_the_command_writes_a_page_over_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    from attnbias.cli import main

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=48, patch_size=8, initializer_range=0.2,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "vit")
    flower = load_sample_images().images[1]
    Image.fromarray(flower).save(tmp_path / "flower.png")
    out = {kind: tmp_path / f"out.{kind}" for kind in ("html", "png", "csv", "json")}
    capsys.readouterr()
    given = ["observe", str(tmp_path / "vit"), "--image", str(tmp_path / "flower.png")]
    code = main([
        *given, "--report", str(out["html"]), "--png", str(out["png"]), "--csv", str(out["csv"]),
        "--json", str(out["json"]),
    ])  # fmt: skip
    assert code == 0
    assert "Attention received" in capsys.readouterr().out
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    data = json.loads(out["json"].read_text())
    page = out["html"].read_text()
    values = torch.tensor(data["surfaces"][0]["values"])
    assert values.shape == (2, 2, 6, 6)
    assert f"<td>{float(values.mean((0, 1))[2, 3]):.2f}</td>" in page
    assert data["facts"]["Command"].startswith("attnbias observe")
    assert str(tmp_path) not in page.replace(str(tmp_path / "vit"), "")
    for wrong, says in (
        ([*given, "--text", str(tmp_path / "out.csv")], "images alone"),
        ([*given[:3], str(out["csv"])], "not an image"),
        (given[:2], "--image"),
    ):
        assert main(wrong) == 2
        assert says in capsys.readouterr().err


def test_the_command_on_a_model_of_images_and_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnbias.cli import main
    from tests.hub import processors

    subject, processor = models.MAKERS["llava"](), processors.processor("llava")
    number = processor.tokenizer.convert_tokens_to_ids("<image>")
    subject.model.config.image_token_id = subject.model.config.image_token_index = number
    subject.model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    processors.picture().save(tmp_path / "picture.png")
    (tmp_path / "question.txt").write_text("what is in the picture ?")
    out = tmp_path / "out.json"
    capsys.readouterr()
    code = main([
        "observe", str(tmp_path / "llava"), "--image", str(tmp_path / "picture.png"),
        "--text", str(tmp_path / "question.txt"), "--json", str(out), "--layers", "0,1",
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    data = json.loads(out.read_text())
    assert [one["tower"] for one in data["surfaces"]] == ["vision", "vision", "text"]
    rows = [one for one in data["heads"] if one["statistic"].startswith("last->")]
    shares: dict[tuple[int, int], float] = {}
    for one in rows:
        if one["of"] == "this input":
            key = (one["layer"], one["head"])
            shares[key] = shares.get(key, 0.0) + one["value"]
    assert set(shares) == {(layer, head) for layer in (0, 1) for head in range(4)}
    assert list(shares.values()) == pytest.approx([1.0] * 8, abs=1e-5)
