"""Kronecker factors and the split of alpha, against dense factors that loops build in float64."""

from __future__ import annotations

import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, cross_entropy, images, mlp, sequences, token_loss, vectors
from factors_twin import rows_of, second_moment
from micro_batches import batch_of, gelu_mlp, ignoring, relu_mlp, summed
from modules import GPT, ConvNet, ProbeRows, fit
from paper import PAPER
from stand_ins import OutOfMemory
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from twins import gradient, matrix_entries

from lightning_spectral import LayerAlignment, SpectralProbe, SpectralReport, measure_spectra
from lightning_spectral.curvature import DifferentiableLoss
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.measurement import factor_sums
from lightning_spectral.measurement import kronecker_factors as factors_module
from lightning_spectral.measurement.factor_sums import FactorSums
from lightning_spectral.measurement.kronecker_factors import OTHER_CALL
from lightning_spectral.measurement.pipeline import run_measurement
from lightning_spectral.numerics import second_moment as moments_module
from lightning_spectral.numerics.power_law import fit_power_law
from lightning_spectral.numerics.second_moment import SecondMoment
from lightning_spectral.numerics.statistics import entropy_rank
from lightning_spectral.options import Options
from lightning_spectral.records.alignment import KroneckerFactors
from lightning_spectral.records.log_keys import LAYER_KEYS

NAMED = {case.name: case for case in CASES}
ALIGNMENT_KEYS = [key for key in LAYER_KEYS if key.part == "alignment"]

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

TIED = OTHER_CALL


class SequenceFirst(nn.Module):
    """Attention whose inner tensors run over time first, behind a layer of that layout."""

    def __init__(self):
        super().__init__()
        self.first, self.attn, self.head = nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 5)

    def forward(self, x):
        y = self.first(x.transpose(0, 1))
        return self.head(self.attn(y, y, y, need_weights=False)[0].mean(0))


def strided():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), nn.GELU(), nn.Conv2d(8, 6, 2, stride=2), nn.GELU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


MORE = [
    *CASES,
    Case("strided_dilated", strided, images(4, 5), cross_entropy),
    Case("sequence_first", SequenceFirst, lambda: (torch.randn(8, 4, 8), torch.randint(0, 5, (8,))), cross_entropy),
]
NAIVE = [case for case in MORE if case.name != "sequence_first"]


def aligned(model, batch, loss, **options):
    return measure_spectra(model, batch, loss, alignment=True, **{"curvature": "exact", "top_k": 6, **options})


def same(found, expected, rtol=1e-8):
    """The alignment of all layers of two reports."""
    for name, layer in expected.layers.items():
        one, other = found.layers[name].alignment, layer.alignment
        assert (one is None) == (other is None)
        if other is None:
            continue
        for key in ("lambda_delta", "lambda_a", "rho_delta", "rho_a", "phi_k", "h_kron", "chi", "concentration"):
            torch.testing.assert_close(getattr(one, key), getattr(other, key), rtol=rtol, atol=0, equal_nan=True)
        for key in ("effective_rank_a", "effective_rank_delta"):
            assert getattr(one, key) == pytest.approx(getattr(other, key), rel=rtol, nan_ok=True)


def adds_up(layer):
    split = layer.alignment
    total = split.beta.exponent + split.phi.exponent + split.chi_slope.exponent
    assert total == pytest.approx(layer.alpha.exponent, abs=1e-6, nan_ok=True)
    for part in (split.beta, split.phi, split.chi_slope):
        assert math.isnan(part.exponent) == math.isnan(layer.alpha.exponent)
        assert part.n_used == layer.alpha.n_used
    torch.testing.assert_close(
        split.h_kron, split.phi_k * split.lambda_delta * split.lambda_a, rtol=1e-6, atol=0, equal_nan=True
    )
    torch.testing.assert_close(split.phi_k, split.rho_delta * split.rho_a, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["exact", "ggn", "sketch", "auto"])
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_slopes_add_up_to_alpha_by_every_method(case, method):
    if case.options.get("mode") == "train" and method in ("ggn", "sketch"):
        pytest.skip("samples depend on each other in train mode, which this method refuses")
    if case.name == "sequence_first" and method == "sketch":
        pytest.skip("a linear layer whose rows are not of samples first, which this method refuses")
    model, batch = case.build()
    report = aligned(model, batch, case.loss, curvature=method, **case.options)
    known = 0
    for name, layer in report.layers.items():
        if name == "head.weight" and case.name.startswith("gpt"):
            assert layer.alignment is None
            assert layer.alignment_note == TIED
            continue
        adds_up(layer)
        known += not math.isnan(layer.alpha.exponent)
    assert known


@pytest.mark.parametrize("case", NAIVE, ids=lambda case: case.name)
def test_factors_are_those_of_loops_over_samples_and_positions(case):
    model, batch = case.build()
    train = case.options.get("mode") == "train"
    report = aligned(model, batch, case.loss, **case.options)
    for name, layer in find_layers(model, fused_qkv=case.options.get("fused_qkv", ())).layers.items():
        spectrum = report.layers[name]
        if spectrum.alignment is None:
            assert spectrum.alignment_note == TIED
            continue
        split, samples = spectrum.alignment, len(batch[0])
        a, delta = rows_of(model, batch, case.loss, layer, train=train)
        delta = delta * samples
        assert split.rows == a.shape[1] == delta.shape[1]
        parameter = model.get_parameter(layer.parameter)
        whole = gradient(model, batch, case.loss, layer.parameter, train=train).flatten()
        blocks = whole[matrix_entries(layer, parameter.shape)].unflatten(0, (layer.groups, -1))
        torch.testing.assert_close(delta.mT @ a / samples, blocks)
        c_a, c_delta = ([second_moment(rows) for rows in of] for of in (a, delta))
        lambda_a, lambda_delta = ([torch.linalg.eigvalsh(c).flip(0) for c in of] for of in (c_a, c_delta))
        found = []
        for g, block in enumerate(blocks):
            u, sigma, vh = torch.linalg.svd(block, full_matrices=False)
            found += [(float(s), g, k, u[:, k], vh[k]) for k, s in enumerate(sigma)]
        found.sort(key=lambda item: -item[0])
        for k, (sigma, g, rank, u, v) in enumerate(found[: spectrum.n_usable]):
            energy_delta, energy_a = u @ c_delta[g] @ u, v @ c_a[g] @ v
            expected = {
                "lambda_delta": lambda_delta[g][rank],
                "lambda_a": lambda_a[g][rank],
                "rho_delta": energy_delta / lambda_delta[g][rank],
                "rho_a": energy_a / lambda_a[g][rank],
                "h_kron": energy_delta * energy_a,
                "chi": spectrum.h[k] / (energy_delta * energy_a),
                "concentration": ((delta[g] @ u) ** 2 * (a[g] @ v) ** 2).mean() / (energy_delta * energy_a),
            }
            assert sigma == pytest.approx(float(spectrum.sigma[k]), rel=1e-9)
            for key, value in expected.items():
                assert float(getattr(split, key)[k]) == pytest.approx(float(value), rel=1e-6), (name, key, k)
        for key, of in (("effective_rank_a", lambda_a), ("effective_rank_delta", lambda_delta)):
            ranks = [entropy_rank(values) for values in of]
            assert getattr(split, key) == pytest.approx(sum(ranks) / len(ranks), rel=1e-6)


def test_inner_layout_of_attention_does_not_matter():
    case = MORE[-1]
    model, (x, y) = case.build()
    report = aligned(model, (x, y), case.loss)
    batch_first = SequenceFirst().double()
    batch_first.load_state_dict(model.state_dict())
    batch_first.attn.batch_first = True
    batch_first.forward = lambda x: batch_first.head(
        batch_first.attn(*(batch_first.first(x),) * 3, need_weights=False)[0].mean(1)
    )
    same(aligned(batch_first, (x, y), case.loss), report)


@pytest.mark.parametrize(
    "case",
    [NAMED["mlp_cross_entropy"], NAMED["cnn_batchnorm_eval"], NAMED["gpt_block_fused_qkv"]],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_twice_as_large_has_the_same_chi(case, reduction):
    model, batch = case.build()

    def loss(m, b):
        return case.loss(m, b) * (len(b[0]) if reduction == "sum" else 1)

    once = aligned(model, batch, loss, **case.options)
    twice = aligned(model, tuple(torch.cat([part, part]) for part in batch), loss, **case.options)
    same(twice, once)
    same(once, aligned(model, batch, case.loss, **case.options))


@pytest.mark.parametrize("loss", [cross_entropy, summed, ignoring])
@pytest.mark.parametrize("size", [1, 7, 24])
def test_pieces_give_the_same(loss, size):
    x, y = batch_of()
    labels = y.clone()
    labels[8:24] = -100
    labels[32::3] = -100
    model, batch = gelu_mlp().double(), (x, y, labels)
    expected = aligned(model, batch, loss, micro_batch_size=len(x))
    assert next(iter(expected.layers.values())).alignment.rows == len(x)
    same(aligned(model, batch, loss, micro_batch_size=size), expected)


@pytest.mark.parametrize("method", ["exact", "ggn", "auto"])
@pytest.mark.parametrize("loss", [cross_entropy, summed])
def test_several_batches_give_the_same(method, loss):
    model, (x, y) = relu_mlp().double(), batch_of()
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    expected = aligned(model, (x, y), loss, micro_batch_size=len(x))
    for options in ({}, {"micro_batch_size": 5}):
        same(aligned(model, loader, loss, n_batches=3, curvature=method, **options), expected)


def test_an_empty_batch_is_no_sample_of_a_sum():
    model, (x, y) = relu_mlp().double(), batch_of()
    options = Options(curvature="exact", alignment=True)
    alone, beside = (
        run_measurement(model, batches, options, summed) for batches in ([(x, y)], [(x, y), (x[:0], y[:0])])
    )
    same(beside, alone)


@pytest.mark.parametrize("options", [{"micro_batch_size": 12}, {"n_batches": 3}])
def test_the_graph_of_a_piece_is_gone_before_the_next(monkeypatch, options):
    model, (x, y) = gelu_mlp().double(), batch_of()
    graphs, alive, at_the_start = [], [], []

    def loss(m, b):
        z, piece = m[0](b[0]), tuple(b[0][0].tolist())
        if torch.is_grad_enabled():
            # A method may have two graphs of a piece.
            alive.append(sum(graph() is not None for other, graph in graphs if other != piece))
            graphs.append((piece, weakref.ref(z)))
        return F.cross_entropy(m[1:](z), b[1])

    real = factors_module._factors
    monkeypatch.setattr(factors_module, "_factors", lambda *args: at_the_start.append(len(alive)) or real(*args))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    aligned(model, loader if "n_batches" in options else (x, y), loss, curvature="ggn", **options)
    assert len(alive) >= at_the_start[0] + 2
    assert alive[at_the_start[0] :] == [0] * (len(alive) - at_the_start[0])


@pytest.mark.parametrize(
    ("case", "size", "most"),
    [("mlp_cross_entropy", None, 2), ("gpt_block_fused_qkv", None, 2), ("mlp_cross_entropy", 12, 6)],
)
def test_the_matrices_of_one_layer_at_a_time_are_held_of_one_piece(monkeypatch, case, size, most):
    model, batch = NAMED[case].build()
    held, counts = weakref.WeakSet(), []
    real = SecondMoment._add_gram

    def noted(self, gram_gnn):
        real(self, gram_gnn)
        held.add(self)
        counts.append(len(held))

    monkeypatch.setattr(SecondMoment, "_add_gram", noted)
    report = aligned(model, batch, NAMED[case].loss, micro_batch_size=size, **NAMED[case].options)
    assert max(counts) == most
    assert not held
    assert len(counts) > most
    assert all(layer.alignment for name, layer in report.layers.items() if name != "head.weight")


def test_a_layer_whose_eigenvalues_fail_stops_no_other(monkeypatch):
    real = SecondMoment.eigenvalues

    def broken(self):
        if self.k == 5:
            raise RuntimeError("no luck")
        return real(self)

    monkeypatch.setattr(SecondMoment, "eigenvalues", broken)
    model, batch = nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 7)), batch_of()
    report = aligned(model.double(), batch, lambda m, b: m(b[0]).square().mean(), top_k=5)
    assert report.layers["4.weight"].alignment_note == "RuntimeError: no luck"
    adds_up(report.layers["0.weight"])
    adds_up(report.layers["2.weight"])


def test_uneven_batches_of_a_mean_give_the_same():
    model, (x, y) = gelu_mlp().double(), batch_of(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    same(aligned(model, loader, cross_entropy, n_batches=3), aligned(model, (x, y), cross_entropy))


def test_pieces_of_a_convolution_give_the_same():
    model, batch = NAMED["grouped_depthwise_transposed"].build()
    expected = aligned(model, batch, cross_entropy, micro_batch_size=12)
    same(aligned(model, batch, cross_entropy, micro_batch_size=5), expected)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (cross_entropy, False),
        (summed, True),
        (lambda m, b: summed(m, b) / len(b[0]), False),
        (lambda m, b: cross_entropy(m, b) + 0.1 * m[0].weight.square().sum(), False),
        (lambda m, b: summed(m, b) + 0.1 * m[0].weight.square().sum(), True),
        (lambda m, b: F.cross_entropy(m(b[0]).view(len(b[0]) // 48, 48, 5).flatten(0, 1), b[1]), False),
    ],
)
def test_a_sum_over_samples_is_told_from_a_mean(monkeypatch, loss, expected):
    seen = []
    real = factors_module.sums_over_samples
    monkeypatch.setattr(factors_module, "sums_over_samples", lambda objective: seen.append(real(objective)) or seen[-1])
    aligned(gelu_mlp().double(), batch_of(), loss)
    assert seen == [expected]


def test_without_the_number_of_samples_there_is_none_and_a_warning():
    model, (x, y) = relu_mlp().double(), batch_of()
    uneven = (x, y, torch.zeros(3))
    with pytest.warns(UserWarning, match="no alignment: the batch does not tell how many samples it holds"):
        report = aligned(model, uneven, cross_entropy)
    assert all(layer.alignment is None and layer.alignment_note for layer in report.layers.values())
    assert not report.failed


class Odd(nn.Module):
    """A matrix that no linear layer applies, one used twice, two of odd uses, and one that the loss does not see."""

    def __init__(self):
        super().__init__()
        self.matrix, self.part = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.scaled = nn.Parameter(torch.randn(6, 6))
        self.twice, self.last, self.dead = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        self.dead(x)
        y = torch.tanh(self.twice(torch.tanh(self.twice(x @ self.matrix))))
        return self.last(y + x[:, :3] @ self.part[:3] + self.scaled.square())


def test_layers_without_alignment_say_why():
    model, batch = Case("", Odd, lambda: (torch.randn(6, 6), torch.randint(0, 5, (6,))), cross_entropy).build()
    with pytest.warns(UserWarning, match="part: no alignment: one of its uses is a look-up, takes a part of it"):
        report = aligned(model, batch, cross_entropy)
    notes = {name: layer.alignment_note for name, layer in report.layers.items() if layer.alignment_note}
    assert notes.pop("dead.weight").startswith("the loss of loss_fn does not depend on it")
    assert notes == {"part": OTHER_CALL, "scaled": "no product of it with activations was seen"}
    for name in ("matrix", "twice.weight", "last.weight"):
        adds_up(report.layers[name])
    silent = measure_spectra(model, batch, lambda m, b: cross_entropy(m, b) + 0 * m.dead(b[0]).sum(), alignment=True)
    assert silent.layers["dead.weight"].alignment_note == "no direction above the noise floor"
    assert sum("dead.weight" in text for text in report.problems()) == 1


class Shared(nn.Module):
    """A matrix of two views, applied from the right by a product, and one that a linear layer takes as it is."""

    def __init__(self):
        super().__init__()
        self.matrix, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(8, 5)

    def views(self, x):
        return x, x.flip(1).square()

    def forward(self, x):
        # The second with the factors the other way round.
        one, two = self.views(x)
        return self.head(torch.cat([one @ self.matrix, torch.einsum("io,bi->bo", self.matrix, two)], 1).tanh())


def test_a_matrix_used_twice_has_the_factors_of_all_its_rows():
    model, (x, y) = Case("", Shared, vectors, cross_entropy).build()
    split = aligned(model, (x, y), cross_entropy, top_k=3).layers["matrix"].alignment
    a = torch.cat(model.views(x))
    z = torch.cat([view @ model.matrix for view in model.views(x)]).detach().requires_grad_()
    F.cross_entropy(model.head(torch.cat(z.chunk(2), 1).tanh()), y).backward()
    delta = z.grad * len(x)
    c_a, c_delta = second_moment(a), second_moment(delta)
    u, _, vh = torch.linalg.svd(gradient(model, (x, y), cross_entropy, "matrix").view(6, 4), full_matrices=False)
    torch.testing.assert_close(a.T @ delta / len(x), gradient(model, (x, y), cross_entropy, "matrix").view(6, 4))
    for k in range(3):
        energy_a, energy_delta = u[:, k] @ c_a @ u[:, k], vh[k] @ c_delta @ vh[k]
        joint = ((a @ u[:, k]) ** 2 * (delta @ vh[k]) ** 2).mean()
        assert float(split.h_kron[k]) == pytest.approx(float(energy_a * energy_delta))
        assert float(split.concentration[k]) == pytest.approx(float(joint / (energy_a * energy_delta)))
        assert float(split.lambda_a[k]) == pytest.approx(float(torch.linalg.eigvalsh(c_a).flip(0)[k]))
        assert float(split.lambda_delta[k]) == pytest.approx(float(torch.linalg.eigvalsh(c_delta).flip(0)[k]))
    assert split.rows == 2 * len(x)


class Unbatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(torch.stack([self.conv(image) if len(x) == 1 else image for image in x]).flatten(1))


def test_a_convolution_without_a_dimension_for_samples_is_noted():
    model, batch = Case("", Unbatched, lambda: (torch.randn(1, 2, 4, 4), torch.tensor([1])), cross_entropy).build()
    report = aligned(model, batch, cross_entropy)
    assert "a convolution without a dimension for samples" in report.layers["conv.weight"].alignment_note
    assert report.layers["head.weight"].alignment is not None


def test_a_layer_that_fails_stops_no_other(monkeypatch):
    real = FactorSums.add

    def broken(self, *args):
        if self.layer.name == "2.weight":
            raise RuntimeError("no luck")
        real(self, *args)

    monkeypatch.setattr(FactorSums, "add", broken)
    model, batch = NAMED["mlp_cross_entropy"].build()
    report = aligned(model, batch, cross_entropy)
    assert report.layers["2.weight"].alignment_note == "RuntimeError: no luck"
    assert not math.isnan(report.layers["2.weight"].alpha.exponent)
    adds_up(report.layers["0.weight"])


def test_a_backward_pass_that_fails_stops_no_other_layer(monkeypatch):
    real = DifferentiableLoss.output_gradients

    def broken(self, uses, **options):
        uses = list(uses)
        if any(use.output.shape[-1] == 7 for use in uses):
            raise RuntimeError("no luck")
        return real(self, uses, **options)

    monkeypatch.setattr(DifferentiableLoss, "output_gradients", broken)
    report = aligned(*NAMED["mlp_cross_entropy"].build(), cross_entropy)
    assert report.layers["2.weight"].alignment_note == "its backward pass failed: no luck"
    adds_up(report.layers["0.weight"])
    adds_up(report.layers["4.weight"])


def test_gradients_in_outputs_are_those_of_a_pass_of_their_own(monkeypatch):
    model, batch = NAMED["grouped_depthwise_transposed"].build()
    # The fifth direction of five classes is rounding noise.
    found = aligned(model, batch, cross_entropy, curvature="ggn", top_k=4)
    real = DifferentiableLoss.gradients
    monkeypatch.setattr(
        DifferentiableLoss, "gradients", lambda self, keep_graph, outputs=False: real(self, keep_graph=keep_graph)
    )
    same(found, aligned(model, batch, cross_entropy, curvature="ggn", top_k=4))


def test_a_failure_of_all_is_noted(monkeypatch):
    monkeypatch.setattr(factors_module, "_factors", lambda *args: 1 / 0)
    report = aligned(*NAMED["mlp_cross_entropy"].build(), cross_entropy)
    assert {layer.alignment_note for layer in report.layers.values()} == {"ZeroDivisionError: division by zero"}


def test_out_of_memory_is_met_with_smaller_pieces(monkeypatch):
    model, batch = relu_mlp().double(), batch_of()
    expected = aligned(model, batch, cross_entropy)
    real, sizes = FactorSums.add, []

    def short(self, use, *args):
        sizes.append(len(use.input))
        if len(use.input) > 12:
            raise torch.OutOfMemoryError("out of memory")
        real(self, use, *args)

    monkeypatch.setattr(FactorSums, "add", short)
    found = aligned(model, batch, cross_entropy)
    same(found, expected)
    assert list(dict.fromkeys(sizes)) == [48, 24, 12]
    assert found.micro_batch_size == expected.micro_batch_size
    monkeypatch.setattr(FactorSums, "add", lambda *args: (_ for _ in ()).throw(MemoryError()))
    nothing = aligned(model, batch, cross_entropy)
    assert {layer.alignment_note for layer in nothing.layers.values()} == {
        "out of memory; measure fewer samples (max_samples), or fewer layers (layers): C_A and C_delta of a layer are "
        "matrices of its width, whatever top_k"
    }
    for name, layer in expected.layers.items():
        torch.testing.assert_close(nothing.layers[name].h, layer.h, equal_nan=True)


def test_out_of_memory_of_both(monkeypatch):
    model, batch = relu_mlp().double(), batch_of()
    expected = aligned(model, batch, cross_entropy)
    short = OutOfMemory(monkeypatch, 12)
    same(aligned(model, batch, short.loss), expected)


@pytest.mark.parametrize(
    "case",
    [
        NAMED["mlp_cross_entropy"],
        NAMED["cnn_batchnorm_eval"],
        NAMED["grouped_depthwise_transposed"],
        NAMED["gpt_block_fused_qkv"],
    ],
    ids=lambda case: case.name,
)
def test_of_large_factors_the_leading_eigenvalues(monkeypatch, case):
    model, batch = case.build()
    expected = aligned(model, batch, case.loss, top_k=3, **case.options)
    monkeypatch.setattr(moments_module, "MAX_DENSE", 4)
    monkeypatch.setattr(factor_sums, "MAX_DENSE", 4)
    monkeypatch.setattr(moments_module, "FEW_ROWS", 5)
    found = aligned(model, batch, case.loss, top_k=3, **case.options)
    noted = 0
    for name, layer in expected.layers.items():
        one, other = found.layers[name].alignment, layer.alignment
        if other is None:
            continue
        large_a = layer.shape[1] > 4
        torch.testing.assert_close(one.h_kron, other.h_kron, rtol=1e-9, atol=0, equal_nan=True)
        torch.testing.assert_close(one.lambda_delta, other.lambda_delta, rtol=1e-6, atol=0, equal_nan=True)
        if large_a:
            noted += 1
            assert math.isnan(one.effective_rank_a)
            assert "only leading eigenvalues of" in one.note
            assert "C_A" in one.note
            assert any(name in text and "leading eigenvalues" in text for text in found.warnings)
            # Those of several parts are bounds.
            assert (one.lambda_a <= other.lambda_a * (1 + 1e-9))[other.lambda_a.isfinite()].all()
            assert (one.lambda_a >= other.lambda_a * 0.5)[other.lambda_a.isfinite()].all()
        adds_up(found.layers[name])
    assert noted


def test_a_few_rows_of_a_large_factor_are_taken_whole(monkeypatch):
    model, batch = NAMED["mlp_cross_entropy"].build()
    expected = aligned(model, batch, cross_entropy)
    monkeypatch.setattr(moments_module, "MAX_DENSE", 4)
    same(aligned(model, batch, cross_entropy), expected)


def test_float32_is_near_float64():
    for case in (NAMED["cnn_batchnorm_eval"], NAMED["gpt_block_fused_qkv"]):
        model, batch = case.build()
        expected = aligned(model, batch, case.loss, top_k=3, **case.options)
        narrow = tuple(t.float() if t.is_floating_point() else t for t in batch)
        found = aligned(model.float(), narrow, case.loss, top_k=3, **case.options)
        for name, layer in expected.layers.items():
            if layer.alignment is not None:
                torch.testing.assert_close(
                    found.layers[name].alignment.lambda_a, layer.alignment.lambda_a, rtol=1e-4, atol=0
                )
                torch.testing.assert_close(
                    found.layers[name].alignment.h_kron, layer.alignment.h_kron, rtol=1e-4, atol=0
                )


def factors_of(k=5, **changes):
    ranks = torch.arange(1, k + 1, dtype=torch.float64)
    parts = {
        "energy_delta": ranks**-1.5, "energy_a": ranks**-1, "joint": 2 * ranks**-2.5, "lambda_delta": ranks**-1,
        "lambda_a": ranks**-0.5, "effective_rank_delta": 3.0, "effective_rank_a": 4.0, "rows": 7,
    }  # fmt: skip
    return KroneckerFactors(**{**parts, **changes})


def test_closed_form_of_power_laws():
    k = torch.arange(1, 6, dtype=torch.float64)
    sigma, h = k**-1, 5 * k**-3.5
    split = LayerAlignment.from_factors(factors_of(), sigma, h, used=h > 0)
    assert split.beta.exponent == pytest.approx(1.5)
    assert split.phi.exponent == pytest.approx(1.0)
    assert split.chi_slope.exponent == pytest.approx(1.0)
    assert split.concentration_ratio == pytest.approx(2.0)
    assert split.median_chi == pytest.approx(float(5 * k[2] ** -1))
    half = LayerAlignment.from_factors(factors_of(), sigma, h, used=h > 0, per_sample=0.5)
    torch.testing.assert_close(half.chi, split.chi / 2)


def test_errors_of_h_enter_that_of_the_slope_of_chi():
    k = torch.arange(1, 6, dtype=torch.float64)
    sigma, h = k**-1, 5 * k**-3.5
    split = LayerAlignment.from_factors(factors_of(), sigma, h, used=h > 0, h_stderr=0.1 * h)
    assert split.chi_slope.stderr > 10 * split.phi.stderr


def test_directions_that_were_not_measured_are_nan():
    k = torch.arange(1, 8, dtype=torch.float64)
    h = torch.cat([k[:4] ** -2, torch.tensor([-1.0, math.nan, math.nan])])
    split = LayerAlignment.from_factors(factors_of(), k**-1, h, used=h > 0)
    assert split.chi.isfinite().tolist() == [True] * 5 + [False] * 2
    assert split.beta.n_used == split.phi.n_used == split.chi_slope.n_used == 4
    assert split.beta.dropped == {"not in the fit of alpha": 3}


def test_a_factor_without_variance_has_no_slopes():
    k = torch.arange(1, 6, dtype=torch.float64)
    lambda_a = torch.cat([k[:4], torch.zeros(1)])
    split = LayerAlignment.from_factors(factors_of(lambda_a=lambda_a), k**-1, k**-2, used=k > 0)
    assert all(math.isnan(part.exponent) for part in (split.beta, split.phi, split.chi_slope))
    assert "a factor has no variance, to rounding" in split.note
    elsewhere = LayerAlignment.from_factors(factors_of(lambda_a=lambda_a), k**-1, k**-2, used=k < 5)
    assert not math.isnan(elsewhere.beta.exponent)
    assert elsewhere.note == ""


def test_round_trip():
    model, batch = NAMED["gpt_block_tied"].build()
    report = aligned(model, batch, token_loss)
    back = SpectralReport.from_json(report.to_json())
    assert back.to_json() == report.to_json()
    layer = back.layers["block.up.weight"]
    assert isinstance(layer.alignment, LayerAlignment)
    assert layer.alignment.chi.dtype is torch.float64
    assert repr(layer.alignment.beta) == repr(report.layers["block.up.weight"].alignment.beta)
    assert back.layers["head.weight"].alignment is None
    assert back.layers["head.weight"].alignment_note == TIED
    same(back, report, rtol=0)
    plain = measure_spectra(model, batch, token_loss, top_k=3)
    assert SpectralReport.from_json(plain.to_json()).to_json() == plain.to_json()


def test_keys_are_there_where_they_were_asked_for():
    model, batch = NAMED["gpt_block_tied"].build()
    names = {key.name for key in ALIGNMENT_KEYS}
    plain = measure_spectra(model, batch, token_loss, top_k=3)
    assert not any(key.partition("/")[0].removesuffix("_median") in names for key in plain.scalars())
    assert not names & set(plain.to_pandas().columns)
    report = aligned(model, batch, token_loss)
    scalars = report.scalars()
    for key in ALIGNMENT_KEYS:
        assert f"{key.name}/block.up.weight" in scalars
        assert math.isnan(scalars[f"{key.name}/head.weight"])
        assert f"{key.name}_median" in scalars
        assert f"{key.name}/median_mlp_up" in scalars
        assert key.name in report.to_pandas().columns
    up = report.layers["block.up.weight"].alignment
    assert scalars["beta/block.up.weight"] == up.beta.exponent
    assert scalars["concentration_ratio/median_mlp_up"] == float(up.concentration.quantile(0.5))


def test_alignment_changes_nothing_else():
    model, batch = NAMED["gpt_block_fused_qkv"].build()
    for method in ("exact", "sketch"):
        report = aligned(model, batch, token_loss, curvature=method)
        plain = measure_spectra(model, batch, token_loss, top_k=6, curvature=method)
        for name, layer in plain.layers.items():
            assert torch.equal(layer.h.nan_to_num(), report.layers[name].h.nan_to_num())


@pytest.mark.parametrize("module", [ConvNet, GPT])
def test_a_probe_logs_it(module):
    rows = ProbeRows()
    fit(module(), [SpectralProbe(every_n_steps=2, top_k=6, alignment=True)], steps=4, logger=[rows])
    assert len(rows.rows) == 2
    for _, scalars in rows.rows:
        assert {f"spectral/{key.name}_median" for key in ALIGNMENT_KEYS} <= scalars.keys()
        name = next(key for key in scalars if key.startswith("spectral/beta/") and key.endswith(".weight"))
        parts = [scalars[name.replace("beta", key)] for key in ("beta", "phi", "chi_slope")]
        assert sum(parts) == pytest.approx(scalars[name.replace("beta", "alpha")], abs=1e-6, nan_ok=True)


def test_a_probe_that_measures_nothing_logs_nan():
    rows = ProbeRows()

    def broken(module, batch):
        raise RuntimeError("no")

    fit(ConvNet(), [SpectralProbe(every_n_steps=2, alignment=True, loss_fn=broken)], steps=1, logger=[rows])
    assert all(math.isnan(rows.rows[0][1][f"spectral/{key.name}_median"]) for key in ALIGNMENT_KEYS)


def test_the_option_is_checked():
    with pytest.raises(ValueError, match="alignment must be True or False, got 'yes'"):
        measure_spectra(mlp(), vectors(), cross_entropy, alignment="yes")
    with pytest.raises(ValueError, match="alignment must be True or False, got 1"):
        SpectralProbe(alignment=1)


def paper(name):
    path = PAPER / name
    if not path.exists():
        pytest.skip(f"the paper's measurements are not at {PAPER}; PAPER_RESULTS says where they are")
    return json.loads(path.read_text())


def test_the_papers_concentration_and_chi():
    for layer in paper("results_conv_gap_v2.json")["conv_results"]:
        columns = {key: torch.tensor(value).double() for key, value in layer.items() if isinstance(value, list)}
        nothing = torch.ones_like(columns["sigma"])
        factors = KroneckerFactors(
            columns["mean_uTd_sq"], columns["mean_vTa_sq"], columns["h_sum_of_products"], nothing, nothing,
            math.nan, math.nan, layer["N_samples"] * layer["L_spatial"],
        )  # fmt: skip
        h = columns["h_exact"]
        split = LayerAlignment.from_factors(factors, columns["sigma"], h, used=h > 0)
        torch.testing.assert_close(split.concentration, columns["concentration_ratio"], rtol=1e-4, atol=0)
        torch.testing.assert_close(split.chi, columns["cos2_theta"], rtol=1e-4, atol=0)
        torch.testing.assert_close(split.h_kron, columns["h_kron"], rtol=1e-4, atol=0)
        total = split.beta.exponent + split.phi.exponent + split.chi_slope.exponent
        assert total == pytest.approx(layer["alpha_exact"], abs=1e-6)


def test_the_papers_alignment_ratios():
    for layer in paper("results_kronecker_spectral.json")["layers"]:
        columns = {
            key: torch.tensor(layer[f"{key}_top30"]).double() for key in ("sigma", "h_kron", "rho_delta", "rho_A")
        }
        lambda_delta, lambda_a = (torch.tensor(layer[f"lambda_{key}_top30"]).double() for key in ("delta", "A"))
        delta, a = columns["rho_delta"] * lambda_delta, columns["rho_A"] * lambda_a
        factors = KroneckerFactors(delta, a, delta * a, lambda_delta, lambda_a, math.nan, math.nan, 1)
        h = columns["h_kron"]
        split = LayerAlignment.from_factors(factors, columns["sigma"], h, used=h > 0)
        torch.testing.assert_close(split.h_kron, h, rtol=1e-4, atol=0)
        torch.testing.assert_close(split.chi, torch.ones_like(h), rtol=1e-4, atol=0)
        assert split.beta.exponent + split.phi.exponent == pytest.approx(
            fit_power_law(columns["sigma"], h).exponent, abs=1e-4
        )


def test_sequences_take_all_positions():
    model, batch = NAMED["gpt_block_tied"].build()
    tokens = sequences()[0]
    assert aligned(model, batch, token_loss).layers["block.up.weight"].alignment.rows == tokens.numel()
