"""What families can do besides: bases of a test class beside `FuseCase`, one for each ability."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.fuse import modes
from tests.cases.fuse import FuseCase


def entropies(maps: tuple[Tensor, ...]) -> Tensor:
    """Mean entropy of each head over log N, all layers together."""
    found = []
    for one in maps:
        rows = -(one * one.clamp_min(1e-30).log()).sum(-1)
        found.append(rows.mean((0, 2)) / torch.tensor(float(one.shape[-1])).log())
    return torch.cat(found)


class Padded(FuseCase):
    """Its inputs take an ``attention_mask (batch, length)``; the second row is padded at `side`."""

    side: ClassVar[str] = "right"

    def padded(self, length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of which the second row is shorter, and the real places of the output."""
        given = self.inputs(2, length)
        keep = torch.ones(2, length, dtype=torch.long)
        if self.side == "left":
            keep[1, : length // 3] = 0
        else:
            keep[1, -(length // 3) :] = 0
        return {**given, "attention_mask": keep}, keep.bool()

    def test_padded(self) -> None:
        model = self.model()
        given, real = self.padded(self.length)
        wanted = self.run(model, given)
        with ab.fuse(model, quiet=True, measure=False):
            found = self.run(model, given)
        assert self.off(found[real], wanted[real]) <= self.tolerance
        full = {name: one for name, one in given.items() if name != "attention_mask"}
        assert self.off(self.run(model, full)[real], wanted[real]) > 1e-2, "padding does nothing"


class Trained(FuseCase):
    """It trains: gradients at dropout 0, and losses at its own dropout."""

    dropout_names: ClassVar[tuple[str, ...]] = ("dropout_rate",)  # in its config
    rounding: ClassVar[str] = r"\bkey\.bias$"  # whose gradient is zero but for rounding

    def loss(self, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        """A number that depends on everything."""
        out = self.output(model(**given))
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return (out * weights).sum() / out.shape[0]

    def test_gradients(self) -> None:
        model = self.model(**dict.fromkeys(self.dropout_names, 0.0)).train()
        given = self.inputs(2, self.length)
        self.loss(model, given).backward()
        wanted = {
            name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
        }
        model.zero_grad()
        with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
            self.loss(model, given).backward()
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        assert found.keys() == wanted.keys()
        largest = max(float(one.abs().max()) for one in wanted.values())
        for name, one in wanted.items():
            share = 1e-1 if re.search(self.rounding, name) else 1e-4
            scale = max(float(one.abs().max()), share * largest)
            assert float((found[name] - one).abs().max()) / scale <= 1e-4, name
        for name, _ in self.biases(model):
            if name in wanted:
                assert float(wanted[name].abs().max()) > 0, name

    def test_training_with_dropout(self) -> None:
        losses: dict[str, list[float]] = {"stock": [], "fused": []}
        for seed in range(3):
            for route, found in losses.items():
                model = self.model().train()
                given = self.inputs(2, self.length)
                with ab.fuse(model, quiet=True, measure=False), modes.taking(route):  # type: ignore[arg-type]
                    torch.manual_seed(seed)
                    found.append(self.descend(model, given))
        stock, fused = torch.tensor(losses["stock"]), torch.tensor(losses["fused"])
        assert stock.std() > 0, "there is no dropout"
        spread = float(stock.max() - stock.min()) + float(fused.max() - fused.min())
        assert abs(float(stock.mean() - fused.mean())) <= spread

    def descend(self, model: nn.Module, given: dict[str, Tensor]) -> float:
        """The loss at the end of a few steps towards fixed outputs."""
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        goal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        for _ in range(8):
            out = self.output(model(**given)).flatten()
            loss = (out - goal.repeat(-(-out.numel() // 1000))[: out.numel()]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return float(loss.detach())


class Checkpointed(Trained):
    """It trains under gradient checkpointing."""

    def test_gradient_checkpointing(self) -> None:
        model = self.model(**dict.fromkeys(self.dropout_names, 0.0)).train()
        given = self.inputs(2, self.length)
        grads = []
        with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
            for kind in (None, {"use_reentrant": False}):
                if kind is not None:
                    model.gradient_checkpointing_enable(kind)  # type: ignore[operator]
                model.zero_grad()
                self.loss(model, given).backward()
                grads.append([one.grad for one in model.parameters() if one.grad is not None])
        assert len(grads[0]) == len(grads[1]) > 0
        for one, other in zip(*grads, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()) + 1e-9)


class Pretrained(Trained):
    """A pretrained model of transformers: saving, loading, Trainer."""

    def test_trainer(self, tmp_path: Path) -> None:
        wanted = self.trained(tmp_path / "stock", fused=False)
        found = self.trained(tmp_path / "fused", fused=True)
        assert wanted[0] != wanted[-1]
        for one, other in zip(found, wanted, strict=True):
            assert abs(one - other) <= 1e-4 * max(1.0, abs(other))

    def trained(self, folder: Path, *, fused: bool) -> list[float]:
        """The losses of a few steps of transformers' Trainer, with checkpoints."""
        from transformers import Trainer, TrainingArguments

        case = self

        class Own(Trainer):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
                return case.loss(model, inputs).square() * 1e-3

        model = self.model(**dict.fromkeys(self.dropout_names, 0.0))
        given = self.inputs(4, 21)
        rows = [{name: one[n] for name, one in given.items()} for n in range(4)]
        options = TrainingArguments(
            str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[],
            save_steps=3, learning_rate=1e-3, disable_tqdm=True, use_cpu=True, seed=0,
            remove_unused_columns=False,
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            if fused:
                stack.enter_context(ab.fuse(model, quiet=True, measure=False))
                stack.enter_context(modes.taking("fused"))
            trainer = Own(model=model, args=options, train_dataset=rows)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model = self.model()
        given = self.inputs(2, self.length)
        wanted = self.run(model, given)
        keys = list(model.state_dict())
        with ab.fuse(model, quiet=True, measure=False):
            assert list(model.state_dict()) == keys
            model.save_pretrained(tmp_path)
        assert "attnbias" not in (tmp_path / "config.json").read_text()
        loaded = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
        with ab.fuse(loaded, quiet=True, measure=False):
            assert self.off(self.run(loaded, given), wanted) <= self.tolerance


class Mapped(FuseCase):
    """The stock model gives maps: heads are sharp, and maps asked for are stock."""

    def maps(self, model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Attention maps of the stock model, for the test of sharpness."""
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")  # type: ignore[operator]
        found = eager(**given, output_attentions=True)
        names = ("encoder_attentions", "attentions", "decoder_attentions")
        maps = next(getattr(found, name) for name in names if getattr(found, name, None))
        return tuple(maps)

    def test_heads_are_sharp(self) -> None:
        with torch.no_grad():
            model = self.model()
            found = entropies(self.maps(model, self.inputs(2, self.length)))
        assert (found < 0.5).float().mean() >= 0.25

    def test_maps_are_stock(self) -> None:
        model = self.model()
        given = self.inputs(2, 9)
        with torch.no_grad():
            wanted = self.maps(model, given)
            model.set_attn_implementation("eager")  # type: ignore[operator]
            with ab.fuse(model, quiet=True, measure=False):
                out = model(**given, output_attentions=True)
        names = ("encoder_attentions", "attentions", "decoder_attentions")
        found = next(getattr(out, name) for name in names if getattr(out, name, None))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


class Generating(FuseCase):
    """A decoder that generates with `input_ids`."""

    def test_generation(self) -> None:
        model = self.model()
        given = self.inputs(2, 33)
        wanted = self.generate(model, given)
        assert all(len(set(row.tolist())) >= 20 for row in wanted.sequences[:, -64:])
        with ab.fuse(model, quiet=True, measure=False):
            for route in ("fused", None):
                with modes.taking(route):  # type: ignore[arg-type]
                    found = self.generate(model, given)
                assert torch.equal(found.sequences, wanted.sequences)
                for one, other in zip(found.logits, wanted.logits, strict=True):
                    assert self.off(one, other) <= 1e-4

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        """64 greedy tokens with their logits."""
        # Greedy, but no pair of tokens twice: small random models soon repeat themselves.
        more = {"min_new_tokens": 64, "max_new_tokens": 64, "do_sample": False}
        more["no_repeat_ngram_size"] = 2
        return model.generate(
            **given, **more, output_logits=True, return_dict_in_generate=True, use_cache=True
        )
