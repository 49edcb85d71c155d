"""Options are declared once: signatures, docstrings and the command line are held to the declaration."""

import argparse
import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from lightning_spectral import SpectralNewton, SpectralProbe, measure_spectra
from lightning_spectral._validation import flag, one_of, optional_positive_int, positive_int
from lightning_spectral.cli.arguments import OPTION_NAMES, PYTHON_ONLY, add_options, options_of
from lightning_spectral.curvature import METHODS as CURVATURE_METHODS
from lightning_spectral.numerics.matmul_precision import PRECISIONS
from lightning_spectral.numerics.power_law import MIN_POINTS
from lightning_spectral.options import METHODS, MIN_TOP_K, Options
from lightning_spectral.plan.planner import plan_spectra

OPTIONS = {option.name: option for option in fields(Options)}
NOT_PLANNED = {"weight_spectra", "bootstrap"}
OWN_DEFAULTS = {SpectralProbe.__init__: {"gradient_samples": "auto"}}
PARAMETERS = inspect.signature(SpectralProbe).parameters
"""As they are without a fixture's defaults."""


def arguments_of(docstring):
    """Name -> text, of the section Args of a docstring."""
    section = re.search(r"^Args:\n(.*?)\n\n", inspect.cleandoc(docstring), re.DOTALL | re.MULTILINE)[1]
    entries = re.findall(r"^    (\w[\w, \n]*?): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {" ".join(names.split()): " ".join(text.split()) for names, text in entries}


@pytest.mark.parametrize(
    ("function", "absent"), [(measure_spectra, set()), (SpectralProbe.__init__, set()), (plan_spectra, NOT_PLANNED)]
)
def test_signatures_have_the_declared_options_in_their_order(function, absent):
    parameters = PARAMETERS if function is SpectralProbe.__init__ else inspect.signature(function).parameters
    assert [name for name in parameters if name in OPTIONS] == [name for name in OPTIONS if name not in absent]
    for name in OPTIONS.keys() - absent:
        assert parameters[name].default == OWN_DEFAULTS.get(function, {}).get(name, OPTIONS[name].default), name
        assert parameters[name].annotation == OPTIONS[name].type, name


@pytest.mark.parametrize("documented", [measure_spectra, SpectralProbe])
def test_docstrings_have_the_declared_text(documented):
    texts = arguments_of(documented.__doc__)
    for name, option in OPTIONS.items():
        assert texts[name] == option.metadata["help"]


def test_a_plans_docstring_refers_to_the_one_of_measuring():
    arguments = arguments_of(plan_spectra.__doc__).items()
    referring = [names for names, text in arguments if text.startswith("as in `measure_spectra`")]
    named = [name for names in referring for name in names.split(", ")]
    assert [name for name in named if name in OPTIONS] == [x for x in OPTIONS if x not in NOT_PLANNED]


def parser():
    made = argparse.ArgumentParser()
    add_options(made)
    return made


def test_the_command_line_has_every_option_with_its_default():
    assert options_of(parser().parse_args([])) == Options(kinds={}, fused_qkv={})
    arguments = ["--top-k", "4", "--layers", "a*", "b", "--kinds", "*.c=head", "--fused-qkv", "*.d=4,2,2", "e"]
    arguments += ["--alignment", "--precision", "float64"]
    expected = Options(
        top_k=4,
        layers=["a*", "b"],
        kinds={"*.c": "head"},
        fused_qkv={"*.d": [4, 2, 2], "e": []},
        alignment=True,
        precision="float64",
    )
    assert options_of(parser().parse_args(arguments)) == expected


def test_the_help_has_the_declared_texts_without_python():
    text = " ".join(re.sub(r"-\s*\n\s*", "-", parser().format_help()).split())
    assert "double backward, a product per layer and direction" in text
    assert "glob patterns on names; without it, all matrices but embeddings" in text
    assert "draws for 95 % intervals of alpha, gamma and s; without it, none" in text
    for word in ("None", "`", "callable", "top_k", '="'):
        assert word not in text
    declared = " ".join(option.metadata["help"] for option in OPTIONS.values())
    assert [pattern for pattern in PYTHON_ONLY if not re.search(pattern, declared)] == []
    assert set(OPTIONS) < set(OPTION_NAMES)


def test_names_that_are_declared_twice_for_speed_are_the_same():
    assert tuple(CURVATURE_METHODS) == METHODS
    assert OPTIONS["precision"].metadata["choices"] == tuple(PRECISIONS)
    assert MIN_TOP_K == MIN_POINTS


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["measure", "--help"], 0),
        (["plan", "--help"], 0),
        (["report", "--help"], 0),
        (["mesure"], 2),
        (["measure", "--model=x", "--data=y", "--topk=3"], 2),
    ],
)
def test_help_versions_and_typos_load_no_torch(arguments, status):
    code = (
        "import sys\nfrom lightning_spectral.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n"
        "    loaded = {'torch', 'lightning', 'pytorch_lightning'} & set(sys.modules)\n"
        "    sys.exit(f'loaded {loaded}' if loaded else stop.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "loaded" not in done.stderr


def test_settings_are_those_that_ranks_have_in_common():
    assert set(Options().settings) == set(OPTIONS) - {
        "layers", "kinds", "fused_qkv", "max_samples", "micro_batch_size",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: positive_int("n", 0), "n must be a whole number of at least 1, got 0"),
        (lambda: positive_int("n", True), "n must be a whole number of at least 1, got True"),
        (lambda: positive_int("n", None), "n must be a whole number of at least 1, got None"),
        (lambda: positive_int("k", 2.5, 3, reason="as ever"), "k must be a whole .* at least 3, as ever, got 2.5"),
        (lambda: optional_positive_int("n", False), "n must be None or a whole number of at least 1, got False"),
        (lambda: optional_positive_int("n", -1, 0), "n must be None or a whole number of at least 0, got -1"),
        (lambda: one_of("mode", "b", ("a", "c")), "mode must be one of 'a', 'c', got 'b'"),
        (lambda: flag("on", 1), "on must be True or False, got 1"),
        (lambda: flag("on", None), "on must be True or False, got None"),
        (lambda: flag("on", "yes", none=True), "on must be None, True or False, got 'yes'"),
    ],
)
def test_guards_say_the_option_the_rule_and_the_value(check, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check()


def test_the_first_arguments_may_be_given_by_place():
    assert next(iter(inspect.signature(SpectralProbe).parameters)) == "every_n_steps"
    assert list(inspect.signature(SpectralNewton).parameters)[:3] == ["params", "lr", "alpha"]


def test_guards_return_what_they_checked():
    assert positive_int("n", 1) == 1
    assert optional_positive_int("n", 0, 0) == 0
    assert optional_positive_int("n", None) is None
    assert one_of("mode", "a", ("a", "b")) == "a"
    assert flag("on", False) is False
    assert flag("on", None, none=True) is None
