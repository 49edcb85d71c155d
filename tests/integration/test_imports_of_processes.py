"""What a process of its own loads: nothing that it does not need."""

import subprocess
import sys
from pathlib import Path

import pytest
from reports import layer, report

from lightning_spectral.report.runs.spectra_file import append_report


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_neither_pyplot_nor_a_backend_is_needed():
    pytest.importorskip("matplotlib")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'helpers')!r})\n"
        "import synthetic\n"
        "from lightning_spectral.report import figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figures.plot_alpha_by_depth(synthetic.network()).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = run_python(code, "/dev/null")
    assert "Error" not in done.stderr.replace("/dev/null", ""), done.stderr


def test_measuring_works_without_lightning_and_wandb_and_loads_nothing_that_serves_shards_alone():
    done = run_python(
        "import sys\n"
        "for name in ('pytorch_lightning', 'lightning', 'wandb', 'torchmetrics', 'sklearn', 'pandas', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "from lightning_spectral import measure_spectra\n"
        "model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))\n"
        "report = measure_spectra(model, torch.randn(64, 6), lambda m, x: m(x).square().mean(), alignment=True)\n"
        "shards = ('lightning_spectral.measurement.sharded', 'torch.distributed.fsdp', 'torch.distributed.tensor')\n"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith(shards)))\n"
        "import lightning_spectral.report.figures\n"
        "print(report, len(report._repr_html_()) > 0)\n"
        "try:\n    from lightning_spectral import SpectralProbe\nexcept ImportError as error:\n    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[]"
    assert "SpectralReport(2 layers" in done.stdout
    assert "SpectralProbe needs Lightning: pip install pytorch-lightning" in done.stdout


HEAVY = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch.distributed.tensor")


def test_importing_loads_nothing_heavy_beyond_torch():
    """Not what only compiling, exporting or sharding needs, nor another package; a plot loads its library."""
    done = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lightning_spectral\n"
        "for name in lightning_spectral.__all__:\n"
        "    if lightning_spectral._PUBLIC[name].partition('.')[0] not in ('callbacks', 'metrics'):\n"
        "        getattr(lightning_spectral, name)\n"
        "new = sorted(set(sys.modules) - before)\n"
        "packages = {name.partition('.')[0] for name in new} - set(sys.stdlib_module_names)\n"
        f"print(sorted(packages), [name for name in new if name.startswith({HEAVY})])\n"
        "import pytorch_lightning\n"
        "before = set(sys.modules)\n"
        "lightning_spectral.SpectralProbe\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'lightning', 'lightning_fabric', 'lightning_utilities'}))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['lightning_spectral'] []", "['lightning_spectral']"]


def test_reading_needs_neither_lightning_nor_wandb_nor_plotly(tmp_path):
    for step in (0, 4, 8):
        append_report(tmp_path / "spectra.jsonl", report(layer("a"), step=step))
    (tmp_path / "metrics.csv").write_text("step,spectral/alpha_median\n0,2.0\n")
    done = run_python(
        "import sys\n"
        "for name in ('pytorch_lightning', 'lightning', 'wandb', 'plotly'):\n    sys.modules[name] = None\n"
        "from lightning_spectral.report import read_run\n"
        f"print(len(read_run([{str(tmp_path)!r}]).steps))"
    )
    assert done.stdout.strip() == "3", done.stderr
