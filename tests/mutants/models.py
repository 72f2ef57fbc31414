"""Kept defects of the models."""

from __future__ import annotations

from tests.mutants.runner import Defect

PLACE = "models/attnbias_models"

DEFECTS: tuple[Defect, ...] = (
    Defect(
        "optimizer-forgotten-at-a-resume",
        f"{PLACE}/training.py",
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        ("tests/models/test_training.py::test_an_interrupted_run_ends_as_an_uninterrupted_one",),
    ),
    Defect(
        "last-weights-kept-in-place-of-the-best",
        f"{PLACE}/training.py",
        "self.model.load_state_dict(self.best)",
        "pass",
        ("tests/models/test_training.py",),
    ),
    Defect(
        "scale-of-a-series-from-all-its-rows",
        f"{PLACE}/forecasting/data.py",
        "head = torch.from_numpy(self.table.values[: self.parts[0]])",
        "head = torch.from_numpy(self.table.values)",
        ("tests/models/forecasting/test_data.py::test_the_scale_is_of_the_training_part_alone",),
    ),
    Defect(
        "test-windows-begin-late",
        f"{PLACE}/forecasting/data.py",
        'self._cut("test", start - length,',
        'self._cut("test", start,',
        ("tests/models/forecasting/test_data.py",),
    ),
    Defect(
        "no-level-in-the-forecast",
        f"{PLACE}/forecasting/revin.py",
        "torch.addcmul(mean, forecast, scale)",
        "forecast * scale",
        ("tests/models/penguin/test_model.py::test_normalisation_is_undone",),
    ),
    Defect(
        "periodic-bias-left-out",
        f"{PLACE}/forecasting/penguin.py",
        "tokens = block(tokens, bias)",
        "tokens = block(tokens, None)",
        ("tests/models/penguin/test_model.py::test_forecast_is_the_dense_one",),
    ),
    Defect(
        "periods-in-steps-not-in-patches",
        f"{PLACE}/forecasting/penguin.py",
        "[period / config.stride for period in config.periods]",
        "list(config.periods)",
        ("tests/models/penguin/test_model.py",),
    ),
    Defect(
        "cycle-without-its-phase",
        f"{PLACE}/forecasting/penguin.py",
        "start.to(steps.device)[:, None] + steps",
        "0 * start.to(steps.device)[:, None] + steps",
        ("tests/models/penguin/test_model.py",),
    ),
    Defect(
        "places-of-new-tokens-start-again",
        f"{PLACE}/music/model.py",
        "first = 0 if cache is None else cache.count",
        "first = 0",
        ("tests/models/music/test_model.py::test_token_by_token_it_says_the_same",),
    ),
    Defect(
        "new-tokens-hear-all-blocks",
        f"{PLACE}/music/model.py",
        "first = max(cache.count // self.config.block - 1, 0) * self.config.block",
        "first = 0",
        ("tests/models/music/test_model.py::test_token_by_token_it_says_the_same",),
    ),
    Defect(
        "distance-weight-of-unnormalised-features",
        f"{PLACE}/solver/model.py",
        "bias=self.bias(normal, points)",
        "bias=self.bias(x, points)",
        ("tests/models/solver/test_model.py::test_it_is_the_dense_computation",),
    ),
    Defect(
        "solution-without-its-centre",
        f"{PLACE}/solver/model.py",
        " * self.output_spread + self.output_centre",
        " * self.output_spread",
        ("tests/models/solver/test_model.py",),
    ),
    Defect(
        "contacts-of-one-order-alone",
        f"{PLACE}/pairs/model.py",
        "z + z.transpose(1, 2)",
        "z + z",
        ("tests/models/pairs/test_pairs.py::test_logits_are_symmetric_and_do_not_see_padding",),
    ),
    Defect(
        "control-learns-a-pair-bias",
        f"{PLACE}/pairs/model.py",
        "module.bias.requires_grad_(False)",
        "pass",
        ("tests/models/pairs/test_pairs.py::test_the_control_has_no_bias_and_learns_none",),
    ),
    Defect(
        "test-points-look-like-observed-ones",
        f"{PLACE}/fields/model.py",
        "stream = self._embedded(test, blank, seen=False)",
        "stream = self._embedded(test, blank)",
        ("tests/models/fields/test_bsa_tnp.py::test_equals_a_dense_computation",),
    ),
    Defect(
        "deviations-not-in-the-units-of-the-table",
        f"{PLACE}/fields/estimator.py",
        "std[0, :, 0].double().numpy() * unit",
        "std[0, :, 0].double().numpy()",
        ("tests/models/fields/test_estimator.py",),
    ),
    Defect(
        "healed-people-stay-ill",
        f"{PLACE}/fields/epidemics.py",
        "ill + new - healed",
        "ill + new",
        ("tests/models/field_data/test_epidemics.py",),
    ),
    Defect(
        "values-of-gated-blocks-start-at-random",
        f"{PLACE}/vision/convit.py",
        "nn.init.eye_(attend.value.weight)",
        "pass",
        ("tests/models/vision_convit/test_models.py::test_initial_weights",),
    ),
    Defect(
        "channel-attention-within-windows",
        f"{PLACE}/vision/davit.py",
        'self.window = window if kind == "spatial" else 0',
        "self.window = window",
        ("tests/models/vision_more/test_davit.py",),
    ),
    Defect(
        "relative-positions-left-out",
        f"{PLACE}/vision/vitdet.py",
        "self.attend(x, bias=bias)",
        "self.attend(x)",
        ("tests/models/vision_more/test_vitdet.py",),
    ),
    Defect(
        "voxels-read-the-first-area",
        f"{PLACE}/vision/brain.py",
        "voxel(tokens[:, number])",
        "voxel(tokens[:, 0])",
        ("tests/models/vision_more/test_brain.py",),
    ),
    Defect(
        "verdict-without-its-interval",
        "experiments/grid.py",
        "low is not None and low > claim.margin",
        'low is not None and found["mean"] > claim.margin',
        ("tests/models/test_grid.py",),
    ),
)
