"""Image classifiers: splits, noise, label permutations, and the files that they are read from."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_l2l.tasks import ImageClassification
from lightning_l2l.tasks.stacked import StackedTasks

EXAMPLES, SIDE, CLASSES = 60, 6, 5


def arrays(count: int = EXAMPLES) -> tuple[Tensor, Tensor]:
    """The first pixel is the number of the example, so that it can be recognised."""
    images = torch.rand(count, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0] = torch.arange(count)
    return images, torch.arange(count) % CLASSES


def task(**options: Any) -> ImageClassification:
    return ImageClassification(*arrays(), *arrays(10), **options)


def numbers(batch: tuple[Tensor, Tensor]) -> set[int]:
    return set(batch[0].reshape(len(batch[0]), -1)[:, 0].int().tolist())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_the_loss_is_that_of_the_same_network_built_from_modules(network: Any) -> None:
    found = task(network=network, hidden=(4, 3))
    parameters = found.initial_parameters(generator())
    images, labels = found.sample_batch("train", generator())
    values = images
    for index in range(3):
        weight, bias = parameters[f"weight{index}"], parameters[f"bias{index}"]
        if network == "convnet" and index < 2:
            layer: Any = torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride=2, padding=1)
            layer.weight.data, layer.bias.data = weight, bias
        else:
            layer = torch.nn.Linear(*weight.shape)
            layer.weight.data, layer.bias.data = weight.T, bias
            values = values.flatten(1)
        values = torch.relu(layer(values)) if index < 2 else layer(values)
    torch.testing.assert_close(found.loss(parameters, (images, labels)), functional.cross_entropy(values, labels))


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_stacked_losses_are_those_of_the_single_tasks(network: Any) -> None:
    family = task(network=network, hidden=(4,), resample=True, permute_labels=True, train_samples=20, batch_size=7)
    tasks = [family.sample(generator(seed)) for seed in range(3)]
    stack = StackedTasks(tasks)
    parameters = stack.initial_parameters(generator())
    data = stack.batch("train", generator()).data
    for index, single in enumerate(tasks):
        own = {name: tensor[index] for name, tensor in parameters.items()}
        alone = single.loss(own, (data[0][index], data[1][index]))
        torch.testing.assert_close(stack.losses(parameters, data)[index], alone)


def test_splits_do_not_overlap_and_have_the_sizes_asked_for() -> None:
    for single in (task(train_samples=20, val_samples=10), task(train_samples=20, val_samples=10, resample=True)):
        drawn = single.sample(generator(3))
        train, val = numbers(drawn.full_batch("train")), numbers(drawn.full_batch("val"))
        assert (len(train), len(val), len(train & val)) == (20, 10, 0)
        assert numbers(drawn.sample_batch("val", generator())) <= val
        assert len(drawn.full_batch("test")[0]) == 10


def test_tasks_that_are_drawn_differ_only_where_that_was_asked_for() -> None:
    assert numbers(task(train_samples=20).sample(generator(1)).full_batch("train")) == set(range(20))
    resampled = task(train_samples=20, resample=True)
    assert numbers(resampled.sample(generator(1)).full_batch("train")) != numbers(
        resampled.sample(generator(2)).full_batch("train")
    )
    permuted = task(permute_labels=True).sample(generator(1))
    meaning = {}
    for given, label in zip(arrays()[1].tolist(), permuted.full_batch("train")[1].tolist(), strict=True):
        assert meaning.setdefault(given, label) == label
    assert sorted(meaning.values()) == list(range(CLASSES))
    assert meaning != {label: label for label in range(CLASSES)}
    # The same meaning in all splits.
    expected = [meaning[label] for label in arrays(10)[1].tolist()]
    assert permuted.full_batch("test")[1].tolist() == expected


def test_noise_disturbs_that_share_of_the_pool_and_never_the_test_labels_unless_told() -> None:
    images, labels = torch.zeros(5000, 2, 2), torch.arange(5000) % CLASSES
    noisy = ImageClassification(images, labels, images, labels, label_noise=0.2)
    changed = (noisy.full_batch("train")[1] != labels).float().mean().item()
    # 0.2 * 4/5; standard error sqrt(0.2 * 0.8 / 5 * ...) below 0.003
    assert changed == pytest.approx(0.16, abs=0.015)
    assert torch.equal(noisy.full_batch("test")[1], labels)
    also = ImageClassification(images, labels, images, labels, label_noise=0.2, noisy_test=True)
    assert not torch.equal(also.full_batch("test")[1], labels)


def test_a_task_of_the_noises_own_seed_has_its_share_of_noise_and_no_more() -> None:
    images, labels = torch.zeros(5000, 2, 2), torch.arange(5000) % CLASSES
    images[:, 0, 0] = torch.arange(5000)
    for seed in range(5):
        family = ImageClassification(images, labels, label_noise=0.2, train_samples=500, resample=True, seed=seed)
        chosen, noisy = family.sample(generator(seed)).full_batch("train")
        # 0.2 * 4/5; standard error sqrt(0.16 * 0.84 / 500) = 0.016
        assert (noisy != labels[chosen[:, 0].long()]).float().mean().item() == pytest.approx(0.16, abs=0.08), seed


def test_the_reference_initialisation_has_the_papers_standard_deviations() -> None:
    big = ImageClassification(torch.zeros(4, 28, 28), torch.arange(4), hidden=(400, 30), initialisation="reference")
    parameters = big.initial_parameters(generator())
    for name, rows in (("weight0", 784), ("bias0", 400), ("weight1", 400)):
        assert parameters[name].std().item() == pytest.approx(1.2 / rows**0.5, rel=0.15), name


def test_the_digits_are_split_as_asked_for() -> None:
    digits = ImageClassification.digits()
    assert [len(digits.full_batch(split)[0]) for split in ("train", "val", "test")] == [1200, 297, 300]
    assert digits.accuracy(digits.initial_parameters(generator()), digits.full_batch("test")) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_samples": 61}, "the pool has 60"),
        ({"label_noise": 1.5}, "fraction"),
        ({"network": "transformer"}, "must be one of"),
        ({"hidden": (0,)}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_a_split_that_is_empty_is_refused_when_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no 'val' split"):
        task().sample_batch("val")


def idx(array: Tensor) -> bytes:
    return struct.pack(f">4B{array.dim()}I", 0, 0, 8, array.dim(), *array.shape) + bytes(array.flatten().tolist())


def write_mnist(folder: Path, compressed: bool = False, separator: str = "-") -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 4, 5), generator=source)
    labels = torch.arange(30) % 10
    for part, count in (("train", 30), ("t10k", 12)):
        for kind, array in (("images", images[:count]), ("labels", labels[:count])):
            name = f"{part}-{kind}{separator}idx{array.dim()}-ubyte" + (".gz" if compressed else "")
            (folder / name).write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    return images, labels


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_mnist_is_read_from_its_files_plain_or_compressed(tmp_path: Path, compressed: bool, separator: str) -> None:
    images, labels = write_mnist(tmp_path, compressed, separator)
    found = ImageClassification.mnist(tmp_path, train_samples=30, val_samples=0)
    read, meaning = found.full_batch("train")
    torch.testing.assert_close(read, images.reshape(30, -1).float() / 255)
    assert meaning.tolist() == labels.tolist()
    assert len(found.full_batch("test")[0]) == 12


def test_a_missing_mnist_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        ImageClassification.mnist(tmp_path)


@pytest.mark.parametrize("damage", ["short", "long", "html", "empty", "other_type", "not_gzip", "cut_gzip"])
def test_a_damaged_mnist_file_gets_a_clear_error(tmp_path: Path, damage: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    content = path.read_bytes()
    changed = {
        "short": content[:-1], "long": content + b"0", "html": b"<html>", "empty": b"",
        "other_type": b"\0\0\x0d" + content[3:], "not_gzip": content, "cut_gzip": gzip.compress(content)[:-9],
    }[damage]  # fmt: skip
    if damage.endswith("gzip"):
        path.unlink()
        path = path.with_name(path.name + ".gz")
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=path.name):
        ImageClassification.mnist(tmp_path)
