"""Grokking and its three siblings: the four training dynamics of Huang et al. 2024 (figures 2, 5 and 9), with the
circuits measured beneath.

A 1-layer transformer learns (a + b) mod p from D of the p*p pairs. Two circuits compete in it: one memorizes, one
generalizes. Which wins, and when, depends on the hidden size and on D:

    progression     too small to memorize: it generalizes while it still learns the training set
    ungrokking      memorizes and stays there (by the last step; Varma et al. 2023 use the word for a grokked network
                    that regresses when trained on with less data)
    semi-grokking   memorizes, then generalizes late and in part
    grokking        memorizes early, generalizes perfectly and much later

    python grok.py                   a laptop's CPU, under a minute
    python grok.py --scale paper     p = 113 and the paper's cells

Expect dynamics.png with one column per dynamic: validation accuracy leaves the floor late or never, while the circuit
beneath it, measured in the logits, has been growing long before; progression.png, seed by seed; and a verdict on each
of the paper's claims.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26,<3", "matplotlib>=3.8,<4"]
# ///
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from common import COLORS, FLOOR, Settings, claim, count_dynamics, fail, first_step, interval, option, reproduce

DYNAMICS = ("progression", "ungrokking", "semi-grokking", "grokking")


@dataclass(frozen=True)
class Cells(Settings):
    """One cell (hidden size, D) for each of the four dynamics, in their order."""
    hidden: tuple[int, ...] = option("hidden sizes of the four cells", minimum=1)
    data: tuple[int, ...] = option("training examples D of the four cells", minimum=1)


PRESETS = {
    "quick": Cells(p=37, seeds=3, steps=2000, lr=2e-2, weight_decay=1.0, hidden=(8, 16, 48, 64), data=(600, 400, 420, 600)),
    "small": Cells(p=59, seeds=11, steps=3000, lr=1e-2, weight_decay=1.0, hidden=(8, 16, 48, 64), data=(1500, 1000, 1000, 1200)),
    "paper": Cells(p=113, seeds=5, steps=10000, lr=5e-3, weight_decay=1.0, hidden=(8, 32, 32, 64), data=(3000, 2600, 3000, 3000)),
}


def grid(settings):
    """The runs: every cell with every seed."""
    if not len(settings.hidden) == len(settings.data) == len(DYNAMICS):
        fail(f"--hidden and --data: four values each are needed, one for each of {', '.join(DYNAMICS)}")
    return [settings.run("addition", hidden, data, seed, experiment="dynamics")
            for hidden, data in zip(settings.hidden, settings.data) for seed in range(settings.seeds)]


def cells(settings, rows, curves):
    """For each of the four cells its rows and its curves, {measure: (seeds, evaluations)}."""
    for cell in zip(settings.hidden, settings.data):
        member = [i for i, line in enumerate(rows) if (line["hidden"], line["data"]) == cell]
        yield [rows[i] for i in member], {name: values[member] for name, values in curves.items()}


# figures

PANELS = (
    ("accuracy", {"train_acc": ("train", "#009E73"), "val_acc_unmirrored": ("validation", "#D55E00")}),
    ("circuit", {"circuit_share": ("generalizing share of logits", "#0072B2"), "fourier_top5": ("embedding power in 5 frequencies", "#56B4E9"),
                 "memory_acc": ("train accuracy without it", "#CC79A7")}),
    ("logits", {"circuit_margin": ("margin of the generalizing part", "#0072B2"), "circuit_spread": ("spread of the rest", "#CC79A7")}),
    ("parameter norm", {"norm": ("", "#000000")}),
)


def draw_dynamics(settings, rows, curves):
    """Figure 2 with the circuits beneath: a column per dynamic, a line per seed."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    axes = figure.subplots(len(PANELS), len(DYNAMICS), sharex=True, sharey="row")
    for column, (lines, history) in zip(axes.T, cells(settings, rows, curves)):
        for axis, (label, measures) in zip(column, PANELS):
            for name, (text, color) in measures.items():
                for i, values in enumerate(history[name]):
                    axis.plot(history["step"][i][1:], values[1:], color=color, lw=1.2, alpha=0.8, label=text if i == 0 else None)
            axis.grid(alpha=0.25)
        kind = max((line["dynamic"] for line in lines), key=[line["dynamic"] for line in lines].count)
        column[0].set_title(count_dynamics(lines).replace(", ", ",\n") + f"\nhidden {lines[0]['hidden']}, D = {lines[0]['data']}", color=COLORS[kind], fontweight="bold")
        column[0].set_ylim(-0.03, 1.03)
        column[1].set_ylim(-0.03, 1.03)
        column[-1].set_xlabel("optimization step")
        column[-1].set_xscale("log")
    for axis, (label, measures) in zip(axes[:, 0], PANELS):
        axis.set_ylabel(label)
        if len(measures) > 1:
            axis.legend(fontsize=8, loc="best", framealpha=0.9)
    figure.suptitle(f"Four training dynamics of (a + b) mod {settings.p}, and the circuits beneath (a line per seed)")
    return figure


def draw_progression(settings, rows, curves):
    """Figures 5 and 9: progression seed by seed, accuracy and norm."""
    lines, history = next(cells(settings, rows, curves))
    figure = Figure(figsize=(2.6 * len(lines) + 1, 4.6), layout="constrained")
    axes = figure.subplots(2, len(lines), sharex=True, sharey="row", squeeze=False)
    for i, line in enumerate(lines):
        steps = history["step"][i]
        axes[0, i].plot(steps, history["train_acc"][i], color="#009E73", label="train")
        axes[0, i].plot(steps, history["val_acc_unmirrored"][i], color="#D55E00", label="validation")
        axes[1, i].plot(steps, history["norm"][i], color="#000000")
        axes[0, i].set_title(f"seed {line['seed']}: {line['dynamic']}", color=COLORS[line["dynamic"]])
        axes[1, i].set_xlabel("optimization step")
        for axis in axes[:, i]:
            axis.grid(alpha=0.25)
    axes[0, 0].legend()
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("parameter norm")
    figure.suptitle(f"Progression differs from seed to seed (hidden {lines[0]['hidden']}, D = {lines[0]['data']}, p = {settings.p})")
    return figure


def draw(settings, rows, curves):
    """The figures by file name."""
    return {"dynamics.png": draw_dynamics(settings, rows, curves), "progression.png": draw_progression(settings, rows, curves)}


# claims


def norm_change(steps, accuracy, norm):
    """Relative change of the norm while validation accuracy rises from 1/10 to 9/10 of its best; None below FLOOR."""
    if accuracy.max() < FLOOR:
        return None
    begin, end = (first_step(steps, accuracy, share * accuracy.max()) for share in (0.1, 0.9))
    return norm[steps == end][0] / norm[steps == begin][0] - 1


def verdict(text, paper, values, expected, style="{:.2f}"):
    """A claim that the mean over seeds of values lies in a direction from expected[0]: 'above' or 'below' it."""
    mean, low, high = interval(values)
    bound, side = expected
    return claim(text, paper, "{} [{}, {}], n = {}".format(*map(style.format, (mean, low, high)), sum(v is not None for v in values)),
                 None if np.isnan(low) else low > bound if side == "above" else high < bound)


def judge(settings, rows, curves):
    """The paper's claims on the four dynamics (figures 2 and 9), and two on the circuits beneath."""
    found = dict(zip(DYNAMICS, cells(settings, rows, curves)))
    claims = []
    for expected, (lines, _) in found.items():
        same = sum(line["dynamic"] == expected for line in lines)
        claims.append(claim(f"fig 2: hidden {lines[0]['hidden']}, D {lines[0]['data']}", expected, count_dynamics(lines), same > len(lines) / 2))
    for name, paper, side in (("progression", "rises", "above"), ("grokking", "falls", "below")):
        history = found[name][1]
        changes = [norm_change(*seed) for seed in zip(history["step"], history["val_acc_unmirrored"], history["norm"])]
        claims.append(verdict(f"fig 9: norm while validation rises, {name}", paper, changes, (0, side), "{:+.1%}"))
    history, grown, lost = found["grokking"][1], [], []
    for steps, val_acc, share, memory in zip(*(history[k] for k in ("step", "val_acc_unmirrored", "circuit_share", "memory_acc"))):
        half, tenth = first_step(steps, val_acc, 0.5), first_step(steps, share, 0.1)
        forgotten = first_step(steps, -memory, -0.5, after=first_step(steps, memory, 0.5) or 0)
        grown.append(tenth / half if half and tenth else None)
        lost.append((forgotten or steps[-1]) / half if half else None)      # not fallen by the last step: at least that
    claims.append(verdict("grokking: step of circuit share 0.1 / of validation 0.5", "before (inferred)", grown, (1, "below")))
    claims.append(verdict("grokking: step of memory accuracy below 0.5 / of validation 0.5", "after (inferred)", lost, (1, "above")))
    return claims


def main():
    """Train, draw, judge."""
    reproduce("grok.py", __doc__, dynamics=(PRESETS, grid, draw, judge))


if __name__ == "__main__":
    main()
