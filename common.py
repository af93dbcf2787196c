"""Tasks, model, training, sweep and output, shared by the scripts.

The suite reproduces Huang et al. 2024, "Unified View of Grokking, Double Descent and Emergent Abilities"
(arXiv 2402.15175). Its experiments are hundreds of small runs of the same shape, so every parameter and
activation carries a leading axis of runs, R in the shape comments: one forward pass, one loss and one AdamW
train a whole population, each run as if it were alone. With R = 1 this is the textbook model.

    python common.py --device cpu --threads 1      measures what that buys on this machine
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.16", "numpy>=1.26,<3", "matplotlib>=3.8,<4"]
# ///
import argparse
import contextlib
import csv
import ctypes
import gc
import hashlib
import io
import json
import math
import multiprocessing as mp
import os
import platform
import shlex
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colormaps          # noqa: F401, this and the next three for the scripts when pasted behind this file
from matplotlib.figure import Figure      # noqa: F401
from matplotlib.patches import Rectangle  # noqa: F401
from matplotlib.patheffects import withStroke      # noqa: F401
from torch import nn

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # for deterministic results; read once, at the first product
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    # M_MMAP_THRESHOLD (the most that every glibc allows) and M_TRIM_THRESHOLD: keep freed memory. Else glibc hands it back to the
    # kernel, which clears every page before it is used again: a fifth of the time of emergence.py. Results stay the same.
    libc.mallopt(-3, 2**25)
    libc.mallopt(-1, 2**31 - 1)

# tasks: pairs, labels, the split


@dataclass(frozen=True)
class Run:
    """One training run: every field that its result depends on, and the experiment that it belongs to.

    task is 'addition' (a + b) mod p, 'squared_addition' (a + b)^2 mod p, or 'random': a random label for each
    unordered pair {a, b}. data, the paper's D, is how many of the p*p ordered pairs train; the rest validate. memorize adds that
    many examples of a - b with random labels. With memorize or operator, a token for + or - stands between a and b.
    With split, half of the feed-forward units serve addition only and the other half the memorization only.
    With first_data, the first half of the steps trains on that many pairs, and only the second half on as many as data says.
    loss is 'float32' or 'exact' (see training_loss), eps is AdamW's, precision that of matrix products while training.
    With normalization 'rms' each layer, and the unembedding, reads the residual stream divided by its root mean square.
    """
    task: str
    p: int
    hidden: int
    data: int
    seed: int
    steps: int
    lr: float
    weight_decay: float
    loss: str = "float32"
    eps: float = 1e-8
    layers: int = 1
    heads: int = 4
    memorize: int = 0
    operator: bool = False
    split: bool = False
    precision: str = "float32"
    first_data: int = 0
    normalization: str = "none"
    experiment: str = ""

    @property
    def length(self):
        """Tokens in a sequence: a b =, or a + b = where there is an operator token."""
        return 4 if self.operator or self.memorize else 3

    @property
    def vocabulary(self):
        """Number of tokens: the numbers 0 to p-1, '=' (p), and with an operator token '+' (p+1) and '-' (p+2)."""
        return self.p + (3 if self.length == 4 else 1)


def generator(run, purpose):
    """A random generator on the CPU that depends on the run's seed and the purpose alone."""
    return torch.Generator().manual_seed(10 * run.seed + ("pairs", "labels", "weights", "memorize").index(purpose))


def answers(run):
    """Labels of all ordered pairs, (p*p,) int64; pair (a, b) stands at a*p + b."""
    a, b = torch.arange(run.p)[:, None], torch.arange(run.p)
    if run.task == "addition":
        return ((a + b) % run.p).flatten()
    if run.task == "squared_addition":
        return ((a + b) ** 2 % run.p).flatten()
    table = torch.randint(run.p, (run.p, run.p), generator=generator(run, "labels"))
    return table[torch.minimum(a, b), torch.maximum(a, b)].flatten()


def train_pairs(run):
    """Training pairs as numbers a*p + b, (data,); a seed's smaller training set is contained in its larger ones."""
    return torch.randperm(run.p**2, generator=generator(run, "pairs"))[:run.data]


def trained(run):
    """Which of the ordered pairs train, (p*p,) bool."""
    return torch.zeros(run.p**2, dtype=torch.bool).index_fill(0, train_pairs(run), True)


def sequences(run, pairs, minus=False):
    """Tokens (N, T) of ordered pairs (N,)."""
    columns = [pairs // run.p, pairs % run.p, torch.full_like(pairs, run.p)]
    if run.length == 4:
        columns.insert(1, torch.full_like(pairs, run.p + 1 + minus))
    return torch.stack(columns, -1)


def training_set(run):
    """Tokens (N, T) and labels (N,), N = data + memorize."""
    pairs, draw = train_pairs(run), generator(run, "memorize")
    noise = torch.randperm(run.p**2, generator=draw)[:run.memorize]
    tokens = torch.cat([sequences(run, pairs), sequences(run, noise, minus=True)])
    return tokens, torch.cat([answers(run)[pairs], torch.randint(run.p, noise.shape, generator=draw)])


# model: a decoder-only transformer with a leading axis of runs


class LookUp(torch.autograd.Function):
    """The sum, for each example, of the table rows that it names. Backward, a row gets the sum over the examples that name it.

    Equal to F.embedding(index, table).sum(1), but without a scatter backward: fast, and deterministic on CUDA.
    """

    @staticmethod
    def forward(ctx, table, index, *inverse):
        """table (rows, width), index (N, k) -> (N, width). inverse: members and offsets of the backward sums, of 1 or 2 rounds.

        Sum i takes members[offsets[i]:offsets[i + 1]]: the examples that name row i. Or in two rounds: a part of those examples
        for each sum of the first, and the parts of row i in the second.
        """
        ctx.inverse = inverse
        return F.embedding_bag(index, table, mode="sum")

    @staticmethod
    def backward(ctx, gradient):
        """gradient (N, width) -> (rows, width)."""
        for members, offsets in zip(ctx.inverse[::2], ctx.inverse[1::2]):
            gradient = F.embedding_bag(members, gradient.contiguous(), offsets, mode="sum")
        return gradient, None, *[None] * len(ctx.inverse)


def for_its_task(units, serves):
    """Feed-forward units (..., 4d) of a split layer: each half is kept where serves (..., 2) says that it serves the task."""
    return (units.unflatten(-1, (2, -1)) * serves[..., None]).flatten(-2)


class FeedForward(torch.autograd.Function):
    """Equal to Block.feed_forward without it, by oneDNN, a part of PyTorch for CPUs.

    The operator is private: PyTorch has it for what torch.compile generates. Where it is missing, works is False.
    It adds the bias while it multiplies, and one run comes after another, so that the units, the largest tensor of a step, are
    still in the cache when they are read, and are not stacked. (Its own ReLU would turn NaN into 0.)
    """

    works = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    least = 2**23       # multiplications in a product of one run: with fewer, the calls take longer than they save

    @classmethod
    def pays(cls, x, weight_in):
        """Whether it can take x (R, n, d), and is then faster."""
        return (not torch.compiler.is_compiling() and cls.works and x.shape[1] * weight_in[0].numel() >= cls.least
                and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"))

    @staticmethod
    def product(x, weight, bias=None):
        """x (n, a) @ weight (b, a).mT, plus bias (b,) if there is one: (n, b)."""
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x, weight_in, bias_in, weight_out, bias_out, serves):
        """x (R, n, d), weights and biases (R, ...), serves (R, n, 2) or None (see for_its_task) -> (R, n, d)."""
        kept, out = [], []
        for i in range(len(x)):
            units = FeedForward.product(x[i], weight_in[i].mT, bias_in[i]).relu_()
            kept.append(units if serves is None else for_its_task(units, serves[i]))
            out.append(FeedForward.product(kept[i], weight_out[i].mT, bias_out[i]))
        ctx.save_for_backward(x, weight_in, weight_out, *kept)
        return torch.stack(out)

    @staticmethod
    def backward(ctx, gradient):
        """gradient (R, n, d) -> those of all that forward took."""
        x, weight_in, weight_out, *kept = ctx.saved_tensors
        found = []
        for i, units in enumerate(kept):      # a unit is 0 by ReLU or because it does not serve: then no gradient passes it
            of_units = torch.ops.aten.threshold_backward(FeedForward.product(gradient[i], weight_out[i]), units, 0)
            found.append((FeedForward.product(of_units, weight_in[i]), x[i].mT @ of_units, of_units.sum(0),
                          (gradient[i].mT @ units).mT))
        return *map(torch.stack, zip(*found)), gradient.sum(1), None


class Inputs:
    """Token sequences of a population, (R, N, T), and which rows of a table each example reads.

    In a 1-layer model the rows are every token at every position before '='. In a deeper one they are the prefixes, all that can
    stand before b: a, or a and the operator.
    longest: the most terms of one sum of the backward pass, since CUDA makes each sum in one thread. A longer one (in a 1-layer
    model every example reads the row of the operator) is made in two rounds: sums of parts so long, then the sum of these.
    """

    def __init__(self, tokens, run, longest=None):
        self.tokens = tokens
        (r, _, t), device = tokens.shape, tokens.device
        minus = tokens[..., 1] == run.p + 2                                                   # never without an operator
        self.serves = torch.stack([~minus, minus], -1).float() if run.split else None         # (R, N, 2)
        if run.layers == 1:
            count = (t - 1) * run.vocabulary                                                  # rows of a run
            place = tokens[..., :-1] + run.vocabulary * torch.arange(t - 1, device=device)    # of those read: (R, N, T-1)
        else:
            count = (t - 2) * run.p
            place = (tokens[..., 0] + run.p * minus)[..., None]                               # (R, N, 1)
            pairs = run.p * torch.arange(run.p)                                               # every a; b = 0 is cut off
            signs = torch.cat([sequences(run, pairs), sequences(run, pairs, minus=True)])     # equal where there is no operator
            self.prefixes = signs[None, :count, :-2].to(device)                               # (1, rows, T-2)
            half = torch.eye(2, device=device).repeat_interleave(run.p, 0)[None, :count]
            self.prefixes_serve = half if run.split else None                                 # (1, rows, 2)
        self.index = (place + count * torch.arange(r, device=device)[:, None, None]).flatten(0, 1)    # (R*N, T-1 or 1)
        row, order = self.index.flatten().sort(stable=True)
        rows = torch.arange(r * count, device=device)
        examples, first = order // place.shape[-1], torch.searchsorted(row, rows)             # by row; where each row begins
        self.inverse = examples, first
        term = torch.arange(len(row), device=device) - first[row]                             # which of its row an example is
        if longest and (term >= longest).any():                                               # two rounds: parts, then rows
            parts, = (term % longest == 0).nonzero(as_tuple=True)                             # where each part begins
            self.inverse = examples, parts, torch.arange(len(parts), device=device), torch.searchsorted(row[parts], rows)


class Block(nn.Module):
    """Causal self-attention and a ReLU feed-forward layer four times as wide, each added to the residual stream.

    Biases in the feed-forward layer only, and no normalization but where asked for (Nanda et al. 2023, arXiv 2301.05217).
    """

    def __init__(self, run, draw):
        super().__init__()
        d, smaller, self.heads, self.normalization = run.hidden, run.layers**-0.5, run.heads, run.normalization
        self.query, self.key, self.value, self.output = draw(d, d), draw(d, d), draw(d, d), draw(d, d, scale=smaller)
        self.mlp_in, self.mlp_in_bias = draw(d, 4 * d), draw(4 * d, scale=0)
        self.mlp_out, self.mlp_out_bias = draw(4 * d, d, scale=smaller), draw(d, scale=0)

    def normalized(self, x):
        """The residual stream x (..., d) as a layer reads it: itself, or over its root mean square (arXiv 1910.07467)."""
        return F.rms_norm(x, x.shape[-1:]) if self.normalization == "rms" else x

    def per_head(self, x, weight):
        """x (R, n, t, d), t positions of n sequences, times weight (R, d, d): (R, n, t, heads, d/heads)."""
        return (self.normalized(x).flatten(1, 2) @ weight).view(*x.shape[:3], self.heads, -1)

    def keys_and_values(self, x):
        """Those of x (R, n, t, d), each a tuple, (R, n, 1, heads, d/heads) for each position."""
        return [self.per_head(x, weight).split(1, 2) for weight in (self.key, self.value)]

    def attention(self, x, keys, values, last=False):
        """What attention reads at every position of x, (R, n, t, d) -> (R, n, t, d), or at the last only, (R, n, 1, d).

        keys, values: of all positions up to the last of x. They are few, so sums over them are faster than PyTorch's attention.
        """
        query = self.per_head(x[:, :, -1:] if last else x, self.query)
        score = torch.stack([(query * key).sum(-1) for key in keys]) / math.sqrt(query.shape[-1])     # (keys, R, n, t, heads)
        if not last:
            earlier = torch.ones(len(keys), x.shape[2], dtype=torch.bool, device=x.device).triu(x.shape[2] - len(keys))
            score = score.where(earlier[:, None, None, :, None], -math.inf)
        return sum(weight[..., None] * value for weight, value in zip(score.softmax(0), values)).flatten(-2)

    def textbook_attention(self, x):
        """The same at every position, x (R, N, T, d) being all of them, by PyTorch's own attention."""
        heads = (self.per_head(x, weight).transpose(2, 3) for weight in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(2, 3).flatten(-2)

    def attention_by_table(self, table, equals, inputs):
        """What attention reads at '=', (R, N, d), in a 1-layer model. table (R, rows, d): every token at every position before.

        It reads sum(exp(score) * value) / sum(exp(score)) over the positions. The query is that of '=' in every example, and
        keys and values depend on a token and its position alone. So exp(score) * value and exp(score) are computed once for
        each row of the table, and for '=' itself; an example adds up the rows that it uses, and divides. This is exact, not an
        approximation, as long as a head's scores lie within 160 of each other, about the range of exp in float32 (at most 70
        was seen, except in runs that too high a learning rate nearly destroys). Scores more than 160 below the highest count
        as 160 below.
        """
        rows = self.normalized(torch.cat([table, equals], 1))                                 # (R, rows + 1, d)
        query = (self.normalized(equals) @ self.query).unflatten(-1, (self.heads, -1))        # (R, 1, heads, d/heads)
        key = (rows @ self.key).unflatten(-1, (self.heads, -1))                               # (R, rows + 1, heads, d/heads)
        score = (key * query).sum(-1) / math.sqrt(query.shape[-1])                            # (R, rows + 1, heads)
        highest, lowest = score.amax(1, keepdim=True), score.amin(1, keepdim=True)
        middle = torch.maximum((highest + lowest) / 2, highest - 80).detach()                 # cancels in the ratio
        weight = (score - middle).clamp(min=-80).exp()                                        # (R, rows + 1, heads)
        weight = weight.repeat_interleave(query.shape[-1], -1)      # (R, rows + 1, d), as broadcast division has a slow gradient
        terms = torch.cat([weight * (rows @ self.value), weight], -1)                         # (R, rows + 1, 2d)
        found = LookUp.apply(terms[:, :-1].flatten(0, 1), inputs.index, *inputs.inverse)
        total = found.view(len(rows), -1, terms.shape[-1]) + terms[:, -1:]                    # (R, N, 2d)
        numerator, denominator = total.chunk(2, -1)
        return numerator / denominator

    def feed_forward(self, x, serves):
        """What the feed-forward layer adds, x (R, n, d) -> (R, n, d). serves (R, n, 2) or None: see for_its_task."""
        if FeedForward.pays(x, self.mlp_in):
            return FeedForward.apply(x, self.mlp_in, self.mlp_in_bias, self.mlp_out, self.mlp_out_bias, serves)
        units = torch.baddbmm(self.mlp_in_bias[:, None], x, self.mlp_in).relu_()              # (R, n, 4d)
        if serves is not None:
            units = for_its_task(units, serves)
        return torch.baddbmm(self.mlp_out_bias[:, None], units, self.mlp_out)

    def add(self, x, read, serves):
        """The residual stream (R, n, t, d) after the block: x plus what attention and the feed-forward layer add.

        read (R, n, t, d) is what attention has read. x may be the same for all n sequences: (R, 1, t, d). serves (R or 1, n, 2),
        if not None: which half of the units serves a sequence, the first addition and the second the memorization.
        """
        x = x + (read.flatten(1, 2) @ self.output).view_as(read)
        if serves is not None:
            serves = serves[:, :, None].expand(*x.shape[:3], 2).flatten(1, 2)                 # (R, n*t, 2)
        return x + self.feed_forward(self.normalized(x).flatten(1, 2), serves).view_as(x)


class Transformer(nn.Module):
    """A population of transformers with learned positions and an untied unembedding (Nanda et al. 2023, as the paper).

    runs: they share everything but seed and experiment. Weights are normal / sqrt(hidden), what a block adds to the
    residual stream smaller by sqrt(layers); each run's are drawn on the CPU from its own seed.
    """

    def __init__(self, runs):
        super().__init__()
        run, generators = runs[0], [generator(run, "weights") for run in runs]

        def draw(*shape, scale=1.0):
            """A parameter (R, *shape), each run's from its own generator."""
            return nn.Parameter(torch.stack([torch.randn(shape, generator=g) for g in generators]) * scale * run.hidden**-0.5)

        self.equals = run.p
        self.embed, self.position = draw(run.vocabulary, run.hidden), draw(run.length, run.hidden)
        self.blocks = nn.ModuleList(Block(run, draw) for _ in range(run.layers))
        self.unembed = draw(run.hidden, run.p)

    def logits(self, x):
        """Those of the residual stream at '=', x (R, N, d): (R, N, p)."""
        return self.blocks[-1].normalized(x) @ self.unembed

    def forward(self, inputs, textbook=False):
        """Logits at '=', (R, N, p). textbook=True computes every position of every example, without a table.

        Without it the logits are the same, with less work: a 1-layer model attends by table, and a deeper one computes a prefix
        once for all examples that begin with it. Attention is causal, so what stands before b depends on nothing after it.
        """
        if len(self.blocks) == 1 and not textbook:
            table = (self.embed[:, None] + self.position[:, :-1, None]).flatten(1, 2)         # (R, (T-1) * vocabulary, d)
            equals = self.embed[:, self.equals, None] + self.position[:, -1:]                 # (R, 1, d)
            read = self.blocks[0].attention_by_table(table, equals, inputs)
            x = self.blocks[0].add(equals[:, :, None], read[:, :, None], inputs.serves)       # (R, N, 1, d)
            return self.logits(x.squeeze(2))
        r, n, _ = inputs.tokens.shape
        first = torch.arange(r, device=self.embed.device)[:, None, None] * self.embed.shape[1]

        def embedded(tokens, position):
            """Tokens (R or 1, n, t) at positions (R, t, d): (R, n, t, d)."""
            return F.embedding(tokens + first, self.embed.flatten(0, 1)) + position[:, None]
        if textbook:
            x = embedded(inputs.tokens, self.position)                                        # (R, N, T, d)
            for block in self.blocks:
                x = block.add(x, block.textbook_attention(x), inputs.serves)
            return self.logits(x[:, :, -1])
        prefix = embedded(inputs.prefixes, self.position[:, :-2])                             # (R, rows, T-2, d)
        x = embedded(inputs.tokens[..., -2:], self.position[:, -2:])                          # (R, N, 2, d): b and '='
        for block in self.blocks:
            last = block is self.blocks[-1]
            keys, values = block.keys_and_values(prefix)
            table = torch.cat(keys + values, 2)                                               # (R, rows, 2(T-2), heads, d/heads)
            found = LookUp.apply(table.flatten(2).flatten(0, 1), inputs.index, *inputs.inverse)
            before = found.view(r, n, *table.shape[2:]).split(1, 2)
            own_keys, own_values = block.keys_and_values(x)
            read = block.attention(x, before[:len(keys)] + own_keys, before[len(keys):] + own_values, last)
            x = block.add(x[:, :, -1:] if last else x, read, inputs.serves)
            if not last:
                prefix = block.add(prefix, block.attention(prefix, keys, values), inputs.prefixes_serve)
        return self.logits(x.squeeze(2))


def parameters(run):
    """Number of parameters of a run's model."""
    d = run.hidden
    return (run.vocabulary + run.length + run.p) * d + run.layers * (12 * d * d + 5 * d)


# training: the loss and the data


def exact_cross_entropy(logits, labels):
    """-log softmax at the label, (..., p) and (...) -> (...), accurate to float32 however small it is.

    softplus(logsumexp of the wrong classes - the right logit); F.cross_entropy rounds to 0 below about 1e-7. (nll_loss takes
    the right logit: the way back of gather is a scatter, made deterministic on CUDA by a slow sort.)
    """
    right = -F.nll_loss(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
    wrong = logits.scatter(-1, labels[..., None], -math.inf).logsumexp(-1)
    return F.softplus(wrong - right)


class CrossEntropy(torch.autograd.Function):
    """Equal to F.cross_entropy (reduction sum); its gradient, softmax - one-hot, takes no second exp and no new memory.

    Where a probability underflows the value is infinite, the gradient is not.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        """logits (..., p), labels (...) -> a scalar."""
        ctx.softmax, ctx.labels = logits.softmax(-1), labels[..., None]
        return -ctx.softmax.gather(-1, ctx.labels).log().sum()

    @staticmethod
    def backward(ctx, gradient):
        """gradient, a scalar -> (..., p), in the memory of the softmax, which is overwritten: so it works once."""
        softmax, ctx.softmax = ctx.softmax, None
        return softmax.mul_(gradient).scatter_add_(-1, ctx.labels, -gradient.expand(ctx.labels.shape)), None


def training_loss(logits, labels, kind):
    """Sum over runs of each run's mean loss, a scalar. Each weight is in one run's loss only, so it gets that run's gradient.

    'float32' has the gradient of F.cross_entropy: at the label, softmax - 1 rounds to 0 once the softmax rounds to 1, and then
    the example pulls its own logit no more. 'exact' (exact_cross_entropy above) has the same gradient without that rounding.
    """
    if kind == "exact":
        return exact_cross_entropy(logits, labels).mean(-1).sum()
    if logits.is_cuda:      # where the scatter of CrossEntropy, made deterministic, would be a slow sort
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").sum() / labels.shape[-1]
    return CrossEntropy.apply(logits, labels) / labels.shape[-1]


class Dataset:
    """The data of a population, runs that train together and share everything but seed and experiment, on a device."""

    def __init__(self, runs, device):
        def stack(tensors):
            """The runs' tensors as one, with the run axis in front."""
            return torch.stack(list(tensors)).to(device)
        tokens, labels = zip(*map(training_set, runs))
        self.run = run = runs[0]
        self.inputs = Inputs(stack(tokens), run, 128 if device.startswith("cuda") else None)    # (R, N, T)
        self.labels = stack(labels)                                                           # (R, N)
        self.all_pairs = Inputs(stack([sequences(run, torch.arange(run.p**2))] * len(runs)), run)  # (R, p*p, T)
        self.answers = stack(map(answers, runs))                                              # (R, p*p)
        self.train = stack(map(trained, runs))                                                # (R, p*p) bool
        # val: pairs that never train; unmirrored: those of them whose mirror (b, a) never trains either
        ever = stack(trained(replace(r, data=max(r.data, r.first_data))) for r in runs)
        self.val, self.unmirrored = ~ever, ~ever & ~ever.unflatten(1, (run.p, run.p)).mT.flatten(1)


# measures of a population at a step


def mean_over(values, mask):
    """Mean of values (R, n) where mask (R, n), per run; NaN where the mask is empty."""
    return values.where(mask, 0).sum(1) / mask.sum(1)


def circuits(logits, dataset):
    """The generalizing circuit of addition, measured in logits (R, p*p, p) of all pairs: a dict of (R,) tensors.

    The logits of a pure generalizing circuit depend on delta = c - (a + b) mod p alone. So its part of the centred logits is
    estimated as their mean at each delta over the unseen pairs: those of validation whose mirror (b, a) was not trained on
    either. What is left of the logits is the rest.
    circuit_share: share of the logit variance on the unseen pairs that the part explains, an adjusted R^2: about 0, or just
    below, where there is no circuit. circuit_margin: the part's right logit less its largest wrong one. Memorization alone
    makes it negative: at an unseen (a, b) it favours the answers of training examples with the same a or the same b, and none
    of those is a + b.
    circuit_spread: standard deviation of the rest on the unseen pairs. memory_acc: training accuracy of the rest, what is
    known without the circuit. A right logit of the part that is negative is not subtracted: that would help the rest.
    """
    p = dataset.run.p
    x = logits - logits.mean(-1, keepdim=True)
    place = (dataset.answers[:1, :, None] + torch.arange(p, device=logits.device)) % p        # (1, p*p, p), the same in all runs
    x = x.gather(-1, place.expand_as(x))                                                      # (R, p*p, p): delta 0 is right
    unseen = dataset.unmirrored[..., None].float()                                            # (R, p*p, 1)
    count = unseen.sum((1, 2))                                                                # (R,)
    part = (unseen.mT @ x).squeeze(1) / count[:, None]                                        # (R, p)
    total = (x.square().sum(-1, keepdim=True) * unseen).sum((1, 2))
    freedom = (count - 1).where(count > 1, math.nan)                                          # a mean was taken
    rest = (total - part.square().sum(1) * count) * count / freedom                           # unbiased
    margin = part[:, 0] - part[:, 1:].amax(1)                                                 # (R,)
    part[:, 0].clamp_(min=0)
    memory = ((x - part[:, None]).argmax(-1) == 0).float().where(margin.isfinite()[:, None], math.nan)       # (R, p*p)
    return {"circuit_share": 1 - rest / total, "circuit_margin": margin,
            "circuit_spread": (rest.clamp(min=0) / count / p).sqrt(), "memory_acc": mean_over(memory, dataset.train)}


def fourier_concentration(embed, p):
    """Share of the Fourier power of number embeddings (R, >= p, d) over the tokens in the five strongest frequencies, (R,)."""
    power = torch.fft.rfft(embed[:, :p], dim=1)[:, 1:].abs().square().sum(-1)                 # (R, p // 2)
    if p % 2 == 0:
        power[:, -1] /= 2       # the others stand for two terms of the transform
    return power.topk(min(5, power.shape[1]), dim=1).values.sum(1) / power.sum(1)


@torch.no_grad()
def evaluate(model, dataset):
    """Every measure of every run now, a dict of (R,) tensors: accuracies, accurate losses, norm, circuits. In float32."""
    torch.set_float32_matmul_precision("highest")
    logits = model(dataset.all_pairs)                                                         # (R, p*p, p)
    loss = exact_cross_entropy(logits, dataset.answers)
    hit = (logits.argmax(-1) == dataset.answers).float().where(loss.isfinite(), math.nan)        # a diverged run knows nothing
    measures = {"train_acc": mean_over(hit, dataset.train), "val_acc": mean_over(hit, dataset.val),
                "val_acc_unmirrored": mean_over(hit, dataset.unmirrored), "train_loss": mean_over(loss, dataset.train),
                "val_loss": mean_over(loss, dataset.val),
                "norm": sum(w.square().flatten(1).sum(1) for w in model.parameters()).sqrt()}
    if dataset.run.memorize:
        guess, label = model(dataset.inputs).argmax(-1)[:, dataset.run.data:], dataset.labels[:, dataset.run.data:]
        measures["memorize_acc"] = (guess == label).float().mean(1).where(loss.isfinite().all(1), math.nan)
    if dataset.run.task == "addition":
        measures |= circuits(logits, dataset)
    if dataset.run.task != "random":
        measures["fourier_top5"] = fourier_concentration(model.embed, dataset.run.p)
    return measures


# the loop


def evaluation_steps(steps):
    """The steps after which a run is evaluated: 0, dense at the start on a log scale, then every hundredth of the run."""
    points = np.concatenate([[0], np.geomspace(1, steps, 60), np.linspace(steps / 100, steps, 100)])
    return np.unique(points.round().astype(int)).tolist()


WARMUP = 10                 # steps over which the learning rate rises linearly (Nanda et al. 2023)
CHECKPOINT_SECONDS = 30     # a killed process loses at most this much of a population


def training_step(model, optimizer, dataset, compiled):
    """A function that makes one optimization step of the population, at the run's precision."""
    precision = "high" if dataset.run.precision == "tf32" else "highest"

    def loss():
        """Forward pass and loss."""
        with torch.autocast(dataset.labels.device.type, torch.bfloat16, dataset.run.precision == "bfloat16", cache_enabled=False):
            return training_loss(model(dataset.inputs).float(), dataset.labels, dataset.run.loss)
    no_compiler = ()
    if compiled:
        torch._dynamo.reset()       # each population has shapes of its own; torch._dynamo is slow to import
        loss, no_compiler = torch.compile(loss, dynamic=False), torch._dynamo.exc.TorchDynamoException

    def step():
        """One optimization step, or one clear line where there is no compiler."""
        torch.set_float32_matmul_precision(precision)
        optimizer.zero_grad()
        try:
            loss().backward()
        except no_compiler as error:
            if out_of_memory(error) or dataset.labels.is_cuda and torch.cuda.is_current_stream_capturing():
                raise
            fail(f"--compile: torch.compile does not work here ({str(error).splitlines()[0]})")
        optimizer.step()
    return step


def out_of_memory(error):
    """Whether memory was too small. On a CPU, and from cuBLAS or CUDA itself, that is an error without a class of its own.

    PyTorch asks NVML how full the GPU is before it says so; where it may not ask, that is the error.
    """
    known = ("allocate memory", "out of memory", "ALLOC_FAILED", "NVML_SUCCESS")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in known)


def capture(step, optimizer):
    """The step as a CUDA graph: one launch instead of a hundred small kernels; the step itself where that fails.

    All are captured on the one stream that torch has for it, since cuBLAS keeps memory for each stream that it has seen; the
    outer context restores the current stream where a capture fails.
    """
    optimizer.zero_grad()
    optimizer.param_groups[0]["capturable"] = True
    graph = torch.cuda.CUDAGraph()
    gc.collect()            # the graph of the population before: freed later, it may take cuBLAS's memory of this stream with it
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        first = error.__context__ or error      # leaving a capture that failed may fail, too
        if out_of_memory(first):
            raise first from None
        print(f"no CUDA graph, slower: {str(first).splitlines()[0]}", file=sys.stderr)
        capture.works = False       # torch does not free the memory of a failed capture: no other is tried
        return step
    finally:
        optimizer.param_groups[0]["capturable"] = False
    graph.step = step       # which holds what the graph reads and writes: the graph itself has addresses only
    return graph.replay


capture.works = True


def train(runs, device, compiled=False, checkpoint=None, tick=lambda *report: None):
    """Train runs of one shape together. Returns the history: a dict of (R, evaluations) tensors on the CPU.

    checkpoint is a file that keeps the state, so that a killed process goes on from it. tick is called after each evaluation
    with the runs, the step, and the mean training and validation accuracy of those that have not diverged. A run whose loss is
    no longer finite spoils no other.
    """
    run, model, on_gpu = runs[0], Transformer(runs).to(device), device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(model.embed.device)       # a graph is captured on the current device
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=(0.9, 0.98), eps=run.eps,
                                  weight_decay=run.weight_decay, fused=True)
    start, history = 0, defaultdict(list)
    state = load_tensors(checkpoint) if checkpoint and checkpoint.exists() else None
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, history = state["step"] + 1, defaultdict(list, state["history"])
    change = run.steps // 2 + 1 if run.first_data else 0        # the step from which on training is on data, not on first_data
    due, saved = set(evaluation_steps(run.steps)), time.monotonic()
    for now in range(start, run.steps + 1):
        if now in (start, change):
            dataset = Dataset([replace(r, data=r.first_data) for r in runs] if now < change else runs, device)
            step = training_step(model, optimizer, dataset, compiled)
            captured = max(now, WARMUP) + 4     # a CUDA graph repeats one learning rate: after the warm-up, and some plain steps
        if now > 0:
            optimizer.param_groups[0]["lr"] = run.lr * min(1, now / WARMUP)
            if on_gpu and now == captured and capture.works:
                step = capture(step, optimizer)
            step()
        if now in due:
            measures = {"step": torch.full((len(runs),), float(now))} | evaluate(model, dataset)
            for name, value in measures.items():
                history[name].append(value.cpu())
            tick(runs, now, float(measures["train_acc"].nanmean()), float(measures["val_acc"].nanmean()))
        if checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS:
            write(checkpoint, partial(torch.save, {"step": now, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                                   "history": dict(history)}))
            saved = time.monotonic()
    return {name: torch.stack(values, 1) for name, values in history.items()}


# sweep: a grid of runs, packed, cached, resumed, sharded


def load_tensors(path):
    """What torch.save wrote, or None: without pickle, and a damaged file is named, never trusted.

    It stays until what is computed again takes its place: it may be whole, and the memory too small to read it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():       # torch.load checks no checksums
                raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        print(f"{path} can't be read and is computed again ({type(error).__name__})", file=sys.stderr)
        return None


def load_histories(folder):
    """All that the cache holds, {run: {measure: array (evaluations,)}}."""
    done, known = {}, {f.name for f in fields(Run)}
    for path in sorted(folder.glob("population-*.pt")):
        saved = load_tensors(path)
        if saved and not saved["runs"][0].keys() <= known:      # one without a later field was trained with its default
            print(f"{path} is of another version and is not used", file=sys.stderr)
        elif saved:
            for i, run in enumerate(saved["runs"]):
                done[Run(**run)] = {name: values[i].numpy() for name, values in saved["history"].items()}
    return done


def values_per_example(run):
    """Values that one example of a run computes: what memory and time are estimated from.

    About 16 hidden sizes at each position of a layer, half of them the feed-forward units and their gradients, and three times
    the logits.
    """
    positions = 1 if run.layers == 1 else 2      # '=', or b and '='
    return positions * run.layers * 16 * run.hidden + 3 * run.p


def work(population):
    """About the operations that train a population: for the order, the time to expect and the time left.

    A value costs the products that make it, one for each hidden unit, and as much time as 80 more.
    """
    run = population[0]
    data = (run.data + (run.first_data or run.data)) / 2 + run.memorize
    return len(population) * run.steps * data * values_per_example(run) * (run.hidden + 80)


def expected_seconds(populations, options):
    """How long they take to train: three times their work at the speed of a matrix product here, at their precision.

    Within a factor of two on a CPU; on a GPU, where small models wait for kernels to start, longer.
    """
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    kind = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    n = 512 if options.device == "cpu" else 2048        # a GPU is done with a small one sooner than it is told of the next
    x, weight = (torch.randn(1, rows, n, device=options.device, dtype=kind) for rows in (4 * n, n))
    seconds = seconds_per_call({"product": lambda: x @ weight}, options.device, 5)["product"]
    works = list(map(work, populations))
    return 3 * max(sum(works) / options.workers, max(works, default=0)) * seconds / (8 * n**3)


def room_on(device):
    """Bytes for a population: a quarter of a rank's share of the GPU memory that is free; on a CPU what measured fastest.

    Rounded down to a power of two, so that a sweep that goes on finds its populations again.
    """
    if not device.startswith("cuda"):
        return 2**28
    ranks = math.ceil(int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / torch.cuda.device_count())      # that share a GPU
    return 2 ** int(math.log2(max(1, torch.cuda.mem_get_info(device)[0] / 4 / ranks)))


def pack(runs, room):
    """Populations, lists of runs of one shape, as large as fits this many bytes; the longest first."""
    shapes, populations = defaultdict(list), []
    for run in runs:
        shapes[replace(run, seed=0, experiment="")].append(run)
    for run, same in shapes.items():
        each = 4 * max(run.data + run.memorize, 1.5 * run.p**2) * values_per_example(run)     # a training step or an evaluation
        parts = math.ceil(len(same) / max(1, room // each))
        populations += [same[i * len(same) // parts:(i + 1) * len(same) // parts] for i in range(parts)]
    return sorted(populations, key=work, reverse=True)


def train_to_cache(population, options, tick):
    """Train a population, or go on with one, and save its histories; in halves where the device's memory is too small."""
    name = hashlib.sha256(repr(population).encode()).hexdigest()[:16]
    checkpoint = options.out / "cache" / f"unfinished-{name}.pt"
    try:
        history = train(population, options.device, options.compile, checkpoint, tick)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        history = None      # halved below, when what the exception holds is freed
    if history:
        finished = {"runs": [asdict(run) for run in population], "history": history}
        write(checkpoint.with_name(f"population-{name}.pt"), partial(torch.save, finished))
        checkpoint.unlink(missing_ok=True)
    elif len(population) == 1:
        fail(f"--device {options.device}: too little memory for one run of {population[0].layers} layers of hidden size "
             f"{population[0].hidden}; without that size (--hidden, and --layers of emergence.py) the rest can run")
    else:
        checkpoint.unlink(missing_ok=True)
        gc.collect()        # importing parts of torch late leaves cycles that hold the model
        torch.cuda.empty_cache()
        for half in (population[::2], population[1::2]):
            train_to_cache(half, options, tick)


def start_method():
    """How a process for training begins: by fork, by spawn, or None, not at all.

    A fork begins at once, in a notebook too, but is not safe everywhere: not on macOS, nor beside a GPU, where autograd has
    threads. A spawned process imports this file, and can't where it was pasted.
    """
    if sys.platform == "linux" and not torch.cuda.is_available():
        return "fork"
    return "spawn" if __name__ == "common" else None


def worker(populations, taken, news, options):
    """A process that trains populations, each time the first that none has taken; taken, a shared number, counts those."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # it ends with the process that began it, however that ends
    threading.Thread(target=lambda: (mp.parent_process().join(), os._exit(1)), daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""            # else AdamW starts a GPU that it does not need (torch 2.12)
    torch.set_num_threads(1)
    try:
        while True:
            with taken.get_lock():
                i, taken.value = taken.value, taken.value + 1
            if i >= len(populations):
                break
            train_to_cache(populations[i], options, lambda _, *report: news.put((i, *report)))
    except OSError as error:
        news.put(error)


@contextlib.contextmanager
def without_interrupts():
    """A process begun meanwhile never gets a Ctrl-C, not even while it still imports torch (except on Windows)."""
    masks = hasattr(signal, "pthread_sigmask")
    before = masks and signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])       # which a process inherits
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def train_all(populations, options, tick):
    """Train populations to the cache, in options.workers processes or in this one; each takes the next, the longest first.

    Processes and not threads, which wait for each other's Python: up to a quarter of the time, where models are small.
    """
    count = min(options.workers, len(populations))
    if count < 2:
        for population in populations:
            train_to_cache(population, options, tick)
        return
    context = mp.get_context(start_method())
    taken, news = context.Value("q", 0), context.SimpleQueue()
    # daemons: not waited for where a second Ctrl-C ends the finally below too soon
    processes = [context.Process(target=worker, args=(populations, taken, news, options), daemon=True) for _ in range(count)]
    try:
        with without_interrupts():
            for process in processes:
                process.start()
        status = [None]
        while None in status:
            time.sleep(0.05)
            status = [process.exitcode for process in processes]      # before the news, so that none is missed
            while not news.empty():
                message = news.get()
                if isinstance(message, OSError):
                    raise message
                tick(populations[message[0]], *message[1:])
            if 2 in status:         # it said why
                raise SystemExit(2)
            if any(status):
                why = " (killed, perhaps for memory: fewer --threads take less)" if -9 in status else ""
                raise ChildProcessError(f"a training process ended with status {min(filter(None, status))}{why}")
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()


def run_steps(begun):
    """Steps made in this start, over all runs; begun: (population, share done before this start, share done now) of each."""
    return sum(len(population) * population[0].steps * (now - before) for population, before, now in begun)


def progress(begun, mine, seconds):
    """How far the populations mine are, and the time left if they go on as in these seconds, once a thousandth is made."""
    finished = sum(len(population) for population, _, now in begun if now == 1)
    made = sum(work(population) * (now - before) for population, before, now in begun)
    left = sum(map(work, mine)) - sum(work(population) * now for population, _, now in begun)
    text = f"{finished}/{sum(map(len, mine))} runs, {run_steps(begun) / seconds:.0f} run-steps/s"
    return text + (f", {timedelta(seconds=round(seconds * left / made))} left" if made > left / 1000 else "")


def rank_and_world():
    """Which of torchrun's processes this is, and how many there are; one of both numbers alone is of something else."""
    both = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    return tuple(map(int, both)) if all(both) else (0, 1)


def meet(world):
    """Wait for the other ranks, or end with one line where one of them has ended."""
    if world > 1:
        try:
            dist.barrier()
        except RuntimeError:
            fail("another rank ended early")


CLEAR = "\r\033[K"      # clears the live line of a terminal


def sweep(runs, options):
    """Train the runs that the cache does not hold. Returns {run: history}, a history a dict of arrays (evaluations,).

    Under torchrun the ranks divide the populations among them and have a file system in common; rank 0 returns the results,
    the others None. However many processes there are, the results are the same (on CUDA up to rounding, where it packs
    otherwise). How many runs this start trained, and how fast, is noted in options.
    """
    (rank, world), folder, start = rank_and_world(), options.out / "cache", time.monotonic()
    done = load_histories(folder)
    if rank == 0:
        write(folder / "room", str(room_on(options.device)))      # for all ranks: others may have other GPUs
    meet(world)      # all ranks know the same runs as done before any adds one
    room = int((folder / "room").read_text())
    missing = [[run for run in population if run not in done] for population in pack(runs, room)]
    mine = [population for population in missing if population][rank::world]
    if rank == 0 and (expected := expected_seconds(mine, options)) > 60:
        print(f"expect about {timedelta(seconds=min(round(expected, -1), 10**9))} of training", file=sys.stderr, flush=True)
    begun, shown, live = {}, 0.0, rank == 0 and sys.stderr.isatty()
    # begun: {first run of a population: (population, share done before this start, share done now)}

    def tick(population, step, train_acc, val_acc):
        """After each evaluation: show how far the sweep is; of several ranks, the share of the first."""
        nonlocal shown
        run, now, seconds = population[0], step / population[0].steps, time.monotonic() - start
        before = begun[run][1] if run in begun else now
        begun[run] = (population, before, now)
        if rank == 0 and step and seconds - shown >= (0.2 if live else 30):
            shown = seconds
            line = (f"{progress(begun.values(), mine, seconds)} | hidden {run.hidden}, D {run.data}, step {step}: "
                    f"train {train_acc:.2f}, val {val_acc:.2f}")
            fits = line[:shutil.get_terminal_size().columns - 1]       # a longer line wraps, and is not cleared
            print(f"{CLEAR}{fits}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    try:
        train_all(mine, options, tick)
    finally:
        if live:
            print(CLEAR, end="", file=sys.stderr, flush=True)
    # in a file, since gloo may abort at exit where it has sent a tensor
    write(folder / f"run-steps-{rank}", str(run_steps(begun.values())))
    meet(world)
    if rank == 0:
        before, done = len(done), load_histories(folder)
        steps = sum(float((folder / f"run-steps-{i}").read_text()) for i in range(world))
        options.runs_trained, options.speed = len(done) - before, round(steps / (time.monotonic() - start), 1)
        return {run: done[run] for run in runs}


# output: rows


MEMORIZED, GENERALIZED, FLOOR = 0.99, 0.99, 0.1      # accuracies that separate the dynamics
COLORS = {"progression": "#E69F00", "ungrokking": "#D55E00", "semi-grokking": "#CC79A7", "grokking": "#0072B2",
          "stalled": "#999999", "diverged": "#000000"}      # colour-blind safe (Okabe and Ito)


def first_step(steps, values, level):
    """The first step at which values reach level, or None."""
    reached = np.flatnonzero(values >= level)
    return int(steps[reached[0]]) if len(reached) else None


def dynamic(history):
    """Names what training showed (paper section 3), by a rule on train_acc and on val_acc_unmirrored.

    progression: validation reaches FLOOR no later than training reaches MEMORIZED, which it may never do. stalled: neither is
    reached. Otherwise the training set was memorized first, and the best validation accuracy decides:
    grokking from GENERALIZED, ungrokking below FLOOR, semi-grokking between. How much later it rises plays no part.
    diverged: a loss was not finite. None: no validation pair without its mirror, as where all pairs train.
    Ungrokking as the paper uses the word: by the last step, validation accuracy has not risen.
    """
    if not np.isfinite(history["train_loss"]).all():
        return "diverged"
    steps, unmirrored = history["step"], history["val_acc_unmirrored"]
    if np.isnan(unmirrored).all():
        return None
    memorized, rising = first_step(steps, history["train_acc"], MEMORIZED), first_step(steps, unmirrored, FLOOR)
    if memorized is None or (rising is not None and rising <= memorized):
        return "stalled" if rising is None else "progression"
    best = unmirrored.max()
    return "grokking" if best >= GENERALIZED else "semi-grokking" if best >= FLOOR else "ungrokking"


def row(run, history):
    """A line of runs.csv: the run, the last value of each measure, and what its curves went through."""
    steps, unmirrored = history["step"], history["val_acc_unmirrored"]
    line = asdict(run) | {"params": parameters(run), "operator": int(run.operator), "split": int(run.split)}
    line |= {name: float(values[-1]) for name, values in history.items() if name != "step"}
    line |= {"best_val_acc": float(history["val_acc"].max()), "best_val_acc_unmirrored": float(unmirrored.max())}
    if run.memorize:
        known = unmirrored[history["memorize_acc"] >= MEMORIZED]
        line["best_val_acc_memorized"] = float(max(known, default=math.nan))
    return line | {"memorized_at": first_step(steps, history["train_acc"], MEMORIZED),
                   "generalized_at": first_step(steps, unmirrored, GENERALIZED), "dynamic": dynamic(history)}


def by_cell(rows, *names):
    """{(value of each name): rows}, such as the seeds of each setting."""
    found = defaultdict(list)
    for line in rows:
        found[tuple(line[name] for name in names)].append(line)
    return found


def majority(rows):
    """The dynamic that more than half of the runs went through, or None."""
    kind, count = Counter(line["dynamic"] for line in rows).most_common(1)[0]
    return kind if count > len(rows) / 2 else None


def count_dynamics(rows):
    """What the seeds of a cell went through, the most frequent first: 'grokking 2/3, semi-grokking 1/3'."""
    counts = Counter(line["dynamic"] or "-" for line in rows)
    return ", ".join(f"{name} {count}/{len(rows)}" for name, count in counts.most_common())


# statistics over seeds


ENOUGH = 6      # seeds: a bootstrap of fewer is too narrow, and fewer may well do the same by chance


def resampled_means(values, seed=0, draws=2000):
    """Means of values (..., seeds) over the seeds, and then over as many drawn with replacement in each cell: (1 + draws, ...).

    The bootstrap: of any statistic computed from each of these means, the first is the estimate and the others are its
    distribution, NaN below 3 seeds. NaN values are left out, and a mean of none is NaN.
    """
    drawn = np.random.default_rng(seed).integers(values.shape[-1], size=(draws, *values.shape))
    values = np.concatenate([values[None], np.take_along_axis(values[None], drawn, -1)])
    means = np.ma.masked_invalid(values).mean(-1).filled(np.nan)
    if values.shape[-1] < 3:
        means[1:] = np.nan
    return means


@cache
def tail(count):
    """The percentiles of the bootstrapped means of so many values, or of what is made of such means, that bound a 95% interval.

    Beyond 2.5 and 97.5, since a bootstrap of few values is too narrow: so far that the interval of normal values is the one by
    Student's t (the expanded percentile interval, Hesterberg 2015, The American Statistician 69). From 3 values on.
    """
    count = max(3, count)
    t = np.percentile(np.random.default_rng(0).standard_t(count - 1, 100_000), 97.5)
    cut = 100 * NormalDist().cdf(-t * math.sqrt(count / (count - 1)))
    return cut, 100 - cut


def interval(values):
    """Mean of values and its 95% bootstrap interval over seeds: (mean, low, high); None and NaN are left out.

    The interval is NaN for fewer than 3 values, and their range for 3 and 4. It covers the mean of normal values 3 times in 4
    with 3 of them, 9 times in 10 with 5, as it should with 11; less often where nearly all values are 0, or nearly all are 1.
    """
    values = np.array(values, dtype=float)      # None becomes NaN
    values = values[np.isfinite(values)]
    means = resampled_means(values, draws=10_000)
    return float(means[0]), *map(float, np.percentile(means[1:], tail(len(values))))


def interval_name(seeds):
    """What interval gives beside the mean of so many seeds."""
    return "no interval" if seeds < 3 else "range" if seeds < 5 else "95% interval"


def with_interval(mean, low=np.nan, high=np.nan, style="{:.2f}"):
    """'mean [low, high]' as text, without an interval where it is not known; '-' where the mean is not."""
    bounds = "" if np.isnan(low) else f" [{style.format(low)}, {style.format(high)}]"
    return "-" if np.isnan(mean) else style.format(mean) + bounds


def beyond(bound, low, high, above):
    """Whether an interval lies above a bound, or below it: True, False, or None where it holds the bound or is not known."""
    return above if low > bound else not above if high < bound else None


def size_curve(rows, task, data, measure="val_acc_unmirrored"):
    """Hidden sizes, ascending, and the seeds' values at each, (sizes, seeds); NaN for a run that diverged."""
    cells = by_cell(rows, "task", "data", "hidden")
    sizes = sorted(hidden for t, d, hidden in cells if (t, d) == (task, data))
    values = [[line[measure] for line in cells[task, data, hidden]] for hidden in sizes]
    return np.array(sizes), np.array(values, dtype=float)      # None becomes NaN


DIP = 0.2      # the depth from which on a dip is called one


def triples(sizes):
    """Every three of so many sizes in ascending order, their indices before, at and after: (3, triples)."""
    return np.array(list(combinations(range(sizes), 3)), int).reshape(-1, 3).T      # none of fewer than 3 sizes


def below(means):
    """How far values of curves (..., sizes) lie below both one before and one after, for all such triples: (..., triples)."""
    before, at, after = triples(means.shape[-1])
    return np.minimum(means[..., before], means[..., after]) - means[..., at]


def judgeable(values):
    """Whether values (sizes, seeds) are enough for a verdict on a dip, both ways: 3 sizes, and 6 seeds known at each."""
    return len(values) >= 3 and np.isfinite(values).sum(-1).min() >= ENOUGH


def dip_interval(values):
    """Depth of the dip of values (sizes, seeds), its index, its 95% interval, and the verdict on it.

    The depth is the most that a mean lies below both the best before and the best after it: 0, and no index, for a curve that
    only rises or falls, NaN and none where all seeds of a size diverged, or of fewer than 3 sizes.

    'dip': deeper than DIP, and the lower end is above 0: for some triple of sizes the difference is more standard errors above 0
    than the largest error of all triples has in 97.5% of the draws (max-t, since so many triples are tried).
    'no dip': the upper end, of the bootstrapped depth, is below DIP, and the largest size is above 0.5 and within DIP of the
    best; a curve that ends lower may still come back. Else 'undecided', as with too few to judge.
    Seeds that all do the same have no variance, and prove little: so each squared standard error has 2 / seeds^2 added, and at
    least 2 standard errors are asked for. The upper end has no such guard: 6 seeds all succeed in 18% of cases where a quarter
    of all runs fail, 11 in 4%.
    """
    means, seeds = resampled_means(values), int(np.isfinite(values).sum(-1).min())
    deep = below(means)
    depths = deep.max(-1, initial=0) if len(values) > 2 else np.full(len(means), np.nan)
    depth = float(depths[0])
    where = int(triples(len(values))[1][deep[0].argmax()]) if depth > 0 else None
    error = np.sqrt(deep[1:].var(0) * seeds / max(1, seeds - 1) + 2 / max(1, seeds)**2)
    most = np.percentile(((deep[1:] - deep[0]) / error).max(-1, initial=2), 97.5)
    low, high = (deep[0] - most * error).max(initial=0), np.percentile(depths[1:], 97.5)
    if not judgeable(values):
        return depth, where, low, high, "undecided"
    back = means[0, -1] > max(0.5, means[0].max() - DIP)
    return depth, where, low, high, "dip" if depth > DIP and low > 0 else "no dip" if high < DIP and back else "undecided"


def dip_of(rows, task, data):
    """dip_interval of the size_curve of a task and D, with the hidden sizes in front.

    'no dip' asks for more. Most runs of the smallest size went through progression: else a peak to its left may not have been
    tried (stalled runs do not tell). And neighbouring sizes are at most a factor of 3 apart: else a dip may lie between.
    """
    hidden, values = size_curve(rows, task, data)
    *found, verdict = dip_interval(values)
    small = majority(by_cell(rows, "task", "data", "hidden")[task, data, hidden[0]]) == "progression"
    dense = (hidden[1:] <= 3 * hidden[:-1]).all()
    return hidden, *found, "undecided" if verdict == "no dip" and not (small and dense) else verdict


# claims, figures and files


def claim(text, paper, measured, holds):
    """A verdict: what is claimed, what the paper says, what was measured, and whether it holds (None: undecided)."""
    return {"claim": text, "paper": paper, "measured": measured, "holds": None if holds is None else bool(holds)}


def claim_on_mean(text, paper, values, bound, above, style="{:.2f}", least=1):
    """A claim that the mean of values lies above a bound, or below it.

    Open while its interval holds the bound, and where fewer than least values are known.
    """
    mean, low, high = interval(values)
    count = int(np.isfinite(np.array(values, float)).sum())      # None becomes NaN
    return claim(text, paper, f"{with_interval(mean, low, high, style)}, n = {count}",
                 beyond(bound, low, high, above) if count >= least else None)


def size_ticks(axis, places, sizes):
    """A tick for each hidden size, at these places; turned by 90 degrees where they would run into each other."""
    many = len(sizes) > 11
    axis.set_xticks(places, labels=map(str, sizes), rotation=90 * many, fontsize=8 if many else None)
    axis.set_xticks([], minor=True)


def write(path, content):
    """Write a file atomically. content is its text, or a function that saves to a binary file, such as figure.savefig.

    By way of memory: torch.save to a full disk ends in an error that does not say so.
    """
    buffer = io.BytesIO()
    if callable(content):
        content(buffer)
    else:
        buffer.write(content.encode())
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_table(path, lines):
    """A CSV file of dicts, with every column that one of them has; None (by csv) and NaN are empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    table.writeheader()
    table.writerows({k: "" if v != v else v for k, v in line.items()} for line in lines)
    write(path, text.getvalue())


CELL = ("experiment", "task", "layers", "hidden", "data", "first_data", "memorize", "split")      # what the seeds of a cell share


def summarize(rows):
    """A dict for each cell: its number of seeds, what they went through, and means with their 95% intervals.

    Means of each accuracy, and of the steps at which runs had memorized and generalized, of those that had.
    """
    lines, measures = [], [name for name in rows[0] if "_acc" in name or name.endswith("_at")]
    for key, seeds in by_cell(rows, *CELL).items():
        line = dict(zip(CELL, key)) | {"seeds": len(seeds), "dynamics": count_dynamics(seeds)}
        for name in measures:
            line |= zip((name, f"{name}_low", f"{name}_high"), interval([seed[name] for seed in seeds]))
        lines.append(line)
    return lines


def write_results(out, results):
    """runs.csv and curves.npz from {run: history}."""
    rows = [row(run, history) for run, history in results.items()]
    write_table(out / "runs.csv", rows)
    names = dict.fromkeys(name for history in results.values() for name in history)
    longest = max(len(history["step"]) for history in results.values())
    curves = {name: np.full((len(rows), longest), np.nan, np.float32) for name in names}
    for i, history in enumerate(results.values()):
        for name, values in history.items():
            curves[name][i, :len(values)] = values
    write(out / "curves.npz", partial(np.savez_compressed, **curves))


def read_table(path):
    """The lines of a CSV file, a list of dicts with numbers as numbers and None for empty."""
    def value(text):
        """A cell of the table as a number where it is one, None where it is empty."""
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None
    with open(path, newline="") as file:
        return [{k: value(v) for k, v in line.items()} for line in csv.DictReader(file)]


def read_results(out):
    """rows, the lines of runs.csv, and curves, {measure: (runs, evaluations)}, {} where there is no curves.npz."""
    rows = read_table(out / "runs.csv")
    if not rows:
        raise ValueError("runs.csv is empty")
    if not (out / "curves.npz").exists():
        return rows, {}
    with np.load(out / "curves.npz", allow_pickle=False) as saved:
        curves = dict(saved)
    last = [norm[np.isfinite(steps)][-1] for norm, steps in zip(curves["norm"], curves["step"])]      # tells runs apart
    if not np.array_equal(last, np.array([line["norm"] for line in rows], np.float32), equal_nan=True):
        raise ValueError("runs.csv and curves.npz hold different runs")
    return rows, curves


def print_table(lines):
    """Lines of cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def print_results(rows, cells, claims):
    """A line for each cell of the grid, a line for each run that diverged, and the verdicts."""
    names = [name for name in CELL if name in ("hidden", "data") or len({cell[name] for cell in cells}) > 1]
    measures = [name for name in ("train_acc", "memorize_acc", "val_acc", "val_acc_unmirrored", "best_val_acc",
                                  "best_val_acc_memorized", "memorized_at", "generalized_at") if name in cells[0]]
    table = [[*names, "dynamics", *measures]]
    for cell in cells:
        means = ["-" if math.isnan(mean) else f"{mean:.3g}" if mean < 100 else f"{mean:.0f}"
                 for mean in (cell[name] for name in measures)]
        table.append([*(str(cell[name]) for name in names), cell["dynamics"], *means])
    print_table(table)
    for line in rows:
        if line["dynamic"] == "diverged":
            print("diverged:", ", ".join(f"{name} {line[name]}" for name in [*names, "seed"]))
    print()
    holds = {True: "yes", False: "NO", None: "undecided"}
    table = [["claim", "paper", "measured", "holds"]]
    for c in claims:
        unasked = c["paper"] == "-" and c["holds"] is None
        table.append([c["claim"], c["paper"], c["measured"], "-" if unasked else holds[c["holds"]]])
    print_table(table)


# command line


def option(text, default=None, minimum=0, maximum=10**9, choices=None):
    """A field of Settings that is also an option: its help and the values it allows."""
    return field(default=default, metadata={"help": text, "minimum": minimum, "maximum": maximum, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """What every experiment sets. A script adds its grid; each field is an option of its command line."""
    p: int = option(f"modulus; below 20 guessing comes near {FLOOR}, from which on accuracy counts as risen",
                    minimum=2, maximum=1000)      # a run has p*p*p logits
    seeds: int = option("runs of each cell, with seeds 0, 1, ...", minimum=1, maximum=10_000)
    steps: int = option("optimization steps, full batch", minimum=1)
    lr: float = option("learning rate of AdamW", minimum=1e-9)
    weight_decay: float = option("weight decay of AdamW")
    loss: str = option("rounding of the loss trained on", "float32", choices=("float32", "exact"))
    eps: float = option("epsilon of AdamW", 1e-8, minimum=1e-30)
    precision: str = option("of the matrix products while training (tf32: NVIDIA GPUs; bfloat16: of what they return, too)",
                            "float32", choices=("float32", "tf32", "bfloat16"))
    normalization: str = option("of the residual stream that each layer reads (rms: over its root mean square)",
                                "none", choices=("none", "rms"))

    def run(self, task, hidden, data, seed, **more):
        """A Run with these settings, but for those given."""
        ours = {f.name: getattr(self, f.name) for f in fields(Settings) if f.name != "seeds"}
        return Run(task=task, hidden=hidden, data=data, seed=seed, **ours | more)


def fail(message):
    """End with one line on stderr, in place of a live one, and exit status 2."""
    print(CLEAR * sys.stderr.isatty() + f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def value_of(kind, minimum, maximum=10**9):
    """An argparse type: an int or a float from minimum to maximum."""
    def parse(text):
        """The number that a word of the command line stands for."""
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not minimum <= number <= maximum:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: {what} from {minimum} to {maximum:,} is needed")
        return number
    return parse


def machine_options(parser):
    """The options that every command has: --device and --threads."""
    parser.add_argument("--device", default="auto", help="auto (cuda, then cpu), cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=value_of(int, 1),
                        help="CPU processes of a script, CPU threads of common.py (default: one a core)")


THREADS = torch.get_num_threads()      # torch's choice, before set_up


def set_up(options):
    """Resolve --device (under torchrun each rank takes its own GPU) and --threads, make CUDA deterministic.

    auto leaves mps out: its torch may lack embedding_bag, and nothing here was tried on it.
    """
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and torch.cuda.is_available():
        options.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        torch.zeros(1, device=options.device).item()
    except (RuntimeError, AssertionError, ImportError) as error:      # the latter where torch knows it as a plugin
        why = (str(error) or type(error).__name__).splitlines()[0]
        fail(f"--device {options.device}: can't be used ({why}); allowed are auto, cpu, "
             "and cuda, cuda:N or mps where there is one")
    if options.device.startswith("cpu:"):       # another name of the same device
        options.device = "cpu"
    options.workers = (options.threads or THREADS) if options.device == "cpu" and start_method() else 1
    torch.set_num_threads(1)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def command_line(script, doc, experiments):
    """The experiment, its settings, and the options; in a notebook, whose words are not ours, the defaults.

    experiments: {name: (presets, ...)}.
    """
    ours = hasattr(sys.modules["__main__"], "__file__") or Path(sys.argv[0]).name == script
    words, default = sys.argv[1:] if ours else [], next(iter(experiments))
    command = shlex.join([script, *words])
    experiment = words.pop(0) if words and not words[0].startswith("-") else default
    if experiment not in experiments:
        fail(f"{experiment}: not an experiment; allowed are {', '.join(experiments)}")
    presets = experiments[experiment][0]
    folder = Path(script).stem + (f"-{experiment}" if experiment != default else "")
    parser = argparse.ArgumentParser(prog=f"{script} [{' | '.join(experiments)}]" if len(experiments) > 1 else script,
                                     description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    late = f" ({' or '.join(experiments)} comes first)" if len(experiments) > 1 and set(words) & set(experiments) else ""
    parser.error = lambda message: fail(message + late)         # one line, without the usage in front
    machine_options(parser)
    parser.add_argument("--scale", choices=presets, help="quick: a CPU, at most two minutes; small: p = 59; "
                        "paper: the paper's grid (default: paper on cuda, quick otherwise)")
    declared = fields(presets["quick"])
    for f in declared:
        meta, several = f.metadata, f.type == tuple[int, ...]
        kind = int if several else f.type
        parser.add_argument("--" + f.name.replace("_", "-"), nargs="+" if several else None,
                            type=str if kind is str else value_of(kind, meta["minimum"], meta["maximum"]),
                            choices=meta["choices"], help=meta["help"])
    parser.add_argument("--out", help=f"directory of the results (default: results/{folder}-SCALE)")
    saved = parser.add_mutually_exclusive_group()
    saved.add_argument("--fresh", action="store_true", help="ignore what was saved, and overwrite it")
    saved.add_argument("--plot-only", action="store_true", help="only judge and redraw saved results")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step: pays in long training only")
    options = parser.parse_args(words, argparse.Namespace(command=command))
    set_up(options)
    if options.precision == "tf32" and not options.device.startswith("cuda") and not options.plot_only:
        fail("--precision tf32: needs --device cuda; allowed on others are float32 and bfloat16")
    options.scale = options.scale or ("paper" if options.device.startswith("cuda") else "quick")
    options.out = Path(options.out or f"results/{folder}-{options.scale}")
    given = {f.name: tuple(value) if isinstance(value, list) else value
             for f in declared if (value := getattr(options, f.name)) is not None}
    return experiment, replace(presets[options.scale], **given), options


def check(runs):
    """End with one line if a run is impossible."""
    for run in runs:
        data = f"--squared-data {run.data}" if run.task == "squared_addition" else f"--data {run.data}"
        hidden = f"--forget-hidden {run.hidden}" if run.first_data else f"--hidden {run.hidden}"
        if not 1 <= run.data <= run.p**2:
            fail(f"{data}: --p {run.p} has {run.p**2} pairs, 1 to {run.p**2} can train")
        seen = trained(run).view(run.p, run.p)
        if run.task != "random" and (seen | seen.T).all():
            fail(f"{data}: of the {run.p**2} pairs of --p {run.p} none is left whose mirror is not trained on; fewer are needed")
        if run.memorize > run.p**2:
            fail(f"--memorize {run.memorize}: --p {run.p} has {run.p**2} pairs, so many at most")
        if run.hidden % run.heads:
            fail(f"{hidden}: must be a multiple of the {run.heads} heads")


def locked(out):
    """Make and lock the output directory, or end with one line: not writable, or in use. Returns the lock, to be closed.

    It is a transaction of sqlite: portable, and gone with the process that holds it.
    """
    try:
        (out / "cache").mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "cache"):
            tempfile.TemporaryFile(dir=folder).close()      # one made read-only since
        lock = sqlite3.connect(out / "cache" / "lock", timeout=0)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        fail(f"--out {out}: " + ("in use by another process" if "locked" in str(error) else f"can't be written ({error})"))
    except sqlite3.DatabaseError as error:
        fail(f"--out {out}: {out / 'cache' / 'lock'} is damaged ({error}); delete it")
    except OSError as error:
        fail(f"--out {out}: can't be written ({error.strerror})")
    return lock


def begin(settings, options, summary):
    """Begin summary.json, or end with one line: results of another configuration. Returns what was saved, {} for nothing."""
    out, path, wanted, saved = options.out, options.out / "summary.json", summary["configuration"], {}
    results = ("cache/*.pt", "summary.json", "runs.csv", "cells.csv", "curves.npz")
    stale = [f"{name}.*.part" for name in (*results, "*.png", "cache/r*")]      # a kill leaves parts
    for pattern in (*stale, *results) if options.fresh else stale:
        for old in out.glob(pattern):
            old.unlink(missing_ok=True)
    if path.exists():
        try:
            saved = json.loads(path.read_text())
            before = {f.name: f.default for f in fields(settings) if f.default is not None}      # of settings added since
            for name, value in (before | saved["configuration"]).items():
                if value != wanted.get(name):
                    fail(f"--out {out}: holds results with {name} = {value}, not {wanted.get(name)}; "
                         "--fresh overwrites them, another --out keeps them")
        except (ValueError, KeyError, TypeError, AttributeError):
            if options.plot_only:
                fail(f"--plot-only: {path} is damaged; the same command without it writes it again")
            print(f"{path} is damaged and is written again", file=sys.stderr)
            saved = {}
    if not saved:
        write(path, json.dumps(summary, indent=1) + "\n")
    return saved


def report(settings, preset, out, draw, judge):
    """Judge the results in out and write their figures there. Returns the rows, the cells and the claims.

    The figures name the options of training that are not those of the preset; p, seeds and steps they name anyway.
    """
    try:
        rows, curves = read_results(out)
        cells = summarize(rows)
    except Exception as error:      # csv and numpy raise a dozen kinds on a damaged file
        fail(f"--out {out}: no whole results ({error}); the command without --plot-only makes them")
    claims = judge(settings, rows, curves)
    write_table(out / "cells.csv", cells)
    own = " ".join(f"--{f.name.replace('_', '-')} {value}" for f in fields(Settings)
                   if f.name not in ("p", "seeds", "steps") and (value := getattr(settings, f.name)) != getattr(preset, f.name))
    for file, figure in draw(settings, rows, curves).items():
        if own:
            figure.suptitle(f"{figure.get_suptitle()}\nwith {own}")
        write(out / file, partial(figure.savefig, format="png", dpi=150))
    return rows, cells, claims


def reproduce(script, doc, needs_curves=False, **experiments):
    """What every script does: train the runs of grid(settings) or load what is saved, write the results, draw, judge.

    experiments: name=(presets, grid, draw, judge), the default first. draw(settings, rows, curves) is {file name: Figure},
    judge(settings, rows, curves) a list of claims; rows and curves as read_results returns them. Without needs_curves both know
    rows alone, and --plot-only asks for no curves.npz.
    """
    start, (rank, world) = time.monotonic(), rank_and_world()
    if hasattr(sys.stdout, "reconfigure"):      # not in a notebook
        sys.stdout.reconfigure(errors="replace")      # where it has no ×
    experiment, settings, options = command_line(script, doc, experiments)
    presets, grid, draw, judge = experiments[experiment]
    runs = list(dict.fromkeys(grid(settings)))      # each once
    check(runs)
    needed = ["runs.csv", "summary.json", *["curves.npz"] * needs_curves]
    if options.plot_only and (missing := [name for name in needed if not (options.out / name).exists()]):
        fail(f"--plot-only: no {missing[0]} in {options.out}; the same command without --plot-only makes it")
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    summary = {"command": options.command,
               "configuration": {"script": script, "experiment": experiment, **json.loads(json.dumps(asdict(settings)))},
               "scale": options.scale, "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
               "device": device, "threads": options.workers}
    lock, again = None, "the same command" + " without --fresh" * options.fresh
    try:
        if world > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        if rank == 0:
            lock = locked(options.out)
            saved = begin(settings, options, summary)
            print(f"{script}: {options.scale} scale, {len(runs)} runs, {sum(run.steps for run in runs):,} run-steps, "
                  f"on {device}; results go to {options.out}")
        meet(world)
        results = None if options.plot_only else sweep(runs, options)
        if rank:
            return
        if results:
            write_results(options.out, results)
        rows, cells, claims = report(settings, presets[options.scale], options.out, draw, judge)
        if results and options.runs_trained:      # else what trained them stands
            saved = summary | {"seconds": round(time.monotonic() - start, 1), "runs_trained": options.runs_trained,
                               "run_steps_per_second": options.speed}
        write(options.out / "summary.json", json.dumps((saved or summary) | {"claims": claims}, indent=1) + "\n")
        print_results(rows, cells, claims)
        print(f"\n{time.monotonic() - start:.0f} s; figures, tables and summary.json are in {options.out}")
    except KeyboardInterrupt:
        print(f"Interrupted. What is finished is saved; {again} goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        ours = isinstance(error, (ChildProcessError, BrokenPipeError))      # not of --out
        what = error if ours else f"--out {options.out}: {error.strerror or error}"
        print(f"{script}: error: {what}; what is finished is saved, and {again} goes on from there", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if lock:
            lock.close()
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


# benchmark: python common.py


def seconds_per_call(functions, device, rounds):
    """Median time of each function, called in turn so that a change in the machine's speed meets all alike.

    CPU time of the process on a CPU (all threads), wall-clock time elsewhere.
    """
    def clock():
        """Seconds, when what was started on the device is done."""
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.process_time() if device == "cpu" else time.perf_counter()
    taken = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            start = clock()
            function()
            if i > 1:
                taken[name].append(clock() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def matrix_products(run, count, device):
    """A function that makes only the matrix products per example of a training step of count runs, by PyTorch's own."""
    n, d, p = run.data, run.hidden, run.p
    products = [[torch.randn(count, *shape, device=device, requires_grad=True) for shape in ((n, a), (a, b), (n, b))]
                for a, b in ((d, d), (d, 4 * d), (4 * d, d), (d, p))]

    def multiply():
        """Forward, and backward to the inputs and to the weights."""
        for x, weight, gradient in products:
            torch.autograd.grad(x @ weight, (x, weight), gradient)
    return multiply


def benchmark():
    """Time of a training step per run, packed and one textbook model at a time, and of its matrix products alone."""
    parser = argparse.ArgumentParser(prog="common.py", description="Run-steps per second on this machine.", allow_abbrev=False)
    parser.error = fail
    machine_options(parser)
    for name, default, maximum, text in (("--p", 113, 1000, "modulus"), ("--hidden", 32, 10_000, "hidden size"),
                                         ("--data", 3000, 10**6, "training examples"),
                                         ("--runs", None, 10_000, "runs packed together (default: as a script packs 11)")):
        parser.add_argument(name, type=value_of(int, 1, maximum), default=default, help=text)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    options = parser.parse_args()
    set_up(options)
    torch.set_num_threads(options.threads or THREADS)
    device = options.device
    runs = [Run("addition", options.p, options.hidden, options.data, seed, 1, 1e-3, 1.0) for seed in range(options.runs or 11)]
    check(runs)
    if not options.runs:
        runs = pack(runs, room_on(device))[0]
    count = len(runs)

    def step(compiled=False):
        """A training step of all runs, and its optimizer."""
        dataset, model = Dataset(runs, device), Transformer(runs).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return training_step(model, optimizer, dataset, compiled), optimizer

    dataset, model = Dataset(runs[:1], device), Transformer(runs[:1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters())

    def textbook():
        """A training step of one model, as one would write it, with PyTorch's own choice of products."""
        optimizer.zero_grad()
        ours, FeedForward.works = FeedForward.works, False
        F.cross_entropy(model(dataset.inputs, textbook=True)[0], dataset.labels[0]).backward()
        FeedForward.works = ours
        optimizer.step()
    functions = {"one at a time": textbook, "packed": step()[0],
                 "products": matrix_products(runs[0], count, device)}
    if options.compile:
        functions["compiled"] = step(compiled=True)[0]
    if device.startswith("cuda"):
        for name, compiled in (("cuda graph", False), ("compiled cuda graph", True))[:1 + options.compile]:
            packed, packed_optimizer = step(compiled)
            for _ in range(3):
                packed()
            replay = capture(packed, packed_optimizer)
            if not capture.works:
                break
            functions[name] = replay
    taken = seconds_per_call(functions, device, 20)
    each = {name: 1e3 * seconds / (1 if name == "one at a time" else count) for name, seconds in taken.items()}
    best = min((name for name in each if name not in ("one at a time", "products")), key=each.get)
    alone, products = each["one at a time"], each["products"]
    print(f"p = {options.p}, hidden {options.hidden}, D = {options.data}, {count} runs, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    clock = "CPU time, ms" if device == "cpu" else "ms"
    table = [["", f"{clock} per run and step", "run-steps/s", "times one at a time", "share of it in matrix products"]]
    for name, ms in each.items():
        table.append([name, f"{ms:.3f}", f"{1e3 / ms:.1f}", f"{alone / ms:.1f}", f"{products / ms:.2f}"])
    print_table(table)
    print(json.dumps({"ms_per_run_step": each[best], "one_at_a_time_ms": alone, "ratio": alone / each[best],
                      "matmul_share": products / each[best], "best": best}))


if __name__ == "__main__" and Path(sys.argv[0]).name == "common.py":
    benchmark()
