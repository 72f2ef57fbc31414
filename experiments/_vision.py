"""Small vision transformers trained on the spot on the digits of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments._tiny import schooling

SIDE, CLASSES = 8, 10


@dataclass(frozen=True)
class Digits:
    """Images ``(rows, 1, 8, 8)`` of mean 0 and deviation 1, and their classes."""

    images: Tensor
    labels: Tensor

    def part(self, rows: Tensor) -> Digits:
        return Digits(self.images[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.images)


@lru_cache(maxsize=8)
def digits(seed: int, test: int = 397) -> tuple[Digits, Digits]:
    """Rows to train on and rows to test on, drawn by the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    whole = Digits(images, torch.tensor(found.target))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return whole.part(order[test:]), whole.part(order[:test])


def config(layers: int, patch: int, **more: Any) -> Any:
    """Width 48, four heads."""
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=48, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=96,
        image_size=SIDE, patch_size=patch, num_channels=1, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


@lru_cache(maxsize=8)
@torch.enable_grad()
def classifier(seed: int, layers: int = 3, patch: int = 2, steps: int = 300) -> Any:
    """A digits classifier: a few seconds on one thread."""
    from transformers import ViTForImageClassification

    train, _ = digits(seed)
    torch.manual_seed(seed)
    model = ViTForImageClassification(config(layers, patch))
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(model, steps)
    for _ in range(steps):
        batch = train.part(torch.randint(len(train), (96,), generator=generator))
        logits = model(pixel_values=batch.images).logits
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


@torch.enable_grad()
def taught(seed: int, offset: tuple[int, int], steps: int = 300) -> Any:
    """A model of one layer that must say what the patch at an offset from each patch shows.

    Offset (0, 0) is the patch itself; where there is no such patch nothing is asked. Weights are
    born larger than usual (deviation 0.3), which shortens the time until positions are told apart.
    """
    from transformers import ViTModel

    train, _ = digits(seed)
    torch.manual_seed(seed)
    model = ViTModel(config(1, 2, initializer_range=0.3), add_pooling_layer=False)
    head = torch.nn.Linear(48, 4)
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(torch.nn.ModuleList([model, head]), steps)
    side = SIDE // 2
    place = torch.arange(side * side).reshape(side, side)
    down, across = offset
    asked = place[max(-down, 0) : side - max(down, 0), max(-across, 0) : side - max(across, 0)]
    asked = asked.flatten()
    for _ in range(steps):
        batch = train.images[torch.randint(len(train), (32,), generator=generator)]
        out = model(pixel_values=batch).last_hidden_state[:, 1:]
        patches = torch.nn.functional.unfold(batch, 2, stride=2).mT
        loss = (head(out)[:, asked] - patches[:, asked + down * side + across]).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()
