"""The suite measures what it says, with sides that train what they say."""

from __future__ import annotations

import copy
import json
import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy

from mbkit.benchmark.baselines import BASELINES
from mbkit.benchmark.cases import CASES, NETWORKS, Case
from mbkit.benchmark.suite import SuiteResult, run_suite
from mbkit.benchmark.timing import Elsewhere, Turns
from mbkit.figures import plots
from mbkit.models import GPT, LSTMClassifier, ResNet


@pytest.fixture(scope="module")
def result() -> SuiteResult:
    cases = [Case("MLP", 2, 8), Case("MLP", 3, 32), Case("MLP", 16, 32), Case("LSTM", 8, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbkit.benchmark.suite.SECONDS", 0.02)
        for side in ("sequential", "naive vmap"):
            patch.setitem(
                BASELINES, side, None
            )  # here, where mbkit has set the process up: they are measured elsewhere
        return run_suite(cases, sides=["sequential", "mbkit", "naive vmap"], progress=False)


def test_a_side_that_cannot_train_a_network_has_a_dash(result):
    assert sorted(result.rows[-1]["seconds"]) == ["mbkit", "sequential"]  # vmap has no rule for an LSTM
    assert result.table()[-1][5] == "-"


def test_ratios_are_those_of_medians_a_model_and_step(result):
    row = result.rows[1]
    medians = {side: statistics.median(times) for side, times in row["seconds"].items()}
    assert result.ratio(row, "mbkit") == pytest.approx(medians["sequential"] / medians["mbkit"], rel=1e-9)
    assert row["how"]
    assert all(t > 0 for times in row["seconds"].values() for t in times)


def test_it_is_saved_and_loaded_and_drawn(result, tmp_path):
    result.save(tmp_path / "new" / "suite.json")
    json.loads((tmp_path / "new" / "suite.json").read_text())
    loaded = SuiteResult.load(tmp_path / "new" / "suite.json")
    assert str(loaded) == str(result)
    picture = plots.scaling(result.growth())
    assert [axes.get_xlabel() for axes in picture.axes] == ["models M, MLP, B = 32", "parameters, M = 8 or 16, B = 32"]


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="Expected sides out of sequential"):
        run_suite(CASES[:1], sides=["tortoise"])


def test_the_end_of_that_process_is_told():
    with Elsewhere() as away:
        away._process.kill()
        away._process.wait()
        with pytest.raises(RuntimeError, match=r"process that measures other libraries ended \(-9\)"):
            away.turn("sequential")


@pytest.mark.parametrize("cls", [ResNet, GPT, LSTMClassifier])
def test_networks_learn_one_batch(cls):
    torch.manual_seed(0)
    case = Case({GPT: "GPT", ResNet: "ResNet", LSTMClassifier: "LSTM"}[cls], 1, 8)
    (x, y), (model,) = case.data(), case.models()
    assert isinstance(model, cls)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


SIDES = [(name, network) for name in BASELINES for network in ("MLP", "LeNet5")]
SLOW = {("mbkit compiled", "LeNet5"): pytest.mark.slow}  # half a minute of compilation


@pytest.mark.parametrize(("name", "network"), [pytest.param(*side, marks=SLOW.get(side, ())) for side in SIDES])
def test_every_side_trains_the_models_that_it_is_given(name, network):
    """After three steps of Adam at one rate each side's parameters are those of plain PyTorch."""
    pytest.importorskip({"modelbatch": "modelbatch", "JAX jit(vmap)": "jax"}.get(name, "torch"))
    case = Case(network, 2, 8)
    (x, y), models = case.data(), case.models()
    lones = copy.deepcopy(models)
    starts = [{name: p.detach().clone() for name, p in lone.named_parameters()} for lone in lones]
    side = BASELINES[name](models, torch.optim.Adam, [{"lr": 0.01}] * 2, [0, 1])
    assert side.num_models == 2
    side.run([(x, y)] * 3)
    assert side.seconds().shape in ((3, 1), (3, 2))
    for m, lone in enumerate(lones):
        optimizer = torch.optim.Adam(lone.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(lone(x), y).backward()
            optimizer.step()
        for parameter, value in lone.named_parameters():
            moved = (value.detach() - starts[m][parameter]).norm()
            # In float32, where Adam divides gradients by their own size: nearly zero ones are all rounding.
            assert (side.read(m, parameter) - value.detach()).norm() < 0.01 * moved


def test_every_network_trains_with_every_side_or_has_a_dash():
    """What a side cannot train is None or an error at its first step, and never a wrong row in the table."""
    for network in NETWORKS:
        case = Case(network, 2, 4)
        turns = Turns(case, ["sequential", "modelbatch", "naive vmap"], seconds=0.0)
        assert turns.counts["sequential"] == 1
        assert len(turns.turn("sequential")) == 1
        assert turns.parameters == sum(p.numel() for p in case.models()[0].parameters())
        assert ("naive vmap" in turns.counts) == (network in ("MLP", "LeNet5", "GPT"))
