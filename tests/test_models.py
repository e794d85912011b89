"""The lessons' networks against the same networks written out with torch.nn alone."""

import pytest
import torch
from torch import nn

from mbkit.models import MLP, LeNet5, TinyMLP


def plain_tiny_mlp() -> nn.Module:
    """Return the demo's network as its recipe says: built, then weights drawn and biases zeroed in order."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, mean=0.0, std=0.01)
        nn.init.zeros_(layer.bias)
    return model


def test_tiny_mlp_takes_the_demos_share_of_random_numbers():
    torch.manual_seed(7)
    expected = [*(p.detach() for _ in range(2) for p in plain_tiny_mlp().parameters()), torch.rand(3)]
    torch.manual_seed(7)
    got = [*(p.detach() for _ in range(2) for p in TinyMLP().parameters()), torch.rand(3)]
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_mlp_is_linear_relu_dropout(rate):
    model = MLP([6, 5, 4, 3], dropout=rate)
    plain = nn.Sequential()
    for layer in model.layers[:-1]:
        plain.extend([layer, nn.ReLU(), nn.Dropout(rate)])
    plain.append(model.layers[-1])
    x = torch.randn(9, 6)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert model(x).equal(expected)
    assert model.eval()(x).equal(plain.eval()(x))
    with pytest.raises(ValueError, match=r"output size, got \[6\]"):
        MLP([6])
    with pytest.raises(ValueError, match="dropout probability"):
        MLP([6, 3], dropout=1.5)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_lenet_is_the_network_of_its_docstring(rate):
    torch.manual_seed(0)
    model = LeNet5(num_classes=7, dropout=rate)
    layers = [model.conv1, model.conv2, model.fc1, model.fc2, model.fc3]
    convolutions = [nn.ReLU(), nn.MaxPool2d(2)]
    plain = nn.Sequential(
        layers[0], *convolutions, layers[1], *convolutions, nn.Flatten(), layers[2], nn.ReLU(), nn.Dropout(rate)
    ).extend([layers[3], nn.ReLU(), nn.Dropout(rate), layers[4]])
    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert model(x).equal(expected)
    assert model.eval()(x).equal(plain.eval()(x))
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [
        (6, 3, 5, 5),
        (16, 6, 5, 5),
        (120, 400),
        (84, 120),
        (7, 84),
    ]
    assert list(LeNet5(dropout=0.5).state_dict()) == list(LeNet5().state_dict())


def test_at_rate_0_nothing_is_drawn():
    model, x = LeNet5(), torch.randn(2, 3, 32, 32)
    before = torch.get_rng_state()
    model(x)
    assert torch.get_rng_state().equal(before)
