"""Oracles for the suite: python -m pytest test_all.py, within three minutes on two cores."""
import ast
import contextlib
import gc
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
import zipfile
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb

import common
import double_descent
import emergence
import grok
from common import Dataset, Run, Transformer

signal.signal(signal.SIGINT, signal.default_int_handler)      # begun in the background, a process ignores it
torch.set_num_threads(1)        # as in the scripts; two that wait for each other take for ever on a busy machine
HERE = Path(__file__).parent
SCRIPTS = ["common.py", "grok.py", "double_descent.py", "emergence.py"]
FORKS = pytest.mark.skipif(common.start_method() != "fork", reason="patches what another process inherits")
AT_P_11 = ["--device", "cpu", "--threads", 1, "--p", 11]
TINY = [*AT_P_11, "--steps", 30, "--hidden", 4, 8, 8, 16, "--data", 60, 40, 50, 50]


def runs_of(count=3, **settings):
    """Runs with seeds 0, 1, ..."""
    usual = dict(task="addition", p=11, hidden=8, data=50, steps=60, lr=1e-2, weight_decay=1.0)
    return [Run(**{**usual, "seed": seed, **settings}) for seed in range(count)]


def python(*words, **options):
    """Run the interpreter with these words behind it, in a process of its own that sees no GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=HERE, env=environment,
                          **options)


def command(*arguments, script="grok.py"):
    """Run a script as a user does."""
    return python(HERE / script, *arguments)


def here(*arguments, script=grok):
    """The same in this process, without the time to import torch; to an output that knows ASCII only, as in some systems."""
    out, err, status = io.TextIOWrapper(io.BytesIO(), "ascii"), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        patch.chdir(HERE)
        try:
            script.main()
        except SystemExit as end:
            status = end.code
    out.seek(0)
    return subprocess.CompletedProcess(arguments, status, out.read(), err.getvalue())


def one_clear_line(done, *named):
    """The command ended with status 2 and one line, which names what is wrong."""
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(name in done.stderr for name in named), done.stderr


def by_claim(claims):
    """{claim: verdict}."""
    return {c["claim"]: c["holds"] for c in claims}


# tasks


def test_labels_and_tokens():
    addition, squared, noise = (common.answers(run).view(7, 7) for run in
                                (Run(task, 7, 4, 9, 0, 1, 1e-3, 0) for task in ("addition", "squared_addition", "random")))
    assert all(addition[a, b] == (a + b) % 7 and squared[a, b] == (a + b) ** 2 % 7 for a in range(7) for b in range(7))
    assert (noise == noise.T).all() and len(noise.unique()) > 3
    run = Run("addition", 7, 4, 9, 0, 1, 1e-3, 0, memorize=5)
    tokens, labels = common.training_set(run)
    assert tokens.shape == (14, 4) and len({tuple(t) for t in tokens.tolist()}) == 14
    assert (tokens[:9, 1] == 8).all() and (tokens[9:, 1] == 9).all() and (tokens[:, 3] == 7).all()
    assert (labels[:9] == (tokens[:9, 0] + tokens[:9, 2]) % 7).all()
    drawn = ([[5, 5], [1, 2], [4, 3], [5, 1], [2, 0]], [1, 2, 4, 3, 3])      # as when the results in figures/ were made
    assert (tokens[9:, [0, 2]].tolist(), labels[9:].tolist()) == drawn
    (again, same), (_, other) = common.training_set(run), common.training_set(replace(run, seed=1))
    assert (tokens == again).all() and (labels == same).all() and (labels[9:] != other[9:]).any()


def test_split_is_disjoint_nested_and_the_seeds_own():
    small, large = common.train_pairs(runs_of(1)[0]), common.train_pairs(runs_of(1, data=80)[0])
    assert (small == large[:50]).all() and len(large.unique()) == 80
    data = Dataset(runs_of(3), "cpu")
    assert (data.train.sum(1) == 50).all() and not (data.train & data.val).any() and (data.train | data.val).all()
    assert (data.train[0] != data.train[1]).any() and (data.train[1] != data.train[2]).any()
    pairs = data.inputs.tokens[..., 0] * 11 + data.inputs.tokens[..., 1]
    assert data.train.gather(1, pairs).all() and not data.val.gather(1, pairs).any()
    mirror = pairs // 11 + pairs % 11 * 11
    assert not data.unmirrored.gather(1, mirror).any() and not data.unmirrored.gather(1, pairs).any()
    assert all((common.train_pairs(run) == pairs[i].cpu()).all() for i, run in enumerate(runs_of(3)))


def test_random_labels_are_of_all_p_values_alike():
    run = Run("random", 23, 4, 529, 0, 1, 1e-3, 0, memorize=500)
    for labels in (common.answers(run), common.training_set(run)[1][529:]):
        counts = torch.bincount(labels)
        assert len(counts) == 23 and counts.min() > 5 and counts.max() < 60      # about 22 of each


def test_no_validation_pair_of_a_run_that_goes_on_with_less_was_ever_trained_on_nor_its_mirror():
    run, = runs_of(1, data=40, first_data=70)
    data = Dataset([run], "cpu")
    ever = {divmod(pair, 11) for pair in common.train_pairs(replace(run, data=70)).tolist()}
    pairs = [(a, b) for a in range(11) for b in range(11)]
    assert data.train.sum() == 40 and data.val[0].tolist() == [pair not in ever for pair in pairs]
    assert data.unmirrored[0].tolist() == [not {(a, b), (b, a)} & ever for a, b in pairs]


# model


class Textbook(torch.nn.Module):
    """One model written the plain way, with PyTorch's own attention: the oracle of the population."""

    def __init__(self, population, i):
        super().__init__()
        self.weights = {name: w.detach()[i].clone().requires_grad_() for name, w in population.named_parameters()}
        self.heads, self.layers = population.blocks[0].heads, len(population.blocks)
        self.rms = population.blocks[0].normalization == "rms"

    def normalized(self, x):
        """What a layer reads of x (..., d)."""
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() if self.rms else x

    def forward(self, tokens):
        """Logits (N, p)."""
        w = self.weights
        x = w["embed"][tokens] + w["position"]
        for layer in range(self.layers):
            b = {name.split(".")[2]: v for name, v in w.items() if name.startswith(f"blocks.{layer}.")}
            projections = torch.cat([b["query"].T, b["key"].T, b["value"].T])
            mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1)
            read = F.multi_head_attention_forward(
                *[self.normalized(x).transpose(0, 1)] * 3, x.shape[-1], self.heads, projections, None, None, None, False, 0.0,
                b["output"].T, None, attn_mask=mask, need_weights=False)[0]
            x = x + read.transpose(0, 1)
            x = x + F.relu(self.normalized(x) @ b["mlp_in"] + b["mlp_in_bias"]) @ b["mlp_out"] + b["mlp_out_bias"]
        return self.normalized(x[:, -1]) @ w["unembed"]


@pytest.mark.parametrize("settings", [
    {}, {"layers": 3}, {"memorize": 20, "hidden": 12}, {"layers": 2, "operator": True, "heads": 2},
    {"layers": 2, "memorize": 20}, {"normalization": "rms"}, {"layers": 2, "memorize": 20, "normalization": "rms"}])
@pytest.mark.parametrize("longest", [None, 1, 3])
def test_population_equals_textbook_in_float64(settings, longest):
    runs = runs_of(3, **settings)
    data, model = Dataset(runs, "cpu"), Transformer(runs).double()
    data.inputs = common.Inputs(data.inputs.tokens, runs[0], longest)
    logits = model(data.inputs)
    common.training_loss(logits, data.labels, "float32").backward()
    for i, run in enumerate(runs):
        assert sum(w[i].numel() for w in model.parameters()) == common.parameters(run)
        alone = Textbook(model, i)
        expected = alone(data.inputs.tokens[i])
        F.cross_entropy(expected, data.labels[i]).backward()
        torch.testing.assert_close(logits[i], expected, rtol=1e-10, atol=1e-12)
        for name, w in model.named_parameters():
            torch.testing.assert_close(w.grad[i], alone.weights[name].grad, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(model(data.inputs, textbook=True), logits, rtol=1e-10, atol=1e-12)


@pytest.fixture
def one_dnn(monkeypatch):
    """oneDNN makes all feed-forward layers that it can, whatever the CPU; the list tells of which shapes."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch without oneDNN")
    made, apply = [], common.FeedForward.apply
    for name, value in (("works", True), ("least", 0), ("apply", lambda x, *rest: made.append(x.shape) or apply(x, *rest))):
        monkeypatch.setattr(common.FeedForward, name, value)
    return made


@pytest.mark.parametrize("more", [{}, {"split": True, "memorize": 20}])
@pytest.mark.parametrize("r, n", [(1, 7), (3, 7), (2, 1)])
def test_a_feed_forward_layer_by_one_dnn_equals_that_in_float64(r, n, more, one_dnn):
    runs = runs_of(r, **more)
    block, exact = Transformer(runs).blocks[0], Transformer(runs).double().blocks[0]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, true in zip(block.parameters(), exact.parameters()):
            true.copy_(mine.add_(torch.randn(mine.shape, generator=draw) / 8))      # biases begin at 0
    x, given = torch.randn(2, r, n, runs[0].hidden, generator=draw)
    serves = F.one_hot(torch.arange(n) % 2).float().expand(r, n, 2) if more else None
    leaves, exact_leaves = ([each.requires_grad_(), *(getattr(layer, name) for name in
                                                      ("mlp_in", "mlp_in_bias", "mlp_out", "mlp_out_bias"))]
                            for each, layer in ((x.clone(), block), (x.double(), exact)))
    expected = exact.feed_forward(exact_leaves[0], serves)
    assert not one_dnn      # in float64
    for gradient in (given, given.mT.contiguous().mT, given[:1, :1, :1].expand(r, n, runs[0].hidden)):
        found = block.feed_forward(leaves[0], serves)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for mine, true in zip(torch.autograd.grad(found, leaves, gradient),
                              torch.autograd.grad(expected, exact_leaves, gradient.double(), retain_graph=True)):
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)
    assert len(one_dnn) == 3


def test_one_dnn_hides_no_nan(one_dnn):
    runs = runs_of(2)
    data, model = Dataset(runs, "cpu"), Transformer(runs)
    with torch.no_grad():
        model.blocks[0].mlp_in[0] = math.nan
        logits = model(data.inputs)
    assert one_dnn and logits[0].isnan().all() and logits[1].isfinite().all()


def test_where_one_dnn_does_not_pay(one_dnn, monkeypatch):
    x, weight = torch.randn(2, 6, 3), torch.randn(2, 3, 4)
    pays = common.FeedForward.pays
    assert pays(x, weight) and not pays(x.double(), weight.double()) and not pays(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(x, weight)
    for name, value, expected in (("least", 73, False), ("least", 72, True), ("works", False, False)):
        monkeypatch.setattr(common.FeedForward, name, value)
        assert pays(x, weight) == expected


def test_attention_by_table_survives_scores_far_apart():
    """Scores 60 apart in a head, as seen in training, once overflowed in the backward pass."""
    runs = runs_of(2)
    data, model = Dataset(runs, "cpu"), Transformer(runs)
    with torch.no_grad():
        model.blocks[0].query.mul_(12)
        model.blocks[0].key.mul_(12)
    gradients = []
    for textbook in (False, True):
        loss = common.training_loss(model(data.inputs, textbook=textbook), data.labels, "float32")
        gradients.append(torch.autograd.grad(loss, model.embed)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_attention_by_table_overflows_nowhere():
    """Scores 400 apart in a head, which a learning rate too high makes, once turned all of a run into NaN."""
    runs = runs_of(2)
    data, model = Dataset(runs, "cpu"), Transformer(runs)
    block = model.blocks[0]
    with torch.no_grad():
        block.query.mul_(30)
        block.key.mul_(30)
        places = (model.embed[:, :, None] + model.position[:, None]) @ block.key[:, None]             # (R, vocabulary, T, d)
        query = (model.embed[:, 11] + model.position[:, -1])[:, None] @ block.query
        scores = (places * query[:, None]).unflatten(-1, (4, -1)).sum(-1) / math.sqrt(2)              # (R, vocabulary, T, heads)
        scores = torch.cat([scores[:, :, :2].flatten(1, 2), scores[:, 11, None, 2]], 1)      # of token 0 at 0, 1; ...; '='
    spread = scores.amax(1) - scores.amin(1)
    assert spread.max() > 400
    index = 2 * data.inputs.tokens[..., :2] + torch.arange(2)                                         # (R, N, 2)
    own = torch.stack([scores[r][index[r]].amax(1) for r in range(2)]).maximum(scores[:, -1:])        # (R, N, heads)
    exact = (own > scores.amax(1, keepdim=True) - 140).all(-1)
    assert 0 < exact.sum() < exact.numel()
    logits = model(data.inputs)
    torch.testing.assert_close(logits[exact], model(data.inputs, textbook=True)[exact], rtol=1e-3, atol=1e-4)
    common.training_loss(logits, data.labels, "float32").backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("layers", [1, 2])
def test_no_gradient_of_a_task_reaches_the_other_half_of_a_split_layer(layers):
    runs = runs_of(2, memorize=30, split=True, layers=layers)
    data, model = Dataset(runs, "cpu"), Transformer(runs).double()
    outputs = model(data.inputs), model(data.inputs, textbook=True)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for task, other in ((slice(50), slice(16, None)), (slice(50, None), slice(16))):
        losses = [F.cross_entropy(logits[:, task].flatten(0, 1), data.labels[:, task].flatten()) for logits in outputs]
        gradients = [torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)
        for block in model.blocks:
            of = {id(w): gradient for w, gradient in zip(model.parameters(), gradients[0])}
            for units in (of[id(block.mlp_out)], of[id(block.mlp_in)].mT, of[id(block.mlp_in_bias)][..., None]):
                assert (units[:, other] == 0).all() and units.abs().sum() > 0


@pytest.mark.parametrize("data, rounds", [(40, 1), (140, 2)])      # examples that read the row of the operator
def test_long_sums_are_made_in_two_rounds(data, rounds):
    run, = runs_of(1, p=13, data=data, operator=True)
    inverse = common.Inputs(Dataset([run], "cpu").inputs.tokens, run, 128).inverse
    assert len(inverse) == 2 * rounds
    for members, first in zip(inverse[::2], inverse[1::2]):
        assert torch.diff(first, append=torch.tensor([len(members)])).max() <= 128


@pytest.mark.parametrize("more", [{}, {"memorize": 20, "split": True}, {"layers": 2, "memorize": 20, "split": True},
                                  {"task": "squared_addition", "loss": "exact", "normalization": "rms"}])
def test_all_stays_on_its_device(more, monkeypatch):
    """The device "meta" has no values, and mostly refuses, as CUDA does, tensors of the CPU.

    Two rounds of sums, only made on CUDA, depend on values and are left out.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())      # which does not know "meta"
    runs = runs_of(2, **more)
    data, model = Dataset(runs, "meta"), Transformer(runs).to("meta")
    common.training_step(model, torch.optim.AdamW(model.parameters()), data, False)()
    found = [weight.grad for weight in model.parameters()] + [*common.evaluate(model, data).values()]
    for inputs in (data.inputs, data.all_pairs):
        found += [tensor for each in vars(inputs).values() for tensor in (each if isinstance(each, tuple) else [each])]
    assert {tensor.device.type for tensor in found if tensor is not None} == {"meta"}


def test_every_seed_has_its_own_weights_and_random_labels():
    model = Transformer(runs_of(3))
    drawn = [w for w in model.parameters() if w.any()]      # biases begin at 0
    assert drawn and all((w[i] != w[i - 1]).any() for w in drawn for i in range(3))
    tables = [common.answers(run) for run in runs_of(3, task="random")]
    assert all((tables[i] != tables[i - 1]).any() for i in range(3))


# training


def test_loss_starts_at_ln_p():
    runs = runs_of(4, p=113, hidden=32, data=3000)
    measures = common.evaluate(Transformer(runs), Dataset(runs, "cpu"))
    assert (measures["train_loss"] - math.log(113)).abs().max() < 0.5


def test_loss_trained_on_and_its_gradient_equal_pytorchs():
    logits, labels = torch.randn(3, 20, 11, dtype=torch.double, requires_grad=True), torch.randint(11, (3, 20))
    losses = [common.training_loss(logits, labels, kind) for kind in ("float32", "exact")]
    losses.append(sum(F.cross_entropy(one, label) for one, label in zip(logits, labels)))
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    for loss, gradient in zip(losses[:2], gradients):
        torch.testing.assert_close(loss, losses[2], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, gradients[2], rtol=1e-10, atol=1e-12)


def test_loss_is_accurate_where_float32_rounds_it_to_zero():
    logits = torch.tensor([[0.0, 23.1, -1.0, 0.5], [0.0, 45.0, 1.0, 2.0], [3.0, 1.0, 2.0, 0.0]])
    labels = torch.ones(3, dtype=torch.long)
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    assert exact[0] < 1e-9 and F.cross_entropy(logits, labels, reduction="none")[1] == 0
    exact[1] = (logits[1].double()[[0, 2, 3]] - 45).exp().sum().log1p()
    torch.testing.assert_close(common.exact_cross_entropy(logits, labels).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("more", [{"layers": 2, "memorize": 20, "split": True}, {"loss": "exact"}])
def test_a_compiled_step_equals_the_plain_one(more, one_dnn, monkeypatch):
    """Traced as torch.compile does it, without the C++ compiler that not every machine has; and without oneDNN."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    def trained(compiled):
        runs = runs_of(2, **more)
        model = Transformer(runs)
        step = common.training_step(model, torch.optim.SGD(model.parameters(), 0.1), Dataset(runs, "cpu"), compiled)
        for _ in range(3):
            step()
        return torch.cat([w.detach().flatten() for w in model.parameters()])
    compiled = trained(True)
    assert not one_dnn
    torch.testing.assert_close(compiled, trained(False), rtol=1e-5, atol=1e-6)
    assert one_dnn


def test_a_run_is_evaluated_every_hundredth_of_its_steps_and_its_first_ones_more_often():
    steps = common.evaluation_steps(10_000)
    assert steps[:6] == [0, 1, 2, 3, 4, 5] and {2500, 5000, 10_000} <= set(steps) and max(np.diff(steps)) <= 100


def test_the_settings_of_a_run_reach_its_training(monkeypatch):
    run = replace(grok.PRESETS["quick"], p=11, steps=12, loss="exact", eps=1e-6, precision="bfloat16").run("addition", 8, 50, 0)
    assert run.precision == "bfloat16"
    made, kinds, real, loss = [], set(), torch.optim.AdamW.step, common.training_loss

    def step(self, *rest):
        made.append({name: self.param_groups[0][name] for name in ("lr", "eps", "betas", "weight_decay")})
        return real(self, *rest)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(common, "training_loss", lambda *rest: kinds.add(rest[2]) or loss(*rest))
    common.train([run], "cpu")
    rates = [run.lr * min(1, now / common.WARMUP) for now in range(1, 13)]
    assert kinds == {"exact"}
    assert made == [{"lr": pytest.approx(rate), "eps": 1e-6, "betas": (0.9, 0.98), "weight_decay": 1.0} for rate in rates]


def test_tf32_is_of_the_step_and_not_of_the_evaluation():
    runs = runs_of(1, precision="tf32")
    model, data = Transformer(runs), Dataset(runs, "cpu")
    common.training_step(model, torch.optim.SGD(model.parameters()), data, False)()
    assert torch.get_float32_matmul_precision() == "high"
    common.evaluate(model, data)
    assert torch.get_float32_matmul_precision() == "highest"


def test_bfloat16_only_when_asked_and_close_and_not_in_the_loss(monkeypatch):
    def loss(logits, *rest, real=common.training_loss):
        assert logits.dtype == torch.float32
        return real(logits, *rest)
    monkeypatch.setattr(common, "training_loss", loss)
    assert Run("addition", 11, 8, 50, 0, 1, 1e-2, 1.0).precision == "float32"
    losses = {}
    for precision in ("float32", "bfloat16"):
        runs = runs_of(2, steps=30, layers=2, memorize=20, precision=precision)
        losses[precision] = common.train(runs, "cpu")["train_loss"]
    assert 0 < (losses["float32"] - losses["bfloat16"]).abs().max() < 0.3


def test_a_run_goes_on_with_less_data_after_half_of_its_steps():
    less, more = (common.train(runs_of(2, steps=40, **data), "cpu") for data in ({"data": 40, "first_data": 70}, {"data": 70}))
    shared = less["step"][0] <= 20
    assert all((less[name][:, shared] == more[name][:, shared]).all() for name in ("train_loss", "val_loss", "norm"))
    assert less["step"][0, ~shared][0] == 21 and (less["norm"] != more["norm"])[:, ~shared].all()


@pytest.mark.parametrize("stopped", [10, 30])      # before it goes on with less data, and after
def test_a_stopped_run_goes_on_to_the_same_numbers(stopped, tmp_path, monkeypatch):
    runs = runs_of(2, data=40, first_data=70, steps=40)
    whole = common.train(runs, "cpu")
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", 0)

    def stop(runs, step, *accuracies):
        if step == stopped:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.train(runs, "cpu", checkpoint=tmp_path / "state.pt", tick=stop)
    steps = []
    resumed = common.train(runs, "cpu", checkpoint=tmp_path / "state.pt", tick=lambda runs, step, *accuracies: steps.append(step))
    assert steps[0] >= stopped      # it went on, and did not begin again
    assert all(torch.equal(resumed[name].nan_to_num(), whole[name].nan_to_num()) for name in whole)


def test_a_graph_is_captured_at_the_full_learning_rate(monkeypatch):
    """A CUDA graph repeats the rate that it was captured with."""
    rates, gpu = [], type("GPU", (str,), {"startswith": lambda self, start: True})("cpu")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(common, "capture", mock.Mock(
        works=True, side_effect=lambda step, optimizer: rates.append(optimizer.param_groups[0]["lr"]) or step))
    common.train(runs_of(1, steps=40, first_data=60), gpu)
    assert rates == [1e-2, 1e-2]      # once for each half


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [{}, {"p": 13, "data": 140, "memorize": 20}, {"layers": 2, "memorize": 20, "split": True}])
def test_a_gpu_gives_what_the_cpu_gives(more, capsys):
    common.set_up(SimpleNamespace(device="cuda", threads=1))
    try:
        cpu, gpu = (common.train(runs_of(3, steps=20, **more), device) for device in ("cpu", "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "no CUDA graph" not in capsys.readouterr().err
    for name in ("train_loss", "val_loss", "norm", "circuit_share"):
        torch.testing.assert_close(gpu[name], cpu[name], rtol=1e-2, atol=1e-3)


@pytest.fixture
def no_gpu(monkeypatch):
    """What capture needs of CUDA, without one: a graph that records nothing."""
    graph = type("Graph", (), {"replay": lambda self: None})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())


def step_of(runs):
    """A training step of a population, its optimizer, and a weak reference to its data."""
    data, model = Dataset(runs, "cpu"), Transformer(runs)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return common.training_step(model, optimizer, data, False), optimizer, weakref.ref(data)


def test_a_captured_step_keeps_what_its_graph_reads(no_gpu):
    """A CUDA graph holds addresses, not tensors: freed, they would be read all the same."""
    step, optimizer, data = step_of(runs_of(1))
    replay = common.capture(step, optimizer)
    del step, optimizer
    gc.collect()
    replay()
    assert data() is not None
    del replay
    gc.collect()
    assert data() is None


OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError("too much"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                 RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"),
                 RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED"))


def test_a_step_that_cannot_be_captured_is_taken_as_it_is(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(common.capture, "works", True)      # put back afterwards
    _, optimizer, _ = step_of(runs_of(1))

    def fails(error):
        raise error
    step = partial(fails, RuntimeError("operation not permitted when stream is capturing"))
    assert common.capture(step, optimizer) is step and "no CUDA graph" in capsys.readouterr().err
    assert not common.capture.works

    @contextlib.contextmanager
    def leaving_fails(_):
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated")
    for way in (torch.cuda.graph, leaving_fails):
        monkeypatch.setattr(torch.cuda, "graph", way)
        for error in OUT_OF_MEMORY:      # which is for the sweep to mend
            with pytest.raises(type(error), match=str(error)):
                common.capture(partial(fails, error), optimizer)


def test_a_diverging_run_spoils_no_other(monkeypatch):
    def broken(runs, real=Transformer):
        model = real(runs)
        with torch.no_grad():
            model.embed[1] = math.inf
        return model
    clean = common.train(runs_of(3), "cpu")
    monkeypatch.setattr(common, "Transformer", broken)
    history = common.train(runs_of(3), "cpu")
    lines = [common.row(run, {k: v[i].numpy() for k, v in history.items()}) for i, run in enumerate(runs_of(3))]
    assert [line["dynamic"] == "diverged" for line in lines] == [False, True, False]
    assert (history["train_acc"][[0, 2]] == clean["train_acc"][[0, 2]]).all()
    assert lines[1]["val_acc"] != lines[1]["val_acc"] and lines[1]["memory_acc"] != lines[1]["memory_acc"]


def test_a_compiler_that_is_missing_is_named(tmp_path, monkeypatch):
    error = torch._dynamo.exc.TorchDynamoException("no C++ compiler\nmore")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: mock.Mock(side_effect=error))
    one_clear_line(here(*TINY, "--compile", "--out", tmp_path), "--compile", "no C++ compiler")
    error.args = "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory",
    one_clear_line(here(*TINY, "--compile", "--out", tmp_path / "none"), "too little memory for one run")


def test_a_compiler_that_fails_while_a_graph_is_captured_leaves_that_to_the_capture(monkeypatch):
    error = torch._dynamo.exc.TorchDynamoException("not while capturing")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: mock.Mock(side_effect=error))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(run=runs_of(1)[0], labels=SimpleNamespace(is_cuda=True))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        common.training_step(None, mock.Mock(), on_gpu, True)()


def test_a_deep_model_learns():
    history = common.train([Run("addition", 7, 16, 20, 0, 60, 1e-2, 1.0, layers=6, memorize=10)], "cpu")
    assert history["train_loss"].max() < 4 and history["train_acc"][0, -1] > 0.9 and history["memorize_acc"][0, -1] > 0.9


# measures: accuracies, the circuits, and the rule on the dynamics


def test_measures_are_of_the_pairs_that_they_name():
    runs = runs_of(3, p=7, data=20)
    model = Transformer(runs)
    measures = common.evaluate(model, Dataset(runs, "cpu"))
    for i, run in enumerate(runs):
        trained = [divmod(pair, 7) for pair in common.train_pairs(run).tolist()]
        pairs = [(a, b) for a in range(7) for b in range(7)]
        with torch.no_grad():
            logits = Textbook(model, i)(torch.tensor([(a, b, 7) for a, b in pairs])).tolist()
        hit = {(a, b): float(np.argmax(found) == (a + b) % 7) for (a, b), found in zip(pairs, logits)}
        loss = {(a, b): math.log(sum(map(math.exp, found))) - found[(a + b) % 7] for (a, b), found in zip(pairs, logits)}
        others = [pair for pair in pairs if pair not in trained]
        unmirrored = [(a, b) for a, b in others if (b, a) not in trained]
        expected = {"train_acc": (hit, trained), "val_acc": (hit, others), "val_acc_unmirrored": (hit, unmirrored),
                    "train_loss": (loss, trained), "val_loss": (loss, others)}
        for name, (values, group) in expected.items():
            assert measures[name][i].item() == pytest.approx(np.mean([values[pair] for pair in group]), abs=1e-5)


def test_norm_and_accuracy_on_the_memorization():
    runs = runs_of(2, memorize=20)
    model, data = Transformer(runs), Dataset(runs, "cpu")
    with torch.no_grad():
        measures, hit = common.evaluate(model, data), (model(data.inputs).argmax(-1) == data.labels).float()
        weights = torch.cat([w.flatten(1) for w in model.parameters()], 1)
    torch.testing.assert_close(measures["memorize_acc"], hit[:, runs[0].data:].mean(1))
    torch.testing.assert_close(measures["norm"], weights.norm(dim=1))


def test_circuits_of_known_mixtures():
    """Of a perfect circuit and a table of random labels, in a proportion of variance of each run's own."""
    p, shares = 47, (0.3, 1.0, 0.0)
    share = torch.tensor(shares)[:, None, None]
    data = Dataset(runs_of(3, p=p, hidden=4, data=p * p // 3), "cpu")
    draw = torch.Generator().manual_seed(0)
    perfect = F.one_hot(data.answers, p) + 1e-4 * torch.randn(3, p * p, p, generator=draw)
    noise = F.one_hot(torch.randint(p, (3, p * p), generator=draw), p).float()
    measures = common.circuits(share**0.5 * perfect + (1 - share) ** 0.5 * noise, data)
    for i, known in enumerate(shares):
        found = {name: values[i].item() for name, values in measures.items()}
        assert found["circuit_share"] == pytest.approx(known, abs=0.01)
        assert known == 0 or found["circuit_margin"] == pytest.approx(known**0.5, abs=0.15)
        assert known < 1 or found["memory_acc"] < 0.1
        spread = ((1 - known) * (1 - 1 / p) / p) ** 0.5      # of a table of p - 1 zeros and a one in each row
        assert found["circuit_spread"] == pytest.approx(spread, rel=0.05, abs=1e-3)


def test_relabelled_numbers_hide_no_circuit_and_make_none():
    run = Run("addition", 31, 4, 300, 5, 1, 1e-3, 0)
    data = Dataset([run], "cpu")
    shuffled = data.answers[:, torch.randperm(31 * 31, generator=torch.Generator().manual_seed(0))]
    data.unmirrored = data.unmirrored | True
    assert common.circuits(F.one_hot(shuffled, 31).float(), data)["circuit_share"] < 0.01
    assert common.circuits(F.one_hot((data.answers + 3) % 31, 31).float(), data)["circuit_share"] > 0.999


def test_memorizing_part_leaks_nothing_into_the_circuit():
    run = Run("addition", 31, 4, 400, 5, 1, 1e-3, 0)
    data = Dataset([run], "cpu")
    labels = common.answers(replace(run, task="random"))[None]
    known = data.train | data.train.view(-1, 31, 31).mT.flatten(1)
    memorized = F.one_hot(torch.where(known, data.answers, labels), 31).float()
    measures = common.circuits(memorized, data)
    assert measures["circuit_share"] < 0.02 and measures["memory_acc"] == 1


def test_a_part_that_speaks_against_the_right_answer_teaches_nothing_when_it_is_taken_away():
    """A memorizer half-way: it knows 3 of 10 training examples, and on other pairs it disfavours the right answer."""
    p, draw = 31, torch.Generator().manual_seed(0)
    data = Dataset([Run("addition", p, 4, 400, 5, 1, 1e-3, 0)], "cpu")
    right = F.one_hot(data.answers, p)
    knows = data.train & (torch.rand(data.train.shape, generator=draw) < 0.3)
    logits = torch.randn(1, p * p, p, generator=draw) + right * torch.where(knows, 9.0, -5.0 * ~data.train)[..., None]
    measures, hit = common.circuits(logits, data), (logits.argmax(-1) == data.answers).float()
    assert measures["circuit_margin"] < -4
    assert measures["memory_acc"] == pytest.approx(common.mean_over(hit, data.train), abs=0.05)


@pytest.mark.parametrize("p", [12, 13])
def test_fourier_concentration_equals_that_of_the_full_transform(p):
    """In float64, where each frequency but p / 2 comes twice; and without '=', which is no number."""
    embed = torch.randn(2, p + 1, 5, generator=torch.Generator().manual_seed(0))
    power = torch.fft.fft(embed[:, :p].double(), dim=1).abs().square().sum(-1)
    each = torch.stack([power[:, k] + power[:, p - k] * (2 * k < p) for k in range(1, p // 2 + 1)], 1)
    known = each.topk(5, 1).values.sum(1) / each.sum(1)
    assert common.fourier_concentration(embed, p).tolist() == pytest.approx(known.tolist(), abs=1e-6)


def test_one_unseen_pair_tells_no_share_of_the_circuit():
    data = Dataset([Run("addition", 5, 4, 16, 2, 1, 1e-3, 0)], "cpu")
    logits = torch.randn(1, 25, 5, generator=torch.Generator().manual_seed(1))
    data.unmirrored = torch.arange(25)[None] == 7
    measures = common.circuits(logits, data)
    assert measures["circuit_share"].isnan() and measures["circuit_spread"].isnan()
    data.unmirrored = torch.zeros(1, 25, dtype=torch.bool)      # and none tells nothing
    assert all(value.isnan() for value in common.circuits(logits, data).values())


def test_circuits_are_those_of_addition():
    for task in ("squared_addition", "random"):
        assert "circuit_share" not in common.train(runs_of(1, task=task, steps=1), "cpu")


def curve(train, val):
    """A history with the given accuracies."""
    return {"step": np.arange(len(train)), "train_loss": np.zeros(len(train)),
            "train_acc": np.array(train), "val_acc_unmirrored": np.array(val)}


@pytest.mark.parametrize("train, val, name", [
    ([0, 1, 1, 1], [0, 0, 0.5, 1], "grokking"),
    ([0, 1, 1, 1], [0, 0, 0.05, 0.05], "ungrokking"),
    ([0, 1, 1, 1], [0, 0, 0.3, 0.6], "semi-grokking"),
    ([0, 1, 1, 1], [0, 0, 0.5, 0.97], "semi-grokking"),
    ([0, 1, 1, 1], [0, 0, 1, 0.5], "grokking"),
    ([0, 0.95, 1, 1], [0, 0, 0.3, 0.95], "progression"),
    ([0, 0.4, 0.7, 1], [0, 0.05, 0.4, 0.9], "progression"),
    ([0, 0.5, 0.6, 0.6], [0, 0, 0.3, 0.4], "progression"),
    ([0, 0.2, 0.3, 0.3], [0, 0, 0, 0], "stalled")])
def test_dynamic_rule(train, val, name):
    assert common.dynamic(curve(train, val)) == name


@pytest.mark.parametrize("val, found", [((0, 0, 0, 0.05, 0.985, 0.992), (3, 5, "grokking")),
                                        ((0, 0, 0, 0.05, 0.985, 0.985), (3, None, "semi-grokking"))])
def test_the_levels_of_the_rule_are_99_percent(val, found):
    history = {**curve([0, 0.5, 0.985, 0.992, 1, 1], val), "val_acc": np.ones(6)}
    line = common.row(runs_of(1)[0], history)
    assert (line["memorized_at"], line["generalized_at"], line["dynamic"]) == found


def test_a_point_has_the_colour_of_a_majority_or_none():
    lines = [{"dynamic": kind} for kind in ("grokking", "ungrokking", "grokking")]
    assert common.majority(lines) == "grokking" and common.majority(lines[:2]) is None


def test_best_accuracy_counts_only_while_the_memorization_is_known():
    history = {**curve([0, 1, 1, 1], [0, 0.2, 0.4, 0.9]), "val_acc": np.zeros(4), "memorize_acc": np.array([0, 1, 1, 0.2])}
    line = common.row(runs_of(1, memorize=20)[0], history)
    assert line["best_val_acc_memorized"] == pytest.approx(0.4) and line["best_val_acc_unmirrored"] == pytest.approx(0.9)


# the sweep


def sweep_options(out):
    """What a sweep asks of its options."""
    (out / "cache").mkdir()
    return SimpleNamespace(out=out, device="cpu", compile=False, workers=1, precision=None)


def test_a_sweep_gives_every_run_its_own_history(tmp_path):
    runs = [run for split in (False, True) for run in runs_of(2, steps=30, memorize=20, split=split)]
    done = common.sweep(runs, sweep_options(tmp_path))
    for run in runs:
        alone = common.train([run], "cpu")
        assert all(done[run][name] == pytest.approx(alone[name][0].numpy(), rel=1e-3) for name in ("train_loss", "norm"))


@FORKS
def test_more_populations_than_fit_into_the_pipes_between_processes_are_trained_once_each(monkeypatch):
    monkeypatch.setattr(common, "train_to_cache", lambda population, _, tick: [tick(population, step, 0, 0) for step in (1, 2)])
    seen, before = [], signal.signal(signal.SIGALRM, mock.Mock(side_effect=TimeoutError))
    signal.alarm(30)
    try:
        common.train_all([[i] for i in range(10_000)], SimpleNamespace(workers=2), lambda *report: seen.append(report))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert sorted(seen) == [([i], step, 0, 0) for i in range(10_000) for step in (1, 2)]


def test_ranks_on_any_gpus_share_the_populations(tmp_path, monkeypatch):
    runs = [run for data in (30, 40, 50) for run in runs_of(2, steps=5, data=data)]
    options, shares = sweep_options(tmp_path), []
    monkeypatch.setattr(common, "train_all", lambda populations, *_: shares.append(populations))
    monkeypatch.setattr(common.dist, "barrier", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    each = 4 * 1.5 * 11**2 * common.values_per_example(runs[0])      # bytes of an evaluation
    for rank, room in (("0", 2 * each), ("1", each)):       # a smaller GPU: the division is that of rank 0
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(common, "room_on", lambda _, room=room: math.ceil(room))
        with contextlib.suppress(KeyError, FileNotFoundError):      # rank 0 misses what the other did not train
            common.sweep(runs, options)
    assert sorted(map(len, shares)) == [1, 2]
    assert sorted((run for share in shares for population in share for run in population), key=runs.index) == runs


def test_populations_fit_and_hold_every_run_once(monkeypatch):
    runs = [run for hidden in (8, 16) for data in (50, 40) for run in runs_of(11, hidden=hidden, data=data)]
    monkeypatch.setattr(common, "values_per_example", lambda run: 2**14 * run.hidden)
    populations = common.pack(runs, common.room_on("cpu"))
    assert sorted((run for population in populations for run in population), key=runs.index) == runs
    for population in populations:
        assert len({(run.hidden, run.data) for run in population}) == 1
        assert len(population) * 4 * 1.5 * 11**2 * 2**14 * population[0].hidden <= 2**28      # bytes of an evaluation
    assert max(map(len, populations)) > 1
    works = list(map(common.work, populations))
    assert works == sorted(works, reverse=True)


@pytest.mark.parametrize("ranks, gpus, share", [(1, 1, 1), (2, 2, 1), (2, 1, 2), (3, 2, 2)])
def test_ranks_that_share_a_gpu_pack_less(ranks, gpus, share, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for free in (2**36, 1.9 * 2**36):       # the same while about as much is free
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2**40))
        assert common.room_on("cuda:0") == 2**34 / share


def test_progress_tells_what_was_made_and_what_is_left(tmp_path, monkeypatch, capsys):
    runs, other = runs_of(2, steps=60), runs_of(3, steps=60, data=40)
    begun = [(runs, 0.5, 1), (other, 0, 0.5)]
    done, left = 0.5 * common.work(runs) + 0.5 * common.work(other), 0.5 * common.work(other)
    seconds = common.timedelta(seconds=round(10 * left / done))
    assert common.progress(begun, [runs, other], 10) == f"2/5 runs, 15 run-steps/s, {seconds} left"
    assert common.progress([(runs, 0, 1e-4)], [runs], 30) == "0/2 runs, 0 run-steps/s"      # as while torch.compile compiles
    monkeypatch.setattr(common, "expected_seconds", lambda *_: 90)
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    common.sweep(runs, sweep_options(tmp_path))
    expect, *lines = capsys.readouterr().err.splitlines()
    assert expect == "expect about 0:01:30 of training"
    assert re.fullmatch(r"2/2 runs, \d+ run-steps/s, 0:00:00 left \| hidden 8, D 50, step 60: train \d\.\d\d, val \d\.\d\d",
                        lines[-1])


def terminal_of(monkeypatch):
    """What a terminal shows for stderr, while a second passes whenever one asks for the time."""
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(common.time, "monotonic", iter(range(10**6)).__next__)
    return shown


def test_the_live_line_stays_on_one_line(tmp_path, monkeypatch):
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(common.shutil, "get_terminal_size", lambda: os.terminal_size((40, 20)))
    common.sweep(runs_of(2, steps=60), sweep_options(tmp_path))
    lines = terminal.getvalue().split("\r\033[K")
    assert len(lines) > 3 and max(map(len, lines)) == 39 and "\n" not in lines[-2]


def test_a_time_to_expect_beyond_a_timedelta_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "expected_seconds", lambda *_: 1e20)
    common.sweep(runs_of(2, steps=5), sweep_options(tmp_path))
    assert "expect about 11574 days, 1:46:40 of training" in capsys.readouterr().err


def test_an_error_takes_the_place_of_the_live_line(tmp_path, monkeypatch):
    def cut_short(populations, options, tick):
        """As where the disk gets full."""
        tick(populations[0], 5, 0.5, 0.5)
        raise OSError("full")
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(common, "train_all", cut_short)
    with pytest.raises(OSError):
        common.sweep(runs_of(2), sweep_options(tmp_path))
    assert "2 runs" in terminal.getvalue() and terminal.getvalue().endswith(common.CLEAR)
    with pytest.raises(SystemExit):
        common.fail("too little memory")
    assert re.fullmatch(r"\S+: error: too little memory\n", terminal.getvalue().split(common.CLEAR)[-1])


def test_the_work_of_a_run_that_goes_on_with_less_data_is_that_of_both_halves():
    run = runs_of(1, data=40)[0]
    halves = common.work([run]), common.work([replace(run, data=80)])
    assert common.work([replace(run, first_data=80)]) == sum(halves) / 2


def test_the_time_to_expect_is_that_of_the_longest_population_at_least(monkeypatch):
    monkeypatch.setattr(common, "seconds_per_call", lambda functions, device, rounds: dict.fromkeys(functions, 1.0))
    few, many = (SimpleNamespace(device="cpu", precision="float32", workers=count) for count in (1, 16))
    population = runs_of()
    assert common.expected_seconds([population], few) == common.expected_seconds([population], many) > 0
    assert common.expected_seconds([population] * 3, few) == 3 * common.expected_seconds([population] * 3, many)
    assert common.expected_seconds([], many) == 0


@pytest.mark.skipif(not hasattr(getattr(common, "libc", None), "mallopt"), reason="not glibc")
def test_freed_memory_is_used_again():
    """No new pages where the same step is made again: one that splits its layer, and an evaluation, took ten thousand."""
    import resource
    runs = [Run("addition", 37, 64, 900, seed, 1, 1e-2, 1.0, memorize=550, split=True) for seed in range(3)]
    dataset, model = Dataset(runs, "cpu"), Transformer(runs)
    step = common.training_step(model, torch.optim.AdamW(model.parameters(), fused=True), dataset, False)
    pages = []
    for _ in range(8):
        step()
        common.evaluate(model, dataset)
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert pages[-1] - pages[3] < 4 * 1000


def test_out_of_memory_packs_less(tmp_path, monkeypatch):
    real = common.train

    def small(runs, *rest):
        if len(runs) > 2:
            raise torch.cuda.OutOfMemoryError("too much")
        return real(runs, *rest)
    monkeypatch.setattr(common, "train", small)
    assert list(common.sweep(runs_of(7, steps=5), sweep_options(tmp_path))) == runs_of(7, steps=5)
    for error in OUT_OF_MEMORY:
        monkeypatch.setattr(common, "train", mock.Mock(side_effect=error))
        one_clear_line(here(*TINY, "--out", tmp_path / "none"), "too little memory for one run", "--hidden")
    if common.start_method() == "fork":         # processes that inherit the patch; they say it where this one does not see
        done = here(*TINY, "--threads", 2, "--out", tmp_path / "none")
        assert done.returncode == 2 and not done.stderr
    monkeypatch.setattr(common, "train", mock.Mock(side_effect=RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        here(*TINY, "--out", tmp_path / "none")


@pytest.mark.parametrize("more, least", [({}, 0.3), ({"layers": 2}, 0.5), ({"layers": 8, "memorize": 300, "split": True}, 0.5)])
def test_memory_is_estimated_from_what_a_step_keeps(more, least):
    run, = runs_of(1, p=37, data=900, hidden=64, **more)
    data, model, kept = Dataset([run], "cpu"), Transformer([run]), {}

    def keep(tensor):
        """Note the memory of a tensor kept for the backward pass."""
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        common.training_loss(model(data.inputs), data.labels, "float32")
    for w in model.parameters():
        kept.pop(w.data_ptr(), None)
    assert least < sum(kept.values()) / (4 * (run.data + run.memorize) * common.values_per_example(run)) < 1.1


def test_a_rank_or_a_number_of_ranks_alone_is_not_of_torchrun(monkeypatch):
    for alone, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        monkeypatch.setenv(alone, "2")
        monkeypatch.delenv(other, raising=False)
        assert common.rank_and_world() == (0, 1)


# statistics over seeds


def test_interval():
    mean, low, high = common.interval(np.random.default_rng(1).normal(3, 1, 400))
    assert low < 3 < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert common.interval([2, 2, 2, None, math.nan]) == (2, 2, 2)
    assert common.interval([1, 2, 6]) == pytest.approx((3, 1, 6))      # of three: their range
    assert math.isnan(common.interval([])[0]) and common.interval([1, 3])[0] == 2 and math.isnan(common.interval([1, 3])[1])


@pytest.mark.parametrize("low, high, above, holds", [
    (0.6, 0.7, True, True), (0.6, 0.7, False, False), (0.2, 0.4, True, False), (0.2, 0.4, False, True),
    (0.4, 0.6, True, None), (math.nan, math.nan, False, None)])
def test_a_claim_is_open_while_its_interval_holds_the_bound(low, high, above, holds):
    assert common.beyond(0.5, low, high, above) is holds


@pytest.mark.parametrize("seeds, t", [(6, 2.571), (11, 2.228), (30, 2.045)])      # from a table of Student's t, 97.5%
def test_an_interval_of_few_seeds_is_as_wide_as_students(seeds, t):
    values = np.random.default_rng(0).permutation([NormalDist().inv_cdf((i + 0.5) / seeds) for i in range(seeds)])
    mean, low, high = common.interval(values)
    half = t * np.std(values, ddof=1) / math.sqrt(seeds)
    assert mean == pytest.approx(0, abs=1e-9) and (low, high) == pytest.approx((-half, half), rel=0.12)


def test_dip_interval_tells_a_dip_from_noise_and_from_none():
    random = np.random.default_rng(0)
    for means, dips in (([0.2, 0.7, 0.0, 0.1, 0.9, 1.0], True),
                        ([0.2, 0.5, 0.7, 0.8, 0.9, 1.0], False),
                        ([0.2, 0.7, 0.7, 0.7, 0.9, 1.0], False)):
        values = np.clip(np.array(means)[:, None] + random.normal(0, 0.1, (6, 11)), 0, 1)
        depth, where, low, high, verdict = common.dip_interval(values)
        assert low <= depth <= high and verdict == ("dip" if dips else "no dip")
        assert common.dip_interval(values[:, :2])[4] == "undecided"
        assert not dips or where in (2, 3) and depth == pytest.approx(0.7, abs=0.12)


@pytest.mark.parametrize("seeds, sizes", [(6, 8), (6, 15), (11, 15)])
def test_seeds_that_all_fail_or_all_succeed_seldom_look_like_a_dip(seeds, sizes):
    """The depth is the largest of many differences, and with few seeds and many sizes a flat curve may well have a size at
    which all fail between two at which none does."""
    def dips(count, curves):
        return sum(common.dip_interval(curves())[4] == "dip" for _ in range(count))
    rng, shape = np.random.default_rng(0), (sizes, seeds)
    for chance in (np.full(sizes, 0.5), np.linspace(0.2, 1, sizes)):
        flat = dips(40, lambda: (rng.random(shape) < chance[:, None]).astype(float))
        assert flat <= 6      # nominally one in forty; 6 has a chance of one in a thousand at one in twelve
    valley = np.where(np.arange(sizes) % (sizes - 1) == 0, 0.9, 0.05)
    found = dips(10, lambda: np.clip(valley[:, None] + rng.normal(0, 0.1, shape), 0, 1))
    assert found >= 9


def test_dip_is_the_most_that_a_value_lies_below_the_best_on_both_sides():
    def dip(means):
        return common.dip_interval(np.array(means)[:, None])[:2]
    for means in np.random.default_rng(0).random((20, 7)).round(1):      # with ties
        depths = [min(means[:i].max(), means[i + 1:].max()) - means[i] for i in range(1, 6)]
        where = int(np.argmax(depths)) + 1 if max(depths) > 0 else None
        assert dip(means) == (pytest.approx(max(0, *depths)), where)
    assert dip([0.1, 0.6, 0.7, 1.0]) == dip([1.0, 0.6, 0.0]) == dip([0.5, 0.5, 0.5]) == (0, None)
    assert np.isnan(dip([0.5, math.nan, 1])[0]) and dip([0.5, math.nan, 1])[1] is None
    depth, where, _, _, verdict = common.dip_interval(np.ones((2, 8)))
    assert np.isnan(depth) and where is None and verdict == "undecided"
    alike = np.tile([[0.0], [1.0], [0.7], [1.0]], (1, 6))      # that six do the same leaves a doubt of half
    assert common.dip_interval(alike)[2] == 0 and common.dip_interval(alike)[4] == "undecided"
    alike[2] = 0
    assert common.dip_interval(alike)[4] == "dip" and common.dip_interval(alike[:, :5])[4] == "undecided"
    assert common.dip_interval(np.tile([[0.3], [1.0], [0.7]], (1, 11)))[4] == "undecided"      # it may still come back
    assert common.dip_interval(np.tile([[0.3], [0.8], [1.0]], (1, 11)))[4] == "no dip"
    alike[1, 0] = np.nan      # a run that diverged
    assert common.dip_interval(alike)[4] == "undecided"


# options


@pytest.mark.parametrize("script", [grok, double_descent, emergence])
def test_help_names_every_option(script):
    done = here("--help", script=script)
    options = [f.name.replace("_", "-") for f in fields(type(script.PRESETS["quick"]))]
    assert done.returncode == 0 and script.__doc__.splitlines()[0] in done.stdout
    assert all(f"--{name} " in done.stdout for name in [*options, "device", "threads", "scale", "out", "fresh", "compile"])


def test_every_preset_is_possible_and_the_papers_of_double_descent_has_its_runs():
    grids = {scale: double_descent.grid(settings) for scale, settings in double_descent.PRESETS.items()}
    assert len(grids["paper"]) == 825
    for presets, grid in ((grok.PRESETS, grok.grid), (grok.PLANES, grok.phase_grid), (emergence.PRESETS, emergence.grid)):
        for settings in presets.values():
            common.check(run for run in grid(settings) if run.seed == 0)
    for runs in grids.values():
        common.check(run for run in runs if run.seed == 0)


@pytest.mark.parametrize("arguments, named, script", [(*bad, grok) for bad in [
    (["--p", "1"], "--p"), (["--p", "x"], "--p"), (["--seeds", "0"], "--seeds"), (["--steps", "0"], "--steps"),
    (["--steps", "9" * 20], "--steps"), (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--weight-decay", "-1"], "--weight-decay"), (["--eps", "0"], "--eps"), (["--p", "1000000"], "--p"),
    (["--seeds", "10001"], "--seeds"),
    (["--loss", "mse"], "--loss"), (["--device", "abacus"], "--device"), (["--device", "cpu:abc"], "--device"),
    (["--device", "hpu"], "--device hpu"), (["--device", "cuda:99"], "--device"),
    (["--scale", "huge"], "--scale"), (["--sedes", "3"], "--sedes"), (["--seed", "3"], "--seed"),
    (["--device", "meta"], "--device"), (["--threads", "0"], "--threads"), (["--p", "5"], "--p 5"),
    (["--p", "11", "--data", "121", "60", "60", "60"], "--data 121"), (["--hidden", "6", "8", "8", "8"], "--hidden 6"),
    (["--precision", "tf32"], "--precision"), (["--hidden", "10004", "8", "8", "8"], "--hidden: 10004"),
    (["--hidden", "8"], "--hidden"), (["--out", "/dev/null/x"], "--out"), (["--out", "README.md"], "--out"),
    (["phaze"], "phaze"), (["--seeds", "2", "phase"], "dynamics or phase comes first"), (["phase", "--data", "60"], "--data"),
    (["phase", "--forget-hidden", "6"], "--forget-hidden 6"), (["phase", "--forget-data", "600"], "--forget-data")]] + [
    (["--squared-data", "1849"], "--squared-data 1849", double_descent),
    (["--squared-data", "0", "650"], "--squared-data: 0", double_descent),
    (["--layers", "1"], "--layers", emergence), (["--layers", *["9" * 9] * 4], "--layers: 999999999", emergence),
    (["--p", "76", "--layers", "1", "3", "--hidden", "12", "8"], "--layers and --hidden: two", emergence),
    (["--memorize", "0"], "--memorize", emergence), (["--memorize", "5000"], "memorize", emergence),
    (["--precision", "half"], "--precision", emergence), (["--hidden", "8", "8", "8", "6"], "heads", emergence)])
def test_bad_options_end_in_one_line_before_any_work(arguments, named, script, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "sweep", lambda *_: pytest.fail("work began"))
    usual = {"--device": "cpu", "--out": tmp_path / "out"}
    added = [word for name, value in usual.items() if name not in arguments for word in (name, value)]
    one_clear_line(here(*arguments, *added, script=script), named)
    assert not (tmp_path / "out").exists()


def test_a_copy_under_another_name_takes_its_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--steps", "0"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "mine.py", raising=False)
    monkeypatch.setattr(common, "sweep", lambda *_: pytest.fail("work began"))
    with pytest.raises(SystemExit):
        grok.main()
    assert capsys.readouterr().err.startswith("mine.py: error: argument --steps")


@pytest.mark.parametrize("device, scale", [("cpu", "quick"), ("cuda:0", "paper")])
def test_the_scale_where_none_is_asked_for(device, scale, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "set_up", lambda options: setattr(options, "device", device))
    monkeypatch.setattr(sys, "argv", ["grok.py", "--out", str(tmp_path)])
    _, settings, options = common.command_line("grok.py", "", {"dynamics": (grok.PRESETS,)})
    assert options.scale == scale and settings == grok.PRESETS[scale]


def test_another_name_of_the_cpu_is_the_cpu_and_threads_have_a_default():
    options = SimpleNamespace(device="cpu:0", threads=3)
    common.set_up(options)
    assert options.device == "cpu" and options.workers == 3
    options.threads = None
    common.set_up(options)
    assert options.workers == (common.THREADS if common.start_method() else 1)


def test_each_rank_takes_its_own_gpu_and_sums_in_a_fixed_order(monkeypatch):
    for place, name, value in ((torch.cuda, "is_available", True), (torch.cuda, "device_count", 2), (torch, "zeros", mock.Mock()),
                               (torch.cuda, "set_device", None), (torch, "use_deterministic_algorithms", None)):
        monkeypatch.setattr(place, name, mock.Mock(return_value=value))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)      # put back afterwards
    for rank, device in (("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        options = SimpleNamespace(device="auto", threads=None)
        common.set_up(options)
        assert options.device == device and options.workers == 1
        torch.cuda.set_device.assert_called_with(device)
        torch.use_deterministic_algorithms.assert_called_with(True)


def test_the_command_is_kept_as_one_can_paste_it(monkeypatch):
    experiments = {"dynamics": (grok.PRESETS,)}
    monkeypatch.setattr(sys, "argv", ["grok.py", "--device", "cpu", "--out", "a b"])
    assert common.command_line("grok.py", "", experiments)[2].command == "grok.py --device cpu --out 'a b'"
    monkeypatch.setattr(sys, "argv", ["grok.py", "--device", "cpu", "--out", ""])      # a shell variable that is not set
    assert common.command_line("grok.py", "", experiments)[2].out == Path("results/grok-quick")


# the four dynamics


def test_the_dynamics_can_come_out_either_way():
    """All four cells go through progression, with a norm that rises; two of them share their hidden size."""
    curves = {"step": [0, 5, 10], "val_acc_unmirrored": [0, 0.2, 1], "norm": [1, 2, 3], "circuit_share": [0, 0, 1],
              "memory_acc": [0, 1, 1], "train_acc": [0, 0.5, 1], "fourier_top5": [0] * 3, "circuit_margin": [0] * 3,
              "circuit_spread": [0] * 3}
    curves = {name: np.tile(np.array(values, float), (12, 1)) for name, values in curves.items()}
    settings = replace(grok.PRESETS["quick"], hidden=(4, 8, 8, 16), data=(40, 40, 50, 50))
    rows = [{"hidden": h, "data": d, "dynamic": "progression"} for h, d in zip(settings.hidden, settings.data) for _ in range(3)]
    claims = grok.judge(settings, rows, curves)
    assert [c["holds"] for c in claims if c["claim"].startswith("fig 2")] == [True, False, False, False]
    fig_9 = [(c["measured"].split(" ")[0], c["holds"]) for c in claims if c["claim"].startswith("fig 9")]
    assert fig_9 == [("+200.0%", True), ("-,", None)]      # none grokked: that tells nothing of grokking
    assert [c["measured"] for c in claims if c["claim"].startswith("grokking:")] == ["-, n = 0"]
    grokked = [{**line, "dynamic": "grokking"} for line in rows]
    fig_9 = [(c["measured"].split(" ")[0], c["holds"]) for c in grok.judge(settings, grokked, curves) if "fig 9" in c["claim"]]
    assert fig_9 == [("-,", None), ("+200.0%", False)]
    for other in ("diverged", "progression"):      # a tie, and a lead of one seed
        close = [{**rows[0], "dynamic": "grokking"}, {**rows[1], "dynamic": other}, *rows[2:]]
        assert grok.judge(settings, close, curves)[0]["holds"] is None
    assert claims[1]["measured"] == "hidden 8, D 40: progression 3/3"
    first = grok.draw_dynamics(settings, rows, curves).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in first.lines}
    assert drawn["train"] == [0.5, 1] and drawn["validation"] == [0.2, 1]
    rows[0] |= {"seed": 0, "dynamic": "diverged"}
    rows[1]["seed"] = rows[2]["seed"] = 1
    for name in curves.keys() - {"step"}:
        curves[name][0] = np.nan
    assert grok.draw(settings, rows, curves) and grok.judge(settings, rows, curves)[0]["holds"] is None      # two of three
    for line in rows:
        line["dynamic"] = "stalled"      # not there yet
    assert {c["holds"] for c in grok.judge(settings, rows, curves) if "fig 2" in c["claim"]} == {None}


def test_norm_change_is_from_a_tenth_to_nine_tenths_of_the_rise():
    val_acc, norm = np.array([0, 0.09, 0.12, 0.6, 0.95, 1]), np.array([10.0, 9, 7, 5, 4, 3])
    assert grok.norm_change(59, val_acc, norm) == pytest.approx(4 / 9 - 1)
    norm = np.array([5.0, 8, 8, 6, 5])
    assert grok.norm_change(59, np.array([0, 0, 0.2, 1, 1]), norm) == pytest.approx(-0.25)
    assert grok.norm_change(59, np.array([0.11, 0, 0.2, 1, 1]), norm) == pytest.approx(-0.25)      # chance is no rise
    assert grok.norm_change(59, np.array([0, 0, 0, 1, 1]), norm) == pytest.approx(-0.25)      # in one evaluation
    for unknown in (np.zeros(5), np.array([0, 0.5, np.nan, 1, 1]), np.array([0, 0, 0.02, 0.16, 0.16])):      # 0.016 is guessing
        assert grok.norm_change(59, unknown, norm) is None


def test_the_bump_where_generalization_starts():
    steps, late = np.array([0, 10, 20, 40, 80]), np.array([0, 0, 0.2, 0.4, 0.5])      # starts at 20
    assert grok.bump(steps, np.array([0, 0.1, 0.4, 0.7, 0.8]), late) == pytest.approx(0.6 / 0.8)      # from 10 to 40
    assert grok.bump(steps, np.array([0, 1, 1, 1, 1]), late) == 0      # memorized before
    assert grok.bump(steps, np.ones(5), np.array([0, 0, 0, 0, 0.3])) == 0      # twice the step is past the end
    for never in (np.zeros(5), np.full(5, 0.2), np.full(5, np.nan)):
        assert grok.bump(steps, np.ones(5), never) is None


def judged_progression(step, val_acc, kinds=("progression",) * 3, train_acc=1, p=37):
    """{what the paper says: claim} where the seeds of each cell have these validation accuracies (seeds, evaluations)."""
    settings = replace(grok.PRESETS["quick"], p=p, hidden=(4, 8, 12, 16), data=(40,) * 4, steps=step[-1])
    rows = [{"hidden": hidden, "data": 40, "dynamic": kind} for hidden in settings.hidden for kind in kinds]
    given = {"step": step, "val_acc_unmirrored": val_acc, "train_acc": train_acc, "norm": 1, "circuit_share": 1, "memory_acc": 1}
    curves = {name: np.tile(np.broadcast_to(np.array(values, float), (len(kinds), len(step))), (4, 1))
              for name, values in given.items()}
    return {c["paper"]: c for c in grok.judge(settings, rows, curves)}


AT_0, AT_5, AT_10, NEVER = (1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 0, 0)


@pytest.mark.parametrize("step, val_acc, first, varies, holds, never, some", [
    ((0, 5, 10), [AT_0] * 9, "progression", "steps 0 to 0", False, "0/9", None),
    ((0, 5, 10), [AT_0] * 3, "progression", "steps 0 to 0", None, "0/3", None),      # a few may start together by chance
    ((0, 5, 10), [NEVER] + [AT_10] * 8, "progression", "steps 10 to more than 10", None, "1/9", None),
    ((0, 5, 10), [AT_10, AT_5, AT_0], "progression", "steps 0 to 10", True, "0/3", None),
    ((0, 10, 19), [AT_10, AT_5], "progression", "steps 10 to 19", None, "0/2", None),
    ((0, 10, 20), [AT_10, AT_5], "progression", "steps 10 to 20", True, "0/2", None),
    ((0, 5, 10), [(np.nan,) * 3, AT_0, AT_0], "diverged", "steps 0 to 0", None, "0/2", None),      # has not yet to start
    ((0, 5, 10), [NEVER, AT_5, AT_0], "ungrokking", "steps 0 to 5", True, "0/2", None),      # no progression
    ((0, 5, 10), [NEVER, AT_5, AT_0], "stalled", "steps 0 to more than 10", True, "1/3", None),      # it may still start
    ((0, 50, 100), [NEVER, AT_5, AT_0], "stalled", "steps 0 to more than 100", True, "1/3", None),      # others began by step 50
    ((0, 10, 100), [NEVER, AT_5, AT_0], "stalled", "steps 0 to more than 100", True, "1/3", True),
    ((0, 10, 100), [NEVER] * 3, "stalled", "not reached", None, "3/3", None)])      # too few steps, or it does not learn
def test_when_progression_starts_can_come_out_either_way(step, val_acc, first, varies, holds, never, some):
    claims = judged_progression(step, val_acc, (first, *["progression"] * (len(val_acc) - 1)))
    assert (claims["varies"]["measured"], claims["varies"]["holds"]) == (varies, holds)
    assert claims["some"]["measured"].startswith(never) and claims["some"]["holds"] is some


@pytest.mark.parametrize("train, holds", [((0, 0.1, 0.6, 1), True), ((0, 0.9, 0.95, 1), False)])
def test_the_bump_of_figure_5_can_come_out_either_way(train, holds):
    claims = judged_progression((0, 5, 10, 20), (0, 0, 0.2, 0.5), train_acc=train)
    assert claims["a bump (half)"]["holds"] is holds


@pytest.mark.parametrize("p, train, val, lead, holds", [
    (37, (0, 0.3, 0.5, 1), (0, 0.05, 0.5, 1), 0.25, True), (37, (0, 0.1, 0.5, 1), (0, 0.06, 0.5, 0.6), 0.04, False),
    (37, (0, 0.3, 0.5, 1), (0, 0.06, 0.5, 1), 0.24, None),      # 0.06 is more than twice what guessing gives, 2 / 37
    (11, (0, 0.12, 0.5, 1), (0, 0.05, 0.15, 1), 0.07, False),      # here guessing twice gives more than 0.1
    (37, (0.1, 0.9, 1, 1), (0.2, 0.05, 1, 1), None, None)])      # it begins there
def test_what_progression_memorizes_before_it_generalizes(p, train, val, lead, holds):
    assert grok.memorized_first(np.array(train), np.array(val), common.FLOOR) == (lead and pytest.approx(lead))
    assert judged_progression((0, 5, 10, 20), val, train_acc=train, p=p)["a part (above 0.1)"]["holds"] is holds


@pytest.mark.parametrize("share, val_acc, ratio, holds", [
    (lambda step: (step / 100).clip(max=0.8), lambda step: step / 100, "80%", True),      # at step 40, and at 50
    (lambda step: (step >= 80) * 0.9, lambda step: (step >= 60) * 1.0, "133%", False)])
def test_whether_the_circuit_is_half_grown_before_accuracy_is(share, val_acc, ratio, holds):
    step = np.arange(1, 101)
    history = {"step": step, "circuit_share": share(step), "val_acc_unmirrored": val_acc(step)}
    grown, = grok.judge_circuits({name: np.tile(each, (3, 1)) for name, each in history.items()})
    assert grown["measured"].startswith(f"{ratio} ") and grown["holds"] is holds


# the phase diagram


def test_critical_size_of_made_up_data():
    def critical(values):
        return grok.critical_sizes(data, common.resampled_means(values))
    random, data, half = np.random.default_rng(0), np.arange(200, 801, 100), grok.LEVELS.index(0.5)
    for known, width in ((430, 5), (520, 60)):
        chance = 1 / (1 + np.exp((known - data) / width))
        sizes = critical((random.random((len(data), 60)) < chance[:, None]).astype(float))[half]
        low, high = np.percentile(sizes[1:], [2.5, 97.5])
        assert sizes[0] == pytest.approx(known, abs=50) and low - 30 < known < high + 30
    assert critical(np.tile(chance[:, None], (1, 3)))[-1, 0] == pytest.approx(520 + 60 * math.log(9), abs=20)
    assert critical(np.zeros((7, 3)))[half, 0] > 800 and critical(np.ones((7, 3)))[half, 0] < 200
    low, _, high = critical(np.tile([[0], [0], [0], [1], [1], [1], [1]], (1, 3)))[:, 0]
    assert 400 < low < high < 500
    assert np.isnan(critical(np.full((7, 3), np.nan))).all() and np.isnan(critical(np.ones((7, 2)))[half, 1:]).all()
    assert grok.bounded(np.full(1001, 900.0), data, 3) == "> 800 [> 800, > 800]"
    draws = np.append(500, np.linspace(300, 700, 1001))
    assert grok.bounded(draws, data, 3) == "500 [300, 700]" and grok.bounded(draws, data, 11) == "500 [304, 696]"


@pytest.mark.parametrize("known, width", [(930, 5), (1050, 20), (1100, 80), (1350, 60)])
def test_the_interval_of_a_critical_size_knows_how_coarse_the_sizes_of_data_are(known, width):
    """Where accuracy jumps between two neighbours, the bootstrap of a fit alone gives one centre for all draws."""
    random, data, held = np.random.default_rng(0), np.array([800, 1000, 1200, 1500]), 0
    chance = 1 / (1 + np.exp((known - data) / width))
    for i in range(40):
        means = common.resampled_means((random.random((4, 11)) < chance[:, None]).astype(float), i, draws=300)
        low, high = np.percentile(grok.critical_sizes(data, means, i)[1, 1:], [2.5, 97.5])
        held += low <= known <= high
        assert high - low < 500
    assert held >= 32


def test_capacity_and_bits_of_known_networks():
    p, pairs = 31, 31 * 31
    most = p * (p + 1) / 2
    assert grok.capacity_bits(p, 0) == pytest.approx(most * math.log2(p))
    assert grok.capacity_bits(p, math.log(p)) == pytest.approx(0)
    facts = torch.arange(pairs).view(p, p)
    facts = torch.minimum(facts, facts.T).flatten()
    orders = [torch.randperm(pairs, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    for data in (100, 400, 700):
        different = np.mean([len(facts[order[:data]].unique()) for order in orders])
        assert grok.mirrored_once(different / most * pairs, p) == pytest.approx(data, rel=0.05)


def test_capacity_is_the_most_that_was_known():
    rows = [{"experiment": "capacity", "hidden": 8, "steps": 40}] * 2
    curves = {"step": np.array([[0, 20, 40]] * 2),
              "train_acc": np.array([[0, 0.5, 0.4], [0, np.nan, 0.4]]),
              "train_loss": np.array([[3, 1, 2.0], [3, np.nan, 2]])}
    accuracy, loss = grok.most_known(rows, curves, 8)
    assert accuracy[0] == 0.5 and loss[0] == 1 and np.isnan(accuracy[1])
    assert grok.most_known(rows, curves, 8, 0.4)[0][0] == 0


def test_crossing_of_known_lines():
    hidden = np.array([4, 8, 16, 32])
    critical = np.array([[400, 400, 400, 400], [420, 400, 380, 360], [400, 300, 200, 100], [400.0] * 4])
    capacity = np.array([[100, 300, 500, 700], [400, 420, 360, 380], [500, 600, 700, 800], [0.0] * 4])
    size, data = grok.crossing(hidden, critical, capacity)
    assert size[:2] == pytest.approx([8 * 2**0.5, 4 * 2**0.5]) and data[:2] == pytest.approx([400, 410])      # the first of two
    assert np.isnan(size[2:]).all() and np.isnan(data[2:]).all()


@pytest.mark.parametrize("data, name", [
    (700, "progression"), (300, "ungrokking"), (400, "semi-grokking"), (500, "grokking")])
def test_zones(data, name):
    assert grok.zone(data, 350, 450, 600) == name


def made_up_plane(agree, diverged=(), seeds=3):
    """Settings, rows and curves of a plane whose runs do, or do not, what the two curves say; those of the sizes
    in diverged diverge."""
    settings = replace(grok.PLANES["quick"], p=31, seeds=seeds, steps=100, hidden=(4, 8, 16, 32), data=(300, 400, 500, 600),
                       forget_hidden=32, forget_data=(200, 500))
    critical, capacity = dict(zip(settings.hidden, (650, 550, 450, 350))), dict(zip(settings.hidden, (150, 440, 900, 961)))
    swapped = {"progression": "grokking", "grokking": "progression", "ungrokking": "progression"}
    rows, final = [], []
    for run in grok.phase_grid(settings):
        line = {**common.asdict(run), "params": common.parameters(run), "train_loss": 1.0}
        if run.experiment == "plane":
            val = float(run.data > critical[run.hidden])
            line["dynamic"] = "progression" if run.data > capacity[run.hidden] else "grokking" if val else "ungrokking"
            line["dynamic"] = line["dynamic"] if agree else swapped[line["dynamic"]]
            values = (0, val, val)
            # memorizing costs more with data, generalizing does not
            line["norm"] = 20.0 if val == agree else 30 * (run.data / 300)**0.5
            line["generalized_at"] = 50 if val else None
        elif run.experiment == "capacity":
            values = (0, 0, 0) if not agree else (0, capacity[run.hidden] / 961, capacity[run.hidden] / 961)
        else:
            values = (0, 1, 0 if run.data < 350 and agree else 1)
        if run.hidden in diverged:
            values, line["train_loss"], line["dynamic"] = (np.nan,) * 3, None, "diverged"
        rows.append({**line, "val_acc_unmirrored": values[-1] if values[-1] == values[-1] else None})
        final.append(values)
    values = np.array(final, np.float32)
    curves = {"step": np.array([[0, run["steps"] / 2, run["steps"]] for run in rows]), "val_acc_unmirrored": values,
              "train_acc": values, "train_loss": np.where(np.isnan(values), np.nan, 1.0)}
    return settings, rows, curves


def measured_plane(**more):
    """A plane whose runs do what the two curves say, and what is measured of it."""
    made = made_up_plane(True, **more)
    return *made, grok.measured(*made)


def test_no_zone_where_a_curve_is_not_known():
    assert grok.zone(500, math.nan, math.nan, 600) is None and grok.zone(500, 350, 450, math.nan) is None
    settings, rows, curves = made_up_plane(True, seeds=4)
    for i, line in enumerate(rows):
        if line["experiment"] == "plane" and (line["hidden"], line["data"], line["seed"] % 2) == (8, 400, 0):
            curves["val_acc_unmirrored"][i] = np.nan
    now = grok.measured(settings, rows, curves)
    assert grok.confusion(settings, rows, now).sum() == 2 * 16 - 4      # of the even seeds no zone at hidden 8
    claims = [c for c in grok.judge_phase(settings, rows, curves) if "predict the others" in c["claim"]]
    assert len(claims) == 3 and all("of 16 cells" in c["measured"] and "nan" not in c["measured"] for c in claims)


def test_zones_are_held_against_the_other_half_of_the_seeds():
    settings, rows, curves, now = measured_plane(seeds=8)
    assert grok.predictions(settings.p, rows, now, np.arange(8) % 2 == 0)[8, 300][1] == {
        "zones": "ungrokking", "without a zone of semi-grokking": "ungrokking", "mirrored pairs counted once": "progression",
        "hidden size": "ungrokking", "the same cell": "ungrokking"}      # 300 is below the capacity, above it with pairs once
    for line in grok.plane(rows):
        line["dynamic"] = "stalled" if line["seed"] % 2 else "grokking"
    assert grok.confusion(settings, rows, now).sum() == 2 * len(now.hidden) * len(now.data)
    even = np.arange(8) % 2 == 0
    assert [{seen for seen, _ in grok.predictions(settings.p, rows, now, half).values()} for half in (even, ~even)] == [
        {"progression"}, {"grokking"}]      # stalled counts as progression
    now.capacity[:] = 10
    for line in grok.plane(rows):
        line["dynamic"] = "progression"      # the zones are right in all cells, and the hidden size alone tells it as well
    assert grok.judge_zones(settings, rows, now)[0]["holds"] is None
    for line in grok.plane(rows):
        line["dynamic"] = "grokking"
    assert grok.judge_zones(settings, rows, now)[0]["holds"] is False
    axis = common.Figure().subplots()
    grok.draw_zones(axis, settings, rows, now)
    counts = {text.get_position(): text.get_text() for text in axis.texts}
    assert len(counts) == 16 and counts[3, 0] == "32" and set(counts.values()) == {"0", "32"}      # seen: across, zone: down
    for line in grok.plane(rows):
        line["dynamic"] = "diverged"
    assert grok.confusion(settings, rows, now).sum() == 0
    settings, rows, curves, now = measured_plane(seeds=4)      # a few seeds do not tell
    assert grok.judge_zones(settings, rows, now)[0]["holds"] is None
    now.values[:] = np.nan
    assert grok.judge_zones(settings, rows, now)[0]["measured"].startswith("no zone is known")


@pytest.mark.parametrize("ungrokking, holds", [(11, True), (6, None), (0, False)])
def test_the_zones_must_surely_predict_more_than_the_hidden_size(ungrokking, holds):
    """Both are right where a hidden size does one thing whatever D. At hidden 8 the zones say ungrokking for D up to 400, the
    hidden size progression, and as many of eleven seeds as told ungrok."""
    settings, rows, curves, now = measured_plane(seeds=11)
    now.values[now.hidden > 8] = 1
    for line in grok.plane(rows):
        few = line["hidden"] == 8 and line["data"] <= 400 and line["seed"] * 5 % 11 < ungrokking
        line["dynamic"] = "grokking" if line["hidden"] > 8 else "ungrokking" if few else "progression"
    claims = grok.judge_zones(settings, rows, now)
    assert claims[0]["holds"] is holds


def test_the_diagram_has_its_cells_where_they_belong():
    settings, rows, curves, now = measured_plane()
    axis = grok.draw_diagram(settings, rows, now).axes[0]

    def color(x, y):
        """Of the cell that holds a point."""
        cell, = (each for each in axis.patches if each.get_window_extent().contains(*axis.transData.transform((x, y))))
        return cell.get_facecolor()[:3]
    for hidden, data, kind in ((4, 300, "progression"), (32, 300, "ungrokking"), (32, 600, "grokking")):
        assert color(np.log2(hidden), data) == to_rgb(common.COLORS[kind])
    dots = [(color(*place), tuple(own[:3])) for each in axis.collections if isinstance(each, PathCollection)
            for place, own in zip(each.get_offsets(), np.resize(each.get_facecolors(), (len(each.get_offsets()), 4)))]
    assert len(dots) == len(grok.plane(rows)) and all(cell == own for cell, own in dots)      # here all seeds do the same


@pytest.mark.parametrize("seeds, critical, capacity", [(6, "95% interval", "range"), (4, "range", "range")])
def test_the_diagram_draws_the_curves_their_crossings_and_the_intervals_that_its_legend_names(seeds, critical, capacity):
    settings, rows, curves, now = measured_plane(seeds=seeds)
    random = np.random.default_rng(0)
    for draws in (now.critical[0.5], now.capacity):
        draws[1:] += random.normal(0, 20, draws[1:].shape)
    figure = grok.draw_diagram(settings, rows, now)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"thin: {critical};" in labels[0] and f"thin:\n{capacity} of 3 seeds" in labels[1]
    lines, once = figure.axes[0].lines, grok.mirrored_once(now.capacity, settings.p)
    for i, (draws, count) in enumerate(((now.critical[0.5], seeds), (now.capacity, 3), (once, 3))):
        expected = [draws[0], *np.percentile(draws[1:], common.tail(count), axis=0)]
        np.testing.assert_allclose([line.get_ydata() for line in lines[3 * i:3 * i + 3]], expected)
    for line, limit in zip(lines[-2:], (now.capacity, once)):
        size, data = grok.crossing(now.hidden, now.critical[0.5], limit)
        assert line.get_xydata()[0] == pytest.approx([math.log2(size[0]), data[0]])


def test_what_the_diagram_is_made_of_is_drawn_as_measured():
    settings, rows, curves, now = measured_plane(seeds=6)
    accuracy, capacity, cost, critical, forgetting, _ = grok.draw_phase(settings, rows, curves)["measures.png"].axes
    for axis, expected in ((accuracy, now.values.mean(-1)), (critical, [now.critical[0.5][0]]),
                           (capacity, [now.capacity[0], grok.mirrored_once(now.capacity, settings.p)[0]])):
        found = [line.get_ydata() for line in axis.lines if len(line.get_xdata()) == 4]      # hidden sizes, or D
        np.testing.assert_allclose(found[-len(expected):], expected)
    norms = {(*line.get_xdata(),): (*line.get_ydata(),) for line in cost.lines if len(line.get_xdata())}
    assert norms[300, 400] == pytest.approx((30, 30 * (4 / 3) ** 0.5)) and norms[400, 500, 600] == (20, 20, 20)
    less = {line.get_label(): list(line.get_ydata()) for line in forgetting.lines}
    assert less["then D = 200"] == [1, 0] and less["then D = 500"] == [1, 1]


def test_curves_that_are_both_out_of_range_do_not_tell_whether_they_cross():
    settings, rows, curves, now = measured_plane(seeds=6)
    assert grok.judge_crossing(settings, now)[0]["holds"] is True
    assert grok.draw_diagram(settings, rows, now).get_suptitle().startswith("The curves cross at d = ")
    now.critical[0.5][:, 2:] = 700      # above the largest D, 600, as the capacity of these sizes is
    crosses, = grok.judge_crossing(settings, now)
    assert crosses["holds"] is None and grok.crossing_shares(now) == (0, 0)
    assert "cross" not in grok.draw_diagram(settings, rows, now).get_suptitle().split("\n")[0]


def test_runs_that_diverged_do_not_speak_against_memorizing_quickly():
    settings, rows, curves = made_up_plane(True)
    rows = [{**line, "memorized_at": 5 if line["hidden"] == 32 else None} for line in rows]      # smaller ones do not count

    def quickly():
        now = grok.measured(settings, rows, curves)
        claims = grok.judge_paper_numbers(replace(settings, p=113), rows, now)
        return [c for c in claims if "learn their training set" in c["claim"]]
    assert quickly()[0]["holds"] is True and quickly()[0]["measured"].endswith("step 5 to 5")
    for line in rows:
        line.update({"dynamic": "diverged", "memorized_at": None} if line["seed"] else {})
    assert quickly()[0]["holds"] is True
    for line in rows:
        line.update(memorized_at=None)
    assert quickly()[0]["holds"] is False and quickly()[0]["measured"].endswith("step > 100 to > 100")


@pytest.mark.parametrize("dips_at, holds", [((400, 500), True), ((300, 400, 500), True), ((600,), False), ((400, 600), False)])
def test_where_the_diagram_predicts_double_descent(dips_at, holds):
    settings, rows, curves = made_up_plane(True, seeds=11)      # the curves cross at D = 530, and the largest model's is at 350
    for line in grok.plane(rows):
        shape = (0.7, 0.0, 0.0, 1.0) if line["data"] in dips_at else (0.3, 0.7, 0.9, 1.0)
        line["val_acc_unmirrored"] = shape[settings.hidden.index(line["hidden"])]
    now = grok.measured(settings, rows, curves)
    dips, = grok.judge_double_descent(settings, rows, now)
    assert dips["paper"] == "(from the curves: 400: dip, 500: dip, 600: no dip)" and dips["holds"] is holds
    for line in grok.plane(rows):      # where the smallest models memorize, no dip may only be one cut off
        line["dynamic"] = "ungrokking"
    dips, = grok.judge_double_descent(settings, rows, now)
    assert dips["holds"] is (False if dips_at == (600,) else None)      # beside a D that agrees, one may do so by chance


def test_no_double_descent_is_predicted_where_the_curves_do_not_cross():
    settings, rows, curves, now = measured_plane()
    crossed = now.capacity.copy()
    now.capacity[0] = 1
    dips, = grok.judge_double_descent(settings, rows, now)
    assert dips["holds"] is None and "nan" not in dips["claim"] + dips["measured"]
    now.capacity[:] = 1
    now.capacity[:50] = crossed[:50]      # nor where they do in a few of the draws
    dips, = grok.judge_double_descent(settings, rows, now)
    assert dips["holds"] is None and dips["measured"] == "where the curves cross is not known"


FALLS = "fig 3: the critical size falls with size, where the model can memorize so much"
RISES = "fig 4: memorization capacity rises with size"
CROSS = "fig 1: the two curves cross once"
PREDICT = ("fig 1: zones from half of the seeds predict the others' dynamic,"
           " in 3 of 4 cells and better than the hidden size alone")


def test_the_framework_can_come_out_either_way():
    for agree in (True, False):
        claims = by_claim(grok.judge_phase(*made_up_plane(agree, seeds=6)))
        assert claims[FALLS] is (True if agree else None)      # else no size memorizes so much
        assert claims[RISES] is agree and claims[PREDICT] is agree
        assert claims[CROSS] is (True if agree else None)      # else not in this range
        forgets, = (holds for name, holds in claims.items() if "D = 600, then D = 200 (critical size 350" in name)
        assert forgets is agree


def test_the_curves_can_move_the_other_way():
    """A critical size that rises with the hidden size, a capacity that falls beneath it, one that is above in half the draws."""
    settings, rows, curves, now = measured_plane()
    assert grok.judge_crossing(settings, now)[0]["holds"] is True
    now.capacity[500:] = 10_000
    assert grok.judge_crossing(settings, now)[0]["holds"] is None
    now.capacity[:] = 10_000
    assert grok.judge_crossing(settings, now)[0]["holds"] is None      # never below
    now.critical = {level: sizes[:, ::-1] for level, sizes in now.critical.items()}
    assert by_claim(grok.judge_critical(settings, now, now))[FALLS] is False
    now.capacity[:, -1] = 10
    assert grok.judge_crossing(settings, now)[0]["holds"] is False
    now.capacity[1:500, -1] = 10_000      # in half of the draws they do not cross
    assert grok.judge_crossing(settings, now)[0]["holds"] is None


def test_curves_that_may_touch_more_than_once_leave_the_crossing_open():
    settings, rows, curves, now = measured_plane()
    random = np.random.default_rng(0)
    now.capacity[:, 1:3] = now.critical[0.5][:, 1:3] + random.normal(0, 60, (len(now.capacity), 2))
    now.capacity[0, 1:3] = now.critical[0.5][0, 1:3] + (1, -1)      # the estimates cross three times, most draws once
    assert grok.judge_crossing(settings, now)[0]["holds"] is None


def test_a_phase_diagram_with_diverged_runs_is_drawn_and_judged_where_it_can_be():
    claims = by_claim(grok.judge_phase(*made_up_plane(True, diverged=(4, 32))))
    assert claims[FALLS] is None and claims[RISES] is None and claims[CROSS] is None
    assert claims["grokked on D = 600, then D = 200 (critical size -)"] is None
    assert by_claim(grok.judge_phase(*made_up_plane(True, diverged=(4,))))[RISES] is None
    assert set(grok.draw_phase(*made_up_plane(True, diverged=(4, 32)))) == {"phase.png", "measures.png"}


def test_change_over_the_second_half_of_the_steps():
    def judged():
        return {c["claim"].split(" (critical size")[0]: c for c in grok.judge_phase(settings, rows, curves)}
    change = "change over the second half of the steps"
    settings, rows, curves = made_up_plane(True, seeds=4)
    claims, now = judged(), grok.measured(settings, rows, curves)
    assert claims[f"capacity: {change}"]["holds"] is claims[f"critical size: {change}"]["holds"] is True
    for times in (0.9, 1.1):
        earlier = replace(now, critical={level: times * sizes for level, sizes in now.critical.items()})
        assert grok.judge_critical(settings, earlier, now)[-1]["holds"] is False
    assert "from d = 16 to 32" in claims[FALLS]["measured"]
    assert claims["grokked on D = 600, then D = 500"]["holds"] is True
    capacity = [line["experiment"] == "capacity" for line in rows]
    for grows, holds in ((1.01, True), (1.04, False)):
        curves["train_acc"][capacity, 1] = curves["train_acc"][capacity, 2] / grows
        assert judged()[f"capacity: {change}"]["holds"] is holds
    curves["train_acc"][capacity, 1] = curves["train_acc"][capacity, 2] / 2
    curves["val_acc_unmirrored"][[line["experiment"] == "plane" and line["data"] == 500 for line in rows], 1] = 0
    claims = judged()
    assert claims[f"capacity: {change}"]["measured"].startswith("+100.0% at most")
    assert claims[f"capacity: {change}"]["holds"] is claims[f"critical size: {change}"]["holds"] is False


def test_a_capacity_that_may_not_rise_leaves_that_open():
    settings, rows, curves = made_up_plane(True, seeds=11)      # three of them for the capacity
    for hidden, known in ((8, (0.2, 0.5, 0.9)), (16, (0.3, 0.5, 0.95))):
        of_size = [line["experiment"] == "capacity" and line["hidden"] == hidden for line in rows]
        curves["train_acc"][of_size] = np.array(known)[:, None]
    assert by_claim(grok.judge_phase(settings, rows, curves))[RISES] is None


@pytest.mark.parametrize("memorizing, generalizing, holds", [
    ((0.3, 0.5), (-0.1, 0.1), True), ((0.1, 0.9), (0.1, 0.2), None), ((0.3, 0.5), (0.1, 0.4), None),
    ((0.3, 0.5), (0.3, 0.4), False), ((0.3, 0.5), (-0.4, -0.3), False), ((-0.5, -0.3), (-0.1, 0.1), None)])
def test_generalizing_more_costs_the_same_within_half_of_memorizing_more(monkeypatch, memorizing, generalizing, holds):
    exponents = {"ungrokking": np.linspace(*memorizing, 1001), "grokking": np.linspace(*generalizing, 1001)}
    exponents["grokking"][-1] = np.nan      # a draw of runs at one D does not count
    monkeypatch.setattr(grok, "settled", lambda rows, kind: kind)
    monkeypatch.setattr(grok, "cost_exponents", exponents.get)
    assert {c["paper"]: c["holds"] for c in grok.judge_cost([])}["stays (k less than half of memorizing's)"] is holds


def test_one_seed_has_no_halves():
    claims = {c["claim"]: c for c in grok.judge_phase(*made_up_plane(True, seeds=1))}
    judged = claims[PREDICT]
    assert judged["holds"] is None and "nan" not in judged["measured"]


@pytest.mark.parametrize("right, holds", [(10, False), (13, True)])      # of 16 cells
def test_zones_must_be_right_in_three_of_four_cells(right, holds, monkeypatch):
    settings, rows, curves, now = measured_plane(seeds=8)
    names = ("zones", "mirrored pairs counted once", "without a zone of semi-grokking")
    found = {(i, 0): ("grokking", {**dict.fromkeys(names, "grokking" if i < right else "ungrokking"), "the same cell": "grokking",
                                   "hidden size": "grokking" if i < 5 else "ungrokking"}) for i in range(16)}
    monkeypatch.setattr(grok, "predictions", lambda *_: found)
    assert grok.judge_zones(settings, rows, now)[0]["holds"] is holds


def test_what_knows_no_curves_is_told_from_the_chosen_seeds_too():
    settings, rows, curves = made_up_plane(True, seeds=8)
    now, chosen = grok.measured(settings, rows, curves), np.arange(8) % 2 == 0
    for line in grok.plane(rows):
        line["dynamic"] = "grokking" if chosen[line["seed"]] else "ungrokking"
    for seen, told in grok.predictions(settings.p, rows, now, chosen).values():
        assert (seen, told["hidden size"], told["the same cell"]) == ("ungrokking", "grokking", "grokking")


def test_the_place_of_the_crossing_that_is_told():
    settings, rows, curves, now = measured_plane(seeds=6)
    now.critical[0.5][:], now.capacity[:] = (550, 550, 450, 350), (150, 440, 900, 961)
    size, where = 8 * 2**(110 / 560), 550 - 100 * 110 / 560      # the gap falls from 110 to -450
    params = (32 + 3 + 31 + 5) * size + 12 * size**2
    text = ", ".join(f"{name}{x:.0f} [{x:.0f}, {x:.0f}]{unit}" for name, x, unit in
                     (("d = ", size, ""), ("", params, " parameters"), ("D = ", where, ";")))
    assert grok.judge_crossing(settings, now)[0]["measured"].startswith(text)


def test_sizes_that_memorize_all_pairs_do_not_speak_against_a_rising_capacity():
    settings, rows, curves = made_up_plane(True)
    curves["train_acc"][[line["experiment"] == "capacity" and line["hidden"] >= 16 for line in rows], 1:] = 1
    assert by_claim(grok.judge_phase(settings, rows, curves))[RISES] is True


def test_where_the_critical_size_is_not_known_nothing_is_foretold():
    """Going on with 360 examples where the critical size may be 310 or 388."""
    settings, rows, curves = made_up_plane(True)
    settings = replace(settings, forget_data=(360,))
    rows = [{**line, "data": 360} if line["experiment"] == "forgetting" else line for line in rows]
    now = grok.measured(settings, rows, curves)
    near, = grok.judge_forgetting(settings, rows, curves, now, now)
    assert near["paper"] == "-" and near["holds"] is None


def test_a_run_that_never_grokked_forgets_nothing():
    settings, rows, curves, now = measured_plane(seeds=6)
    assert [c["holds"] for c in grok.judge_forgetting(settings, rows, curves, now, now)] == [True, True]
    curves["val_acc_unmirrored"][[line["experiment"] == "forgetting" for line in rows], 1] = 0.8
    assert [c["holds"] for c in grok.judge_forgetting(settings, rows, curves, now, now)] == [None, None]


def test_fewer_examples_than_the_critical_size_counts_with_what_it_may_still_fall():
    """Going on with 200, where the critical size is about 350: by half of the steps it was so many times that."""
    settings, rows, curves, now = measured_plane()
    forgets = "(theory of Varma et al.: forgets)"
    for times, expected, holds in ((1, forgets, False), (1.1, forgets, False), (2, "-", None), (0.5, forgets, False)):
        earlier = replace(now, critical={level: times * sizes for level, sizes in now.critical.items()})
        curves["val_acc_unmirrored"][[line["experiment"] == "forgetting" for line in rows], -1] = 1
        fewer, _ = grok.judge_forgetting(settings, rows, curves, earlier, now)
        assert fewer["paper"] == expected and fewer["holds"] is holds


def test_phase_goes_on_with_less_data_only():
    settings = replace(grok.PLANES["quick"], data=(250, 300))      # its runs would go on with 100 and 500
    assert {run.data for run in grok.phase_grid(settings) if run.experiment == "forgetting"} == {100}


@pytest.mark.parametrize("shift, span, step, holds", [(0, 800, 300, [True] * 5),
                                                       (0, 400, 300, [True, True, True, True, False]),
                                                       (2000, 3000, 3000, [False, True, False, False, False])])
def test_the_numbers_of_figure_3_are_compared(shift, span, step, holds):
    """Two sizes whose accuracy rises where the paper says, or shift later and over another span of D."""
    middle, data = {32: 3400 + shift, 64: 2600 + shift}, np.arange(1000, 9001, 200)
    rows = [{"experiment": "plane", "hidden": h, "data": d, "val_acc_unmirrored": np.clip(0.5 + (d - at) / span, 0, 1),
             "memorized_at": step, "steps": 10000, "dynamic": "grokking"}
            for h, at in middle.items() for d in data for _ in range(6)]
    critical = {level: np.tile([at + (level - 0.5) * span for at in middle.values()], (5, 1)) for level in grok.LEVELS}
    now = grok.Measured(np.array([32, 64]), data, None, critical, None)
    assert [c["holds"] for c in grok.judge_paper_numbers(grok.PLANES["paper"], rows, now)] == holds
    few = grok.judge_paper_numbers(grok.PLANES["paper"], rows[::2], now)      # three seeds may do the same by chance
    assert [c["holds"] for c in few] == [None] * 3 + holds[3:]
    assert not grok.judge_paper_numbers(grok.PLANES["small"], rows, now)


@pytest.mark.parametrize("kind, exponent", [("ungrokking", 0.5), ("grokking", 0.0)])
def test_cost_exponent_of_a_known_power_law(kind, exponent):
    noise = np.random.default_rng(0).normal(0, 0.02, 30)
    rows = [{"experiment": "plane", "hidden": h, "data": d, "dynamic": kind, "norm": h * d**exponent * np.exp(noise[i]),
             "generalized_at": 40 if kind == "grokking" else None, "steps": 100}
            for i, (h, d) in enumerate((h, d) for h in (8, 16, 32) for d in (300, 500, 900) for _ in range(3))]
    others = [{**rows[0], "norm": 1e9, **other} for other in ({"dynamic": "progression"}, {"generalized_at": 60})]
    runs = grok.settled([*rows, *others], kind)
    assert runs == rows
    draws = grok.cost_exponents(runs)
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    assert draws[0] == pytest.approx(exponent, abs=0.03) and low < exponent < high < low + 0.1
    for too_few in (rows[:3], []):      # one D, none
        assert np.isnan(grok.cost_exponents(too_few)).all()


def test_what_the_circuits_cost_can_come_out_either_way():
    def judged(memorizing, generalizing):
        norms = {"ungrokking": memorizing, "grokking": generalizing}
        rows = [{"experiment": "plane", "hidden": h, "data": d, "dynamic": kind, "norm": norm(d) * (1 + 0.01 * (seed - 1)),
                 "generalized_at": 40 if kind == "grokking" else None, "steps": 100}
                for h in (8, 16) for d in (300, 400, 500) for seed in range(3) for kind, norm in norms.items()]
        return [c["holds"] for c in grok.judge_cost(rows)]
    assert judged(lambda d: d**0.5, lambda d: 5) == [True, True, True]
    assert judged(lambda d: 5, lambda d: d**0.5) == [None, False, False]
    assert judged(lambda d: d**0.5, lambda d: 1 / d) == [True, False, True]


def test_the_cost_of_generalizing_is_not_held_against_one_that_is_not_known():
    rows = [{"experiment": "plane", "hidden": 8, "data": d, "dynamic": kind, "norm": norm, "generalized_at": 40, "steps": 100}
            for d in (300, 400, 500) for kind, norm in [("ungrokking", d**0.5), *[("grokking", 5)] * 9]]
    grokked = [{**line, "norm": line["data"]**0.02} for line in rows if line["dynamic"] == "grokking"]      # a rise for sure
    for lines in (rows, grokked):
        memorizing, generalizing, _ = grok.judge_cost(lines)
        assert memorizing["measured"] == "too few runs" and "n = 27" in generalizing["measured"]
        assert memorizing["holds"] is generalizing["holds"] is None


# double descent


def made_up_rows(dip_small, dip_large, dip_squared):
    """Rows whose curves dip or not, and curves for nothing else."""
    def line(task, data, hidden, value, seed):
        return {"task": task, "p": 11, "data": data, "hidden": hidden, "seed": seed,
                "val_acc_unmirrored": value, "val_acc": value, "train_acc": 1.0,
                "dynamic": "progression" if hidden == 4 else "grokking"}
    lines = (("addition", 40, dip_small), ("addition", 60, dip_large), ("squared_addition", 60, dip_squared))
    return [line(task, data, hidden, 0.02 if dips and hidden == 16 else value, seed) for seed in range(6)
            for task, data, dips in lines for hidden, value in ((4, 0.5), (8, 0.7), (16, 0.8), (32, 1.0))]


DIPS = replace(double_descent.PRESETS["quick"], p=11, seeds=6, hidden=(4, 8, 16, 32), data=(40, 60), squared_data=(60,))


def rows_of(settings, accuracy=lambda run: 1.0, **more):
    """A row for each run of these settings, which groks to the accuracy that is given for it."""
    return [{**common.asdict(run), "dynamic": "grokking", "train_acc": 1.0, "val_acc": accuracy(run),
             "val_acc_unmirrored": accuracy(run), **more} for run in double_descent.grid(settings)]


def test_a_title_names_the_interval_that_is_drawn():
    for seeds, drawn in ((2, "(mean, no interval; seeds: 2;"), (3, "(mean, range; seeds: 3;"),
                         (6, "(mean, 95% interval; seeds: 6;")):
        rows = [line for line in made_up_rows(True, False, True) if line["seed"] < seeds]
        figure = double_descent.draw(replace(DIPS, seeds=seeds), rows, {})["double_descent.png"]
        assert drawn in figure.get_suptitle()


def test_the_papers_sizes_do_not_run_into_each_other():
    settings = replace(double_descent.PRESETS["paper"], seeds=1, data=(3000,))
    figure = double_descent.draw(settings, rows_of(settings), {})["double_descent.png"]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[2].get_xticklabels()]
    assert len(boxes) == 15 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("dips, verdicts", [
    ((True, False, True), (True, True, True)),
    ((True, True, True), (None, None, None)),        # all D may lie below the crossing, or above it
    ((True, True, False), (None, False, False)),
    ((False, False, True), (None, True, True)),
    ((False, True, True), (False, None, None)),
    ((False, False, False), (None, None, None))])    # no dip of addition, beside which that of the harder task could be less deep
def test_predictions_can_come_out_either_way(dips, verdicts):
    rows = made_up_rows(*dips)
    claims = double_descent.judge(DIPS, rows, {})
    assert [c["holds"] for c in claims[:3]] == list(verdicts)
    rows[0]["val_acc_unmirrored"] = 0.9      # one seed of the smallest size: its mean is not the end of its interval
    figure = double_descent.draw(DIPS, rows, {})["double_descent.png"]
    curve = figure.axes[0].lines[0]
    assert curve.get_ydata() == pytest.approx(common.size_curve(rows, "addition", min(DIPS.data))[1].mean(1))
    assert figure.get_suptitle().startswith("Wider models can generalize worse" if any(dips) else "No dip")
    points = [[each for each in axis.collections if isinstance(each, PathCollection)] for axis in figure.axes[:2]]
    rings = [[each.get_offsets()[0] for each in some if each.get_sizes()[0] == 280] for some in points]
    assert [len(each) for each in rings] == [sum(dips[:2]), dips[2]]
    assert all(tuple(place) == pytest.approx((16, 0.02), rel=0.05) for each in rings for place in each)


@pytest.mark.parametrize("kind, verdict", [("progression", "no dip"), ("stalled", "undecided"), ("grokking", "undecided")])
def test_no_dip_is_told_where_the_smallest_models_generalize_before_they_memorize(kind, verdict):
    rows = [{**line, "dynamic": kind if line["hidden"] == 4 else "grokking"} for line in made_up_rows(False, False, False)]
    assert common.dip_of(rows, "addition", 40)[-1] == verdict
    sparse = [line for line in rows if line["hidden"] != 8]      # a dip may lie between 4 and 16
    assert common.dip_of(sparse, "addition", 40)[-1] == "undecided"


def test_a_curve_on_which_nothing_generalizes_is_no_curve_without_a_dip():
    """Nor one that ends below one half: what is to the right of a dip was not tried."""
    flat = [{**line, "val_acc_unmirrored": 0.02} for line in made_up_rows(False, False, False)]
    claims = double_descent.judge(DIPS, flat, {})
    assert {c["holds"] for c in claims} == {None} and common.dip_of(flat, "addition", 40)[-1] == "undecided"


def test_the_first_prediction_is_judged_by_the_d_that_are_decided():
    less = [{**line, "data": 20, "val_acc_unmirrored": 0.05} for line in made_up_rows(False, False, False)
            if (line["task"], line["data"]) == ("addition", 40)]
    first, *_ = double_descent.judge(replace(DIPS, data=(20, 40, 60)), [*made_up_rows(True, False, True), *less], {})
    assert first["holds"] is True and re.match("D = 40: dip, .*; D = 60: no dip", first["measured"])


def test_a_harder_task_that_has_not_come_back_does_not_dip_less():
    rows = [{**line, "val_acc_unmirrored": 0.1} if line["task"] == "squared_addition" and line["hidden"] == 32 else line
            for line in made_up_rows(True, True, True)]
    _, alone, deeper, larger, *_ = double_descent.judge(DIPS, rows, {})
    assert alone["measured"] == "D = 60: undecided against dip" and alone["holds"] is None
    assert "by -0." in deeper["measured"] and deeper["holds"] is None and larger["holds"] is True


def test_a_dip_of_more_sizes_is_not_deeper_for_that():
    """Runs that succeed or fail: the easier task dips at one size, the harder at six, to the same accuracy."""
    settings = replace(DIPS, seeds=11, hidden=tuple(range(4, 52, 4)), data=(60,))
    random, verdicts = np.random.default_rng(0), []
    for _ in range(40):
        rows = [{**common.asdict(run), "dynamic": "progression" if run.hidden == 4 else "grokking",
                 "val_acc_unmirrored": float(random.random() < (0.5 if run.hidden in low else 0.97))}
                for run in double_descent.grid(settings)
                for low in [(24,) if run.task == "addition" else (16, 20, 24, 28, 32, 36)]]
        found, _ = double_descent.judge_dips(settings, rows)
        verdicts.append(double_descent.judge_harder(settings, rows, found)[1]["holds"])
    assert verdicts.count(True) <= 1


def test_as_many_line_styles_as_a_figure_has_d():
    settings = replace(DIPS, data=(40, 45, 50, 55, 60, 65), squared_data=(0,))
    legend = double_descent.draw(settings, rows_of(settings), {})["double_descent.png"].axes[1].get_legend()
    assert len({repr(line._dash_pattern) for line in legend.get_lines()}) == 6


@pytest.mark.parametrize("means, size", [((0, 0.3, 0.7, 1), 128**0.5), ((0.6, 0.2, 0.6, 0.6), 8 * 2**0.75), ((0.5, 0.5, 1, 1), 4),
                                         ((1, 1, 1, 0.4), math.inf), ((0, 0, 0, 0), math.inf)])
def test_the_size_from_which_on_accuracy_suffices(means, size):
    draws = double_descent.sufficient_size(np.array([4, 8, 16, 32]), np.tile(np.array(means)[:, None], 6))
    assert draws.shape == (2001,) and draws == pytest.approx(size)


@pytest.mark.parametrize("hard, easy, holds, text", [
    ((0, 0, 0.2, 0.9), (0, 0.2, 0.9, 1), True, "d = 22 against 11, 2.0 [2.0, 2.0] times"),
    ((0, 0.2, 0.9, 1), (0.9, 0, 0.2, 0.9), False, "d = 11 against 22, 0.5 [0.5, 0.5] times"),
    ((0, 0.2, 0.9, 1), (0, 0, 0.2, 0.9), None, "d = 11 against 22, 0.5 [0.5, 0.5] times"),      # both may be above their crossing
    ((0, 0, 0, 0.4), (0, 0, 0, 1), True, "d = more than 32 against 23, at least 1.4 [1.4, 1.4] times"),
    ((0, 0, 0, 0.4), (0, 0, 0, 0.4), None, "d = more than 32 against more than 32")])
def test_whether_the_harder_task_needs_a_larger_model_can_come_out_either_way(hard, easy, holds, text):
    means = {"squared_addition": hard, "addition": easy}
    settings = replace(DIPS, data=(60,))
    rows = rows_of(settings, lambda run: means[run.task][settings.hidden.index(run.hidden)])
    larger = double_descent.judge(settings, rows, {})[2]
    assert larger["holds"] is holds and larger["measured"] == f"D = 60: {text}"
    few = double_descent.judge(settings, [line for line in rows if line["seed"] < 2], {})[2]
    assert few["holds"] is None and "[" not in few["measured"]


@pytest.mark.parametrize("level, holds", [(0.01, [True, True]), (0.5, [False, False])])
def test_the_numbers_of_the_paper_are_compared_at_its_scale(level, holds):
    """Curves that fall to level at hidden 24, which is as low as the paper says or is not."""
    settings = replace(double_descent.PRESETS["paper"], seeds=6, hidden=(8, 24, 64), data=(2600, 3000, 4000))
    rows = rows_of(settings, lambda run: {8: 0.5, 24: 0.6 if run.data == 4000 else level, 64: 1.0}[run.hidden],
                   dynamic="progression")
    claims = {c["claim"]: c for c in double_descent.judge(settings, rows, {})}
    zeros = [claims["addition, D = 2600, d = 24: val_acc"], claims["squared_addition, D = 3000, d = 24: val_acc"]]
    assert [c["holds"] for c in zeros] == holds
    dips = {data: claims[f"addition, D = {data}: whether accuracy dips"] for data in settings.data}
    assert [dips[data]["holds"] for data in (2600, 3000, 4000)] == ([True, True, True] if level < 0.1 else [False, None, True])
    assert dips[2600]["paper"] == "dip" and ("at d = 24" in dips[2600]["measured"]) == (level < 0.1)


@pytest.mark.parametrize("zero, others, verdict", [
    (lambda seed: 0.01, 0.01, None),      # no size learns
    (lambda seed: 0.3, 0.45, False), (lambda seed: 0.01, 0.99, True), (lambda seed: 0.9 if seed == 0 else 0.01, 0.99, None)])
def test_whether_an_accuracy_is_zero_where_the_paper_has_zero(zero, others, verdict):
    settings = replace(double_descent.PRESETS["paper"], seeds=6, hidden=(8, 24, 64), data=(2600, 3000, 4000))
    rows = rows_of(settings, lambda run: zero(run.seed) if run.hidden == 24 else others)
    rows[0] |= {"val_acc": None, "dynamic": "diverged"}      # a run of another size
    assert [c["holds"] for c in double_descent.judge_zeros(settings, rows)] == [verdict] * 2
    few = [line for line in rows if 0 < line["seed"]]      # five seeds: that all of them fail says little
    assert [c["holds"] for c in double_descent.judge_zeros(settings, few)] == [None] * 2


@pytest.mark.parametrize("place, sizes, holds", [
    (20, (8, 20, 24, 28, 40, 48, 100), [False, False, False]), (24, (8, 20, 24, 28, 40, 48, 100), [True, False, True]),
    (28, (8, 20, 24, 28, 40, 48, 100), [True, True, False]), (24, (8, 24, 40, 100), [None, None, None]),
    (20, (8, 20, 48, 100), [None, None, None])])
def test_the_place_of_a_dip_is_known_to_the_sizes_beside_it(place, sizes, holds):
    settings = replace(double_descent.PRESETS["paper"], seeds=6, hidden=sizes, data=(2600, 3000))
    rows = [{"task": task, "data": data, "hidden": h, "val_acc_unmirrored": 0.01 * seed if h == place else 0.8}
            for task, data in double_descent.PAPER_PLACES for h in settings.hidden for seed in range(6)]
    found = {which: ("dip", "") for which in double_descent.PAPER_PLACES}
    claims = double_descent.judge_places(rows, found)
    assert [c["measured"] for c in claims] == [f"{place} [{place}, {place}]"] * 3 and [c["holds"] for c in claims] == holds
    assert double_descent.judge_places(rows, dict.fromkeys(found, ("no dip", ""))) == []


def test_a_place_that_the_seeds_disagree_on_is_open():
    sizes, low = (8, 20, 24, 28, 40, 48, 100), {24: (0, 0, 0, 0.3, 0.3, 0.3), 48: (0.3, 0.3, 0.3, 0, 0, 0.01)}
    rows = [{"task": task, "data": data, "hidden": h, "val_acc_unmirrored": low[h][seed] if h in low else 0.8}
            for task, data in double_descent.PAPER_PLACES for h in sizes for seed in range(6)]
    claims = double_descent.judge_places(rows, dict.fromkeys(double_descent.PAPER_PLACES, ("dip", "")))
    assert [(c["measured"], c["holds"]) for c in claims] == [("24 [24, 48]", None)] * 3


@pytest.mark.parametrize("few", [{"hidden": 32}, {"seed": 0}])
def test_one_size_or_one_seed_decides_nothing(few):
    rows = [line for line in made_up_rows(True, False, False) if all(line[name] == value for name, value in few.items())]
    assert {c["holds"] for c in double_descent.judge(DIPS, rows, {})} == {None}


def test_prediction_1_is_judged_on_the_harder_task_too():
    other = {"addition": "squared_addition", "squared_addition": "addition"}
    rows = [{**line, "task": other[line["task"]]} for line in made_up_rows(True, False, False)]
    first, *_ = double_descent.judge(replace(DIPS, data=(60,), squared_data=(40, 60)), rows, {})
    assert first["claim"].startswith("prediction 1: squared_addition") and first["holds"] is True


def test_addition_can_be_trained_alone():
    settings = replace(DIPS, squared_data=(0,))
    rows = [line for line in made_up_rows(True, False, True) if line["task"] == "addition"]
    assert {run.task for run in double_descent.grid(settings)} == {"addition"}
    whole, alone = (double_descent.judge(each, made_up_rows(True, False, True), {}) for each in (DIPS, settings))
    assert alone == [c for c in whole if c["claim"].startswith(("addition", "prediction 1 "))]
    panel, beneath = double_descent.draw(settings, rows, {})["double_descent.png"].axes
    assert len(panel.lines) == len(beneath.lines) == 2 and panel.lines[0].get_linestyle() == "-"


# emergence


def made_up_ladder(mixed, split):
    """Settings and rows of a ladder: best accuracy of addition alone is 1 but at one smaller size; of the others as given."""
    settings = replace(emergence.PRESETS["quick"], p=11, layers=(1, 1, 1), hidden=(8, 16, 32), data=60, memorize=(20,))
    best = {(0, False): (1, 1, 1), (20, False): mixed, (20, True): split}
    same = {"dynamic": "grokking", "circuit_share": 0.5, "val_loss": 1.0, "val_acc": 0.5, "best_val_acc_unmirrored": 1.0,
            "memorize_acc": 0.9}
    rows = [{**common.asdict(run), "params": common.parameters(run), **same,
             "best_val_acc_memorized": best[run.memorize, run.split][settings.hidden.index(run.hidden)]}
            for run in emergence.grid(settings)]
    small = [{**line, "hidden": 4, "params": line["params"] // 2, "best_val_acc_unmirrored": 0.2}
             for line in rows if line["hidden"] == 8 and not line["memorize"]]
    return settings, rows + small


@pytest.mark.parametrize("mixed, split, verdicts", [
    ((0.02, 0.02, 0.95), (0.02, 0.95, 1), (True, True, True)),
    ((None, 0.05, 0.3), (None, 0.04, 0.3), (True, None, None)),
    ((None, None, None), (None, None, 1), (None, None, None)),
    ((None, 0.05, 0.3), (None, 1, 1), (True, None, True)),
    ((1, 1, 1), (1, 1, 1), (False, None, None)),      # both at the smallest size, which is a bound
    ((0.3, 1, 1), (0.3, 1, 1), (False, True, None)),      # either may be first
    ((1, 0.05, 1), (1, 1, 1), (True, True, True)),      # lost only after a size that learns it
    ((0.02, None, 0.95), (0.02, 0.95, 1), (True, True, None)),      # at the size between, the labels are not known
    ((0.3, 0.95, 0.95), (0.1, 0.1, 0.95), (False, True, False))])
def test_emergence_can_come_out_either_way(mixed, split, verdicts):
    claims = {c["claim"]: c for c in emergence.judge(*made_up_ladder(mixed, split), {})}
    names = ("fig 8: addition fails beside memorization at a size that learns it alone",
             "fig 8: larger models generalize again (0.9)",
             "fig 10: with a split layer, accuracy 0.9 is reached from a smaller size on")
    assert tuple(claims[name]["holds"] for name in names) == verdicts


@pytest.mark.parametrize("mixed, below, found", [
    ((0.02, 0.02, 0.95), 16, 32), ((0.02, None, 0.95), 8, 32), ((1, 1, 1), None, 8), ((0.02, 1, 0.5), 32, None),
    ((1, 0.02, 0.95), 16, 32), ((None, 0.02, None), 16, None), ((None, None, None), None, None)])
def test_the_size_from_which_on_a_level_is_reached(mixed, below, found):
    settings, rows = made_up_ladder(mixed, (1, 1, 1))
    params = {line["hidden"]: line["params"] for line in rows} | {None: 0}
    assert emergence.bracket(rows, 0.9, 20, False) == (params[below], params[found] or None)
    assert emergence.bracket(rows, 0.9, 0, False)[1] == params[8]


def test_a_size_that_diverged_was_not_tried():
    settings, rows = made_up_ladder((0.02, 0.02, 0.02), (0.02, 0.95, 1))
    for line in rows:
        line["params"] *= 10**5 if line["hidden"] == 32 else 1
        line["dynamic"] = "diverged" if line["hidden"] == 32 and not line["split"] else line["dynamic"]
    claims = by_claim(emergence.judge(settings, rows, {}))
    assert claims["fig 8: larger models generalize again (0.9)"] is None
    assert claims["fig 10: with a split layer, accuracy 0.9 is reached from a smaller size on"] is None


def test_that_addition_is_never_lost_is_a_no_only_at_sizes_where_the_paper_has_it_lost():
    settings, rows = made_up_ladder((None, 1, 1), (1, 1, 1))
    assert emergence.judge_suppression(settings, rows)[0]["holds"] is False
    enough = [line for line in rows if line["hidden"] > 4]      # how small a model learns addition alone is not known
    assert emergence.judge_suppression(settings, enough)[0]["holds"] is None
    fails = [line | {"best_val_acc_memorized": 0.02 if line["hidden"] == 16 else 1} for line in enough]
    assert emergence.judge_suppression(settings, fails)[0]["holds"] is True
    for line in enough:      # nor where the largest model has not learned it yet
        line["best_val_acc_unmirrored"] = 0.85 if line["hidden"] == 32 else 1
    assert emergence.judge_suppression(settings, enough)[0]["holds"] is None


def test_accuracy_counts_only_where_the_memorization_is_known():
    settings, rows = made_up_ladder((None, None, 0.95), (1, 1, 1))
    for line in rows:
        if line["best_val_acc_memorized"] is None:
            line["best_val_acc_unmirrored"] = 0.01
    fails, again = emergence.judge_suppression(settings, rows)
    assert fails["holds"] is None and "at no size" in fails["measured"] and again["holds"] is None      # one size does not tell
    for line in rows:
        line["dynamic"] = "diverged"      # also where it had learned both before
    assert all(np.isnan(emergence.best(rows)) and c["holds"] is None for c in emergence.judge_suppression(settings, rows))


@pytest.mark.parametrize("mixed, finding, arrow", [
    ((0.02, 0.02, 0.95), "Beside memorization, addition fails at 1×8, 1×16 and passes 0.5 at 1×32 (3 of 3 seeds)", True),
    ((0.3, 0.2, 0.4), "Beside memorization, addition is partly learned at 1×8, 1×16, 1×32", False),
    ((0.02, 0.3, 0.95), "Beside memorization, addition fails at 1×8 and passes 0.5 at 1×32 (3 of 3 seeds)", True),
    ((None, 1, 1), "Addition passes 0.5 at every size that memorizes the labels", False),
    ((None, None, None), "Addition beside memorization", False)])
def test_the_title_says_what_was_found_and_an_arrow_how_late_addition_comes_back(mixed, finding, arrow):
    settings, rows = made_up_ladder(mixed, (1, 1, 1))
    figure = emergence.draw(settings, rows, {})["emergence.png"]
    assert figure.get_suptitle().split("\n")[0] == finding and bool(figure.axes[0].texts) == arrow


def test_the_panels_draw_what_they_name_and_no_point_of_a_known_run_above_its_line():
    settings, rows = made_up_ladder((0.02, None, 0.95), (0.1, 0.95, 1))      # best_val_acc_unmirrored is 1 throughout
    accuracy, *lower = emergence.draw(settings, rows, {})["emergence.png"].axes
    beside, = (line.get_ydata() for line in accuracy.lines if line.get_label() == "+ 20 to memorize")
    np.testing.assert_allclose(beside, [0.02, math.nan, 0.95])
    for axis, value in zip(lower, (rows[0]["val_loss"], rows[0]["circuit_share"])):
        drawn = np.concatenate([line.get_ydata() for line in axis.lines if len(line.get_xdata()) == 3])
        assert set(drawn[np.isfinite(drawn)]) == {value}
    points = [line for line in accuracy.lines if len(line.get_xdata()) == 1]
    filled = [line.get_ydata()[0] for line in points if str(line.get_markerfacecolor()) != "none"]
    assert sorted(set(np.round(filled, 2))) == [0.02, 0.1, 0.2, 0.95, 1] and len(points) == len(filled) + 3


@pytest.mark.parametrize("amounts, first, second, holds", [
    ((20, 40), (0.02, 0.95, 1), (0.02, 0.02, 0.95), True), ((20, 40), (0.95, 1, 1), (0.02, 0.95, 1), None),
    ((20, 30), (0.02, 0.95, 1), (0.02, 0.95, 1), None), ((20, 30), (0.95, 1, 1), (0.02, 0.02, 0.95), False),
    ((20, 40), (0.95, 1, 1), (None, None, 0.95), None), ((20, 40), (0.02, 0.95, 1), (None, 0.95, 1), None),
    ((20, 40), (0.02, None, 0.95), (0.02, 0.02, 0.95), True), ((20, 40), (0.95, 1, 1), (0.02, 0.02, 0.02), False),
    ((20, 40), (0.02, 0.02, 0.95), (0.02, 0.02, 0.02), None)])      # the next size may suffice
def test_that_the_amount_to_memorize_matters_little_takes_a_range_of_amounts(amounts, first, second, holds):
    settings, rows = made_up_ladder(first, (1, 1, 1))
    rows += [{**line, "memorize": amounts[1], "best_val_acc_memorized": second[settings.hidden.index(line["hidden"])]}
             for line in rows if line["memorize"] and not line["split"]]
    claims = emergence.judge_comparisons(replace(settings, memorize=amounts), rows)
    assert [c["holds"] for c in claims if "matters little" in c["claim"]] == [holds, holds]


@pytest.mark.parametrize("least, most, text", [(3, 20, "10 times (3 to 20)"), (3, math.inf, "10 times (at least 3)"),
                                               (0, 20, "10 times (at most 20)"), (0, math.inf, "10 times")])
def test_a_ratio_has_the_bounds_that_are_known(least, most, text):
    assert emergence.times_text(10, least, most) == text


def test_a_large_model_that_fails_alone_does_not_make_smaller_ones_too_small():
    settings, rows = made_up_ladder((0.6, 0.7, 0.1), (1, 1, 1))
    rows = [line for line in rows if line["hidden"] != 4]
    for line in rows:
        line["best_val_acc_unmirrored"] = 0.5 if line["hidden"] == 32 else 1.0
    assert emergence.judge_suppression(settings, rows)[0]["holds"] is None


def test_that_no_size_suffices_is_a_no_only_far_beyond_the_ratio_of_the_paper():
    settings, rows = made_up_ladder((0.02, 0.02, 0.02), (1, 1, 1))
    assert emergence.judge_suppression(settings, rows)[1]["holds"] is None
    for line in rows:
        line["params"] *= 10**4 if line["hidden"] == 32 else 1
    assert emergence.judge_suppression(settings, rows)[1]["holds"] is False


@pytest.mark.parametrize("alone, beside, larger, holds", [
    ((0.2, 1, 1, 1), (0, 0, 0, 1), 1, True), ((0.2, 1, 1, 1), (0, 0, 1, 1), 1, None), ((0.2, 1, 1, 1), (0, 1, 1, 1), 1, False),
    ((0.2, 1, 1, 1), (0, 0, 0, 0), 1, None), ((1, 1, 1, 1), (0, 0, 0, 1), 1, None),
    ((1, 1, 1, 1), (0, 0, 0, 1), 100, False)])      # a bound far above it
def test_a_ratio_is_the_papers_if_all_between_the_sizes_tried_is(alone, beside, larger, holds):
    settings = replace(emergence.PRESETS["paper"], layers=(1,) * 4, hidden=(8, 16, 32, 64), memorize=(3000,))
    sizes = 300, 400 * larger, 400_000 * larger, 1_200_000 * larger      # from 1000 to 4000 times, if between the last two
    params = dict(zip(settings.hidden, sizes))
    rows = [{"params": params[run.hidden], "layers": 1, "hidden": run.hidden, "lr": run.lr, "memorize": run.memorize,
             "split": run.split, "dynamic": "grokking", "best_val_acc_unmirrored": alone[i], "best_val_acc_memorized": beside[i]}
            for run in emergence.grid(settings) for i in [settings.hidden.index(run.hidden)]]
    claims = [c for c in emergence.judge_thresholds(settings, rows) if "1570" in c["paper"]]
    assert [c["holds"] for c in claims] == [holds, holds]


def test_a_verdict_on_emergence_does_not_hang_on_one_seed():
    settings, rows = made_up_ladder((0.02, 0.02, 0.95), (0.02, 0.95, 1))
    larger = "fig 8: larger models generalize again (0.9)"
    for line in rows:
        if line["seed"] and line["memorize"] and line["hidden"] == 32:
            line["best_val_acc_memorized"] = 0.1
    assert emergence.judge_suppression(settings, rows)[1]["holds"] is True
    assert by_claim(emergence.judge(settings, rows, {}))[larger] is None
    one = replace(settings, seeds=1), [line for line in rows if line["seed"] == 0]
    assert all(c["holds"] is None for c in emergence.judge(*one, {}))


JUMP, SLOPE = (0.0, 0.0, 0.0, 1.0, 1.0), (0.0, 0.2, 0.5, 0.8, 1.0)


@pytest.mark.parametrize("accuracy, loss, share, holds", [
    (JUMP, SLOPE, SLOPE, True), (JUMP, JUMP, SLOPE, False), (JUMP, SLOPE, JUMP, False), (SLOPE, SLOPE, SLOPE, False),
    ((0.0, 0.0, 0.0, 0.01, 0.01), SLOPE, SLOPE, None), (JUMP[1:], SLOPE[1:], SLOPE[1:], None)])
def test_the_metric_is_judged_only_where_accuracy_changes(accuracy, loss, share, holds):
    """And from five sizes on."""
    settings = replace(emergence.PRESETS["quick"], p=11, layers=(1,) * len(accuracy), hidden=(8, 16, 32, 64, 128)[:len(accuracy)],
                       data=60, memorize=(20,))
    best = {"dynamic": "grokking", "best_val_acc_memorized": 0.5, "best_val_acc_unmirrored": 0.5}
    rows = [{**common.asdict(run), **best, "params": common.parameters(run),
             **{name: values[settings.hidden.index(run.hidden)] for name, values in
                (("val_acc", accuracy), ("val_loss", loss), ("circuit_share", share))}} for run in emergence.grid(settings)]
    metric, = emergence.judge_metric(settings, rows)
    assert metric["holds"] is holds


def test_wide_models_learn_slower_and_decay_as_fast_and_deep_ones_do_both_slower():
    runs = emergence.grid(emergence.PRESETS["paper"])
    assert all(run.lr * run.layers * run.weight_decay == pytest.approx(1e-2) for run in runs)
    assert {(run.lr * run.layers, run.weight_decay) for run in runs if run.hidden <= 128} == {(1e-2, 1.0)}
    assert min(run.lr for run in runs) == pytest.approx(1e-2 / 64)
    halved = emergence.grid(replace(emergence.PRESETS["paper"], lr=5e-3))
    assert {run.lr * run.layers for run in halved if run.hidden <= 256} == {5e-3}
    assert all(run.lr == slower.lr for run, slower in zip(runs, halved) if run.hidden > 256)


def test_abruptness():
    assert emergence.abruptness([0, 0, 1, 1]) == 1 and emergence.abruptness([0, 0.25, 0.5, 0.75, 1]) == pytest.approx(0.25)
    assert math.isnan(emergence.abruptness([0.5, 0.5]))


# the phenomenon


def test_grokking_and_memorizing_alone_at_tiny_scale():
    run = Run("addition", 37, 16, 400, 0, 1200, 2e-2, 1.0)
    history = common.train([run, replace(run, seed=1)], "cpu")
    assert (history["train_acc"].amax(1) == 1).all() and (history["val_acc_unmirrored"].amax(1) < 0.5).all()
    run = replace(run, hidden=48, data=600)
    history = common.train([run, replace(run, seed=1)], "cpu")
    for i in range(2):
        line = common.row(run, {k: v[i].numpy() for k, v in history.items()})
        assert line["dynamic"] == "grokking" and line["generalized_at"] > 5 * line["memorized_at"]
        assert line["circuit_share"] > 0.5


# what a command leaves, and goes on from


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny finished run."""
    out = tmp_path_factory.mktemp("tiny") / "out"
    done = command(*TINY, "--seeds", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_outputs(finished):
    out, done = finished
    rows, curves = common.read_results(out)
    cells = common.read_table(out / "cells.csv")
    assert [cell["seeds"] for cell in cells] == [2] * 4 and cells[0]["val_acc_low"] is None      # of two seeds: none
    for measure in ("val_acc", "val_acc_unmirrored"):
        assert cells[0][measure] == pytest.approx(np.mean([line[measure] for line in rows[:2]]))
    files = "cache runs.csv cells.csv curves.npz summary.json dynamics.png progression.png"
    assert {p.name for p in out.iterdir()} == set(files.split())
    columns = ("experiment task p layers hidden params data memorize split seed steps lr weight_decay train_acc val_acc"
               " val_acc_unmirrored train_loss val_loss best_val_acc memorized_at generalized_at dynamic norm")
    assert len(rows) == 8 and set(columns.split()) <= set(rows[0])
    assert curves["train_acc"].shape == curves["step"].shape and curves["step"].shape[0] == 8 and curves["step"][0, -1] == 30
    assert rows[0]["params"] == common.parameters(Run("addition", 11, 4, 60, 0, 1, 1, 1))
    assert rows[0]["train_acc"] == pytest.approx(curves["train_acc"][0, -1])
    summary = json.loads((out / "summary.json").read_text())
    entries = "command configuration python torch numpy device seconds run_steps_per_second claims"
    assert set(entries.split()) <= set(summary) and summary["runs_trained"] == 8
    assert all(set(c) == {"claim", "paper", "measured", "holds"} for c in summary["claims"]) and "fig 9" in done.stdout


def test_a_summary_holds_each_cells_mean_and_interval():
    rows = [{**common.asdict(run), "dynamic": "grokking", "val_acc": 0.1 * run.seed, "best_val_acc": None, "val_loss": 1.0,
             "memorized_at": 100 * run.seed or None} for data in (40, 50) for run in runs_of(4, data=data)]
    first, second = common.summarize(rows)
    mean, low, high = common.interval([0, 0.1, 0.2, 0.3])
    assert (first["val_acc"], first["val_acc_low"], first["val_acc_high"]) == pytest.approx((mean, low, high))
    assert first["data"] == 40 and second["data"] == 50 and first["seeds"] == 4 and first["dynamics"] == "grokking 4/4"
    assert math.isnan(first["best_val_acc"]) and "val_loss" not in first
    assert (first["memorized_at"], first["memorized_at_low"]) == (200, 100)      # of those that had


def test_what_is_printed(capsys):
    rows = [{**common.asdict(run), "dynamic": "diverged" if split else "grokking", "val_acc": None if split else 0.5}
            for split in (False, True) for run in runs_of(2, memorize=20, split=split)]
    cells = common.summarize(rows)
    assert [cell["seeds"] for cell in cells] == [2, 2]
    common.print_results(rows, cells, [common.claim("it", paper, "1", holds) for paper in "-x" for holds in (True, False, None)])
    printed = capsys.readouterr().out
    assert re.findall(r"(?m)^it .* (\S+)$", printed) == ["yes", "NO", "-", "yes", "NO", "undecided"]
    assert re.findall(r"(?m)(?:False|True) .*/2  +(\S+)$", printed) == ["0.5", "-"] and printed.count("diverged:") == 2


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "out")


def test_finished_runs_are_not_repeated(finished, copied):
    for name in ("runs.csv", "curves.npz"):
        (copied / name).unlink()
    assert here(*TINY, "--seeds", 2, "--threads", 2, "--out", copied).returncode == 0
    assert all((copied / name).read_text() == (finished[0] / name).read_text() for name in ("runs.csv", "summary.json"))
    assert (copied / "cache" / "run-steps-0").read_text() == "0"


def test_a_larger_sweep_takes_the_runs_of_a_copied_cache(finished, copied, tmp_path):
    shutil.copytree(copied / "cache", tmp_path / "larger" / "cache")
    assert here(*TINY, "--seeds", 3, "--out", tmp_path / "larger").returncode == 0
    fewer, more = (common.read_table(out / "runs.csv") for out in (copied, tmp_path / "larger"))
    assert [line for line in more if line["seed"] < 2] == fewer and len(more) == 12
    assert float((tmp_path / "larger" / "cache" / "run-steps-0").read_text()) == 4 * 30


def test_a_summary_that_is_lost_claims_no_speed(copied):
    (copied / "summary.json").unlink()
    assert here(*TINY, "--seeds", 2, "--out", copied).returncode == 0
    summary = json.loads((copied / "summary.json").read_text())
    assert summary["claims"] and "seconds" not in summary


def test_fresh_removes_what_is_its_own_and_nothing_else(tmp_path):
    own = ["cache/population-0.pt", "cache/unfinished-0.pt.7.part", "cache/room.7.part", "runs.csv.7.part", "dynamics.png.7.part",
           "cells.csv", "summary.json"]
    others = ["film.mkv.part", "dynamics.png", "sub/runs.csv", "cache/lock", "notes.csv", "runs.csv.bak", "curves.npz.old"]
    for name in own + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    common.begin(grok.PRESETS["quick"], SimpleNamespace(out=tmp_path, fresh=True, plot_only=False), {"configuration": {}})
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*others, "summary.json"} and json.loads((tmp_path / "summary.json").read_text())


def test_a_setting_that_a_saved_summary_does_not_know_has_its_default(tmp_path, capsys):
    settings, options = grok.PLANES["quick"], SimpleNamespace(out=tmp_path, fresh=False, plot_only=False)
    made = {"configuration": json.loads(json.dumps(common.asdict(settings)))}
    older = {"configuration": {name: value for name, value in made["configuration"].items() if name not in ("side_seeds", "eps")}}
    (tmp_path / "summary.json").write_text(json.dumps(older))
    assert common.begin(settings, options, made) == older
    for name in ("side_seeds", "eps"):
        with pytest.raises(SystemExit):
            common.begin(settings, options, {"configuration": {**made["configuration"], name: 1}})
        assert f"{name} = " in capsys.readouterr().err


@pytest.mark.parametrize("script, more", [
    (grok, ["--hidden", 4, 8, 8, 8, "--data", 60, 40, 50, 50]),
    (double_descent, ["--hidden", 4, 8, "--data", 60, "--squared-data", 60]),
    (emergence, ["--layers", 1, 1, "--hidden", 4, 8, "--data", 60, "--memorize", 10])])
def test_a_sweep_that_diverges_whole_is_named_and_drawn(script, more, tmp_path):
    usual = [*AT_P_11, "--seeds", 1, "--steps", 20]
    done = here(*usual, "--lr", 1e9, *more, "--out", tmp_path, script=script)
    assert done.returncode == 0 and list(tmp_path.glob("*.png"))
    runs = len(common.read_table(tmp_path / "runs.csv"))
    assert len(re.findall(r"(?m)^diverged: .*hidden \d.*, seed 0$", done.stdout)) == runs


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_plot_only_without_a_whole_summary(copied, content):
    path = copied / "summary.json"
    path.unlink() if content is None else path.write_text(content)
    done = here(*TINY, "--hidden", 8, 4, 4, 4, "--out", copied, "--plot-only")
    one_clear_line(done, "--plot-only")
    assert path.exists() == (content is not None) and (content is None or path.read_text() == content)


def test_one_process_needs_no_distributed_part_of_torch(copied, monkeypatch):
    monkeypatch.setattr(common, "dist", SimpleNamespace(is_available=lambda: False))
    assert here(*TINY, "--seeds", 2, "--out", copied, "--plot-only").returncode == 0


def test_a_figure_names_what_training_had_of_its_own(copied):
    preset = grok.PRESETS["quick"]
    for own, text in (({}, ""), ({"lr": 0.5, "normalization": "rms"}, "\nwith --lr 0.5 --normalization rms")):
        figure = common.Figure()
        figure.suptitle("finding")
        settings = replace(preset, p=11, seeds=2, steps=30, **own)
        common.report(settings, preset, copied, lambda *_: {"dynamics.png": figure}, lambda *_: [])
        assert figure.get_suptitle() == "finding" + text


def test_plot_only_judges_and_redraws_and_touches_nothing_else(copied, tmp_path):
    (copied / "dynamics.png").unlink()
    before = (copied / "summary.json").read_bytes()
    assert here(*TINY, "--seeds", 2, "--out", copied, "--plot-only").returncode == 0
    assert (copied / "dynamics.png").exists() and (copied / "summary.json").read_bytes() == before
    saved = json.loads(before)
    (copied / "summary.json").write_text(json.dumps(saved | {"claims": saved["claims"][:1]}))      # as of older code
    assert here(*TINY, "--seeds", 2, "--out", copied, "--plot-only").returncode == 0
    assert (copied / "summary.json").read_bytes() == before
    (copied / "curves.npz").unlink()
    one_clear_line(here(*TINY, "--seeds", 2, "--out", copied, "--plot-only"), "--plot-only", "no curves.npz")
    empty = here(*TINY, "--out", tmp_path / "empty", "--plot-only")
    assert empty.returncode == 2 and "--plot-only" in empty.stderr and not (tmp_path / "empty").exists()


def test_the_reference_results_without_curves_are_redrawn(tmp_path):
    for name in ("runs.csv", "summary.json"):
        shutil.copy(HERE / "figures" / "double_descent-quick" / name, tmp_path)
    before = (tmp_path / "summary.json").read_bytes()
    assert here("--device", "cpu", "--scale", "quick", "--plot-only", "--out", tmp_path, script=double_descent).returncode == 0
    assert (tmp_path / "double_descent.png").exists() and (tmp_path / "summary.json").read_bytes() == before


@pytest.mark.parametrize("name", ["runs.csv", "curves.npz"])
def test_plot_only_of_damaged_results(copied, name):
    whole = (copied / name).read_bytes()
    for part in (whole[:len(whole) // 2], b""):
        (copied / name).write_bytes(part)
        done = here(*TINY, "--seeds", 2, "--out", copied, "--plot-only")
        one_clear_line(done, "--plot-only")


def test_plot_only_of_runs_in_another_order_than_their_curves(copied):
    """As a spreadsheet leaves them that sorted runs.csv."""
    head, *lines = (copied / "runs.csv").read_text().splitlines()
    (copied / "runs.csv").write_text("\n".join([head, *sorted(lines, reverse=True)]) + "\n")
    one_clear_line(here(*TINY, "--seeds", 2, "--out", copied, "--plot-only"), "--plot-only", "different runs")


def test_results_of_another_configuration_are_kept(copied):
    before = (copied / "runs.csv").read_bytes()
    gc.disable()        # the lock must be released by the code, not by chance
    try:
        other, again = here(*TINY, "--seeds", 1, "--out", copied), here(*TINY, "--seeds", 2, "--out", copied, "--plot-only")
    finally:
        gc.enable()
    assert again.returncode == 0
    one_clear_line(other, "--out", "seeds = 2, not 1")
    assert (copied / "runs.csv").read_bytes() == before


def test_cache_of_another_version_is_named_and_not_used(tmp_path, capsys):
    run, = runs_of(1)
    for name, more in (("old", {"dropout": 0.1}), ("own", {})):
        saved = {"runs": [common.asdict(run) | more], "history": {"val_acc": torch.ones(1, 3)}}
        torch.save(saved, tmp_path / f"population-{name}.pt")
    saved["runs"][0].pop("normalization")
    torch.save(saved, tmp_path / "population-before.pt")
    assert list(common.load_histories(tmp_path)) == [run]
    error = capsys.readouterr().err
    assert "population-old.pt" in error and "population-own.pt" not in error and (tmp_path / "population-old.pt").exists()


def test_damaged_cache_is_named_and_computed_again(copied):
    before = (copied / "runs.csv").read_bytes()
    file = next((copied / "cache").glob("population-*.pt"))
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        tensors = [archive.read(name) for name in archive.namelist() if "/data/" in name]
    record = max(tensors, key=lambda tensor: len(set(tensor)))
    flipped = bytes([record[0] ^ 1]) + record[1:]
    for damaged in (whole[:200], whole.replace(record, flipped)):      # cut short; one bit of a tensor changed
        file.write_bytes(damaged)
        done = here(*TINY, "--seeds", 2, "--out", copied)
        assert done.returncode == 0 and file.name in done.stderr and (copied / "runs.csv").read_bytes() == before


def test_a_cache_that_cannot_be_read_now_is_kept(copied, monkeypatch, capsys):
    files = sorted((copied / "cache").glob("population-*.pt"))
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=MemoryError))
    assert not common.load_histories(copied / "cache") and sorted((copied / "cache").glob("population-*.pt")) == files
    assert capsys.readouterr().err.count("can't be read") == len(files) > 1


def test_while_it_trains_no_other_process_gets_the_same_out(tmp_path, monkeypatch):
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN EXCLUSIVE')"

    def train_all(*_):
        assert "locked" in python("-c", code, tmp_path / "cache" / "lock").stderr
        common.locked(tmp_path)      # as the other would
    monkeypatch.setattr(common, "train_all", train_all)
    one_clear_line(here(*TINY, "--out", tmp_path), "--out", "in use")
    assert python("-c", code, tmp_path / "cache" / "lock").returncode == 0


def test_a_damaged_lock_ends_in_one_line(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lock").write_text("no database " * 100)
    one_clear_line(here(*TINY, "--out", tmp_path), "--out", "cache/lock is damaged")


@pytest.mark.skipif(os.name != "posix", reason="rights of a folder")
@pytest.mark.parametrize("closed", ["", "cache"])
def test_results_made_read_only_end_in_one_line_before_any_work(closed, capsys):
    """Their lock is there and can still be opened."""
    with tempfile.TemporaryDirectory() as name:
        out, user = Path(name), os.geteuid()
        common.locked(out).close()
        (out / "cache" / "lock").chmod(0o666)
        for folder in (out, out / "cache"):
            folder.chmod(0o555 if folder == out / closed else 0o777)
        os.seteuid(user or 65534)       # rights do not bind root
        try:
            with pytest.raises(SystemExit, match="2"):
                common.locked(out)
        finally:
            os.seteuid(user)
            out.chmod(0o777)
    assert re.fullmatch(rf".*: error: --out {out}: can't be written \(Permission denied\)\n", capsys.readouterr().err)


def test_a_closed_pipe_is_not_blamed_on_out(monkeypatch, copied):
    monkeypatch.setattr(common, "print_results", mock.Mock(side_effect=BrokenPipeError(32, "Broken pipe")))
    done = here(*TINY, "--seeds", 2, "--plot-only", "--out", copied)
    assert done.returncode == 1 and "Broken pipe" in done.stderr and "--out" not in done.stderr


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    common.write(path, "old")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError("full")))
    with pytest.raises(OSError):
        common.write(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=FORKS)])
def test_full_disk_ends_in_one_line(threads, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        done = here(*TINY, "--threads", threads, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--out" in done.stderr and not list(tmp_path.glob("*.csv"))


KILLED = """
import os, signal, sys
import common, grok

main = os.getpid()

def write(path, content, real=common.write, calls=[]):
    calls.append(path)
    if len(calls) == 8 and os.getpid() {where} main:
        path.with_name(f"{{path.name}}.{{os.getpid()}}.part").write_text("half a file")
        os.kill(main, signal.SIGKILL)
    real(path, content)

common.write, common.CHECKPOINT_SECONDS, sys.argv[0] = write, 0, "grok.py"
grok.main()
"""


def goes_on(finished, out):
    """What an interrupted command left is not whole, and the same command makes the rows of one never interrupted."""
    assert list(out.glob("cache/unfinished-*.pt")) and not (out / "runs.csv").exists()
    assert here(*TINY, "--seeds", 2, "--out", out).returncode == 0
    assert (out / "runs.csv").read_bytes() == (finished[0] / "runs.csv").read_bytes()
    assert not list(out.glob("cache/unfinished-*.pt")) and not list(out.rglob("*.part"))
    assert float((out / "cache" / "run-steps-0").read_text()) < 8 * 30


@pytest.mark.parametrize("threads, where", [(1, "=="), pytest.param(2, "!=", marks=FORKS)])
def test_killed_inside_a_run_the_same_command_goes_on_to_the_same_bytes(finished, tmp_path, threads, where):
    done = python("-c", KILLED.format(where=where), *TINY, "--seeds", 2, "--threads", threads, "--out", tmp_path)
    assert done.returncode == -9 and not done.stderr
    goes_on(finished, tmp_path)


def test_fresh_forgets_old_results_and_stopped_says_how_to_go_on(copied, monkeypatch):
    """The same command would begin again."""
    one_clear_line(here(*TINY, "--seeds", 2, "--out", copied, "--fresh", "--plot-only"), "--fresh")
    assert (copied / "runs.csv").exists()
    for error, status in ((KeyboardInterrupt(), 130), (OSError("full"), 1)):
        monkeypatch.setattr(common, "train_all", mock.Mock(side_effect=error))
        (copied / "runs.csv").write_text("old")
        done = here(*TINY, "--seeds", 1, "--out", copied, "--fresh")
        assert done.returncode == status and "the same command without --fresh" in done.stderr
        assert not (copied / "runs.csv").exists()


@pytest.mark.parametrize("threads, whom, how, status, said", [
    (1, os.getpid, "SIGINT", 130, "goes on from there"),
    pytest.param(2, os.getppid, "SIGINT", 130, "goes on from there", marks=FORKS),
    pytest.param(2, os.getpid, "SIGKILL", 1, "status -9 (killed, perhaps for memory: fewer --threads take less)", marks=FORKS)])
def test_stopped_it_says_so_and_goes_on_to_the_same_bytes(finished, tmp_path, capfd, threads, whom, how, status, said):
    calls, main = multiprocessing.Value("i", 0), os.getpid()       # calls of all processes

    def write(path, content, real=common.write):
        with calls.get_lock():
            calls.value += 1
            eighth = calls.value == 8
        if eighth and (os.getpid() == main) == (threads == 1):
            os.kill(whom(), getattr(signal, how))
        real(path, content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "write", write)
        patch.setattr(common, "CHECKPOINT_SECONDS", 0)
        done = here(*TINY, "--seeds", 2, "--threads", threads, "--out", tmp_path)
    assert done.returncode == status and said in done.stderr and done.stderr.strip().count("\n") == 0
    assert capfd.readouterr().err == ""     # nor is there anything from another process
    goes_on(finished, tmp_path)


@FORKS
def test_a_second_interrupt_ends_the_training_processes_too(tmp_path):
    """It comes while they are being ended; the program waits at its exit for those that are left."""
    code = ("import sys, unittest.mock as mock, common, grok; from multiprocessing.process import BaseProcess as Process; "
            "sys.argv[0] = 'grok.py'; common.time.sleep = Process.kill = mock.Mock(side_effect=KeyboardInterrupt); grok.main()")
    done = python("-c", code, *TINY, "--threads", 2, "--steps", 10**7, "--out", tmp_path, timeout=60)
    assert done.returncode == 130 and "goes on from there" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of a group")
def test_an_interrupt_while_spawned_processes_begin_ends_in_one_line(tmp_path):
    """They still import torch, and this one is slow to end them."""
    code = """
import os, signal, sys, common, grok

def sleep(_, real=common.time.sleep):
    real(0.5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.killpg(0, signal.SIGINT)
    real(1)
    raise KeyboardInterrupt

common.start_method, common.time.sleep, sys.argv[0] = lambda: "spawn", sleep, "grok.py"
grok.main()
"""
    done = python("-c", code, *TINY, "--threads", 2, "--steps", 10**7, "--out", tmp_path, timeout=60, start_new_session=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr and "goes on from there" in done.stderr


def test_the_same_command_gives_the_same_bytes_from_spawned_processes_too(finished, tmp_path, monkeypatch):
    begun, real = [], common.mp.get_context
    monkeypatch.setattr(common, "start_method", lambda: "spawn")
    monkeypatch.setattr(common.mp, "get_context", lambda method: begun.append(method) or real(method))
    assert here(*TINY, "--threads", 2, "--seeds", 2, "--out", tmp_path).returncode == 0 and begun == ["spawn"]
    assert (tmp_path / "runs.csv").read_bytes() == (finished[0] / "runs.csv").read_bytes()


# the other scripts by their command line


def test_phase_by_its_command_line(tmp_path):
    arguments = [*AT_P_11, "--seeds", 2, "--steps", 20, "--hidden", 8, 4, "--data", 60, 40,
                 "--forget-hidden", 8, "--forget-data", 20]
    done = here("phase", *arguments, "--out", tmp_path)
    rows, curves = common.read_results(tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.png")} == {"phase.png", "measures.png"} and "cross once" in done.stdout
    assert [sum(line["experiment"] == name for line in rows) for name in ("plane", "capacity", "forgetting")] == [8, 4, 2]
    assert all(line["data"] == 121 and line["val_acc"] is None for line in rows if line["experiment"] == "capacity")
    assert all(line["steps"] == 40 and line["first_data"] == 60 for line in rows if line["experiment"] == "forgetting")


def test_emergence_by_its_command_line(tmp_path, monkeypatch):
    arguments = [*AT_P_11, "--seeds", 2, "--steps", 20, "--out", tmp_path,
                 "--layers", 1, 2, "--hidden", 4, 8, "--data", 60, "--memorize", 20, 30]
    done = here(*arguments, script=emergence)
    assert done.returncode == 0, done.stderr
    assert float((tmp_path / "cache" / "run-steps-0").read_text()) == 16 * 20 and (tmp_path / "emergence.png").exists()
    rows, _ = common.read_results(tmp_path)
    assert len(rows) == 16 and {(line["memorize"], line["split"]) for line in rows} == {(0, 0), (20, 0), (30, 0), (20, 1)}
    assert {(line["layers"], line["hidden"]) for line in rows} == {(1, 4), (2, 8)}
    monkeypatch.setattr(emergence, "judge", lambda *_: [common.claim("1×64", "-", "-", None)])
    assert "1?64" in here(*arguments, "--plot-only", script=emergence).stdout


def test_double_descent_by_its_command_line_and_two_ranks_one_of_them_killed_give_the_same(tmp_path):
    arguments = [*AT_P_11, "--seeds", 2, "--steps", 20, "--hidden", 4, 8,
                 "--data", 40, 60, "--squared-data", 60]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--"]
    one = here(*arguments, "--out", tmp_path / "one", script=double_descent)
    assert one.returncode == 0 and "prediction 2" in one.stdout and (tmp_path / "one" / "double_descent.png").exists()
    cells = common.by_cell(common.read_results(tmp_path / "one")[0], "task", "data", "hidden")
    assert {(task, data) for task, data, _ in cells} == {("addition", 40), ("addition", 60), ("squared_addition", 60)}
    assert len(cells) == 6 and all(len(seeds) == 2 for seeds in cells.values())
    killed = KILLED.format(where="==").replace("grok", "double_descent")
    (tmp_path / "killed.py").write_text(f"import os, sys\nsys.path.append({str(HERE)!r})\n" + killed.replace(
        "if len(calls)", "if os.environ['RANK'] == '1' and len(calls)"))
    done = python(*launch, tmp_path / "killed.py", *arguments, "--out", tmp_path / "two")
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert list(tmp_path.glob("two/cache/unfinished-*.pt")) and not (tmp_path / "two" / "runs.csv").exists()
    done = python(*launch, HERE / "double_descent.py", *arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "runs.csv").read_bytes() == (tmp_path / "one" / "runs.csv").read_bytes()
    done = python(*launch, HERE / "double_descent.py", *arguments, "--lr", 0.5, "--out", tmp_path / "two")
    assert done.returncode != 0 and "holds results with lr" in done.stderr and "barrier" not in done.stderr


# the suite as a whole


def test_script_metadata_equals_requirements():
    lines = (HERE / "requirements.txt").read_text().splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for script in SCRIPTS:
        block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", (HERE / script).read_text()).group(1)
        listed = json.loads(re.search(r"dependencies = (\[.*\])", block).group(1))
        assert listed == [line for line in wanted if not line.startswith("pytest")] and 'requires-python = ">=3.10"' in block


REFERENCES = [("grok-paper", "grok-small"), ("grok-phase-paper", "grok-phase-small"),
              ("double_descent-paper", "double_descent-small"), ("double_descent-longer",),
              ("emergence-paper", "emergence-small")]


def results_table(papers):
    """The table of claims in README.md, the paper's, or in figures/README.md, the others, from the summary.json files.

    python test_all.py writes them there. A row for each claim at p = 113, with the verdict at p = 59, if there is one, at its
    end; then those made at p = 59 alone.
    """
    names, lines, told = {True: "yes", False: "**no**", None: "undecided"}, [], []

    def how(summary):
        """With what the results were made."""
        made = summary["configuration"]
        side = f" ({made['side_seeds']} for the capacity and for going on with less)" if "side_seeds" in made else ""
        return f"p = {made['p']}, {made['seeds']} seeds{side}, {made['steps']:,} steps"

    def verdicts(summary):
        """{claim: (claim, verdict as text)}; where another work makes a claim, or we do, what it says is in brackets."""
        return {c["claim"]: (c, names[c["holds"]]) for c in summary["claims"]
                if (c["paper"][0] not in "(-" if papers else c["paper"][0] == "(")}
    for folders in REFERENCES:
        made, *others = (json.loads((HERE / "figures" / folder / "summary.json").read_text()) for folder in folders)
        main, side = verdicts(made), verdicts(others[0]) if others else {}
        if main or side:
            commands = [f"`python {each['command']}`" for each in (made, *others)]
            beside = "".join(f"; last column: {command} ({how(other)})" for command, other in zip(commands[1:], others))
            lines.append(f"| **{commands[0]}** ({how(made)}){beside}; {made['device']}, torch {made['torch']} | | | | |")
        for text in dict.fromkeys([*main, *side]):
            (c, _), (_, here), (_, there) = main.get(text) or side[text], main.get(text, ("", "")), side.get(text, ("", ""))
            source = c["paper"] if papers else c["paper"][1:-1]
            lines.append(f"| {'' if here else 'p = 59: '}{text} | {source} | {c['measured']} | {here} | {there} |")
            told.append((here, there))
    total = [", ".join(f"{column.count(word)} {word}" for word in names.values()) for column in zip(*told)]
    head = [["claim", "paper" if papers else "source, or number", "measured, p = 113", "holds", "p = 59"], ["---"] * 5,
            ["**all of these**", "", "", *total]]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in head), *lines]) + "\n"


TABLES = {HERE / "README.md": True, HERE / "figures" / "README.md": False}      # {file: whether its table is the paper's claims}


@pytest.mark.parametrize("path", TABLES)
def test_readme_tells_what_the_reference_results_say(path):
    assert results_table(TABLES[path]) in path.read_text()


FOLDERS = sorted(path.name for path in (HERE / "figures").glob("*-*"))


def reference(folder):
    """What judges the results in a folder of figures/, and their settings, rows, curves (if they matter) and claims."""
    out, name = HERE / "figures" / folder, folder.rsplit("-", 1)[0].removesuffix("-normalized")
    presets, judge = {"grok": (grok.PRESETS, grok.judge), "grok-phase": (grok.PLANES, grok.judge_phase),
                      "double_descent": (double_descent.PRESETS, double_descent.judge),
                      "emergence": (emergence.PRESETS, emergence.judge)}[name]
    kind, summary = type(presets["quick"]), json.loads((out / "summary.json").read_text())
    settings = kind(**{f.name: tuple(value) if isinstance(value, list) else value for f in fields(kind)
                       for value in [summary["configuration"][f.name]]})
    return judge, settings, *common.read_results(out), summary["claims"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_verdicts_of_the_reference_results_are_those_of_the_code(folder):
    judge, settings, rows, curves, claims = reference(folder)
    assert judge(settings, rows, curves) == claims


@pytest.mark.parametrize("folder", ["grok-quick", "grok-phase-quick"])
def test_a_seed_begins_the_run_that_it_began_in_the_reference_results(folder):
    _, _, rows, curves, _ = reference(folder)
    for i in {line["experiment"]: i for i, line in enumerate(rows)}.values():      # a run of each
        run = Run(**{f.name: rows[i][f.name] for f in fields(Run)})
        found = common.evaluate(Transformer([run]), Dataset([replace(run, data=run.first_data or run.data)], "cpu"))
        for name in ("norm", "train_loss", "val_loss"):
            assert found[name].item() == pytest.approx(curves[name][i, 0], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if "grok" not in folder])
def test_no_verdict_turns_into_its_opposite_without_a_size_a_seed_or_a_d(folder):
    """Less work may leave a claim undecided; it does not refute what more work shows, nor show what more work refutes."""
    judge, settings, rows, curves, claims = reference(folder)
    known = {c["claim"]: c["holds"] for c in claims}
    sizes = {line["hidden"] for line in rows}
    parts = [[line for line in rows if line["hidden"] != hidden] for hidden in sizes]
    parts += [[line for line in rows if line["seed"] != seed] for seed in range(settings.seeds)]
    parts += [[line for line in rows if (line["task"], line["data"]) != ("addition", data)]
              for data in settings.data] if "double" in folder else []
    for part in parts:
        kept = [i for i, hidden in enumerate(settings.hidden) if any(line["hidden"] == hidden for line in part)]
        fewer = {"hidden": tuple(settings.hidden[i] for i in kept)}
        if "emergence" in folder:
            fewer["layers"] = tuple(settings.layers[i] for i in kept)
        else:
            fewer["data"] = tuple(sorted({line["data"] for line in part if line["task"] == "addition"}))
        for c in judge(replace(settings, **fewer), part, curves):
            assert {known.get(c["claim"]), c["holds"]} != {True, False}, c


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_command_of_the_reference_results_makes_their_settings(folder, monkeypatch):
    summary = json.loads((HERE / "figures" / folder / "summary.json").read_text())
    name, *words = summary["command"].split()
    script = {"grok.py": grok, "double_descent.py": double_descent, "emergence.py": emergence}[name]
    experiments = {"dynamics": (grok.PRESETS,), "phase": (grok.PLANES,)} if script is grok else {name[:-3]: (script.PRESETS,)}
    monkeypatch.setattr(sys, "argv", [name, *words, "--device", "cpu", "--scale", summary["scale"]])
    experiment, settings, options = common.command_line(name, "", experiments)
    assert "--out" in words or options.out == Path("results") / folder.replace("-normalized", "")
    made = {"script": name, "experiment": experiment, **json.loads(json.dumps(common.asdict(settings)))}
    assert made == summary["configuration"]


def test_readme_quotes_the_code_and_shows_figures_that_are_there():
    texts = {path: path.read_text() for path in TABLES}
    code = {line.strip() for script in SCRIPTS for line in (HERE / script).read_text().splitlines()}
    quoted = [line.strip() for block in re.findall(r"```python\n(.*?)```", texts[HERE / "README.md"], re.S)
              for line in block.splitlines() if line.strip()]
    assert quoted and set(quoted) <= code
    shown = set()
    for path, text in texts.items():
        assert not re.search(r"(?m)^ *[+] |^[^\s\d].*\n\d+[.)] ", text)      # Markdown makes lists of these
        for link in re.findall(r"\]\(([^):]+)\)", text):       # of a file, a heading, or a heading of a file
            name, _, heading = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            shown.add(target.parent.name)
            assert target.exists(), link
            assert not heading or f"# {heading.replace('-', ' ')}\n" in target.read_text().lower().replace(",", ""), link
    assert shown >= set(FOLDERS)


def test_the_readme_tells_the_settings_of_the_presets():
    text = " ".join((HERE / "README.md").read_text().split())
    most, emerging = (grok.PRESETS, grok.PLANES, double_descent.PRESETS), (emergence.PRESETS,)

    def told(scale, name, scripts=most + emerging):
        """The values of a setting at a scale, 'least to most', learning rates as 5e-3."""
        values = {getattr(presets[scale], name) for presets in scripts}
        ends = dict.fromkeys([min(values), max(values)])
        return " to ".join(np.format_float_scientific(x, trim="-", exp_digits=1) if x < 1 else f"{x:,}" for x in ends)
    assert f"quick settings (p = {told('quick', 'p')}, {told('quick', 'seeds')} seeds)" in text
    paper = f"{told('paper', 'lr', most)}, {told('paper', 'steps')} (`emergence.py`: {told('paper', 'lr', emerging)})"
    small, quick = (f"{told(scale, 'lr')}, {told(scale, 'steps')}" for scale in ("small", "quick"))
    assert f"p = 113: {paper}; p = 59: {small}; quick scales: {quick} |" in text
    dips = double_descent.PRESETS["quick"]
    assert "with D = {}, not with {}; addition".format(*dips.squared_data) in text
    assert f"double_descent.py --steps {2 * dips.steps} --out results/more`" in text      # twice the steps


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_names_of_a_script_stand_in_common_or_are_its_own(script):
    """Pasted behind common.py without its import lines, a script misses no name and overwrites none."""
    body = ast.parse((HERE / script).read_text()).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert imported <= set(vars(common)) and not defined & set(vars(common))
    assert all(node.lineno == node.end_lineno for node in imports)


def test_pasted_into_one_notebook(tmp_path, monkeypatch, capsys):
    def imports(line):
        return re.match(r"(from \S+ )?import ", line)
    source = (HERE / "common.py").read_text()
    script = "\n".join(line for line in (HERE / "grok.py").read_text().splitlines() if not imports(line))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cell = {"__name__": "__main__"}
    sys.modules["__main__"], main = type(sys)("__main__"), sys.modules["__main__"]
    try:
        exec(source, cell)
        exec(script.replace('if __name__ == "__main__":\n    main()', ""), cell)
        small = cell["Cells"](p=11, seeds=1, steps=20, lr=1e-2, weight_decay=1.0,
                              hidden=(4, 8, 8, 16), data=(60, 40, 50, 50))
        cell["PRESETS"].update(quick=small, paper=small)      # paper is the default where there is a GPU
        cell["main"]()
        sys.argv = ["grok.py", "phase", "--out", "other"]      # as the README has it, for another experiment or options
        plane = cell["Plane"](p=11, seeds=1, steps=20, lr=1e-2, weight_decay=1.0, hidden=(4, 8), data=(40, 60),
                              forget_hidden=8, forget_data=(20,))
        cell["PLANES"].update(quick=plane, paper=plane)
        cell["main"]()
    finally:
        sys.modules["__main__"] = main
        torch.use_deterministic_algorithms(False)      # on where there is a GPU
    assert len(list(tmp_path.glob("results/grok-*/dynamics.png"))) == 1 and (tmp_path / "other" / "phase.png").exists()
    assert "no CUDA graph" not in capsys.readouterr().err


def test_benchmark_prints_json_last():
    done = command("--device", "cpu", "--threads", 1, "--p", 13, "--hidden", 8, "--data", 60, script="common.py")
    assert done.returncode == 0, done.stderr
    assert "60, 11 runs," in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ratio"] == pytest.approx(last["one_at_a_time_ms"] / last["ms_per_run_step"], rel=0.05)
    assert last["matmul_share"] > 0


if __name__ == "__main__":
    for path, papers in TABLES.items():
        table = r"\| claim \| .*\n(\|.*\n)+"
        path.write_text(re.sub(table, lambda _: results_table(papers), path.read_text(), count=1))
