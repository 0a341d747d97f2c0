"""The comparison of predicted and measured stages; the predictions themselves have tests of their own."""

import pytest

from benchmarks.prediction import Compared, rank_correlation, summary


def stage(predicted: float, measured: float, cpu: float | None = None) -> Compared:
    return Compared("stage", "measured", predicted, measured, 0.2, cpu and predicted, cpu)


def test_errors_are_of_single_stages_and_of_all() -> None:
    found = summary([stage(1.0, 2.0, 1.1), stage(2.0, 2.2, 2.0), stage(3.0, 2.7, 2.9)])
    assert found["error_of_all"] == pytest.approx(6.9 / 6.0 - 1)
    assert found["median_error_of_a_stage"] == pytest.approx(0.1)
    assert found["within_two_stated_errors"] == pytest.approx(2 / 3)
    assert found["cpu_error_of_all"] == pytest.approx(0.0)
    assert found["cpu_median_error_of_a_stage"] == pytest.approx(0.1 / 3)
    assert summary([stage(1.0, 1.0)])["cpu_error_of_all"] is None


def test_ranks_are_compared_as_spearman_does() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 200.0, 3000.0]) == 1.0
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1.0
    assert rank_correlation([1.0, 2.0, 2.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(9 / 90**0.5)
