"""An ability that appears with size when memorization is mixed in (Huang et al. 2024, figures 8 and 10).

Addition is learned together with pure memorization: a + b mod p beside a - b with random labels, told apart by the
operator token. Memorizing the labels takes a memorizing circuit anyway, and a model with just enough room then memorizes
the additions too: addition does not generalize. (Smaller ones have no room for both, and may generalize instead.) Only a
larger model gets it back, a far larger one, says the paper: against size, the ability looks emergent. Where half of the
feed-forward units serve one task and half the other, it should appear earlier.

    python emergence.py                     a laptop's CPU, about a minute
    python emergence.py --scale small       p = 59, three seeds, 22 minutes on two cores
    python emergence.py --scale paper --layers 1 1 1 1 1 1 1 --hidden 4 8 16 32 64 128 192 --memorize 3000 6000
                                            p = 113, six hours on two cores: beside 3000 labels lost at hidden 64, back in
                                            one seed of three at 128, in two at 192; beside 6000 not back up to 192
    python emergence.py --normalization rms --out results/normalized-quick
                                            a model that normalizes its residual stream is held back less at p = 37 and 59
    python emergence.py --device cuda       p = 113, up to 8 layers of width 1024: not run yet, it says how long; --layers
                                            and --hidden cut the ladder, --precision tf32 or bfloat16 may save time

Expect emergence.png: validation accuracy on addition against the number of parameters, for addition alone, for each
amount of memorization and for the split feed-forward layer; beneath it the loss on the answer and the generalizing
circuit's share of the logits, which tell an ability that appears from a metric that jumps (Schaeffer et al. 2023,
arXiv 2304.15004); and a verdict on each of the paper's claims.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.16", "numpy>=1.26,<3", "matplotlib>=3.8,<4"]
# ///
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from common import FLOOR, Settings, by_cell, claim, fail, interval, interval_name, option, parameters, reproduce, with_interval


@dataclass(frozen=True)
class Ladder(Settings):
    """Model sizes, each a number of layers and a hidden size, with each amount of memorization."""
    lr: float = option("learning rate of AdamW, less for large models (--weight-decay more)", minimum=1e-9)
    layers: tuple[int, ...] = option("layers of the model sizes", minimum=1, maximum=1000)
    hidden: tuple[int, ...] = option("hidden sizes of the model sizes", minimum=1, maximum=10_000)
    data: int = option("training examples of addition", minimum=1)
    memorize: tuple[int, ...] = option("examples to memorize; the first amount is also trained with a split layer", minimum=1)


PRESETS = {
    "quick": Ladder(p=37, seeds=3, steps=1300, lr=2e-2, weight_decay=1.0, layers=(1, 1, 1, 1), hidden=(8, 16, 32, 64),
                    data=850, memorize=(500,)),
    "small": Ladder(p=59, seeds=3, steps=3000, lr=1e-2, weight_decay=1.0, layers=(1,) * 7, hidden=(8, 16, 24, 32, 48, 64, 128),
                    data=2000, memorize=(1400, 1100)),
    # parameters: 2.7k, 6.9k, 20k, 64k, 227k, 424k, 1.6M, 3.2M, 13M, 25M, 101M
    "paper": Ladder(p=113, seeds=3, steps=10000, lr=1e-2, weight_decay=1.0, layers=(1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8),
                    hidden=(8, 16, 32, 64, 128, 128, 256, 256, 512, 512, 1024), data=3000, memorize=(3000, 4000, 5000, 6000)),
}


def series(settings):
    """What is compared, (memorize, split): addition alone, each amount of memorization, the first of them split."""
    return [(0, False), *((amount, False) for amount in dict.fromkeys(settings.memorize)), (settings.memorize[0], True)]


def rates(settings, layers, hidden):
    """Learning rate and weight decay of a model size.

    4 layers of 256 diverge at 5e-3 and train at 1e-3. So learning rate x hidden is at most that of hidden 128 at 1e-2, and where
    the learning rate falls for it, the weight decay rises as much: what decays in a step, their product, stays. Depth divides
    the learning rate, too, and there the product should fall: 8 layers of 32 (p = 37, two seeds) mostly keep what they learned
    where it is 1.9e-3, never where it is 5e-3 (whichever of the two was raised), and collapse where it is 1.5e-2.
    """
    share = min(1.0, 1e-2 * 128 / (settings.lr * hidden))
    return {"lr": settings.lr * share / layers, "weight_decay": settings.weight_decay / share}


def grid(settings):
    """The runs: every size with addition alone, each amount of memorization, and the split layer, with every seed."""
    if len(settings.layers) != len(settings.hidden):
        fail("--layers and --hidden: as many values each, one for each model size")
    runs = [settings.run("addition", hidden, settings.data, seed, layers=layers, memorize=memorize, operator=True, split=split,
                         experiment="emergence", **rates(settings, layers, hidden))
            for memorize, split in series(settings) for layers, hidden in zip(settings.layers, settings.hidden)
            for seed in range(settings.seeds)]
    sizes = {(run.layers, run.hidden): parameters(run) for run in runs}
    if len(set(sizes.values())) < len(sizes):      # which tell model sizes apart
        fail("--layers and --hidden: two model sizes have the same number of parameters; one of them must go")
    return runs


# the threshold


def series_name(memorize, split):
    """What a series is called."""
    return f"+ {memorize} to memorize" + (", split layer" if split else "") if memorize else "addition alone"


def size_names(rows):
    """What each model size is called, {parameters: layers x hidden size}, ascending; with its learning rate if lower."""
    found, highest = {}, max(line["lr"] for line in rows)
    for line in rows:
        lower = f" (lr/{two_digits(highest / line['lr'])})" if line["lr"] < highest else ""
        found[line["params"]] = f"{line['layers']}×{line['hidden']}{lower}"
    return dict(sorted(found.items()))


def by_size(rows, memorize, split):
    """The seeds of each model size of a series, {number of parameters: rows}, ascending."""
    found = by_cell([line for line in rows if (line["memorize"], line["split"]) == (memorize, split)], "params")
    return {params: lines for (params,), lines in sorted(found.items())}


def ability(line):
    """A run's best validation accuracy on addition at which it knows the memorization too (to MEMORIZED).

    A run that has no room for both sets, or loses the memorization in a spike of the loss, may generalize instead. None if
    it never knows it, or diverged.
    """
    if line["dynamic"] == "diverged":
        return None
    return line["best_val_acc_memorized" if line["memorize"] else "best_val_acc_unmirrored"]


def best(lines):
    """The best of the seeds, as the paper reports; NaN where none knows the memorization."""
    return max((accuracy for accuracy in map(ability, lines) if accuracy is not None), default=np.nan)


def bracket(rows, level, memorize, split):
    """The two sizes, in parameters, between which a series comes to reach level and stays there, with its best seed.

    The largest size known to be below level (0 for none), and the next one known (None for none). The truth lies between.
    """
    known = {params: best(lines) for params, lines in by_size(rows, memorize, split).items() if not np.isnan(best(lines))}
    below = max((params for params, accuracy in known.items() if accuracy < level), default=0)
    return below, min((params for params in known if params > below), default=None)


def held_back(settings, rows):
    """The sizes at which addition alone is learned (0.9) and the memorization beside it is known, and those of them at which
    addition beside it is not (0.5)."""
    alone, mixed = by_size(rows, 0, False), by_size(rows, settings.memorize[0], False)
    known = [params for params, lines in mixed.items() if best(alone[params]) >= 0.9 and not np.isnan(best(lines))]
    return known, [params for params in known if best(mixed[params]) < 0.5]


def two_digits(ratio):
    """A ratio as text, to two digits; whole from 100 on."""
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:.0f}"


def ratio_alone(rows, level, memorize, split):
    """The size at which a series reaches level, divided by that of addition alone: of the sizes tried, and the least and the
    most that it may be; the first is None where one of both does not reach level.
    """
    (below_alone, alone), (below, size) = (bracket(rows, level, *which) for which in ((0, False), (memorize, split)))
    return (size / alone if alone and size else None, below / alone if alone else 0,
            size / below_alone if size and below_alone else np.inf)


def times_text(ratio, least, most):
    """A ratio as text, with the bounds that are known."""
    low, high = two_digits(least), two_digits(most)
    bounds = {(True, True): f" ({low} to {high})", (True, False): f" (at least {low})", (False, True): f" (at most {high})",
              (False, False): ""}[least > 0, most < np.inf]
    return f"{two_digits(ratio)} times{bounds}"


# the figure


def draw_series(axes, found, label, column, color):
    """A series, {parameters: rows}, in the panels of accuracy, loss and share: hollow, and joined by no line, what is not known.

    column: the factor by which the dots of its seeds are moved to the right.
    """
    accuracy, loss, share = axes
    sizes, bests = list(found), np.array([best(lines) for lines in found.values()])
    accuracy.plot(sizes, bests, "-o", ms=7, lw=2, color=color, label=label)
    for params, lines in found.items():
        for line in lines:
            known = ability(line) is not None
            value = np.array(ability(line) if known else line["best_val_acc_unmirrored"], float)      # None becomes NaN
            accuracy.plot(params * column, value, "o", ms=4, alpha=0.6, mec=color, mfc=color if known else "none")
    for axis, measure in ((loss, "val_loss"), (share, "circuit_share")):
        means = np.array([interval([line[measure] for line in lines]) for lines in found.values()]).T
        axis.plot(sizes, np.where(np.isnan(bests), means[0], np.nan), "o", ms=4, mec=color, mfc="none")
        mean, low, high = np.where(np.isnan(bests), np.nan, means)
        axis.plot(sizes, mean, "-o", ms=4, color=color)
        axis.fill_between(sizes, low, high, color=color, alpha=0.15, lw=0)


def draw(settings, rows, curves):
    """Figures 8 and 10, with the loss on the answer and the circuit's share beneath."""
    figure = Figure(figsize=(8.5, 8.5), layout="constrained")
    axes = accuracy, loss, share = figure.subplots(3, 1, sharex=True, height_ratios=(5, 2, 2))
    amounts = sorted(set(settings.memorize))
    colors = dict(zip(amounts, colormaps["Blues"](np.linspace(0.6, 1, len(amounts)))))
    for i, (memorize, split) in enumerate(series(settings)):
        column = 1.03 ** (i - (len(series(settings)) - 1) / 2)      # the seeds of each series in a column of their own
        draw_series(axes, by_size(rows, memorize, split), series_name(memorize, split), column,
                    "#009E73" if split else colors.get(memorize, "#000000"))
    label, (known, held) = size_names(rows), held_back(settings, rows)
    (_, alone), (_, back) = (bracket(rows, 0.5, *which) for which in series(settings)[:2])
    if alone and back and held:
        accuracy.annotate("", (back, 0.5), (alone, 0.5), arrowprops={"arrowstyle": "<->"})
        times = times_text(*ratio_alone(rows, 0.5, settings.memorize[0], False))
        accuracy.annotate(f"{times} the parameters", ((alone * back) ** 0.5, 0.5), (0, -5), textcoords="offset points", va="top",
                          ha="center", zorder=1, path_effects=[withStroke(linewidth=3, foreground="white")])      # hides no dot
    accuracy.set(xscale="log", xlim=(0.8 * min(label), 1.25 * max(label)), ylim=(-0.03, 1.03),
                 ylabel="best validation accuracy on addition")
    accuracy.plot([], [], "o", ms=4, mec="black", mfc="none", label="has not memorized (lower panels: no seed has)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    loss.axhline(np.log(settings.p), color="#999999", lw=0.8, ls="--")
    loss.annotate("guessing, ln p", (0.99, np.log(settings.p)), xycoords=("axes fraction", "data"), va="bottom", ha="right",
                  fontsize=8, color="#666666")
    loss.set_ylim(top=max(loss.get_ylim()[1], 1.3 * np.log(settings.p)))      # with room for what is written there
    loss.set_ylabel("validation loss\n(nats)")
    spread = interval_name(settings.seeds)
    share.set(xlabel=f"parameters (top: each seed, line through the best; below: mean, {spread}, at the last step)",
              ylabel="circuit's share\nof the logits")
    share.xaxis.set_minor_formatter("")
    top = accuracy.secondary_xaxis("top")
    top.set_xticks(list(label), labels=[text.replace(" ", "\n") for text in label.values()], fontsize=8)
    top.set_xticks([], minor=True)
    top.set_xlabel("layers × hidden size" + " (learning rate, where lower)" * ("lr" in "".join(label.values())), fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.25)
    beside = by_size(rows, settings.memorize[0], False)
    failed = [params for params in held if best(beside[params]) < FLOOR]
    lost = "fails" if failed else "is partly learned"
    finding = (f"Beside memorization, addition {lost} at {', '.join(label[params] for params in failed or held)}" if held else
               "Addition passes 0.5 at every size that memorizes the labels" if known else "Addition beside memorization")
    if back and held:
        pass_it = sum((ability(line) or 0) >= 0.5 for line in beside[back])
        finding += f" and passes 0.5 at {label[back]} ({pass_it} of {len(beside[back])} seeds)"
    figure.suptitle(f"{finding}\np = {settings.p}, {settings.data} additions, {settings.seeds} seeds, {settings.steps} steps")
    return {"emergence.png": figure}


# claims

# the size that learns addition beside memorization over that which learns it alone (8 x 1024 over 1 x 64, the ends of the
# paper's ladder, is 1568); here to a factor of 3
PAPER_RATIO = 1570


def judge_suppression(settings, rows):
    """Figure 8: sizes at which addition alone is learned and beside memorization is not, and larger ones at which it is.

    The paper: near 0 up to about 1570 times the size that learns addition alone. So the first claim fails only if two of the
    sizes that count are surely smaller (below a third of 1570 times a size seen to be too small for addition alone), and the
    second only if one is surely larger (above three times 1570 times the size that learns addition alone). A size counts if
    addition alone is learned there, and the memorization beside it is known.
    """
    label, (known, held) = size_names(rows), held_back(settings, rows)
    alone, mixed = by_size(rows, 0, False), by_size(rows, settings.memorize[0], False)
    seen = ", ".join(f"{best(mixed[params]):.2f} at {label[params]} (alone {best(alone[params]):.2f})" for params in held)
    _, first = bracket(rows, 0.9, 0, False)
    able = min((params for params, lines in alone.items() if best(lines) >= 0.9), default=0)
    too_small = max((params for params, lines in alone.items() if params < able and best(lines) < 0.9), default=0)
    testable = sum(params < PAPER_RATIO / 3 * too_small for params in known) > 1
    fails = claim("fig 8: addition fails beside memorization at a size that learns it alone", f"near 0 (below {FLOOR})",
                  f"+ {settings.memorize[0]}: {seen or 'at no size'}",
                  True if any(best(mixed[params]) < FLOOR for params in held) else False if testable else None)
    larger = [params for params, lines in mixed.items() if held and params > held[-1] and best(lines) >= 0.9]
    measured = f"not up to the largest size, by step {settings.steps}" if held else "no size was held back"
    if larger:
        measured = f"{best(mixed[larger[0]]):.2f} at {label[larger[0]]}"
    far = held and first and known[-1] > 3 * PAPER_RATIO * first
    again = claim("fig 8: larger models generalize again (0.9)", "yes", measured, True if larger else False if far else None)
    return [fails, again]


def judge_thresholds(settings, rows):
    """The size from which on each series reaches an accuracy, in parameters, and its ratio to addition alone.

    The true ratio lies between those of the sizes tried: it is the paper's, or is not, if all of that is within a factor of 3.
    """
    label, claims = size_names(rows), []
    for level in (0.5, 0.9):
        for which in series(settings):
            (_, size), (ratio, least, most) = bracket(rows, level, *which), ratio_alone(rows, level, *which)
            measured = f"{label[size]}, {size:,} parameters" if size else f"not up to the largest size, by step {settings.steps}"
            measured += f", {times_text(ratio, least, most)} the size for addition alone" if ratio and which[0] else ""
            paper, holds = "-", None
            if which == (3000, False) and (settings.p, settings.data) == (113, 3000):
                paper = f"about {PAPER_RATIO} times"
                inside = least > PAPER_RATIO / 3 and most < 3 * PAPER_RATIO
                holds = True if inside else False if most < PAPER_RATIO / 3 or least > 3 * PAPER_RATIO else None
            claims.append(claim(f"smallest size from which on accuracy is {level}: {series_name(*which)}", paper, measured,
                                holds))
    return claims


def judge_comparisons(settings, rows):
    """That the amount of memorization matters little (figure 8), and that a split layer helps by a factor of two (figure 10).

    A verdict on which is smaller holds wherever between the sizes tried the truth lies; the factor of two is of these sizes.
    The paper's amounts differ by a factor of two: smaller ranges do not tell, nor does a threshold with no size known to be
    below it, which is a bound. One that is not reached lies at least one size beyond the largest.
    """
    label, claims, first = size_names(rows), [], settings.memorize[0]
    order = {size: i for i, size in enumerate([0, *label])}
    for level in (0.5, 0.9):
        found = {amount: bracket(rows, level, amount, False) for amount in settings.memorize}
        if len(found) > 1:
            least, most = [order[below] + 1 for below, _ in found.values()], [order[size] for _, size in found.values() if size]
            tells = max(found) >= 2 * min(found) and min(least) > 1
            claims.append(claim(f"fig 8: the amount to memorize matters little for accuracy {level}", "within one size",
                                ", ".join(f"+ {amount}: {label.get(size, 'none')}" for amount, (_, size) in found.items()),
                                False if most and max(least) - min(most) > 1 else
                                True if len(most) == len(found) and tells and max(most) - min(least) <= 1 else None))
        (below_whole, whole), (below_split, split) = (bracket(rows, level, first, halved) for halved in (False, True))
        claims.append(claim(f"fig 10: with a split layer, accuracy {level} is reached from a smaller size on", "far smaller",
                            f"{label.get(split, 'none')} against {label.get(whole, 'none')}"
                            + (f", {two_digits(whole / split)} times" if split and whole and split != whole else ""),
                            True if split and below_whole >= split and (whole or below_whole) >= 2 * split else
                            False if whole and below_split >= whole else None))
    return claims


def abruptness(values):
    """Largest change between two neighbours as a share of the range of values: 1 for a jump, less for a gradual change."""
    return np.abs(np.diff(values)).max() / np.ptp(values) if np.ptp(values) else np.nan


def judge_metric(settings, rows):
    """Whether loss and circuit change more gradually with size than accuracy does (Schaeffer et al. 2023).

    Of the sizes at which memorization is known; all are means over seeds at the last step, of val_acc too, which is of the
    same pairs as val_loss. Fewer than five sizes cannot tell a jump from a slope, and where accuracy changes by less than
    0.5 over all sizes there is none to explain.
    """
    known = [lines for lines in by_size(rows, settings.memorize[0], False).values() if not np.isnan(best(lines))]
    if len(known) < 3:
        return []
    means = {measure: [interval([line[measure] for line in lines])[0] for lines in known]
             for measure in ("val_acc", "val_loss", "circuit_share")}
    jumps = {measure: abruptness(values) for measure, values in means.items()}
    unclear = len(known) < 5 or not np.ptp(means["val_acc"]) >= 0.5 or np.isnan(list(jumps.values())).any()
    seen = ", ".join(f"{measure} {with_interval(value, style='{:.0%}')}" for measure, value in jumps.items())
    return [claim("loss and circuit change more gradually with size than accuracy (largest step, of the whole range)",
                  "(Schaeffer et al.)", seen,
                  None if unclear else max(jumps["circuit_share"], jumps["val_loss"]) < jumps["val_acc"])]


def judge(settings, rows, curves):
    """The paper's claims on emergence, and one on the metric.

    A verdict stands only if it is the same whichever one seed is left out; with one seed none stands.
    """
    def judged(lines):
        """The claims, from these rows."""
        return [*judge_suppression(settings, lines), *judge_thresholds(settings, lines), *judge_comparisons(settings, lines),
                *judge_metric(settings, lines)]
    claims = judged(rows)
    for seed in range(settings.seeds):
        others = [line for line in rows if line["seed"] != seed]
        without = {c["claim"]: c["holds"] for c in judged(others)} if others else {}
        for c in claims:
            if without.get(c["claim"]) != c["holds"]:
                c["holds"] = None
    return claims


def main():
    """Train, draw, judge."""
    reproduce("emergence.py", __doc__, emergence=(PRESETS, grid, draw, judge))


if __name__ == "__main__":
    main()
