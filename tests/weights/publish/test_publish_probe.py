"""What counts as the same, and as different."""

import numpy as np
import pytest

from megatron_rl.weights.publish.probe import difference, odd_one_out, probe_sequences


def test_sequences_are_the_same_in_every_run_and_of_the_vocabulary() -> None:
    first = probe_sequences(7, 5, 40)
    assert first == probe_sequences(7, 5, 40)
    assert len(first) == 5 and all(len(tokens) == 40 and set(tokens) <= set(range(6)) for tokens in first)


def test_difference_is_the_mean_of_the_worst_sequence_without_its_first_token() -> None:
    ours = [np.array([0, -1, -2], np.float32), np.array([0, -3], np.float32)]
    theirs = [np.array([9, -1.5, -2.5], np.float32), np.array([0, -3.25], np.float32)]
    assert difference(ours, theirs) == pytest.approx(0.5)
    assert difference(ours, ours) == 0.0
    assert difference(ours, [ours[0], np.array([0, np.nan], np.float32)]) == float("inf")


def test_servers_cut_alike_must_hold_the_same() -> None:
    a = [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}]
    b = [{"x": "1", "y": "2"}, {"x": "3", "y": "5"}]
    assert odd_one_out({"u": a, "v": a, "w": None}) is None
    assert odd_one_out({"u": a, "v": [a[0]]}) is None  # of another tensor-parallel size: other tensors
    assert odd_one_out({"u": a, "v": b}) == "y (tensor-parallel rank 1) is not the same on u and v"
