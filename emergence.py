"""An ability that appears with size when memorization is mixed in (Huang et al. 2024, figures 8 and 10).

Addition is learned together with pure memorization: a + b mod p beside a - b with random labels, told apart by the
operator token. Memorizing the labels takes a memorizing circuit anyway, and a small model then memorizes the additions
too: it learns both training sets and generalizes on neither. Only a far larger model generalizes: beside the
size, the ability looks emergent. Where half of the feed-forward units serve one task and half the other, it appears earlier.

    python emergence.py                     a laptop's CPU, two minutes
    python emergence.py --scale small       p = 59, three seeds, about half an hour on two cores
    python emergence.py --device cuda       p = 113, up to 8 layers of width 1024: hours; --precision tf32 is faster,
                                            --layers and --hidden cut the ladder of sizes

Expect emergence.png: validation accuracy on addition against the number of parameters, for addition alone, for each
amount of memorization and for the split feed-forward layer; beneath it the loss on the answer and the generalizing
circuit's share of the logits, which tell an ability that appears from a metric that jumps (Schaeffer et al. 2023,
arXiv 2304.15004); and a verdict on each of the paper's claims.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26,<3", "matplotlib>=3.8,<4"]
# ///
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from common import FLOOR, Settings, by_cell, claim, fail, interval, option, reproduce


@dataclass(frozen=True)
class Ladder(Settings):
    """Model sizes, each a number of layers and a hidden size, with each amount of memorization."""
    layers: tuple[int, ...] = option("layers of the model sizes", minimum=1)
    hidden: tuple[int, ...] = option("hidden sizes of the model sizes", minimum=1)
    data: int = option("training examples of addition", minimum=1)
    memorize: tuple[int, ...] = option("examples to memorize; the first amount is also trained with a split layer", minimum=1)


PRESETS = {
    "quick": Ladder(p=37, seeds=3, steps=2000, lr=1.5e-2, weight_decay=1.0, layers=(1, 1, 1, 1), hidden=(8, 16, 32, 64), data=900, memorize=(550,)),
    "small": Ladder(p=59, seeds=3, steps=3000, lr=1e-2, weight_decay=1.0, layers=(1,) * 7, hidden=(8, 16, 24, 32, 48, 64, 128), data=2000, memorize=(1100, 800)),
    # parameters: 2.7k, 6.9k, 20k, 64k, 227k, 426k, 1.6M, 3.2M, 13M, 25M, 101M
    "paper": Ladder(p=113, seeds=3, steps=10000, lr=5e-3, weight_decay=1.0, layers=(1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8),
                    hidden=(8, 16, 32, 64, 128, 128, 256, 256, 512, 512, 1024), data=3000, memorize=(3000, 4000, 5000, 6000)),
}


def grid(settings):
    """The runs: every size with addition alone, each amount of memorization, and the split layer, with every seed."""
    if len(settings.layers) != len(settings.hidden):
        fail("--layers and --hidden: as many values each, one for each model size")
    return [settings.run("addition", hidden, settings.data, seed, layers=layers, memorize=memorize, operator=True, split=split,
                         experiment="emergence")
            for memorize, split in series(settings) for layers, hidden in zip(settings.layers, settings.hidden) for seed in range(settings.seeds)]


def series(settings):
    """What is compared, (memorize, split): addition alone, each amount of memorization, the first of them split."""
    return [(0, False), *((amount, False) for amount in settings.memorize), (settings.memorize[0], True)]


# the threshold


def sizes(rows, memorize, split):
    """The seeds of each model size of a series, {number of parameters: rows}, ascending."""
    found = by_cell([line for line in rows if (line["memorize"], bool(line["split"])) == (memorize, split)], "params")
    return {params: found[params,] for params, in sorted(found)}


def ability(line):
    """A run's best validation accuracy on addition at which it knows the memorization too (to MEMORIZED); None if it never does.

    A run that has not room for both sets, or loses the memorization in a spike of the loss, may generalize instead.
    """
    return line["best_val_acc_memorized" if line["memorize"] else "best_val_acc_unmirrored"]


def best(lines):
    """The best of the seeds, as the paper reports; NaN where none knows the memorization."""
    return max((ability(line) for line in lines if ability(line) is not None), default=np.nan)


def threshold(rows, level, memorize, split):
    """The smallest number of parameters whose best seed reaches level, or None."""
    return next((params for params, lines in sizes(rows, memorize, split).items() if best(lines) >= level), None)


# the figure


def color(settings, memorize, split):
    """Addition alone black, each amount of memorization its shade of blue, the split layer orange."""
    shades = ("#0072B2", "#2E93C9", "#56B4E9", "#9AD0F0")
    return "#D55E00" if split else "#000000" if not memorize else shades[settings.memorize.index(memorize) % len(shades)]


def draw(settings, rows, curves):
    """Figures 8 and 10, with the loss on the answer and the circuit's share beneath."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(5, 2, 2))
    for memorize, split in series(settings):
        label = "addition alone" if not memorize else f"+ {memorize} to memorize" + (", split layer" if split else "")
        shade, found = color(settings, memorize, split), sizes(rows, memorize, split)
        axes[0].plot(list(found), [best(lines) for lines in found.values()], "-o", ms=6, color=shade, label=label)
        for params, lines in found.items():
            for line in lines:
                axes[0].scatter(params, line["best_val_acc_unmirrored"], s=14, edgecolors=shade, alpha=0.6,
                                facecolors="none" if ability(line) is None else shade)
        for axis, measure in ((axes[1], "val_loss"), (axes[2], "circuit_share")):
            mean, low, high = np.array([interval([line[measure] for line in lines]) for lines in found.values()]).T
            axis.plot(list(found), mean, "-o", ms=4, color=shade)
            axis.fill_between(list(found), low, high, color=shade, alpha=0.15, lw=0)
    alone, mixed = (threshold(rows, 0.5, *which) for which in series(settings)[:2])
    if alone and mixed:
        axes[0].annotate("", (mixed, 0.5), (alone, 0.5), arrowprops={"arrowstyle": "<->"})
        axes[0].annotate(f"× {mixed / alone:.3g} parameters", ((alone * mixed) ** 0.5, 0.5), (0, 6), textcoords="offset points", ha="center",
                         bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    for axis, label in zip(axes, ("best validation accuracy on addition\nwhile the memorization is known\n(line: best seed; hollow: a seed never knows it)", "loss on the answer,\nvalidation",
                                  "generalizing circuit's\nshare of the logits")):
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_xscale("log")
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend(loc="best", fontsize=9)
    axes[1].axhline(np.log(settings.p), color="#999999", lw=0.8, ls="--")
    axes[1].annotate("guessing, ln p", (0.01, np.log(settings.p)), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="#666666")
    axes[2].set_xlabel("parameters")
    axes[2].xaxis.set_minor_formatter("")
    ladder = {line["params"]: f"{line['layers']}×{line['hidden']}" for line in rows}
    top = axes[0].secondary_xaxis("top")
    top.set_xticks(list(ladder), labels=list(ladder.values()), fontsize=8)
    top.set_xticks([], minor=True)
    top.set_xlabel("layers × hidden size", fontsize=9)
    figure.suptitle(f"{finding(settings, rows)}\np = {settings.p}, {settings.data} additions, {settings.seeds} seeds, {settings.steps} steps")
    return {"emergence.png": figure}


def finding(settings, rows):
    """The figure's title: what the thresholds of addition alone and beside memorization say."""
    alone, mixed = (threshold(rows, 0.5, *which) for which in series(settings)[:2])
    if alone and mixed and mixed > alone:
        return "Beside memorization, addition is learned only by a far larger model"
    return "Beside memorization, addition is not learned at any size tried" if alone and not mixed else "Memorization beside it does not hold addition back here"


# claims


def abruptness(values):
    """Largest change between two neighbours as a share of the range of values: 1 for a jump, less for a gradual change."""
    return np.abs(np.diff(values)).max() / np.ptp(values) if np.ptp(values) else np.nan


def judge(settings, rows, curves):
    """The paper's claims on emergence, and one on the metric."""
    base, amounts, by_step = settings.memorize[0], settings.memorize, f"not up to the largest size, by step {settings.steps}"
    alone, mixed = sizes(rows, 0, False), sizes(rows, base, False)
    label = {line["params"]: f"{line['layers']}x{line['hidden']}" for line in rows}

    reached = {(level, *which): threshold(rows, level, *which) for level in (0.5, 0.9) for which in series(settings)}
    held = [params for params, lines in mixed.items() if best(alone[params]) >= 0.9 and best(lines) < 0.5]
    floor = [params for params in held if best(mixed[params]) < FLOOR]
    text = [f"{label[params]}: {best(mixed[params]):.2f} (alone {best(alone[params]):.2f})" for params in held]
    claims = [claim(f"fig 8: + {base} to memorize, both sets learned, addition not", f"near 0 (below {FLOOR})", ", ".join(text) or "at no size",
                    bool(floor) if reached[0.9, 0, False] else None)]
    later = [params for params, lines in mixed.items() if held and params > max(held) and best(lines) >= 0.9]
    claims.append(claim("fig 8: larger models generalize again (0.9)", "yes", f"{label[later[0]]}: {best(mixed[later[0]]):.2f}" if later else by_step,
                        True if later else None))
    for level in (0.5, 0.9):
        for which in series(settings):
            name = "addition alone" if not which[0] else f"+ {which[0]} to memorize" + (", split" if which[1] else "")
            size, first = reached[level, *which], reached[level, 0, False]
            measured = f"{label[size]}, {size:,} parameters" + (f", {size / first:.3g} times alone" if first and which[0] else "") if size else by_step
            mixture = which == (base, False)
            claims.append(claim(f"smallest size with accuracy {level}: {name}", "about 1570 times alone" if mixture else "-", measured,
                                500 < size / first < 5000 if mixture and size and first else None))
    if len(amounts) > 1:
        found = [reached[0.5, amount, False] for amount in amounts]
        order = sorted(label)
        claims.append(claim("fig 8: the amount of memorization matters little", "within one size", ", ".join(f"+ {amount}: {label.get(size, 'not reached')}" for amount, size in zip(amounts, found)),
                            None if None in found else max(map(order.index, found)) - min(map(order.index, found)) <= 1))
    for level in (0.5, 0.9):
        split, whole = reached[level, base, True], reached[level, base, False]
        claims.append(claim(f"fig 10: split, accuracy {level} is reached at a smaller size", "far smaller",
                            f"{label.get(split, 'not reached')} against {label.get(whole, 'not reached')}",
                            None if not split and not whole else bool(split) and (not whole or split < whole)))
    known = [lines for lines in mixed.values() if not np.isnan(best(lines))]
    if len(known) > 2:
        steps = {"accuracy": abruptness([best(lines) for lines in known])}
        steps |= {name: abruptness([np.nanmean([line[name] for line in lines]) for lines in known]) for name in ("circuit_share", "val_loss")}
        claims.append(claim("is it the metric? largest step between two sizes, of the whole change", "- (Schaeffer et al.: smooth beneath)",
                            ", ".join(f"{name} {value:.0%}" for name, value in steps.items()), steps["circuit_share"] < steps["accuracy"] and steps["val_loss"] < steps["accuracy"]))
    return claims


def main():
    """Train, draw, judge."""
    reproduce("emergence.py", __doc__, emergence=(PRESETS, grid, draw, judge))


if __name__ == "__main__":
    main()
