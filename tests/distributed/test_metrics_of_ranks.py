"""Metrics of several ranks have the value of all updates."""

import math

import pytest
from metric_updates import four, numbers, spectrum

from lightning_spectral import CurvatureExponent


def test_two_processes_have_the_value_of_all_updates(world_of_two):
    cases = [((0, 1, 2), (3,)), ((0, 1), ()), ((), (4,)), ((), ())]
    (*first, _, last), (*second, _, other) = world_of_two.run("metric_updates:compute_in_ranks", cases)
    for seeds, (values, own, after), (others, theirs, others_after) in zip(cases, first, second, strict=True):
        assert values == pytest.approx(others, nan_ok=True, rel=0, abs=0)
        assert after == others_after
        assert (set(own), set(theirs)) == ({len(seeds[0])}, {len(seeds[1])})
        metrics = four()
        for seed in (*seeds[0], *seeds[1]):
            sigma, h = spectrum(seed)
            metrics.update(sigma=sigma, h=h)
        if seeds != ((), ()):
            assert values == pytest.approx(numbers(metrics.compute()), rel=1e-12)
        for _ in range(2):
            metrics.update(sigma=spectrum(9)[0], h=spectrum(9)[1])
        assert after == pytest.approx(numbers(metrics.compute()), rel=1e-12)
    assert all(math.isnan(value) for value in first[-1][0].values())
    metric = CurvatureExponent()
    for seed in (0, 1):
        metric.update(*spectrum(seed))
    assert last == other == metric.compute().item()


def test_two_processes_of_a_trainer_log_the_value_of_all_updates(world_of_two, tmp_path):
    first, second = world_of_two.run("probe_trainers:log_metrics", tmp_path)
    expected = {}
    for name, seeds in (("alpha", (0, 3, 1)), ("never", (0, 3))):
        metric = CurvatureExponent()
        for seed in seeds:
            metric.update(*spectrum(seed))
        expected[name] = metric.compute().item()
    assert first["logged"] == second["logged"]
    assert first["logged"] == pytest.approx(expected, rel=1e-6)
