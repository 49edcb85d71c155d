"""Three processes, of which the last has no sample, against one with all samples; and failures in one of them."""

from __future__ import annotations

import warnings

import joint_measurements as joint
import pytest
import torch
from twins import z_scores

from lightning_spectral import (
    ProcessError,
    SpectralReport,
    SpectralWarning,
    directional_curvature,
    measure_spectra,
    top_singular_triplets,
)
from lightning_spectral.distributed.assignment import assign_owners
from lightning_spectral.distributed.process_group import Group
from lightning_spectral.numerics.gradient_noise import gradient_noise

WORLD = 3


@pytest.fixture(scope="module")
def results(world_of_three):
    """Results of each rank by label."""
    names = ("measure_joined", "fail_in_one", "measure_shards", "measure_odd_groups")
    calls = [world_of_three.run(f"joint_measurements:{name}") for name in names]
    return [{label: result for call in calls for label, result in call[rank].items()} for rank in range(WORLD)]


def without_time(report):
    return {key: value for key, value in report.items() if key not in ("seconds", "gradient_seconds")}


@pytest.fixture(scope="module")
def alone():
    """The same by one process on the joined batch."""
    found = {}
    for label, (name, options) in joint.MEASURED.items():
        model, batch = joint.network(name)
        with warnings.catch_warnings():
            # Some layers have too few directions with h > 0 for a fit, in both measurements.
            warnings.simplefilter("ignore", SpectralWarning)
            found[label] = measure_spectra(model, batch, joint.loss, **joint.OPTIONS | options)
    return found


OF_RANKS = ("smooth sketch", "smooth auto", "smooth of many and few")
"""What ranks measure otherwise: "auto" takes a sketch of the smooth network; few samples are so of each rank."""


@pytest.mark.parametrize("label", [label for label in joint.MEASURED if label not in OF_RANKS])
def test_processes_together_measure_what_one_does_on_all_their_samples(results, alone, label):
    expected, found = alone[label], SpectralReport.from_dict(results[0][label])
    assert found.loss == pytest.approx(expected.loss, rel=1e-10)
    assert found.n_samples == expected.n_samples == sum(joint.SIZES)
    assert list(found.layers) == list(expected.layers)
    for name, layer in found.layers.items():
        other = expected.layers[name]
        assert layer.kind == other.kind
        torch.testing.assert_close(layer.sigma, other.sigma, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(layer.h, other.h, rtol=1e-8, atol=1e-8 * float(other.h.abs().max()))
        torch.testing.assert_close(layer.spectrum, other.spectrum, rtol=1e-10, atol=1e-14)
        assert layer.alpha.exponent == pytest.approx(other.alpha.exponent, rel=1e-6, nan_ok=True)


def test_a_process_without_a_sample_knows_the_kinds_that_the_graph_of_the_others_shows(results):
    report = SpectralReport.from_dict(results[-1]["blend exact"])
    expected = ["attention_qkv", "attention_out", "mlp_up", "mlp_down", "head"]
    assert [layer.kind for layer in report.layers.values()] == expected


def test_the_gradient_is_of_all_samples_and_the_curvature_of_the_first_of_each_process(results):
    model, batch = joint.network("smooth")
    found = SpectralReport.from_dict(results[0]["smooth of many and few"])
    assert (found.n_samples, found.curvature_samples) == (sum(joint.SIZES), 2 * joint.FEW)
    parts = [joint.part(batch, rank) for rank in (0, 1)]
    first = tuple(torch.cat([x[: joint.FEW] for x in tensors]) for tensors in zip(*parts, strict=True))
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    gradients = torch.autograd.grad(joint.loss(model, batch), list(weights.values()))
    directions = {n: top_singular_triplets(g, 5) for n, g in zip(weights, gradients, strict=True)}
    h = directional_curvature(model, first, directions, joint.loss)
    for name, layer in found.layers.items():
        torch.testing.assert_close(layer.sigma, directions[name].sigma, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(layer.h, h[name], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("label", ["smooth exact", "smooth sketch", "conv exact"])
def test_the_noise_of_the_gradient_is_told_by_the_samples_of_each_process(results, label):
    model, batch = joint.network(label.partition(" ")[0])
    found, total = SpectralReport.from_dict(results[0][label]), sum(joint.SIZES)
    for name, layer in found.layers.items():
        weight = dict(model.named_parameters())[name]
        terms = [
            n / total * torch.autograd.grad(joint.loss(model.eval(), joint.part(batch, rank)), weight)[0]
            for rank, n in enumerate(joint.SIZES)
            if n
        ]
        parts = [(n / total, float(g.square().sum())) for n, g in zip(joint.SIZES, terms, strict=False)]
        expected = gradient_noise(float(sum(terms).square().sum()), parts, total)
        assert layer.gradient_noise.parts == 2
        assert layer.gradient_noise.signal == pytest.approx(expected.signal, rel=1e-8)
        assert layer.gradient_noise.noise_scale == pytest.approx(expected.noise_scale, rel=1e-8)


@pytest.mark.parametrize("label", joint.MEASURED)
def test_every_process_is_given_the_same_report(results, label):
    first, *others = (str(without_time(of_rank[label])) for of_rank in results)
    assert others == [first] * (WORLD - 1)


def test_a_sketch_over_processes_is_within_its_errors(results, alone):
    found = SpectralReport.from_dict(results[0]["smooth sketch"])
    exact = SpectralReport.from_dict(results[0]["smooth exact"])
    z = z_scores(found.layers, exact.layers)
    assert float(z.abs().max()) < 6
    assert 0.3 < float(z.std()) < 2
    mean = {name: float((x.h_stderr / x.h.abs()).median()) for name, x in found.layers.items()}
    one = {name: float((x.h_stderr / x.h.abs()).median()) for name, x in alone["smooth sketch"].layers.items()}
    assert sum(mean.values()) < 3 * sum(one.values())


@pytest.mark.parametrize("label", ["conv everything", "conv everything in pieces"])
def test_what_is_measured_on_request_is_joined_too(results, alone, label):
    found = SpectralReport.from_dict(results[0][label])
    for name, layer in found.layers.items():
        other = alone[label].layers[name]
        for attribute in ("lambda_delta", "lambda_a", "rho_delta", "rho_a", "phi_k", "h_kron"):
            own, others = (getattr(one.alignment, attribute) for one in (layer, other))
            torch.testing.assert_close(own, others, rtol=1e-7, atol=1e-12, equal_nan=True)
        assert layer.alignment.beta.exponent == pytest.approx(other.alignment.beta.exponent, rel=1e-6)
        torch.testing.assert_close(layer.weights.sigma, other.weights.sigma, rtol=1e-10, atol=1e-12)
        error = (layer.fraction.trace_stderr**2 + other.fraction.trace_stderr**2) ** 0.5
        assert abs(layer.fraction.trace - other.fraction.trace) <= 6 * error


def test_an_expert_that_one_process_does_not_use_is_measured_from_the_others(results, alone):
    found = SpectralReport.from_dict(results[0]["routed exact"])
    assert not found.failed
    torch.testing.assert_close(
        found.layers["second.weight"].h, alone["routed exact"].layers["second.weight"].h, rtol=1e-8, atol=1e-14
    )


@pytest.mark.parametrize(
    "label",
    ["conv exact, FSDP2", "conv ggn, FSDP2", "routed exact, FSDP2 in bfloat16", "smooth exact, tensor parallel"],
)
def test_a_network_in_shards_is_measured_as_a_whole_one(results, alone, label):
    expected, found = alone[label.partition(",")[0]], SpectralReport.from_dict(results[0][label])
    for name, layer in found.layers.items():
        h = expected.layers[name].h
        torch.testing.assert_close(layer.sigma, expected.layers[name].sigma, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(layer.h, h, rtol=1e-8, atol=1e-8 * float(h.abs().max()))


@pytest.mark.parametrize("label", ["conv sketch, FSDP2", "smooth sketch, tensor parallel"])
def test_a_sketch_of_a_network_in_shards(results, alone, label):
    expected, found = alone[label.partition(" ")[0] + " exact"], SpectralReport.from_dict(results[0][label])
    z = z_scores(found.layers, expected.layers)
    assert bool((z.abs() < 6).all())


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("FSDP2", ["DTensor", [3, 3, 3, 3], "FSDPSequential"]),
        ("FSDP2 in bfloat16", ["DTensor", [3, 12], "FSDPRouted"]),
        ("tensor parallel", ["DTensor", [8, 12], "Sequential"]),
    ],
)
def test_a_network_in_shards_needs_its_processes_and_stays_in_shards(results, how, kept):
    assert "are shards over several ranks (DTensor)" in results[0][f"{how} alone"]
    assert results[0][f"{how} kept"] == kept


FAILED = {
    "exact, call 1": "ProcessError: rank 1: KeyError: 'lost'",
    "the first, no sample": "ValueError: rank 0: bad value",
    "memory always": "MeasurementError: out of memory with 30 samples at once, with 15 samples at once, with 8",
    "gathers": "MeasurementError: rank 0: the loss communicates with other ranks (c10d.allreduce_",
    "gathers by name": "MeasurementError: rank 0: the loss communicates with other ranks (c10d.allreduce_",
    "sends": "MeasurementError: rank 0: the loss communicates with other ranks (c10d.send",
    "no text": "ProcessError: rank 1: OddError: ",
    "another option": "MeasurementError: top_k: rank 1 has 4, and rank 0 has 3; all must have the same",
    "not a number": "MeasurementError: rank 1: the loss is nan",
    "another selection": "MeasurementError: rank 1 measures other layers than rank 0",
}


@pytest.mark.parametrize("label", FAILED)
def test_a_failure_in_one_process_is_one_in_all(results, label):
    for of_rank in results:
        assert isinstance(of_rank[label], str), "measured"
        assert FAILED[label] in of_rank[label]


@pytest.mark.parametrize("method", ["exact", "ggn", "sketch", "auto"])
def test_wherever_a_process_fails_no_other_waits_for_it(results, method):
    for call in (1, 2, 3, 4):
        first, *others = (of_rank[f"{method}, call {call}"] for of_rank in results)
        if isinstance(first, str):
            assert "rank 1" in first
            assert others == [first] * (WORLD - 1)
        else:
            # There is no such call.
            assert call > 1
            assert [str(without_time(other)) for other in others] == [str(without_time(first))] * (WORLD - 1)


@pytest.mark.parametrize("label", joint.STEPS)
def test_no_process_waits_for_one_that_fails_beside_the_loss(results, label):
    first, *others = (of_rank[label] for of_rank in results)
    if isinstance(first, str):
        assert "out of memory" in first
        assert others == [first] * (WORLD - 1)
    else:
        # Without factors, curvature goes on.
        assert label.startswith("sums")
        assert all(layer["alignment"] is None for layer in first["layers"].values())
        assert [str(without_time(other)) for other in others] == [str(without_time(first))] * (WORLD - 1)


def test_a_cache_that_grows_in_each_process_is_its_own(results, alone):
    found = SpectralReport.from_dict(results[0]["grown"])
    for name, layer in found.layers.items():
        expected = alone["smooth exact"].layers[name.removeprefix("net.")].h
        torch.testing.assert_close(layer.h, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("label", ["memory once", "memory twice"])
def test_where_memory_runs_out_in_one_process_all_take_smaller_pieces(results, alone, label):
    found = [SpectralReport.from_dict(of_rank[label]) for of_rank in results]
    assert [report.micro_batch_size for report in found] == [found[0].micro_batch_size] * WORLD
    assert found[0].micro_batch_size < max(joint.SIZES)
    for name, layer in found[0].layers.items():
        expected = alone["smooth exact"].layers[name].h
        torch.testing.assert_close(layer.h, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_where_memory_runs_out_for_factors_all_try_smaller_pieces(results):
    for of_rank in results:
        report = SpectralReport.from_dict(of_rank["memory in factors"])
        assert all(layer.alignment is not None for layer in report.layers.values())


def test_a_method_that_one_process_refuses_is_used_by_none(results):
    report = SpectralReport.from_dict(results[0]["refused in one"])
    assert {layer.method for layer in report.layers.values()} == {"exact"}
    assert "rank 1" in report.chosen


def test_a_group_of_some_processes(results, alone):
    for of_rank in results[:2]:
        found = SpectralReport.from_dict(of_rank["two of them"])
        for name, layer in found.layers.items():
            torch.testing.assert_close(layer.sigma, alone["conv exact"].layers[name].sigma, rtol=1e-10, atol=1e-14)
    assert "this process is not in the group" in results[2]["two of them"]


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_a_batch_of_one_process_whose_loss_is_no_sum_is_measured_by_all(results):
    model, batch = joint.network("smooth")
    expected = measure_spectra(model, batch, joint.coupled, curvature="exact", **joint.FEW_OF_ONE)
    for of_rank in results:
        found = SpectralReport.from_dict(of_rank["batch of one"])
        assert (found.n_samples, found.curvature_samples) == (sum(joint.SIZES), joint.FEW)
        for name, layer in found.layers.items():
            torch.testing.assert_close(layer.sigma, expected.layers[name].sigma, rtol=1e-10, atol=1e-14)


def test_owners_share_evenly():
    costs = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 3.0}
    owners = assign_owners(costs, 2)
    loads = [sum(costs[name] for name, owner in owners.items() if owner == rank) for rank in (0, 1)]
    assert sorted(loads) == [8.0, 10.0]
    assert list(owners) == list(costs)


def test_an_iterator_that_ends_within_a_step_is_an_error_of_the_step(monkeypatch):
    of_two = Group(0, 2)
    monkeypatch.setattr(of_two, "all_gather_object", lambda value: [value, (None, None)])
    with pytest.raises(ProcessError, match="rank 0: StopIteration"), of_two.step():
        next(iter(()))


def test_one_process_has_everything():
    one = Group()
    assert one.all_gather_object("x") == ["x"]
    assert one.gather_object(2, 0) == [2]
    values = {"a": torch.ones(2)}
    found = one.reduce_to_owners({"a": 0, "b": 0}, lambda name: values.get(name, torch.zeros(1)))
    assert found["a"] is values["a"]
    assert found["b"].tolist() == [0.0]
