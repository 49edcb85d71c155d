"""Traces of Hessian blocks as measured, and the blocks themselves."""

from twins import dense_hessian, matrix_entries

from lightning_spectral import measure_spectra
from lightning_spectral.layers.matrices import find_layers


def blocks(case, model, batch):
    """layer name -> (layer, its Hessian block over the entries of its matrix)."""
    found = find_layers(model, layers=lambda layer: True, fused_qkv=case.options.get("fused_qkv", ())).layers
    out = {}
    for name, layer in found.items():
        train = case.options.get("mode") == "train"
        hessian = dense_hessian(model, batch, case.loss, layer.parameter, train=train)
        entries = matrix_entries(layer, model.get_parameter(layer.parameter).shape).flatten()
        out[name] = layer, hessian[entries][:, entries]
    return out


def measured(case, model, batch, draws, **options):
    options = {"layers": lambda layer: True, "curvature": "exact", "top_k": 4} | case.options | options
    return measure_spectra(model, batch, case.loss, curvature_fraction=draws, **options)
