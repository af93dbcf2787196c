"""Grokking and its three siblings: the four training dynamics of Huang et al. 2024 (figures 2, 5 and 9), with the
circuits measured beneath, and the two curves that decide between them (figures 1, 3 and 4), measured.

A 1-layer transformer learns (a + b) mod p from D of the p*p pairs. Two circuits compete in it: one memorizes, one
generalizes. Which wins, and when, depends on the hidden size and on D:

    progression     validation accuracy rises while the training set is still being learned (a small model never memorizes it)
    ungrokking      memorizes and stays there (by the last step; Varma et al. 2023 use the word for a grokked network
                    that regresses when trained on with less data)
    semi-grokking   memorizes first, then generalizes in part
    grokking        memorizes first, then generalizes perfectly: much later, or (the rule here does not ask) soon after

    python grok.py                        a laptop's CPU, under a minute
    python grok.py --scale paper          p = 113 and the paper's cells
    python grok.py phase                  a laptop's CPU, about a minute
    python grok.py phase --scale small    p = 59, 11 seeds, 17 minutes on two cores

Expect dynamics.png with one column per dynamic: after memorizing, validation accuracy leaves the floor late or never, as the
circuit beneath it, measured in the logits, grows; and progression.png, seed by seed. From phase, expect phase.png, the
paper's drawn diagram, measured: the critical dataset size falls with model size, the memorization capacity rises, and they
cross; measures.png shows what it is made of, what each circuit costs in parameter norm, and grokked runs that forget when
they are trained on with less data. Each ends with a verdict on every claim.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.16", "numpy>=1.26,<3", "matplotlib>=3.8,<4"]
# ///
from collections import Counter
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from common import COLORS, ENOUGH, FLOOR, Settings, beyond, by_cell, claim, claim_on_mean, count_dynamics, dip_of, fail
from common import first_step, interval, interval_name, majority, option, parameters, reproduce, resampled_means, size_ticks
from common import tail, with_interval

DYNAMICS = ("progression", "ungrokking", "semi-grokking", "grokking")


@dataclass(frozen=True)
class Cells(Settings):
    """One cell (hidden size, D) for each of the four dynamics, in their order."""
    hidden: tuple[int, ...] = option("hidden sizes of the four cells", minimum=1, maximum=10_000)
    data: tuple[int, ...] = option("training examples D of the four cells", minimum=1)


PRESETS = {
    "quick": Cells(p=37, seeds=6, steps=2000, lr=2e-2, weight_decay=1.0, hidden=(8, 16, 64, 64), data=(600, 400, 400, 600)),
    "small": Cells(p=59, seeds=11, steps=3000, lr=1e-2, weight_decay=1.0, hidden=(8, 16, 48, 64), data=(1500, 1000, 1000, 1200)),
    "paper": Cells(p=113, seeds=5, steps=10000, lr=5e-3, weight_decay=1.0, hidden=(8, 32, 32, 64), data=(3000, 2600, 3000, 3000)),
}


def grid(settings):
    """The runs: every cell with every seed."""
    if not len(settings.hidden) == len(settings.data) == len(DYNAMICS):
        fail(f"--hidden and --data: four values each are needed, one for each of {', '.join(DYNAMICS)}")
    return [settings.run("addition", hidden, data, seed, experiment="dynamics")
            for hidden, data in zip(settings.hidden, settings.data) for seed in range(settings.seeds)]


def members(rows, **cell):
    """Indices of the runs of a cell, such as members(rows, hidden=8, data=400)."""
    return [i for i, line in enumerate(rows) if all(line[name] == value for name, value in cell.items())]


def cells(settings, rows, curves):
    """For each of the four cells its rows and its curves, {measure: (seeds, evaluations)}."""
    for hidden, data in zip(settings.hidden, settings.data):
        member = members(rows, hidden=hidden, data=data)
        yield [rows[i] for i in member], {name: values[member] for name, values in curves.items()}


def went_through(lines, history, *kinds):
    """The curves of those runs of a cell that went through one of these dynamics."""
    member = [i for i, line in enumerate(lines) if line["dynamic"] in kinds]
    return {name: values[member] for name, values in history.items()}


# figures

PANELS = {      # green: what generalizes; black: what memorizes, and the norm
    "accuracy": {"train_acc": ("train", "#000000"), "val_acc_unmirrored": ("validation", "#009E73")},
    "share, accuracy": {"circuit_share": ("generalizing circuit's\nshare of the logits", "#009E73"),
                        "fourier_top5": ("embedding power\nin 5 frequencies", "#56B4E9"),
                        "memory_acc": ("train accuracy\nwithout the circuit", "#000000")},
    "logits": {"circuit_margin": ("margin of the\ngeneralizing circuit", "#009E73"),
               "circuit_spread": ("spread of\nthe rest", "#000000")},
    "parameter norm": {"norm": ("", "#000000")},
}


def draw_dynamics(settings, rows, curves):
    """Figure 2 with the circuits beneath: a column for each cell, a thin line per seed and their median."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplots(len(PANELS), len(DYNAMICS), sharex=True, sharey="row")
    for expected, column, (lines, history) in zip(DYNAMICS, axes.T, cells(settings, rows, curves)):
        for axis, measures in zip(column, PANELS.values()):
            for name, (text, color) in measures.items():
                known = np.ma.masked_invalid(history[name])[:, 1:]      # without runs that diverged; step 0 has no logarithm
                axis.plot(history["step"].T[1:], known.T, color=color, lw=0.6, alpha=0.5)
                axis.plot(history["step"][0, 1:], np.ma.median(known, 0), color=color, lw=2, label=text)
            axis.grid(alpha=0.25)
        middle = np.ma.median(np.ma.masked_invalid(history["val_acc_unmirrored"]), 0).filled(0)
        risen = first_step(history["step"][0], middle, 0.5)
        for axis in column:
            axis.axvline(risen or np.nan, color="#D55E00", lw=1, ls="--", zorder=3)
        counts = count_dynamics(lines).replace(", ", ",\n")
        cell = f"the cell of {expected}:\nhidden {lines[0]['hidden']}, D = {lines[0]['data']}"
        column[0].set_title(f"{cell}\n{counts}", fontsize=11, color=COLORS.get(majority(lines), "black"))
        column[0].set_ylim(-0.03, 1.03)
        column[1].set_ylim(-0.03, 1.03)
        column[-1].set(xlabel="optimization step", xscale="log", xlim=(settings.steps / 1000, 1.2 * settings.steps))
    for row, (label, measures) in zip(axes, PANELS.items()):
        row[0].set_ylabel(label)
        if len(measures) > 1:
            row[-1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(f"Training dynamics of (a + b) mod {settings.p}, and the circuits beneath\n"
                    "(thin: each seed; thick: median; dashed: the step at which the median validation accuracy reaches 0.5)")
    return figure


def draw_progression(settings, rows, curves):
    """Figures 5 and 9: progression seed by seed, accuracy and norm, of the first five seeds, as many as the paper shows."""
    lines, history = next(cells(settings, rows, curves))
    lines = lines[:5]
    figure = Figure(figsize=(2 * max(3, len(lines)) + 1, 4.2), layout="constrained")
    axes = figure.subplots(2, len(lines), sharex=True, sharey="row", squeeze=False)
    for i, (line, column) in enumerate(zip(lines, axes.T)):
        steps = history["step"][i]
        start = first_step(steps, history["val_acc_unmirrored"][i], FLOOR)
        when = f"\nfrom step {start}" if start is not None else ""
        for axis, label in zip(column, ("accuracy", "parameter norm")):
            for name, (text, color) in PANELS[label].items():
                axis.plot(steps[1:], history[name][i, 1:], color=color, label=text)
            axis.grid(alpha=0.25)
            axis.axvline(start or np.nan, color="#999999", lw=0.8, ls="--")
            axis.set_ylabel(label if i == 0 else "")
        column[0].set_title(f"seed {line['seed']}: {line['dynamic']}{when}", fontsize=11, color=COLORS[line["dynamic"]])
        column[1].set(xlabel="optimization step", xscale="log", xlim=(settings.steps / 1000, 1.2 * settings.steps))
    axes[0, 0].legend(fontsize=8)
    cell = f"hidden {lines[0]['hidden']}, D = {lines[0]['data']}, p = {settings.p}"
    first = f"; the first {len(lines)} of {settings.seeds} seeds" if settings.seeds > len(lines) else ""
    figure.suptitle(f"When each seed starts to generalize\n(dashed: validation accuracy {FLOOR}; {cell}{first})")
    return figure


def draw(settings, rows, curves):
    """The figures by file name."""
    return {"dynamics.png": draw_dynamics(settings, rows, curves), "progression.png": draw_progression(settings, rows, curves)}


# claims


def norm_change(p, val_acc, norm):
    """Relative change of the norm while validation accuracy rises from 1/10 to 9/10 of its best.

    The rise ends at the first evaluation with 9/10 of the best, and begins at the last one before with less than 1/10: earlier
    ones may have more by chance. None where the best is below FLOOR, or 1/10 of it below 1 / p, which guessing reaches.
    """
    if not val_acc.max() >= max(FLOOR, 10 / p):      # NaN too
        return None
    end = int(np.argmax(val_acc >= 0.9 * val_acc.max()))
    begin = np.flatnonzero(val_acc[:end] < 0.1 * val_acc.max()).max(initial=0)
    return norm[end] / norm[begin] - 1


def bump(steps, train_acc, val_acc):
    """The share of its best that training accuracy gains from half to twice the step at which validation accuracy reaches FLOOR.

    None where validation accuracy never reaches FLOOR, or is there at step 0.
    """
    start = first_step(steps, val_acc, FLOOR)
    if not start:
        return None
    before, after = np.interp((start / 2, 2 * start), steps, train_acc)
    return (after - before) / train_acc.max()


def memorized_first(train_acc, val_acc, level):
    """How far training accuracy is ahead of validation accuracy before that reaches a level, at most; None if it begins there."""
    before = np.cumsum(val_acc >= level) == 0
    return float((train_acc - val_acc)[before].max()) if before.any() else None


def judge(settings, rows, curves):
    """The paper's claims on the four dynamics (section 3, figures 2, 5 and 9), and one on the circuit beneath.

    Those on a dynamic are told by the runs that went through it, whatever the others of its cell did.
    """
    found = dict(zip(DYNAMICS, cells(settings, rows, curves)))
    claims = []
    for expected, (lines, _) in found.items():
        agree = [line["dynamic"] == expected for line in lines if line["dynamic"] not in ("diverged", "stalled")]
        lead = 2 * sum(agree) - len(agree)      # those that agree minus those that do not: a lead of 1 rests on one seed
        claims.append(claim(f"fig 2: the cell of {expected}", expected,
                            f"hidden {lines[0]['hidden']}, D {lines[0]['data']}: {count_dynamics(lines)}",
                            lead > 0 if abs(lead) > 1 and len(agree) > (len(lines) + 1) / 2 else None))
    claims += judge_progression(settings, *found["progression"])
    for name, paper in (("progression", "rises"), ("grokking", "falls")):
        history = went_through(*found[name], name)
        changes = [norm_change(settings.p, *seed) for seed in zip(history["val_acc_unmirrored"], history["norm"])]
        claims.append(claim_on_mean(f"fig 9: norm while validation rises, {name}", paper, changes, 0, paper == "rises",
                                    "{:+.1%}"))
    return claims + judge_circuits(went_through(*found["grokking"], "grokking"))


def judge_progression(settings, lines, history):
    """Claims on progression (figure 5), from the rows and curves of its cell.

    Zero validation accuracy, at which a part is memorized, is defined in two ways, and the verdict is open where they differ.
    """
    curves = went_through(lines, history, "progression", "stalled")      # the latter has not started yet
    starts = [first_step(steps, val_acc, FLOOR) for steps, val_acc in zip(curves["step"], curves["val_acc_unmirrored"])]
    reached, never = sorted(step for step in starts if step is not None), starts.count(None)
    latest = settings.steps if never else max(reached, default=0)      # a lower bound where a seed never started
    varies = reached and latest >= 2 * max(1, reached[0])
    together = len(reached) >= ENOUGH and not never and latest < 1.5 * max(1, reached[0])      # fewer seeds may by chance
    when = claim(f"fig 5: when progression starts to generalize (validation {FLOOR}) varies twofold with the seed", "varies",
                 f"steps {reached[0]} to {'more than ' * bool(never)}{latest}" if reached else "not reached",
                 True if varies else False if together else None)
    curves = went_through(lines, history, "progression")
    seeds = list(zip(curves["step"], curves["train_acc"], curves["val_acc_unmirrored"]))
    strict, loose = (claim_on_mean("progression memorizes a part first: how far training accuracy is ahead while validation "
                                   f"accuracy is near zero (below twice guessing; below {FLOOR})", f"a part (above {FLOOR})",
                                   [memorized_first(train_acc, val_acc, zero) for _, train_acc, val_acc in seeds],
                                   FLOOR, True) for zero in (min(2 / settings.p, FLOOR), FLOOR))
    part = loose | {"measured": f"{strict['measured']}; {loose['measured']}",
                    "holds": loose["holds"] if strict["holds"] == loose["holds"] else None}
    rises = claim_on_mean("fig 5: training accuracy rises when validation does: share of its best gained between half and "
                          f"twice the step of validation {FLOOR}", "a bump (half)", [bump(*seed) for seed in seeds], 0.5, True,
                          "{:.0%}")
    some = claim("fig 5: some seeds never start to generalize", "some",
                 f"{never}/{len(starts)} had not by step {settings.steps}",
                 True if reached and never and settings.steps >= 10 * reached[-1] else None)      # else they may still
    return [when, part, rises, some]


def judge_circuits(history):
    """When the generalizing circuit grows in runs that grok, as a share of the steps to validation accuracy 0.5."""
    grown = []
    for steps, val_acc, share in zip(history["step"], history["val_acc_unmirrored"], history["circuit_share"]):
        jumped, risen = first_step(steps, val_acc, 0.5), first_step(steps, share, share.max() / 2)
        grown.append(risen / jumped if jumped and risen else None)
    return [claim_on_mean("grokking: the circuit reaches half of its largest share, in % of the steps to validation 0.5",
                          "(Nanda et al.: before)", grown, 1, False, "{:.0%}")]


# phase: figure 1, measured


@dataclass(frozen=True)
class Plane(Settings):
    """Every hidden size with every D, the capacity of every hidden size, and grokked runs that go on with less data."""
    hidden: tuple[int, ...] = option("hidden sizes", minimum=1, maximum=10_000)
    data: tuple[int, ...] = option("training examples D", minimum=1)
    forget_hidden: int = option("hidden size of the runs that grok on the largest D and then go on with less",
                                minimum=1, maximum=10_000)
    forget_data: tuple[int, ...] = option("D to go on with, for as many steps again; those not below the largest D are left out",
                                           minimum=1)
    side_seeds: int = option("at most so many seeds for the capacity, and for going on with less", 3, minimum=1)


PLANES = {
    "quick": Plane(p=31, seeds=6, steps=1100, lr=2e-2, weight_decay=1.0,
                   hidden=(4, 8, 12, 16, 32), data=(300, 400, 500, 600),
                   forget_hidden=32, forget_data=(100, 500)),
    "small": Plane(p=59, seeds=11, steps=3000, lr=1e-2, weight_decay=1.0,
                   hidden=(4, 8, 12, 16, 24, 32, 64), data=(800, 1000, 1200, 1500),
                   forget_hidden=32, forget_data=(200, 400, 800, 1200)),
    "paper": Plane(p=113, seeds=11, steps=10000, lr=5e-3, weight_decay=1.0,
                   hidden=(4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 100), data=tuple(range(2000, 4001, 200)),
                   forget_hidden=64, forget_data=(500, 1000, 2000, 3000)),
}


def less_data(settings):
    """The sizes of data to go on with that are less than the largest D, ascending."""
    return sorted({data for data in settings.forget_data if data < max(settings.data)})


def fewer_seeds(settings):
    """The smaller of --seeds and --side-seeds."""
    return min(settings.seeds, settings.side_seeds)


def phase_grid(settings):
    """The runs: the plane, random labels on all pairs for the capacity (figure 4), and forgetting."""
    if len(set(settings.hidden)) < 2 or len(set(settings.data)) < 2:
        fail("--hidden and --data: at least two values of each are needed for a phase diagram")
    if not less_data(settings):
        fail(f"--forget-data: less than {max(settings.data)} is needed, the largest of --data, which those runs begin with")
    side = range(fewer_seeds(settings))
    diagram = [settings.run("addition", hidden, data, seed, experiment="plane")
               for hidden in settings.hidden for data in settings.data for seed in range(settings.seeds)]
    capacity = [settings.run("random", hidden, settings.p**2, seed, experiment="capacity")
                for hidden in settings.hidden for seed in side]
    forgetting = [settings.run("addition", settings.forget_hidden, data, seed, experiment="forgetting", steps=2 * settings.steps,
                               first_data=max(settings.data)) for data in less_data(settings) for seed in side]
    return diagram + capacity + forgetting


def val_acc_at(rows, curves, until, **cell):
    """Validation accuracy of each seed of a cell, (seeds,), at the evaluation nearest to this share of its steps."""
    member = members(rows, **cell)
    at = np.nanargmin(abs(curves["step"][member[0]] - until * rows[member[0]]["steps"]))
    return curves["val_acc_unmirrored"][member, at]


LEVELS = (FLOOR, 0.5, 0.9)      # a critical size is where the fit to the mean validation accuracy crosses a level
TOLERANCE = 2 * 0.05**2         # 2 sigma^2: each mean accuracy is taken to lie within about sigma = 0.05 of the true curve


def critical_sizes(data, accuracy, seed=0):
    """D_crit (figure 3) at each of LEVELS, for mean validation accuracies (1 + draws, sizes of D): (levels, 1 + draws).

    Where a logistic curve in D crosses the level; NaN where an accuracy is. Where accuracy jumps between two neighbours, many
    curves fit equally well. So each of a grid of curves has the weight exp(-squared error / TOLERANCE), its likelihood: the
    estimate, the first, is the mean of where they cross, with these weights, and each draw takes one curve with its weight as
    the probability. A result outside of data is no more than a bound: the grid ends with centres half the range outside.
    """
    span, spacing, levels = data[-1] - data[0], np.diff(data).min(), np.array(LEVELS)
    centres, widths = np.linspace(data[0] - span / 2, data[-1] + span / 2, 241), spacing * np.geomspace(0.02, 8, 10)
    centre, width = (each.ravel() for each in np.meshgrid(centres, widths))
    fits = 0.5 + 0.5 * np.tanh((data - centre[:, None]) / width[:, None] / 2)                 # (curves, sizes of D)
    crossed = centre + width * np.log(levels / (1 - levels))[:, None]                         # (levels, curves)
    error = (fits**2).sum(1) - 2 * accuracy @ fits.T                                          # squared, less a constant
    weight = np.exp((error.min(-1, keepdims=True) - error) / TOLERANCE)                       # (1 + draws, curves)
    share = weight.cumsum(-1) / weight.sum(-1, keepdims=True)
    drawn = (share < np.random.default_rng(seed).random((len(share), 1))).sum(-1)             # a curve for each draw
    estimate = crossed @ weight[0] / weight[0].sum()                                          # (levels,)
    sizes = np.concatenate([estimate[:, None], crossed[:, drawn[1:]]], -1)
    return np.where(np.isnan(accuracy).any(-1), np.nan, sizes)


def most_known(rows, curves, hidden, until=1.0):
    """Best accuracy and lowest loss on random labels up to this share of the steps, two arrays (seeds,).

    The best, so that a spike of the loss costs nothing. Accuracy times p*p is the memorization capacity in examples (figure 4).
    """
    member = members(rows, experiment="capacity", hidden=hidden)
    early = curves["step"][member[0]] <= until * rows[member[0]]["steps"]
    return curves["train_acc"][member][:, early].max(1), curves["train_loss"][member][:, early].min(1)


def capacity_bits(p, loss):
    """Bits of the random labels that a network knows whose mean loss on all pairs is loss (nats): one label an unordered pair."""
    return p * (p + 1) / 2 * (np.log2(p) - loss / np.log(2))


def mirrored_once(capacity, p):
    """The D at which a training set holds as many different facts as capacity, which counts both (a, b) and (b, a).

    A fact is the label of an unordered pair: about p^2 / 2 in all, and x p^2 / 2 at accuracy x = capacity / p^2 on random labels.
    A training set of a share f = D / p^2 of the ordered pairs misses a fact if it lacks both orders, in (1 - f)^2 of cases.
    So it holds (1 - (1 - f)^2) p^2 / 2 facts: as many for f = 1 - sqrt(1 - x).
    """
    return p**2 * (1 - np.sqrt(1 - np.clip(capacity / p**2, 0, 1)))


def crossing(hidden, critical, capacity):
    """Hidden size and D where capacity first rises above the critical size, two arrays (draws,), NaN if nowhere.

    critical and capacity are (draws, sizes). Between two sizes both curves are lines in log(hidden).
    """
    gap, draw = capacity - critical, np.arange(len(capacity))
    crosses = (gap[:, :-1] <= 0) & (gap[:, 1:] > 0)
    at = crosses.argmax(1)
    left, right = gap[draw, at], gap[draw, at + 1]
    share = np.divide(left, left - right, where=crosses.any(1), out=np.full(len(gap), np.nan))
    size = np.exp(np.log(hidden)[at] + share * np.diff(np.log(hidden))[at])
    data = critical[draw, at] + share * (critical[draw, at + 1] - critical[draw, at])
    return size, data


def plane(rows):
    """The runs of the diagram."""
    return [line for line in rows if line["experiment"] == "plane"]


@dataclass
class Measured:
    """What the diagram is made of, at one step: the estimates in front, then their bootstrap draws."""
    hidden: np.ndarray          # (sizes,)
    data: np.ndarray            # (sizes of D,)
    values: np.ndarray          # validation accuracy of each seed, (sizes, sizes of D, seeds)
    critical: dict              # {level: critical size (1 + draws, sizes)}
    capacity: np.ndarray        # memorization capacity in examples, accuracy on random labels times p*p (1 + draws, sizes)

    @property
    def able(self):
        """Whether a model of each size can memorize as many examples as its critical size, (sizes,) bool."""
        return self.capacity[0] > self.critical[0.5][0]


def measured(settings, rows, curves, until=1.0):
    """Both curves and the accuracies, at this share of the steps."""
    hidden, data = np.array(sorted(set(settings.hidden))), np.array(sorted(set(settings.data)))
    values = np.array([[val_acc_at(rows, curves, until, experiment="plane", hidden=h, data=each) for each in data]
                       for h in hidden])
    critical, capacity = [], []
    for i, h in enumerate(hidden):      # each with draws of its own
        critical.append(critical_sizes(data, resampled_means(values[i], i, draws=1000), i))
        capacity.append(resampled_means(most_known(rows, curves, h, until)[0], i, draws=1000))
    return Measured(hidden, data, values, dict(zip(LEVELS, np.stack(critical, -1))), np.stack(capacity, 1) * settings.p**2)


def settled(rows, kind):
    """The runs of the diagram that went through a dynamic; if they generalized, in the first half of the steps.

    What a circuit costs (paper section 1, from Varma et al. 2023) is here the parameter norm at the last step, and it goes on
    falling after grokking.
    """
    return [line for line in plane(rows) if line["dynamic"] == kind and (line["generalized_at"] or 0) <= line["steps"] / 2]


def cost_exponents(runs, draws=1000):
    """Exponent k of norm ~ D^k by least squares over runs, with a factor for each hidden size, (1 + draws,).

    The estimate, then its bootstrap over the runs; NaN where no hidden size has runs at two values of D.
    """
    if not runs:
        return np.full(1 + draws, np.nan)
    hidden, x, y = np.array([(line["hidden"], np.log(line["data"]), np.log(line["norm"])) for line in runs]).T
    terms, found = np.column_stack([x, hidden[:, None] == np.unique(hidden)]), []             # (runs, 1 + sizes)
    drawn = np.random.default_rng(0).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), draws)
    for times in [np.ones(len(runs), int), *drawn]:      # how often each run is taken
        fit, _, rank, _ = np.linalg.lstsq(np.repeat(terms, times, 0), np.repeat(y, times), rcond=None)
        found.append(fit[0] if rank > len(np.unique(hidden[times > 0])) else np.nan)
    return np.array(found)


def within(draws, tried):
    """Whether each estimate, the first of draws (1 + draws, ...), lies in the range tried."""
    return (draws[0] >= tried[0]) & (draws[0] <= tried[-1])


def zone(data, rises, risen, capacity):
    """The dynamic that the two curves predict for D (paper section 3); None where one of them is not known.

    rises and risen: the critical sizes at which accuracy is FLOOR and 0.9, between which it is semi-grokking.
    """
    if np.isnan(rises + risen + capacity):
        return None
    return "progression" if data > capacity else "ungrokking" if data < rises else "semi-grokking" if data < risen else "grokking"


# the zones, held against runs that did not make them


def observed(lines):
    """The most frequent dynamic of these runs, of equals the one seen first; stalled is progression not there yet (figure 5).

    None where all diverged.
    """
    seen = Counter("progression" if line["dynamic"] == "stalled" else line["dynamic"] for line in lines)
    del seen["diverged"]
    return seen.most_common(1)[0][0] if seen else None


def predictions(p, rows, now, chosen):
    """{(hidden, D): (dynamic observed in the other seeds, {name: dynamic told from the chosen ones})}; chosen is (seeds,) bool.

    Told by the zones, as the paper draws them; with mirrored pairs counted once; without the zone of semi-grokking, cut at the
    critical size alone. And by two that know no curves: the most frequent dynamic of that hidden size, and of that cell.
    """
    runs, once, found = by_cell(plane(rows), "hidden", "data"), mirrored_once(now.capacity[0], p), {}

    def most(h, sizes, mine):
        """The most frequent dynamic of the chosen seeds (mine) or of the others, at a hidden size and these D."""
        return observed([line for data in sizes for line in runs[h, data] if chosen[line["seed"]] == mine])
    for i, h in enumerate(now.hidden if chosen.any() else ()):
        rises, middle, risen = critical_sizes(now.data, resampled_means(now.values[i][:, chosen], draws=0))[:, 0]      # at LEVELS
        by_size = most(h, now.data, True)
        for data in now.data:
            found[h, data] = most(h, [data], False), {
                "zones": zone(data, rises, risen, now.capacity[0, i]),
                "mirrored pairs counted once": zone(data, rises, risen, once[i]),
                "without a zone of semi-grokking": zone(data, middle, middle, now.capacity[0, i]),
                "hidden size": by_size, "the same cell": most(h, [data], True)}
    return found


def confusion(settings, rows, now):
    """In how many cells one half of the seeds predicts a zone (rows) and the other shows a dynamic (columns), of DYNAMICS (4, 4).

    The halves are the even and the odd seeds; each cell counts twice, with the halves exchanged.
    """
    even = np.arange(settings.seeds) % 2 == 0
    pairs = [(told["zones"], seen) for half in (even, ~even)
             for seen, told in predictions(settings.p, rows, now, half).values()]
    return np.array([[pairs.count((predicted, seen)) for seen in DYNAMICS] for predicted in DYNAMICS])


def share_right(found, predictor, beside):
    """Share of cells in which a predictor is right, among those where it and the one beside it both predict; or NaN."""
    both = [(seen, told) for seen, told in found.values() if seen and told[predictor] and told[beside]]
    return np.mean([told[predictor] == seen for seen, told in both] or np.nan)


# places as text


def place_text(value, tried):
    """A value as text, as a bound where it leaves the range tried."""
    if np.isnan(value):
        return "-"
    return f"> {tried[-1]}" if value > tried[-1] else f"< {tried[0]}" if value < tried[0] else f"{value:.0f}"


def bounded(draws, tried, seeds):
    """'estimate [low, high]' of draws (1 + draws,), as bounds where they leave the range tried; of the draws that are known."""
    if np.isnan(draws[1:]).all():
        return place_text(draws[0], tried)
    low, high = np.nanpercentile(draws[1:], tail(seeds))
    return "{} [{}, {}]".format(*(place_text(value, tried) for value in (draws[0], low, high)))


SURE = 0.95      # the share of the draws in which the curves must cross


def crossing_shares(now):
    """The shares of the draws in which the capacity rises above the critical size once, and in which they cross otherwise.

    A critical size out of the range of D is a bound, and beside a capacity that lies there, too, does not tell which is above.
    """
    critical, tried = now.critical[0.5][1:], now.data
    outside = [(critical > tried[-1]) & (now.capacity[1:] > tried[-1]), (critical < tried[0]) & (now.capacity[1:] < tried[0])]
    known = np.isfinite(critical + now.capacity[1:]) & ~np.logical_or(*outside)
    above = np.where(known, now.capacity[1:] > critical, np.nan)                              # (draws, sizes)
    changes = abs(np.diff(above)).sum(1)
    once = (changes == 1) & (above[:, -1] == 1)
    return once.mean(), ((changes > 0) & ~once).mean()


def crossing_place(settings, now, capacity):
    """Where the critical size and a capacity cross, as text, with the share of the draws in which they do.

    The intervals of hidden size and parameters are for as few seeds as the capacity has; D hardly depends on the capacity.
    """
    size, where = crossing(now.hidden, now.critical[0.5], capacity)
    share = np.isfinite(size[1:]).mean()
    if not np.isfinite(size[0]):
        return "not in this range"
    params, tried = (parameters(settings.run("addition", sizes, 1, 0)) for sizes in (size, now.hidden))      # of arrays of sizes
    few = fewer_seeds(settings)
    return (f"d = {bounded(size, now.hidden, few)}, {bounded(params, tried, few)} parameters, "
            f"D = {bounded(where, now.data, settings.seeds)}" + (f" ({share:.0%} of the draws)" if 0 < share < 1 else ""))


# the figures of phase


def band(axis, x, draws, seeds, style="-o", shade=0.2, thin=False, **look):
    """A line for the estimate, the first of draws (1 + draws, n), and its interval over seeds: shaded, or between thin lines."""
    low, high = np.percentile(draws[1:], tail(seeds), axis=0)
    line, = axis.plot(x, draws[0], style, **look)
    if thin:
        axis.plot(x, np.stack([low, high], 1), style, color=line.get_color(), lw=0.9)
    elif shade:
        axis.fill_between(x, low, high, color=line.get_color(), alpha=shade, lw=0)


def edges(values):
    """Borders of cells around values (n,): half-way between neighbours, (n + 1,)."""
    middle = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middle[0]], middle, [2 * values[-1] - middle[-1]]])


def draw_cell(axis, lines, x, y, points):
    """A cell between two x and two y, about so many points (2,) wide and high: a dot for each run, a majority's colour behind."""
    number, count = np.arange(len(lines)), len(lines)
    columns = int(np.clip(np.round(np.sqrt(count * points[0] / points[1])), 1, count))
    right, down = (number % columns + 0.5) / columns, (number // columns + 0.5) / np.ceil(count / columns)
    width, height = np.ptp(x), np.ptp(y)
    axis.add_patch(Rectangle((x[0], y[0]), width, height, fc=(COLORS.get(majority(lines), "white"), 0.3), ec="white", lw=4))
    axis.scatter(x[0] + width * right, y[1] - height * down, s=min(60, np.prod(points) / count / 5), zorder=3,
                 edgecolors="white", lw=0.6, c=sorted((COLORS[line["dynamic"]] for line in lines), key=[*COLORS.values()].index))


def draw_diagram(settings, rows, now):
    """Figure 1: a cell for each hidden size and D, a dot for each of its runs, with both measured curves on top."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axis, x, runs = figure.subplots(), np.log2(now.hidden), by_cell(plane(rows), "hidden", "data")
    left, bottom = edges(x), edges(now.data)
    widths, heights = 640 * np.diff(left) / np.ptp(left), 360 * np.diff(bottom) / np.ptp(bottom)      # in points, about
    for i, j in np.ndindex(len(widths), len(heights)):
        draw_cell(axis, runs[now.hidden[i], now.data[j]], left[i:i + 2], bottom[j:j + 2], (widths[i], heights[j]))
    look = {"thin": True, "color": "black", "lw": 3, "path_effects": [withStroke(linewidth=6, foreground="white")]}
    once, few = mirrored_once(now.capacity, settings.p), fewer_seeds(settings)
    band(axis, x, now.critical[0.5], settings.seeds, "-",
         label=f"critical size (thin: {interval_name(settings.seeds)}; grey:\nmodels that cannot memorize so much)", **look)
    band(axis, x, now.capacity, few, "--",
         label=f"memorization capacity (thin:\n{interval_name(few)} of {few} seeds)", **look)
    band(axis, x, once, few, ":", label="capacity, mirrored\npairs counted once", **look)
    (size, where), (size_once, where_once) = (crossing(now.hidden, now.critical[0.5], each) for each in (now.capacity, once))
    small = np.argmax([*now.able, True])      # so many sizes, and a line on to the crossing
    axis.plot([*x[:small], np.log2(size[0])], [*now.critical[0.5][0, :small], where[0]], color="#888888", lw=3)
    for each, at, ms in ((size, where, 12), (size_once, where_once, 7)):
        axis.plot(np.log2(each[0]), at[0], "o", ms=ms, mfc="white", mec="black", mew=2, zorder=5)
    for kind in COLORS:
        if any(line["dynamic"] == kind for line in plane(rows)):
            axis.scatter([], [], s=60, color=COLORS[kind], label=kind)
    figure.legend(loc="outside lower center", ncols=4, fontsize=11)
    axis.set(xlim=(left[0], left[-1]), ylim=(bottom[0], bottom[-1]), yticks=now.data)
    axis.set_xlabel("hidden size d", fontsize=13)
    axis.set_ylabel("training examples D", fontsize=13)
    size_ticks(axis, x, now.hidden)
    axis.tick_params(labelsize=12)
    place = f"d = {bounded(size, now.hidden, few)}, D = {bounded(where, now.data, settings.seeds)}"
    finding = f"The curves cross at {place}" if crossing_shares(now)[0] >= SURE else "Which circuit wins, measured"
    figure.suptitle(f"{finding}\n(a + b) mod {settings.p} at step {settings.steps}; dots: a cell's runs; "
                    "cell colour: a majority (white: none); circles: crossings")
    return figure


def draw_accuracy(axis, settings, now):
    """Figure 3: validation accuracy against D, a line for each hidden size."""
    colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(now.hidden)))
    for h, values, color in zip(now.hidden, now.values, colors):
        band(axis, now.data, resampled_means(values), settings.seeds, shade=0.07, ms=4, color=color, label=f"d = {h}")
    axis.axhline(0.5, color="#999999", lw=0.8, ls="--")
    axis.set(xlabel="training examples D", ylabel="final validation accuracy, unmirrored", xticks=now.data,
             title="Generalization against data, for each hidden size")


def draw_capacity(axis, settings, now):
    """Figure 4: the memorization capacity against hidden size."""
    once, few = mirrored_once(now.capacity, settings.p), fewer_seeds(settings)
    band(axis, now.hidden, now.capacity, few, ms=4, color="black", label="accuracy on random labels times p²")
    band(axis, now.hidden, once, few, ":o", ms=4, color="black", label="mirrored pairs counted once")
    axis.axhline(settings.p**2, color="#999999", lw=0.8)
    axis.annotate("all pairs", (now.hidden[0], settings.p**2), (0, -12), textcoords="offset points", fontsize=8, color="#666666")
    axis.set(ylabel="examples", title="Memorization capacity against hidden size")


def draw_critical(axis, settings, found):
    """The critical size against hidden size, at several steps of the same runs."""
    for (until, then), color in zip(found.items(), ("#9BD1F0", "#56B4E9", "#0072B2")):
        band(axis, then.hidden, then.critical[0.5], settings.seeds, ms=4, color=color,
             label=f"step {round(until * settings.steps)}", shade=0.2 if until == 1 else 0)
    axis.set(ylabel="critical size (ticks: the D tried)", title="Critical size against hidden size, as training goes on",
             ylim=edges(then.data)[[0, -1]], yticks=then.data)


def draw_forgetting(axis, settings, rows, curves):
    """Validation accuracy of runs that go on with less data after half of their steps (Varma et al. 2023), a line per seed."""
    sizes = less_data(settings)
    colors = dict(zip(sizes, colormaps["viridis"](np.linspace(0, 0.8, len(sizes)))))
    for i, line in enumerate(rows):
        if line["experiment"] == "forgetting":
            steps, val_acc = curves["step"][i], curves["val_acc_unmirrored"][i]
            more, less = steps <= settings.steps, steps >= settings.steps
            axis.plot(steps[more], val_acc[more], lw=1.2, color="#999999")
            axis.plot(steps[less], val_acc[less], lw=1.2, color=colors[line["data"]],
                      label=f"then D = {line['data']}" if line["seed"] == 0 else None)
    axis.axvline(settings.steps, color="#D55E00", lw=1)
    axis.set(xlabel="optimization step", ylabel="validation accuracy, unmirrored",
             title=f"d = {settings.forget_hidden}: D = {max(settings.data)}, then less")


def draw_cost(axis, rows):
    """The last parameter norm against D, of runs that memorized and of runs that grokked early, a line for each hidden size."""
    labels = []
    for kind, mark in (("ungrokking", "-^"), ("grokking", "-o")):
        for (h,), lines in by_cell(settled(rows, kind), "hidden").items():
            norms = {data: np.mean([line["norm"] for line in seeds]) for (data,), seeds in sorted(by_cell(lines, "data").items())}
            axis.plot(list(norms), list(norms.values()), mark, color=COLORS[kind])
            labels.append((norms[max(norms)], max(norms), h, COLORS[kind]))
        when = " by half of the steps" if kind == "grokking" else ""
        axis.plot([], [], mark, color=COLORS[kind], label=f"{kind}{when}")
    gap, place = np.ptp(axis.get_ylim()) / 30, {}
    for norm, data, h, color in sorted(labels):      # labels one above the other where lines end close together
        place[data] = max(place.get(data, -np.inf) + gap, norm)
        axis.annotate(f"  d = {h}", (data, place[data]), va="center", fontsize=8, color=color)
    axis.margins(x=0.18, y=0.12)      # room for the labels and the legend
    axis.set(xlabel="training examples D", ylabel="parameter norm, last step",
             title="What a circuit costs: norm against data")


def draw_zones(axis, settings, rows, now):
    """The zone that the curves of half the seeds predict against the dynamic of the others, in cells of the diagram."""
    count = confusion(settings, rows, now)
    axis.imshow(count, cmap="Blues", vmax=1.5 * max(1, count.max()))
    for i, j in np.ndindex(count.shape):
        axis.annotate(count[i, j], (j, i), ha="center", va="center", fontsize=13, fontweight="bold" if i == j else None)
    axis.set_xticks(range(len(DYNAMICS)), labels=DYNAMICS, fontsize=8)
    axis.set_yticks(range(len(DYNAMICS)), labels=DYNAMICS, fontsize=8, rotation=90, va="center")
    axis.set(xlabel="most frequent dynamic of the other half", ylabel="zone by the curves of one half of the seeds",
             title="Where the zones are right: the diagonal\n(each cell twice, with the halves exchanged)")


def draw_phase(settings, rows, curves):
    """The figures by file name: the diagram, and what it is made of."""
    found = {until: measured(settings, rows, curves, until) for until in (0.25, 0.5, 1.0)}
    figure = Figure(figsize=(16.5, 8.5), layout="constrained")
    (accuracy, capacity, cost), (critical, forgetting, agreement) = figure.subplots(2, 3)
    draw_accuracy(accuracy, settings, found[1.0])
    draw_capacity(capacity, settings, found[1.0])
    draw_cost(cost, rows)
    draw_critical(critical, settings, found)
    draw_forgetting(forgetting, settings, rows, curves)
    draw_zones(agreement, settings, rows, found[1.0])
    for axis, place in ((accuracy, {}), (capacity, {}), (cost, {"loc": "upper center", "ncols": 2}), (critical, {}),
                        (forgetting, {"loc": "center", "bbox_to_anchor": (0.33, 0.45)})):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, **place)
    for axis in (capacity, critical):
        axis.set(xscale="log", xlabel="hidden size d")
        size_ticks(axis, found[1.0].hidden, found[1.0].hidden)
    figure.suptitle(f"What the diagram of (a + b) mod {settings.p} is made of ({settings.seeds} seeds, step {settings.steps})")
    return {"phase.png": draw_diagram(settings, rows, found[1.0]), "measures.png": figure}


# the claims of phase


CONVERGED = 0.02      # the largest change over the second half of the steps


def judge_critical(settings, earlier, now):
    """Claims on the critical size (figure 3)."""
    claims, bounds = [], tail(settings.seeds)
    for h, middle, near in zip(now.hidden, now.critical[0.5].T, now.critical[0.9].T):
        claims.append(claim(f"fig 3: critical size at d = {h} (where accuracy is 0.5; 0.9)", "-",
                            f"{bounded(middle, now.data, settings.seeds)}; {bounded(near, now.data, settings.seeds)}", None))
    first = int(now.able.argmax())      # smaller models cannot memorize so much
    inside = np.clip(now.critical[0.5][:, [first, -1]], now.data[0], now.data[-1])
    fall, sure = inside[:, 0] - inside[:, 1], within(now.critical[0.5], now.data)
    low, high = np.percentile(fall[1:], bounds)
    bound = "" if sure[first] and sure[-1] else "about "      # beyond the range of D, its end is taken
    found = f"by {bound}{with_interval(fall[0], low, high, '{:.0f}')} from d = {now.hidden[first]} to {now.hidden[-1]}"
    claims.append(claim("fig 3: the critical size falls with size, where the model can memorize so much", "falls",
                        found if now.able.any() else "no size can", beyond(0, low, high, True) if now.able.any() else None))
    both = sure & within(earlier.critical[0.5], now.data)
    change = (now.critical[0.5] / earlier.critical[0.5] - 1)[:, both]                         # (1 + draws, sizes)
    low, high = np.percentile(change[1:], bounds, axis=0)
    still = (low > -CONVERGED) & (high < CONVERGED)
    cut = bounds[0] / max(1, both.sum())      # one size that moves is enough, so for all together (Bonferroni)
    least, most = np.percentile(change[1:], [cut, 100 - cut], axis=0)
    moving = (least > CONVERGED) | (most < -CONVERGED)
    changes = [f"{with_interval(*each, '{:+.0%}')} (d = {h})" for h, *each in zip(now.hidden[both], change[0], low, high)]
    claims.append(claim("critical size: change over the second half of the steps", f"(converged: {CONVERGED:.0%})",
                        ", ".join(changes) or "none in range",
                        False if moving.any() else True if both.any() and still.all() else None))
    return claims


# what the paper reports of figure 3, at p = 113 and hidden sizes 32 to 64
PAPER_PERFECT = {(64, 3000): True, (32, 3000): False, (32, 4000): True}      # {(hidden, D): whether accuracy is near perfect}
PAPER_SPAN = 1000                                                            # D over which accuracy rises; here to a factor of 2


def judge_paper_numbers(settings, rows, now):
    """What the paper states of figure 3 as numbers, all of them at p = 113."""
    if settings.p != 113:
        return []
    claims, runs = [], by_cell([line for line in plane(rows) if line["dynamic"] != "diverged"], "hidden", "data")
    for (h, data), perfect in PAPER_PERFECT.items():
        if (h, data) in runs:
            values = [line["val_acc_unmirrored"] for line in runs[h, data]]
            claims.append(claim_on_mean(f"fig 3: accuracy at d = {h}, D = {data}",
                                        f"{'' if perfect else 'not '}near perfect (0.9)", values, 0.9, perfect, least=ENOUGH))
    sizes = (now.hidden >= 32) & (now.hidden <= 64)
    early = [np.median([line["memorized_at"] or np.inf for line in lines])
             for (h, _), lines in runs.items() if h in now.hidden[sizes]]
    if early:
        steps = [place_text(each, (0, settings.steps)) for each in (min(early), max(early))]
        claims.append(claim("fig 3: models of d = 32 to 64 learn their training set within a tenth of the steps", "quickly",
                            f"median of a cell's runs: step {' to '.join(steps)}",
                            max(early) <= settings.steps / 10))
    sizes &= within(now.critical[FLOOR], now.data) & within(now.critical[0.9], now.data)
    if sizes.any():
        span = (now.critical[0.9] - now.critical[FLOOR])[:, sizes].mean(1)
        low, high = np.percentile(span[1:], tail(settings.seeds))
        sides = beyond(PAPER_SPAN / 2, low, high, True), beyond(2 * PAPER_SPAN, low, high, False)
        claims.append(claim(f"fig 3: D over which accuracy rises from {FLOOR} to 0.9, mean of d = "
                            f"{', '.join(map(str, now.hidden[sizes]))}",
                            f"about {PAPER_SPAN} ({PAPER_SPAN // 2} to {2 * PAPER_SPAN})",
                            with_interval(span[0], low, high, "{:.0f}"),
                            False if False in sides else None if None in sides else True))
    return claims


def judge_capacity(settings, rows, curves, earlier, now):
    """Claims on the memorization capacity (figure 4), where it is below all pairs."""
    partly, known = now.capacity[0] < 0.99 * settings.p**2, np.isfinite(now.capacity[0]).all()
    rise, grown = np.diff(now.capacity)[1:, partly[:-1]], now.capacity[0] / earlier.capacity[0].clip(1) - 1
    low, high = np.percentile(rise, tail(fewer_seeds(settings)), axis=0)      # from each size to the next
    at = np.nanargmax(abs(grown)) if np.isfinite(grown).any() else 0
    claims = [claim("fig 4: memorization capacity rises with size", "rises",
                    ", ".join(f"{with_interval(each, style='{:.0f}')} (d = {h})" for h, each in zip(now.hidden, now.capacity[0])),
                    False if (high <= 0).any() else True if known and len(low) and (low > 0).all() else None),
              claim("capacity: change over the second half of the steps", f"(converged: {CONVERGED:.0%})",
                    f"{with_interval(grown[at], style='{:+.1%}')} at most (d = {now.hidden[at]})",
                    None if np.isnan(grown).any() else (abs(grown) < CONVERGED).all())]
    for h in now.hidden[partly]:
        params = parameters(settings.run("random", h, 1, 0))
        bits, limit = capacity_bits(settings.p, most_known(rows, curves, h)[1]), capacity_bits(settings.p, 0)
        mean, low, high = np.array(interval(bits)) / params
        claims.append(claim(f"capacity at d = {h}: bits; bits a parameter (elsewhere 2 to 3.6)", "-",
                            f"{mean * params:.0f}; {with_interval(mean, low, high)} of at most {limit / params:.2f}", None))
    return claims


def judge_crossing(settings, now):
    """The claim of figure 1 that the two curves cross, once; the place also with mirrored pairs counted once.

    A yes where the capacity rises above the critical size once, and does not fall below it, in a share SURE of the draws; a no
    where they cross in another way in as many. Undecided where they do not: they may beyond the sizes tried.
    """
    once, otherwise = crossing_shares(now)
    place, mirrored = (crossing_place(settings, now, each) for each in (now.capacity, mirrored_once(now.capacity, settings.p)))
    return [claim("fig 1: the two curves cross once", "once", f"{place}; mirrored pairs counted once: {mirrored}",
                  True if once >= SURE else False if otherwise >= SURE else None)]


def judge_zones(settings, rows, now):
    """The claim of figure 1 that the zones hold what the paper says: those of half of the seeds against the runs of the rest.

    Shares of cells predicted right are means over 200 random halves, with the interval that holds 95% of these: halves differ
    about as much as new sets of seeds would, but for what all these seeds happen to have in common.
    """
    enough = settings.seeds >= ENOUGH      # of fewer, which decide nothing, one half
    halves = np.random.default_rng(0).permuted(np.tile(np.arange(settings.seeds) % 2 == 0, (200 if enough else 1, 1)), axis=1)
    found, claims = [predictions(settings.p, rows, now, half) for half in halves], []
    known = enough and np.isfinite(now.capacity[0] + now.critical[0.5][0]).all()      # both curves everywhere
    for name, paper in (("zones", "all"), ("mirrored pairs counted once", "all"), ("without a zone of semi-grokking", "(all)")):
        which = "" if name == "zones" else f", {name}"
        right, by_size, by_same = np.array([[share_right(each, predictor, name)
                                             for predictor in (name, "hidden size", "the same cell")] for each in found]).T
        (low, high), (least, most) = (np.percentile(each, [2.5, 97.5]) if known else (np.nan, np.nan)
                                      for each in (right, right - by_size))
        text = (f"{with_interval(right.mean(), low, high, '{:.0%}')} of {len(now.hidden) * len(now.data)} cells; "
                f"the hidden size {by_size.mean():.0%}, a difference of "
                f"{with_interval((right - by_size).mean(), least, most, '{:+.0%}')}; the same cell {by_same.mean():.0%}")
        claims.append(claim("fig 1: zones from half of the seeds predict the others' dynamic, in 3 of 4 cells and better "
                            f"than the hidden size alone{which}", paper,
                            text if right.mean() >= 0 else "no zone is known from half of the seeds",
                            True if low >= 0.75 and least > 0 else False if high < 0.75 or most < 0 else None))
    for kind, counts in zip(DYNAMICS, confusion(settings, rows, now)):
        seen = ", ".join(f"{dynamic} {count}" for dynamic, count in zip(DYNAMICS, counts) if count)
        claims.append(claim(f"in the zone of {kind}: the other half's dynamic (each cell twice)", "-", seen or "no cell", None))
    return claims


def judge_double_descent(settings, rows, now):
    """The prediction from the two curves alone: double descent for D below the crossing, and none above.

    Not for D below the critical size of the largest model either: there accuracy does not come back. One D of several that
    contradicts may do so by chance.
    """
    text = "double descent for D from the critical size of the largest model to the crossing, not above"
    _, where = crossing(now.hidden, now.critical[0.5], now.capacity)
    if not np.isfinite(where[0]) or crossing_shares(now)[0] < SURE:
        return [claim(text, "-", "where the curves cross is not known", None)]
    (low, high), largest = np.nanpercentile(where[1:], tail(settings.seeds)), now.critical[0.5][:, -1]
    returns = np.percentile(largest[1:], tail(settings.seeds)[1])      # the D above which the largest model surely generalizes
    expected = {data: "dip" if returns < data < low else "no dip" if data > high else None for data in now.data}
    seen = {data: dip_of(plane(rows), "addition", data)[-1] for data in now.data}
    tested = {data: seen[data] == dip for data, dip in expected.items() if dip and seen[data] != "undecided"}
    both, wrong = {expected[data] for data in tested} == {"dip", "no dip"}, list(tested.values()).count(False)
    ours, found = (", ".join(f"{data}: {dip}" for data, dip in each.items() if dip) for each in (expected, seen))
    between = f"{bounded(largest, now.data, settings.seeds)} to {bounded(where, now.data, settings.seeds)}"
    return [claim(text, f"(from the curves: {ours})" if ours else "-", f"{between}; {found}",
                  False if wrong > 1 or 0 < wrong == len(tested) else True if both and not wrong else None)]


def judge_cost(rows):
    """Claims on what the two circuits cost (paper section 1), with the parameter norm at the last step as the cost."""
    def exponent(kind):
        """The 95% interval of the exponent of the norm in D of the runs of a dynamic, and all of it as text."""
        runs = settled(rows, kind)
        draws = cost_exponents(runs)
        if np.isnan(draws[0]) or np.isnan(draws).mean() > 0.025:
            return np.nan, np.nan, "too few runs"
        low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
        return low, high, f"{with_interval(draws[0], low, high)}, n = {len(runs)}"
    least, most, found = exponent("ungrokking")
    claims = [claim("cost of memorizing more examples: exponent k in norm ~ D^k", "rises", found, beyond(0, least, most, True))]
    low, high, found = exponent("grokking")
    largest, smallest = max(-low, high), max(low, -high)      # |k| in its interval (smallest below 0: it holds 0)
    stays, moves = largest < least / 2, smallest > np.maximum(0, most) / 2      # against half of memorizing's k, all its interval
    claims.append(claim("cost of generalizing more examples: exponent k in norm ~ D^k, runs that grokked by half of the steps",
                        "stays (k less than half of memorizing's)", found, True if stays else False if moves else None))
    less = []
    for lines in by_cell(plane(rows), "hidden", "data").values():
        grokked, memorized = ([line["norm"] for line in lines if line["dynamic"] == kind] for kind in ("grokking", "ungrokking"))
        if grokked and memorized:
            less.append(np.mean(grokked) / np.mean(memorized) - 1)
    return [*claims, claim_on_mean("cost: norm of runs that grokked, beside those of the same cell that only memorized", "less",
                                   less, 0, False, "{:+.0%}")]


def judge_forgetting(settings, rows, curves, earlier, now):
    """Claims of Varma et al. 2023: a grokked run forgets on fewer examples than the critical size, and not on more.

    So says their theory; in their experiments it took less than half of that (appendix A.2). earlier: as Measured, half-way.
    The steps double while the runs go on with less, and the critical size may fall again as much as it did when they doubled
    last: only below that they are expected to forget.
    """
    claims, at = [], np.flatnonzero(now.hidden == settings.forget_hidden)
    critical, half_way = (each.critical[0.5][:, at[0]] if len(at) else np.full(2, np.nan) for each in (now, earlier))
    later = critical * np.minimum(1, critical / half_way)
    (least, most), (fallen, _) = (np.percentile(draws[1:], tail(settings.seeds)) for draws in (critical, later))
    for less in less_data(settings):
        before, after = (val_acc_at(rows, curves, until, experiment="forgetting", data=less) for until in (0.5, 1))
        mean, low, high = interval(after)
        text = (f"validation {with_interval(before.mean())}, by step {2 * settings.steps} "
                f"{with_interval(mean, low, high)}")
        expected = None     # out of range the critical size is a bound
        if now.data[0] <= least and less < fallen:
            expected = "forgets"
        elif most <= now.data[-1] and less > most:
            expected = "keeps"
        holds = beyond(0.5, low, high, expected == "keeps") if expected and before.mean() >= 0.9 else None
        claims.append(claim(f"grokked on D = {max(now.data)}, then D = {less} "
                            f"(critical size {bounded(critical, now.data, settings.seeds)})",
                            f"(theory of Varma et al.: {expected})" if expected else "-", text, holds))
    return claims


def judge_phase(settings, rows, curves):
    """The paper's claims on figures 1, 3 and 4, on what the circuits cost, and on forgetting."""
    earlier, now = (measured(settings, rows, curves, until) for until in (0.5, 1.0))
    return [*judge_critical(settings, earlier, now), *judge_paper_numbers(settings, rows, now),
            *judge_capacity(settings, rows, curves, earlier, now), *judge_cost(rows), *judge_crossing(settings, now),
            *judge_zones(settings, rows, now), *judge_double_descent(settings, rows, now),
            *judge_forgetting(settings, rows, curves, earlier, now)]


def main():
    """Train, draw, judge."""
    reproduce("grok.py", __doc__, needs_curves=True, dynamics=(PRESETS, grid, draw, judge),
              phase=(PLANES, phase_grid, draw_phase, judge_phase))


if __name__ == "__main__":
    main()
