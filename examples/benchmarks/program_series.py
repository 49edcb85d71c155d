"""Programs that forecast time series, trained on noisy waves through their own Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from examples.benchmarks.program_training import STEPS, Trained, answering, through

SERIES, LENGTH, HORIZON, CONTEXT = 64, 240, 12, 48


def waves() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw series of a daily and a slower wave with noise, (SERIES, LENGTH)."""
    random = np.random.default_rng(0)
    time, phase = np.arange(LENGTH), random.uniform(0, 6, (SERIES, 2, 1))
    clean = 3 + np.sin(time / 24 * 6.283 + phase[:, 0]) + 0.5 * np.sin(time / 83 * 6.283 + phase[:, 1])
    return (clean * random.uniform(0.5, 2, (SERIES, 1)) + 0.2 * random.standard_normal(clean.shape)).astype(np.float32)


def table() -> pd.DataFrame:
    """Return the waves in long form."""
    hours = pd.date_range("2024-01-01", periods=LENGTH, freq="h")
    values = waves()
    return pd.concat(
        pd.DataFrame({"unique_id": str(i), "ds": hours, "step": range(LENGTH), "y": values[i]}) for i in range(SERIES)
    ).reset_index(drop=True)


def _gluonts(estimator: Callable[..., Any], **own: Any) -> Trained:
    from gluonts.dataset.common import ListDataset

    start = pd.Period("2024-01-01", freq="h")
    data = ListDataset([{"start": start, "target": values} for values in waves()], freq="h")

    def train(options: dict[str, Any]) -> None:
        built = estimator(prediction_length=HORIZON, context_length=CONTEXT, trainer_kwargs=options, **own)
        built.train_model(data)

    # It adds a checkpoint by itself, and counts epochs of 50 batches.
    return through(train, enable_checkpointing=None, max_steps=None, max_epochs=1)


def gluonts_deepar() -> Trained:
    """Train DeepAR: a fused LSTM and Student's t."""
    from gluonts.torch import DeepAREstimator

    return _gluonts(DeepAREstimator, freq="h")


def gluonts_patchtst() -> Trained:
    """Train PatchTST with Student's t."""
    from gluonts.torch import PatchTSTEstimator

    return _gluonts(PatchTSTEstimator, patch_len=8)


def gluonts_feedforward() -> Trained:
    """Train an MLP with Student's t."""
    from gluonts.torch import SimpleFeedForwardEstimator

    return _gluonts(SimpleFeedForwardEstimator, hidden_dimensions=[64, 64])


def _neuralforecast(model: Callable[..., Any], **own: Any) -> Trained:
    from neuralforecast import NeuralForecast

    def train(options: dict[str, Any]) -> None:
        built = model(h=HORIZON, input_size=CONTEXT, batch_size=32, windows_batch_size=256, **own, **options)
        NeuralForecast(models=[built], freq="h").fit(table()[["unique_id", "ds", "y"]])

    return through(train)


def neuralforecast_nhits() -> Trained:
    """Train NHITS on the absolute error: piecewise linear throughout."""
    from neuralforecast.models import NHITS

    return _neuralforecast(NHITS, mlp_units=[[64, 64]] * 3)


def neuralforecast_nhits_normal() -> Trained:
    """Train NHITS on the likelihood of a normal distribution."""
    from neuralforecast.losses.pytorch import DistributionLoss
    from neuralforecast.models import NHITS

    return _neuralforecast(NHITS, mlp_units=[[64, 64]] * 3, loss=DistributionLoss("Normal", level=[80]))


def neuralforecast_patchtst() -> Trained:
    """Train PatchTST on the absolute error."""
    from neuralforecast.models import PatchTST

    return _neuralforecast(PatchTST, patch_len=8, stride=4, hidden_size=32, n_heads=4, linear_hidden_size=64)


def neuralforecast_lstm() -> Trained:
    """Train a fused LSTM."""
    from neuralforecast.models import LSTM

    return _neuralforecast(LSTM, encoder_hidden_size=48, decoder_hidden_size=48)


def _darts(model: Callable[..., Any], **own: Any) -> Trained:
    from darts import TimeSeries

    series = [TimeSeries.from_values(values) for values in waves()]

    def train(options: dict[str, Any]) -> None:
        model(CONTEXT, HORIZON, batch_size=64, pl_trainer_kwargs=options, random_state=0, **own).fit(series)

    # It sets the number of epochs and whether checkpoints are kept by itself.
    return through(train, max_steps=None, enable_checkpointing=None, limit_train_batches=STEPS, logger=None)


def darts_tcn() -> Trained:
    """Train a temporal convolutional network."""
    from darts.models import TCNModel

    return _darts(TCNModel, num_filters=32, n_epochs=1)


def darts_transformer() -> Trained:
    """Train a transformer, sequence-first."""
    from darts.models import TransformerModel

    return _darts(TransformerModel, d_model=32, dim_feedforward=64, n_epochs=1)


def darts_tide() -> Trained:
    """Train TiDE: residual blocks of linear layers."""
    from darts.models import TiDEModel

    return _darts(TiDEModel, hidden_size=64, n_epochs=1)


def _pytorch_forecasting(build: Callable[[Any], Any]) -> Trained:
    import lightning.pytorch
    from pytorch_forecasting import TimeSeriesDataSet

    data = TimeSeriesDataSet(
        table(),
        time_idx="step",
        target="y",
        group_ids=["unique_id"],
        max_encoder_length=CONTEXT,
        max_prediction_length=HORIZON,
        time_varying_known_reals=["step"],
        time_varying_unknown_reals=["y"],
    )

    def train(options: dict[str, Any]) -> None:
        loader = data.to_dataloader(train=True, batch_size=64, num_workers=0)
        lightning.pytorch.Trainer(**options).fit(build(data), loader)

    # It computes no loss if it is to predict.
    return answering(through(train, max_epochs=1), current_stage="train")


def pytorch_forecasting_tft() -> Trained:
    """Train a temporal fusion transformer on seven quantiles."""
    from pytorch_forecasting import TemporalFusionTransformer

    return _pytorch_forecasting(
        lambda data: TemporalFusionTransformer.from_dataset(data, hidden_size=16, attention_head_size=4)
    )


def pytorch_forecasting_nhits() -> Trained:
    """Train NHITS on three quantiles."""
    from pytorch_forecasting import NHiTS, QuantileLoss

    loss = QuantileLoss([0.1, 0.5, 0.9])
    return _pytorch_forecasting(lambda data: NHiTS.from_dataset(data, hidden_size=64, loss=loss))


PROGRAMS: dict[str, Callable[[], Trained]] = {
    function.__name__: function
    for function in (
        gluonts_deepar,
        gluonts_patchtst,
        gluonts_feedforward,
        neuralforecast_nhits,
        neuralforecast_nhits_normal,
        neuralforecast_patchtst,
        neuralforecast_lstm,
        pytorch_forecasting_tft,
        pytorch_forecasting_nhits,
        darts_tcn,
        darts_transformer,
        darts_tide,
    )
}
