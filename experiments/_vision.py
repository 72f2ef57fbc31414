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
def inpainter(seed: int, images: Tensor, layers: int = 1, patch: int = 1, steps: int = 400) -> Any:
    """A model that fills in hidden patches: a quarter of them, drawn anew at every step.

    Its weights are born larger than usual (deviation 0.3), which spares it the long plateau on
    which a small model learns to tell positions apart.
    """
    from transformers import ViTModel

    torch.manual_seed(seed)
    model = ViTModel(
        config(layers, patch, initializer_range=0.3), add_pooling_layer=False, use_mask_token=True
    )
    head = torch.nn.Linear(48, patch * patch)
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(torch.nn.ModuleList([model, head]), steps)
    count = (SIDE // patch) ** 2
    for _ in range(steps):
        batch = images[torch.randint(len(images), (16,), generator=generator)]
        hidden = torch.rand(len(batch), count, generator=generator) < 0.25
        out = model(pixel_values=batch, bool_masked_pos=hidden).last_hidden_state[:, 1:]
        want = torch.nn.functional.unfold(batch, patch, stride=patch).mT
        loss = (head(out) - want)[hidden].square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()
