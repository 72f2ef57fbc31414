from __future__ import annotations

from experiments import test_time_registers


def test_outliers_move_to_the_added_token() -> None:
    found = test_time_registers.measure(0)
    assert found["found"] == 1.0
    assert found["effect"] > 0.8
    assert found["control"] < 0.1
    assert found["attention_on_outliers"] > 0.3
    assert found["attention_on_register"] > 0.8 * found["attention_on_outliers"]
    assert found["attention_on_register_random"] < 0.1
    assert found["attention_left_on_outliers"] < 0.1
    assert found["same_class"] > 0.97
    assert found["same_class"] > found["same_class_no_register"] + 0.03
