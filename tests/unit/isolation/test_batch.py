"""The first samples of batches of every shape users have."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_spectral import MeasurementError
from lightning_spectral.isolation.batch_tree import batch_size, map_leaves, take_samples

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Example:
    x: torch.Tensor
    name: str = "n"


class Encoding(UserDict):
    """Like Hugging Face's BatchEncoding: a UserDict with attributes beside its items."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self.encodings = encodings


class Output(OrderedDict):
    """Like Hugging Face's ModelOutput."""

    def update(self, *args, **kwargs):
        raise TypeError("You cannot use ``update`` on a ModelOutput instance.")


BATCHES = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "dict": {"x": X, "y": Y, "scale": 2.0},
    "ordered_dict": OrderedDict(x=X, y=Y),
    "defaultdict": defaultdict(list, x=X),
    "namedtuple": Pair(X, Y),
    "dataclass": Example(X),
    "encoding": Encoding({"input_ids": Y, "mask": X}, encodings="kept"),
    "output": Output([("x", X), ("y", Y)]),
    "nested": ({"a": [X, (Y,)]}, Example(X), None),
    "names": (X, [f"file{i}" for i in range(6)], torch.tensor(3.0)),
}


def tensors(batch):
    found = []
    map_leaves(batch, lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None)
    return found


@pytest.mark.parametrize("name", BATCHES)
def test_first_samples(name):
    batch = BATCHES[name]
    assert batch_size(batch) == 6
    cut = take_samples(batch, 4)
    assert type(cut) is type(batch)
    assert [t.shape for t in tensors(cut)] == [(4, *t.shape[1:]) if t.ndim else t.shape for t in tensors(batch)]
    for whole, part in zip(tensors(batch), tensors(cut), strict=True):
        assert torch.equal(part, whole[:4] if whole.ndim else whole)
    assert batch_size(batch) == 6
    assert take_samples(batch, 6) is batch


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_first_samples_of_sparse_tensors(layout):
    batch = X.to_sparse(layout=layout), Y
    assert batch_size(batch) == 6
    cut, labels = take_samples(batch, 5, 1)
    assert cut.layout is layout
    assert torch.equal(cut.to_dense(), X[1:5])
    assert torch.equal(labels, Y[1:5])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_first_samples_of_nested_tensors(layout):
    samples = [torch.full((length, 2), float(length)) for length in (1, 3, 2)]
    batch = torch.nested.as_nested_tensor(samples, layout=layout)
    assert batch_size((batch, Y[:3])) == 3
    cut = take_samples(batch, 3, 1)
    assert cut.is_nested
    assert cut.layout is layout
    assert all(torch.equal(a, b) for a, b in zip(cut.unbind(), samples[1:], strict=True))


def test_what_stands_beside_the_tensors_is_kept():
    assert take_samples(BATCHES["encoding"], 2).encodings == "kept"
    assert take_samples(BATCHES["dict"], 2)["scale"] == 2.0
    assert take_samples(BATCHES["dataclass"], 2).name == "n"
    assert take_samples(BATCHES["names"], 2)[1] == ["file0", "file1"]


@pytest.mark.parametrize("batch", [(X, torch.zeros(5)), "text", None, {"a": 1}, torch.tensor(1.0)])
def test_batches_without_a_common_leading_dimension(batch):
    assert batch_size(batch) is None
    with pytest.raises(
        MeasurementError, match=r"max_samples: the batch cannot be cut by samples.*set max_samples=None"
    ):
        take_samples(batch, 2)


def test_the_message_names_the_sizes():
    with pytest.raises(MeasurementError, match=r"batch\['x'\]: 6, batch\['mask'\]: 3"):
        take_samples({"x": X, "mask": torch.ones(3, 3)}, 2)


def test_a_tuple_of_fewer_samples_than_tensors_is_no_list_of_samples():
    batch = X[:2], Y[:2], X[:2, 0]
    assert [len(t) for t in take_samples(batch, 1)] == [1, 1, 1]
    pair = X[:1], X[:1]
    assert take_samples(pair, 4) is pair
    with pytest.raises(MeasurementError, match="a tuple of 2, keeps its samples apart by other means"):
        take_samples(pair, 1)
