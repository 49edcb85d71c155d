"""Each sentence of the summary, and the analysis behind it."""

import math
from dataclasses import replace

import pytest
from fits import fit_numbers
from reports import dead, layer, report

from lightning_spectral.analysis import PAPER_ALPHA, PAPER_RANGES, deviating, transfer_identity, trusted
from lightning_spectral.records.fit_quality import FitQuality
from lightning_spectral.summary import SAYS_LITTLE, in_words, summary, summary_over_training


def said(start, *layers):
    """The one sentence of these layers' summary that starts so."""
    sentences = [text for text in summary(report(*layers)) if text.startswith(start)]
    assert len(sentences) <= 1
    return sentences[0] if sentences else ""


def cloud(name, **kwargs):
    return layer(name, noise=2.0, alpha=0.5, **kwargs)


def test_how_many_fits_to_trust():
    assert said("All 2", layer("a"), layer("b")) == (
        "All 2 layers have an alpha to trust (r2 of at least 0.9, at least 5 points, standard error up to alpha / 4, "
        "no single point that carries the slope, signal of at least 0.8)."
    )
    assert said("The one layer has an alpha", layer("a"))
    assert said("1 of 2 layers has an alpha", layer("a"), cloud("b"))
    assert said("2 of 3 layers have an alpha", layer("a"), layer("c"), cloud("b"))
    assert said("None of 2 layers has an alpha", dead("a"), cloud("b"))
    assert summary(report()) == ["No layer was measured."]


def test_fits_not_to_be_trusted_come_worst_first():
    bad, worse = layer("bad.weight", noise=0.6, alpha=1.0), cloud("worse.weight")
    assert worse.alpha.r2 < bad.alpha.r2 < 0.9
    text = said("Not to be trusted", bad, layer("a"), worse)
    assert text.startswith(
        f"Not to be trusted: worse (r2 {worse.alpha.r2:.2f}), bad (r2 {bad.alpha.r2:.2f}). There log h"
    )
    assert said("Not to be trusted", layer("a"), dead("b")) == ""
    many = said("Not to be trusted", *(cloud(f"c{i}", seed=i) for i in range(9)))
    assert "and 3 more. There" in many


def test_few_points_and_large_errors_are_not_to_be_trusted_whatever_their_r2():
    """A line through 3 of 20 points, and one whose h is lost in its noise, both with an r2 of 1."""
    few, noisy, short = layer("few", negative=17), sampled("noisy", 40.0), layer("short", negative=15)
    assert min(x.alpha.r2 for x in (few, noisy, short)) > 0.999
    assert (few.alpha.n_used, short.alpha.n_used) == (3, 5)
    assert [trusted(x) for x in (few, noisy, short, sampled("mild", 0.4))] == [False, False, True, True]
    text = said("Not to be trusted", few, noisy, short)
    assert f"few (3 points), noisy (alpha 2.00 ± {noisy.alpha.stderr:.2f}). " in text
    assert "slope of a cloud" not in text
    # What is not known is not held against a fit.
    assert FitQuality(2.0, r2=1.0).trusted
    assert not FitQuality(2.0, r2=1.0, points=4.0).trusted


def test_errors_of_the_sketch_are_told_with_what_lowers_them():
    text = said("In ", sampled("noisy", 40.0), sampled("other", 40.0), sampled("mild", 0.4), cloud("exact"))
    assert text == (
        "In 2 of 4 layers, without an alpha to trust, h is known to no better than a quarter along most "
        'directions: more samples (max_samples, n_batches), or curvature="exact".'
    )
    assert said("In ", sampled("mild", 0.4), cloud("exact")) == ""


def sampled(name, relative):
    """Exact h, each with a standard error of so many times its size."""
    whole = layer(name)
    options = {"name": name, "kind": "dense", "shape": (64, 32), "h_stderr": relative * whole.h}
    return fit_numbers(whole.sigma, whole.h, **options)


def test_layers_without_an_alpha():
    assert said("No alpha", layer("a"), dead("b.weight")) == "No alpha: b (nothing flows through it)."
    assert said("No alpha", dead("b"), dead("c", note="frozen")) == "No alpha: b, c."
    assert said("No alpha", layer("a")) == ""


def test_median_alpha_and_its_reach():
    text = said("The median alpha", layer("low", alpha=1.5), layer("mid"), layer("high", alpha=2.5), cloud("x"))
    assert text == (
        "The median alpha of the fits to trust is 2.00, from 1.50 (low) to 2.50 (high): "
        "curvature grows about as the square of the gradient."
    )
    assert "is 2.00 (one, the only one): curvature" in said("The median alpha", layer("one"))
    assert said("The median alpha", cloud("a")) == ""


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (-0.5, "falls where the gradient is large"),
        (0.1, "hardly depends"),
        (0.5, "more slowly than the gradient"),
        (1.0, "in proportion to"),
        (1.5, "more slowly than its square"),
        (2.0, "about as the square"),
        (3.0, "faster than the square"),
    ],
)
def test_an_exponent_in_words(alpha, words):
    assert words in in_words(alpha)


def test_kinds_beside_the_paper():
    text = said(
        "Median alpha of the fits", layer("a", kind="conv"), layer("b", kind="embedding", alpha=1.0), cloud("c")
    )
    assert text == (
        "Median alpha of the fits to trust, by kind of layer: conv 2.00; embedding 1.00. "
        "In the paper: conv 1.94 to 2.17 (ResNet-18, VGG-11, ResNet-50)."
    )
    assert (
        said("Median alpha of", layer("b", kind="embedding"))
        == "Median alpha of the fits to trust, by kind of layer: embedding 2.00."
    )


def test_the_papers_alphas_in_words_and_as_ranges_are_of_one_table():
    assert PAPER_ALPHA["conv"] == "1.94 to 2.17 (ResNet-18, VGG-11, ResNet-50)"
    assert PAPER_ALPHA["head"] == "1.23 to 1.65 (10 classes), 0.90 (200), 2.83 (1000), 4.53 (small GPT)"
    assert PAPER_RANGES["conv"] == (1.94, 2.17)
    assert PAPER_RANGES["mlp_up"] == (0.84, 0.84)
    assert set(PAPER_ALPHA) - set(PAPER_RANGES) == {"head"}


def test_layers_far_from_their_kind():
    siblings = [layer(f"c{i}", kind="conv") for i in range(3)]
    far, head = layer("far", alpha=1.0, kind="conv"), layer("head", alpha=4.0, kind="head")
    assert said("Far from", *siblings, far, head) == (
        "Far from the median of their kind (alpha; the median): far (1.00 ± 0.00; 2.00)."
    )
    layers = [layer(f"{i}", alpha=4.0 if i == 3 else 2.0) for i in range(4)]
    assert "Far from the median of their kind (alpha; the median): 3 (4.00 ± 0.00; 2.00)." in summary(layers)
    assert said("Far from", *siblings, layer("near", alpha=2.2, kind="conv"), head) == ""
    assert said("Far from", siblings[0], far) == ""
    assert deviating(report(*siblings, cloud("noise", kind="conv"))) == []


def test_a_layer_within_its_error_does_not_deviate():
    def one(name, alpha, stderr):
        measured = layer(name)
        return replace(measured, alpha=replace(measured.alpha, exponent=alpha, stderr=stderr), alpha_theil_sen=alpha)

    others = [one(name, 2.0, 0.01) for name in "abc"]
    assert [x.name for x, _ in deviating([*others, one("d", 2.6, 0.3), one("e", 2.6, 0.1)])] == ["e"]
    assert any(text.startswith("Far from the median of their kind") for text in summary([*others, one("e", 2.6, 0.1)]))


def test_transfer_identity():
    text = said("s = alpha gamma", replace(layer("a"), transfer_error=0.02), replace(layer("b"), transfer_error=0.01))
    assert text == "s = alpha gamma holds: median error 1.5 % over 2 fits to trust, 2.0 % at worst (a). " + SAYS_LITTLE
    assert "over 1 fit to trust. A small transfer error says little" in said("s = alpha gamma", layer("a"))
    assert said("s = alpha gamma", cloud("a")) == ""
    for error, verdict in ((0.03, "holds:"), (0.1, "holds roughly:"), (0.4, "does not hold:")):
        one = replace(layer("a"), transfer_error=error)
        assert any(f"s = alpha gamma {verdict} median error {100 * error:.1f} %" in text for text in summary([one]))


def test_transfer_identity_counts_fits_to_trust_alone():
    layers = [layer("a", noise=0.1), layer("b", noise=0.2, seed=1), cloud("c"), dead("d")]
    identity = transfer_identity(report(*layers))
    assert [x.name for x in identity.layers] == ["a", "b", "c"]
    assert [x.name for x in identity.trusted] == ["a", "b"]
    assert identity.median_error == pytest.approx((layers[0].transfer_error + layers[1].transfer_error) / 2)
    assert identity.worst.transfer_error == max(x.transfer_error for x in layers[:2])
    assert identity.layers[0].alpha_gamma == layers[0].alpha_gamma
    nothing = transfer_identity([])
    assert math.isnan(nothing.median_error)
    assert nothing.worst is None


def test_participation_and_negative_curvature():
    assert said("The participation ratio", layer("a")).startswith("The participation ratio of curvature is 2.4 in the")
    assert said("The participation ratio", dead("a")) == ""
    assert said("1 direction of", layer("a", negative=1)) == (
        "1 direction of negative curvature, left out of the fits, in 1 layer; most in a (1)."
    )
    assert "in 2 layers; most in b (3)" in said("4 directions of", layer("a", negative=1), layer("b", negative=3))


def test_summary_over_training():
    def at(**alphas):
        return [layer(name, alpha=alpha) for name, alpha in alphas.items()]

    assert summary_over_training([(0, at(a=1.0, b=1.5)), (9, at(a=1.1, b=2.5)), (5, [])]) == [
        "From step 0 to 9 the median alpha of the fits to trust went from 1.25 to 1.80; b moved most, from 1.50 to "
        "2.50."
    ]
    assert summary_over_training([(0, at(a=1.0)), (9, at(b=2.0))]) == [
        "From step 0 to 9 the median alpha of the fits to trust went from 1.00 to 2.00."
    ]
    for probes in ([], [(None, at(a=1.0)), (3, at(a=2.0))], [(3, at(a=1.0)), (3, at(a=1.0))]):
        assert summary_over_training(probes) == []
