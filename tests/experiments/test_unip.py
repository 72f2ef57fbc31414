from __future__ import annotations

import torch

from experiments import unip
from experiments._vision import classifier, digits


def test_a_student_learns_the_maps_of_one_layer() -> None:
    teacher = classifier(0, layers=2, steps=5)
    with torch.no_grad():
        for layer in teacher.vit.layers:  # few steps leave it attending evenly
            layer.attention.q_proj.weight.mul_(12)
            layer.attention.k_proj.weight.mul_(12)
    train, test = digits(0)
    part = train.part(torch.arange(200))
    want = unip.attentions(teacher, part.images)[1]

    def apart(model: object) -> float:
        got = model(pixel_values=part.images, output_attentions=True).attentions[-1]  # type: ignore[operator]
        return float((torch.xlogy(want, want) - want * got.log()).sum(-1).mean())

    with torch.no_grad():
        before = apart(unip.student(0, part.images, None, 0))
    student = unip.student(0, part.images, want, 60)
    with torch.no_grad():
        assert apart(student) < 0.6 * before
    assert 0.3 < unip.probe(student, part, test) <= 1.0
