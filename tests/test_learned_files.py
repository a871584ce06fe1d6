"""One safetensors file: what was saved comes back, and everything else is refused in words."""

from __future__ import annotations

import json
import pickle

import pytest
import safetensors
import safetensors.torch
import torch
import torchopt

from lightning_l2l import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LSTMOptimizer,
    MLPOptimizer,
    SmallFCOptimizer,
    TensorwiseOptimizer,
)
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned import register_learned_optimizer
from lightning_l2l.learned.file import checksum
from lightning_l2l.tasks import ImageClassification


def learned_adam():
    learned = LearnedHyperparameters(learn=("learning_rate", "betas"), bounds={"learning_rate": (1e-6, 1.0)})
    return learned.attach(inner_optimizer(torch.optim.Adam, lr=0.01, weight_decay=0.1))


def learned_sgd():
    inner = inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.5, nesterov=True).with_names(["w", "b"])
    return LearnedHyperparameters(learn=("learning_rate", "momentum"), per="tensor").attach(inner)


MAKERS = {
    "mlp": lambda: MLPOptimizer(hidden_size=3, normalise_output=True),
    "small_fc": lambda: SmallFCOptimizer(hidden_size=5, exponent_multiplier=0.0, initialisation="zero_output"),
    "lstm": lambda: LSTMOptimizer(hidden_size=4, preprocessing="raw", initial_output="zero"),
    "adam": learned_adam,
    "sgd": learned_sgd,
    "step_size": lambda: LearnedStepSize(minimum=1e-3).attach(inner_optimizer(torch.optim.SGD, lr=0.1)),
    "unattached": lambda: LearnedStepSize(),
    "double": lambda: SmallFCOptimizer().double(),
}
KINDS = pytest.mark.parametrize("kind", list(MAKERS))


def shaken(kind):
    torch.manual_seed(0)
    learned = MAKERS[kind]()
    learned.set_({name: 0.1 * torch.randn_like(p) for name, p in learned.named_parameters()})
    return learned


def resigned(path, tensors=None, **changes):
    """The file with another header and the checksum that goes with it: what a careful forger would write."""
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = {**opened.metadata(), **changes}
        tensors = tensors or {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    metadata["sha256"] = checksum(metadata, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.safetensors"
    SmallFCOptimizer().save(path)
    return path


@KINDS
def test_everything_comes_back_and_moves_parameters_as_before(kind, tmp_path):
    learned = shaken(kind)
    learned.horizon, learned.tasks = 200, "digits, 64-32-10 Übung"
    path = tmp_path / "learned.safetensors"
    learned.save(path)
    random_numbers = torch.get_rng_state()
    loaded = LearnedOptimizer.load(path)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert type(loaded) is type(learned)
    assert loaded.configuration() == learned.configuration()
    assert (loaded.horizon, loaded.tasks) == (200, "digits, 64-32-10 Übung")
    before, after = dict(learned.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name])
        assert parameter.dtype == before[name].dtype
        assert parameter.requires_grad
        assert not parameter.is_meta
    if kind != "unattached":  # that one sits on no optimizer
        parameters = {"w": torch.randn(3, 2), "b": torch.randn(3)}
        moves = []
        for each in (learned, loaded):
            optimizer = each.transformation()
            moves.append(optimizer.update(parameters, optimizer.init(parameters), params=parameters)[0])
        assert all(torch.equal(moves[0][name], moves[1][name]) for name in parameters)


def test_header_says_what_it_is(saved):
    with safetensors.safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["class"] == "SmallFCOptimizer"
    assert json.loads(metadata["configuration"])["hidden_size"] == 4
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["horizon"]) is None


def test_saving_replaces_the_old_file_or_leaves_it(saved, monkeypatch):
    before = saved.read_bytes()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
        MLPOptimizer().save(saved)
    assert saved.read_bytes() == before
    MLPOptimizer().save(saved)
    assert isinstance(LearnedOptimizer.load(saved), MLPOptimizer)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_loading_as_another_class_is_refused(saved):
    with pytest.raises(ValueError, match="holds a SmallFCOptimizer, not a MLPOptimizer"):
        MLPOptimizer.load(saved)


def test_a_missing_file_is_told_with_what_there_is_instead(saved):
    with pytest.raises(FileNotFoundError, match=f"leanred.safetensors.*{saved.name}"):
        LearnedOptimizer.load(saved.with_name("leanred.safetensors"))
    for path in (saved, saved.parent / "nowhere" / saved.name):
        saved.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError, match=r"no .safetensors file .*learned\.save\(path\)"):
            LearnedOptimizer.load(path)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_file(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match="not a safetensors file, or not all of it"):
        LearnedOptimizer.load(saved)


def test_pickle_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not a safetensors file"):
        LearnedOptimizer.load(path)
    torch.save({"state": Bomb()}, path)
    with pytest.raises(ValueError, match="can run code"):
        LearnedOptimizer.load(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_file(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(safetensors.torch.save({"w": torch.ones(2)}, metadata))
    with pytest.raises(ValueError, match="not a learned optimizer saved by lightning_l2l"):
        LearnedOptimizer.load(path)


def test_a_changed_weight_is_found(saved):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="changed or damaged"):
        LearnedOptimizer.load(saved)


def test_a_changed_header_is_found(saved):
    content = saved.read_bytes()
    assert content.count(b'\\"step_multiplier\\": 0.001') == 1
    saved.write_bytes(content.replace(b'\\"step_multiplier\\": 0.001', b'\\"step_multiplier\\": 9.001'))
    with pytest.raises(ValueError, match="changed or damaged"):
        LearnedOptimizer.load(saved)


def test_a_later_format_is_refused(saved):
    with pytest.raises(ValueError, match="format version 2, written by lightning_l2l 9.9.*Update"):
        LearnedOptimizer.load(resigned(saved, format_version="2", library_version="9.9"))
    with pytest.raises(ValueError, match="no legible format version"):
        LearnedOptimizer.load(resigned(saved, format_version="one"))


def test_an_unknown_class_is_refused_by_name(saved):
    for name in ("Other", "os.system", "Module", "LearnedOptimizer"):
        with pytest.raises(ValueError, match="not known here"):
            LearnedOptimizer.load(resigned(saved, **{"class": name}))


def test_weights_of_the_wrong_shape_are_refused_before_memory_is_taken(saved):
    configuration = SmallFCOptimizer().configuration()
    huge = json.dumps({**configuration, "hidden_size": 10**8})
    with pytest.raises(ValueError, match="does not fit together"):
        LearnedOptimizer.load(resigned(saved, configuration=huge))
    with pytest.raises(ValueError, match="the file has nothing"):
        LearnedOptimizer.load(resigned(saved, {"w": torch.ones(2)}, configuration=json.dumps(configuration)))


@pytest.mark.parametrize(
    "configuration",
    [
        '{"width": 4}',
        "[1, 2]",
        "not json",
        '{"hidden_size": "four"}',
        '{"hidden_size": -1}',
        '{"__class__": 1}',
        "null",
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(saved, configuration):
    with pytest.raises(ValueError, match="configuration"):
        LearnedOptimizer.load(resigned(saved, configuration=configuration))


def test_a_header_without_its_entries_is_refused(saved):
    with safetensors.safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    del metadata["horizon"], metadata["class"], metadata["sha256"]
    metadata["sha256"] = checksum(metadata, tensors)
    saved.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(ValueError, match="lacks"):
        LearnedOptimizer.load(saved)


class Descent(LearnedOptimizer):
    def __init__(self, rate=0.1):
        super().__init__()
        self.rate = rate
        self.log_rate = torch.nn.Parameter(torch.tensor(0.0))

    def configuration(self):
        return {"rate": self.rate}

    def transformation(self):
        return torchopt.sgd(lr=lambda step: self.rate * self.log_rate.exp())


def test_a_class_of_the_users_is_saved_once_registered(tmp_path):
    path = tmp_path / "descent.safetensors"
    with pytest.raises(TypeError, match="not registered"):
        Descent().save(path)
    register_learned_optimizer(Descent)
    Descent(rate=0.5).save(path)
    assert LearnedOptimizer.load(path).rate == 0.5
    with pytest.raises(ValueError, match="is taken"):
        register_learned_optimizer(type("Descent", (LearnedOptimizer,), {"__module__": "elsewhere"}))
    with pytest.raises(TypeError, match="subclass of LearnedOptimizer"):
        register_learned_optimizer(torch.nn.Linear)


def test_a_class_without_a_plain_configuration_says_so(tmp_path):
    @register_learned_optimizer
    class Silent(Descent):
        configuration = LearnedOptimizer.configuration

    @register_learned_optimizer
    class Talkative(Descent):
        def configuration(self):
            return {"rate": torch.ones(1)}

    for cls, message in ((Silent, "define configuration"), (Talkative, "plain data")):
        with pytest.raises(TypeError, match=message):
            cls().save(tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_pretrained_rule_comes_with_the_package():
    learned = LearnedOptimizer.pretrained("tensorwise")
    assert isinstance(learned, TensorwiseOptimizer) and learned.tasks
    assert not torch.equal(learned.exponents, TensorwiseOptimizer().exponents)  # it has been meta-trained
    with pytest.raises(ValueError, match="no pretrained 'tensor-wise'.*tensorwise"):
        LearnedOptimizer.pretrained("tensor-wise")
    with pytest.raises(ValueError, match="holds a TensorwiseOptimizer, not a MLPOptimizer"):
        MLPOptimizer.pretrained("tensorwise")


def test_the_pretrained_rule_trains_at_the_rate_that_it_is_given_without_further_ado():
    digits = ImageClassification.digits()

    def test_loss(make):
        generator = torch.Generator().manual_seed(0)
        parameters = {n: torch.nn.Parameter(p) for n, p in digits.initial_parameters(generator).items()}
        optimizer = make(parameters.values())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
        for _ in range(200):
            optimizer.zero_grad()
            digits.loss(parameters, digits.sample_batch("train", generator)).backward()
            optimizer.step()
            schedule.step()
        return digits.loss(parameters, digits.full_batch("test")).item()

    rule = test_loss(LearnedOptimizer.pretrained("tensorwise").as_torch_optimizer)
    assert rule < 0.7 * test_loss(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
