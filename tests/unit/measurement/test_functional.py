"""Losses of torch.nn.functional by name: shapes of classes and values, batches of all kinds, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_spectral import MeasurementError, measure_spectra
from lightning_spectral.functional import FUNCTIONAL_LOSSES, OF_CLASSES, OF_VALUES, functional_loss

TOKENS = torch.arange(24).reshape(4, 6) % 7


class Says(nn.Module):
    """Returns what it was made with, and keeps what it was called with."""

    def __init__(self, output):
        super().__init__()
        self.output, self.seen = output, None

    def forward(self, *args, **kwargs):
        self.seen = (args, kwargs)
        return self.output


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CLASS_CASES = {
    "classes": (drawn(4, 7), TOKENS[:, 0], lambda f, x, y: f(x, y)),
    "sequence, classes last": (
        drawn(4, 6, 7),
        TOKENS,
        lambda f, x, y: sum(f(x[n, t][None], y[n, t][None]) for n in range(4) for t in range(6)) / 24,
    ),
    "sequence, classes second": (
        drawn(4, 7, 6),
        TOKENS,
        lambda f, x, y: sum(f(x[n, :, t][None], y[n, t][None]) for n in range(4) for t in range(6)) / 24,
    ),
    "image": (drawn(4, 7, 2, 3), TOKENS.view(4, 2, 3), lambda f, x, y: f(x, y)),
    "small whole numbers": (drawn(4, 7), TOKENS[:, 0].to(torch.int32), lambda f, x, y: f(x, y.long())),
    "one sample of as many classes": (drawn(7, 7), torch.arange(7), lambda f, x, y: f(x, y)),
    "ignored tokens": (
        drawn(4, 6, 7),
        torch.where(TOKENS == 3, -100, TOKENS),
        lambda f, x, y: sum(f(a[None], b[None]) for a, b in zip(x[y >= 0], y[y >= 0], strict=True)) / (y >= 0).sum(),
    ),
}


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("case", CLASS_CASES)
def test_losses_of_classes_find_the_classes(name, case):
    output, targets, expected = CLASS_CASES[case]
    loss = functional_loss(name)(Says(output), (torch.zeros(4), targets))
    torch.testing.assert_close(loss, expected(OF_CLASSES[name], output, targets))


def test_probabilities_of_classes():
    output, targets = drawn(4, 7), drawn(4, 7).softmax(1)
    loss = functional_loss("cross_entropy")(Says(output), (torch.zeros(4), targets))
    torch.testing.assert_close(loss, -(output.log_softmax(1) * targets).sum(1).mean())


@pytest.mark.parametrize("name", OF_VALUES)
def test_losses_of_values_compare_each_with_its_own(name):
    output, targets = drawn(4, 1).sigmoid(), torch.tensor([0, 1, 1, 0])
    loss = functional_loss(name)(Says(output), (torch.zeros(4), targets))
    expected = sum(OF_VALUES[name](output[n, 0], targets[n].double()) for n in range(4)) / 4
    torch.testing.assert_close(loss, expected)


def test_batches_of_text_predict_the_next_token():
    model = Says(drawn(4, 5, 7))
    loss = functional_loss("cross_entropy")(model, TOKENS)
    ((seen,), _) = model.seen
    assert seen.equal(TOKENS[:, :-1])
    torch.testing.assert_close(loss, F.cross_entropy(model.output.reshape(20, 7), TOKENS[:, 1:].reshape(20)))


@pytest.mark.parametrize("targets", ["labels", "label", "targets", "target", "y"])
def test_mappings_give_one_input_by_position_and_several_by_keyword(targets):
    x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 3])
    model = Says(drawn(4, 7))
    functional_loss("cross_entropy")(model, {"x": x, targets: y})
    assert model.seen == ((x,), {})
    functional_loss("cross_entropy")(model, {"input_ids": x, "attention_mask": y, targets: y})
    assert model.seen == ((), {"input_ids": x, "attention_mask": y})


def test_outputs_may_hold_logits():
    logits, batch = drawn(4, 7), (torch.zeros(4), TOKENS[:, 0])
    losses = [
        functional_loss("cross_entropy")(Says(x), batch) for x in (SimpleNamespace(logits=logits), {"logits": logits})
    ]
    assert losses[0] == losses[1] == F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize(
    ("name", "output", "batch", "says"),
    [
        ("cross_entropy", drawn(4, 7), drawn(4, 6), r"must be tokens \(N, T\).*got torch.float64 \(4, 6\)"),
        ("cross_entropy", drawn(4, 7), TOKENS[:, :1], "with T of at least 2"),
        ("mse_loss", drawn(4, 7), drawn(4, 6), r"needs batches \(inputs, targets\), got a Tensor"),
        ("mse_loss", drawn(4), (drawn(4), drawn(4), drawn(4)), "got a tuple of 3"),
        ("mse_loss", drawn(4), {"x": drawn(4)}, "needs targets as one of labels, .*, which has x"),
        ("mse_loss", drawn(4), {"x": 1, "y": 2, "labels": 3}, "which has x, y, labels"),
        ("mse_loss", "text", (drawn(4), drawn(4)), "the model's output is a str"),
        ("mse_loss", drawn(4), (drawn(4), [0, 1]), "what the batch has as targets is a list"),
        ("mse_loss", drawn(4, 1), (drawn(4), drawn(3)), r"of the targets' shape, got \(4, 1\) and \(3,\)"),
        ("mse_loss", drawn(4, 4), (drawn(4), drawn(4)), r"of the targets' shape, got \(4, 4\) and \(4,\)"),
        ("cross_entropy", drawn(4, 6, 7), (drawn(4), TOKENS.double()), "whole numbers of classes as targets"),
        ("cross_entropy", drawn(4, 6, 6), (drawn(4), TOKENS), "may be the second or the last dimension"),
        ("cross_entropy", drawn(4, 5, 7), (drawn(4), TOKENS), r"needs an output .* got \(4, 5, 7\) and \(4, 6\)"),
        ("nll_loss", drawn(4), (drawn(4), TOKENS[:, 0]), r"needs an output .* got \(4,\) and \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(name, output, batch, says):
    with pytest.raises(MeasurementError, match=says):
        functional_loss(name)(Says(output), batch)


def test_unknown_losses_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"must be one of cross_entropy, .*, got 'ctc_loss'"):
        functional_loss("ctc_loss")
    assert all(callable(getattr(F, name)) for name in FUNCTIONAL_LOSSES)


def test_the_measurement_sees_them_as_it_sees_a_loss_written_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7))
    tokens = torch.randint(7, (48, 6))
    by_name = measure_spectra(model, tokens, functional_loss("cross_entropy"), top_k=5)
    written = measure_spectra(
        model, tokens, lambda m, b: F.cross_entropy(m(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten()), top_k=5
    )
    assert by_name.chosen == written.chosen
    for name, layer in by_name.layers.items():
        torch.testing.assert_close(layer.h, written.layers[name].h)
