"""What is special about windows and images: shifts, padding, tables that change, small maps."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.forms.vit import by_distance
from attnbias.fuse import masked, modes
from attnbias.fuse.windows import Kept, attend, back, cut, into
from tests.fuse.test_beit import TestBeit as OfBeit
from tests.fuse.test_beit import TestBeitBoth as OfBeitBoth
from tests.fuse.test_swin import SMALL
from tests.fuse.test_swin import TestSwin as OfSwin
from tests.fuse.test_swin import TestSwinV2 as OfSwinV2


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 9), (3, 10), (13, 5)])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("learns", [False, True])
def test_every_window_sees_its_own(
    height: int, width: int, shift: int, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few windows at a time in the backward pass; one call for all of them, or one a kind.
    monkeypatch.setattr(masked, "SCORES", 3 * 2 * 16**2)
    monkeypatch.setattr(masked, "TOGETHER", 2**18 if width % 2 else 0)
    torch.manual_seed(0)
    window, heads, size, images, hidden = 4, 2, 8, 3, -1.5  # hidden pairs weigh something here
    down, across = -(-height // window) * window, -(-width // window) * window
    table = torch.randn(49, heads, requires_grad=learns)
    maps = [torch.randn(images, height * width, heads * size) for _ in range(3)]
    windows = cut(images, height, width, window, shift)
    query, key, value = (
        into(one, windows).view(windows.count, 16, heads, size).transpose(1, 2) for one in maps
    )
    out = attend(
        query, key, value, (table,), lambda: by_distance(table, (4, 4)), windows, Kept(),
        hidden=hidden,
    )  # fmt: skip
    found = back(out.flatten(2), windows, images)

    # The same, place by place: where a token stands after the roll, which window that is, and
    # whether two tokens were neighbours before it.
    rows, columns = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
    at = torch.stack([(rows - shift) % down, (columns - shift) % across], -1).reshape(-1, 2)
    place = torch.stack([rows, columns], -1).reshape(-1, 2)
    together = ((at[:, None] // window) == (at[None] // window)).all(-1)
    near = (place[:, None] - place[None] == at[:, None] - at[None]).all(-1)
    step = at[:, None] - at[None] + window - 1
    index = (step[..., 0] * 7 + step[..., 1]).clamp(0, 48)
    bias = table[index].permute(2, 0, 1) + torch.where(near, 0.0, hidden)
    bias = bias.masked_fill(~together, -torch.inf)
    wide = [
        nn.functional.pad(
            one.view(images, height, width, -1), (0, 0, 0, across - width, 0, down - height)
        ).view(images, -1, heads, size).transpose(1, 2)
        for one in maps
    ]  # fmt: skip
    scores = wide[0] @ wide[1].mT / size**0.5 + bias
    whole = (scores.softmax(-1) @ wide[2]).transpose(1, 2).flatten(2)
    wanted = whole.view(images, down, across, -1)[:, :height, :width].reshape(found.shape)
    assert torch.allclose(found, wanted, atol=2e-6)
    if learns:
        weights = torch.randn_like(found)
        (ours,) = torch.autograd.grad((found * weights).sum(), table)
        (theirs,) = torch.autograd.grad((wanted * weights).sum(), table)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("case", [OfSwin(), OfSwinV2()])
def test_a_changed_table_is_followed(case: Any) -> None:
    model = case.model()
    given = case.inputs(1, 30)
    with ab.fuse(model, quiet=True, measure=False):
        first = case.run(model, given)
        for _, one in case.biases(model):
            one.data.mul_(-0.5)  # leaves no trace in the version of the parameter
        found = case.run(model, given)
    wanted = case.run(model, given)
    assert case.off(first, wanted) > 1e-2
    assert case.off(found, wanted) <= 1e-5


@pytest.mark.parametrize("case", [OfSwin(), OfSwinV2(), OfBeit()])
def test_frozen_tables_and_inference_before_training(case: Any) -> None:
    model = case.model()
    for name, one in model.named_parameters():
        one.requires_grad_(not re.search("position_bias", name))
    given = case.inputs(1, 30)
    other = copy.deepcopy(model)
    with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
        with torch.inference_mode():
            model(**given)
        for one in (model, other):
            case.loss(one, given).backward()
    wanted = {name: one.grad for name, one in other.named_parameters() if one.grad is not None}
    largest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in model.named_parameters():
        if name in wanted:
            assert one.grad is not None
            scale = max(float(wanted[name].abs().max()), 1e-4 * largest)
            assert float((one.grad - wanted[name]).abs().max()) / scale <= 1e-4, name
    assert all(one.grad is None for _, one in case.biases(model))


@pytest.mark.parametrize("side", [4, 6, 22])
def test_windows_larger_than_the_map(side: int) -> None:
    from transformers import SwinBackbone, SwinConfig

    torch.manual_seed(0)
    model = SwinBackbone(SwinConfig(**SMALL, out_features=["stage1", "stage2"])).eval()
    for name, one in model.named_parameters():
        if "table" in name:
            one.data.normal_()
    image = torch.randn(2, 3, side, side + 2)
    with torch.no_grad(), ab.fuse(model, quiet=True, measure=False):
        with modes.taking("fused"), modes.recording() as seen:
            found = model(image).feature_maps
        with modes.taking("stock"):
            wanted = model(image).feature_maps
    assert len(seen) == 4
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_map_smaller_than_its_window_is_left_to_stock_code() -> None:
    case = OfSwin()
    model = case.model()
    small = {"pixel_values": torch.randn(1, 3, 6, 6)}
    with pytest.raises(RuntimeError) as wanted:
        copy.deepcopy(model)(**small)
    with ab.fuse(model, quiet=True, measure=False), pytest.raises(RuntimeError) as found:
        case.run(model, small)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("case", [OfSwin(), OfSwinV2(), OfBeit(), OfBeitBoth()])
def test_no_mask_of_all_windows_is_made(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.model()
    given = case.inputs(1, 30)
    wanted = case.run(model, given)
    with ab.fuse(model, quiet=True, measure=False):
        for module in model.modules():
            for name in ("get_attn_mask", "generate_relative_position_index"):
                if hasattr(module, name):
                    monkeypatch.setattr(type(module), name, _never)
        assert case.off(case.run(model, given), wanted) <= 1e-5


def _never(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the stock code makes a mask")


def test_another_attention_in_a_layer_is_refused() -> None:
    model: Any = OfSwin().model()

    class Own(type(model.encoder.layers[0].blocks[0].attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    for module in model.modules():
        if type(module).__name__ == "SwinAttention":
            module.__class__ = Own
    with pytest.raises(AttnbiasError, match="Own has forward"):
        ab.fuse(model, quiet=True, measure=False)


@pytest.mark.parametrize("case", [OfBeit(), OfBeitBoth()])
@pytest.mark.parametrize("resized", [False, True])
def test_other_image_sizes(case: Any, resized: bool) -> None:
    model = case.model(image_size=[16, 16])
    given = {"pixel_values": torch.randn(2, 3, 28, 20), "interpolate_pos_encoding": resized}
    wanted = case.run(model, given)
    with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
        found = case.run(model, given)
    assert len(seen) == 2
    assert case.off(found, wanted) <= 1e-5


def test_beit_without_a_table_is_refused() -> None:
    from transformers import BeitConfig, BeitModel

    model = BeitModel(BeitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(AttnbiasError, match="no relative position bias"):
        ab.fuse(model, quiet=True, measure=False)
