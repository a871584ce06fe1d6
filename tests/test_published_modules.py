"""LightningModules of published packages, unmodified, on data that the packages ship or that is generated here.

An optional group: `pip install -c constraints.txt -e ".[test,published]"`. Without a package its tests are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import difference, observer, outcome

from lightning_l2l import LearnToLearn

# The packages warn about a great deal, and the suite makes errors of warnings.
pytestmark = [pytest.mark.published, pytest.mark.filterwarnings("ignore")]

STEPS = 200
Fit = Callable[..., tuple[Any, Any, LearnToLearn | None]]


def fit(trainer: Any, callback: LearnToLearn | None, module: Any, train: Any, val: Any, **options: Any) -> Any:
    options = {"max_epochs": -1, "limit_val_batches": 2, **options}
    fitted = trainer(*([] if callback is None else [callback]), **options)
    fitted.fit(module, train, val)
    return fitted, module, callback


# -- pytorch-forecasting ----------------------------------------------------------------------------------------------


def forecasting(name: str, trainer: Any, callback: LearnToLearn | None, steps: int) -> Any:
    """Autoregressive series from the package's own generator."""
    package = pytest.importorskip("pytorch_forecasting")
    from pytorch_forecasting.data.examples import generate_ar_data

    data = generate_ar_data(seasonality=10.0, timesteps=100, n_series=10, seed=42)
    data["series"] = data["series"].astype(str)
    statics = {"static_categoricals": ["series"]} if name in ("TemporalFusionTransformer", "DeepAR") else {}
    training = package.TimeSeriesDataSet(
        data[data["time_idx"] < 80],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        max_encoder_length=20,
        max_prediction_length=5,
        **statics,
    )
    held_out = package.TimeSeriesDataSet.from_dataset(training, data, min_prediction_idx=80)
    sizes = {
        "NBeats": {"widths": [16, 32]},
        "NHiTS": {"hidden_size": 16},
        "TemporalFusionTransformer": {"hidden_size": 8, "attention_head_size": 1, "hidden_continuous_size": 4},
        "DeepAR": {"hidden_size": 8, "rnn_layers": 1},
    }[name]
    torch.manual_seed(0)
    module = getattr(package, name).from_dataset(training, learning_rate=1e-3, optimizer="adam", **sizes)
    loaders = [
        dataset.to_dataloader(train=train, batch_size=16, num_workers=0)
        for dataset, train in ((training, True), (held_out, False))
    ]
    return fit(trainer, callback, module, *loaders, max_steps=steps, gradient_clip_val=0.1)


# -- chemprop ---------------------------------------------------------------------------------------------------------


def chemprop(passing: str, trainer: Any, callback: LearnToLearn | None, steps: int) -> Any:
    """Small molecules made here, with a property computed by RDKit."""
    pytest.importorskip("chemprop")
    from chemprop import data, featurizers, models, nn
    from rdkit.Chem import Descriptors, MolFromSmiles

    smiles = ["C" * i + "O" * (i % 2) + "N" * (i // 2 % 2) + "C" * j for i in range(1, 9) for j in range(1, 9)]
    points = [data.MoleculeDatapoint.from_smi(s, [Descriptors.MolLogP(MolFromSmiles(s))]) for s in smiles]
    graphs = featurizers.SimpleMoleculeMolGraphFeaturizer()
    sets = [data.MoleculeDataset(part, graphs) for part in (points[::2], points[1::2])]
    loaders = [
        data.build_dataloader(part, batch_size=8, num_workers=0, shuffle=shuffle, seed=0)
        for part, shuffle in zip(sets, (True, False), strict=True)
    ]
    torch.manual_seed(0)
    network = nn.RegressionFFN(input_dim=32, hidden_dim=32)
    module = models.MPNN(getattr(nn, passing)(d_h=32), nn.MeanAggregation(), network, batch_norm=True)
    return fit(trainer, callback, module, *loaders, max_steps=steps)


# -- PyTorch Geometric ------------------------------------------------------------------------------------------------


def geometric(layer: str, trainer: Any, callback: LearnToLearn | None, steps: int) -> Any:
    """GraphGym's LightningModule on the package's fake graphs."""
    pytest.importorskip("torch_geometric")
    pytest.importorskip("yacs")
    from torch_geometric.datasets import FakeDataset
    from torch_geometric.graphgym.config import cfg, set_cfg
    from torch_geometric.graphgym.model_builder import create_model
    from torch_geometric.loader import DataLoader

    set_cfg(cfg)
    cfg.accelerator, cfg.dataset.task, cfg.model.type = "cpu", "graph", "gnn"
    cfg.share.dim_in, cfg.share.dim_out = 4, 3
    cfg.gnn.layer_type, cfg.gnn.layers_mp, cfg.gnn.dim_inner, cfg.gnn.head = layer, 2, 16, "graph"
    torch.manual_seed(0)
    graphs = FakeDataset(num_graphs=64, avg_num_nodes=10, num_channels=4, num_classes=3)
    module = create_model()
    loaders = DataLoader(graphs[:48], batch_size=8, shuffle=True), DataLoader(graphs[48:], batch_size=8)
    return fit(trainer, callback, module, *loaders, max_steps=steps)


# -- neuralforecast ---------------------------------------------------------------------------------------------------


class KeepsTrainer(pl.Callback):
    """The package makes its Trainer itself, and drops it."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.trainer = trainer


def neuralforecast(name: str, trainer: Any, callback: LearnToLearn | None, steps: int) -> Any:
    """Air passengers, which the package ships; it makes its Trainer itself, of the other namespace."""
    package = pytest.importorskip("neuralforecast")
    from neuralforecast import models
    from neuralforecast.utils import AirPassengersDF

    sizes = {"MLP": {"hidden_size": 16}, "NHITS": {"mlp_units": [[16, 16]] * 3}, "LSTM": {"encoder_hidden_size": 8}}[
        name
    ]
    keeps = KeepsTrainer()
    module = getattr(models, name)(
        h=6,
        input_size=12,
        max_steps=steps,
        val_check_steps=max(1, steps // 2),
        accelerator="cpu",
        callbacks=[keeps, *([] if callback is None else [callback])],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **sizes,
    )
    whole = package.NeuralForecast(models=[module], freq="ME")
    whole.fit(AirPassengersDF, val_size=12)
    # It trains a copy of the model, and with it of the callback.
    (module,) = whole.models
    keeps, *used = module.trainer_kwargs["callbacks"]
    return keeps.trainer, module, used[0] if used else None


MODULES: dict[str, tuple[Fit, str]] = {
    "pytorch-forecasting NBeats": (forecasting, "NBeats"),
    "pytorch-forecasting NHiTS": (forecasting, "NHiTS"),
    "pytorch-forecasting TemporalFusionTransformer": (forecasting, "TemporalFusionTransformer"),
    "pytorch-forecasting DeepAR": (forecasting, "DeepAR"),
    "chemprop MPNN, bonds": (chemprop, "BondMessagePassing"),
    "chemprop MPNN, atoms": (chemprop, "AtomMessagePassing"),
    "torch-geometric GraphGymModule, GCN": (geometric, "gcnconv"),
    "torch-geometric GraphGymModule, GAT": (geometric, "gatconv"),
    "neuralforecast MLP": (neuralforecast, "MLP"),
    "neuralforecast NHITS": (neuralforecast, "NHITS"),
    "neuralforecast LSTM": (neuralforecast, "LSTM"),
}


@pytest.mark.feature(
    "modules of pytorch-forecasting, neuralforecast, chemprop and PyTorch Geometric", "works", "unmodified"
)
@pytest.mark.parametrize("name", MODULES)
def test_a_published_module_is_learned_on_unmodified(trainer: Any, name: str) -> None:
    train, which = MODULES[name]
    _, module, callback = train(which, trainer, LearnToLearn(), STEPS)
    assert callback.history and all(record["learning_rates"][0] >= 0 for record in callback.history)
    assert any(math.isfinite(record["cosine"][0]) for record in callback.history if "cosine" in record)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_a_published_module_is_unchanged_by_watching(trainer: Any, name: str) -> None:
    train, which = MODULES[name]
    found = []
    for callback in (None, observer()):
        pl.seed_everything(0, verbose=False)
        fitted, module, used = train(which, trainer, callback, 12)
        found.append(outcome(fitted, module))
    assert difference(*found) == "" and used.history
