"""Model-wise double descent: validation accuracy against hidden size rises, falls and rises again (Huang et al. 2024,
figures 6 and 7), and the paper's two predictions of when it does.

A wider model memorizes more (the memorization capacity rises with size) and needs fewer examples to prefer the
generalizing circuit (the critical dataset size falls with size). The two curves cross once. With fewer training
examples D than at the crossing, says the paper, a growing model goes through progression, then ungrokking, where it
memorizes and nothing more, then semi-grokking and grokking: validation accuracy dips on the way. With more it does not.

    prediction 1    the dip is there for small D and gone for large D
    prediction 2    a harder task, (a + b)^2 mod p, moves the crossing up: it dips at a D where addition does not, or deeper

    python double_descent.py                      a laptop's CPU, one to two minutes
    python double_descent.py --scale small        p = 59, 11 seeds, 19 minutes on two cores
    python double_descent.py --device cuda        p = 113, the paper's 825 runs
    torchrun --nproc-per-node=8 double_descent.py --scale paper     the same, shared out over GPUs or processes

Expect double_descent.png, a column per task, training accuracy beneath: each point is a mean over seeds, coloured by the
dynamic that most of its runs went through (white: none has most); and a verdict on each prediction and each curve.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.16", "numpy>=1.26,<3", "matplotlib>=3.8,<4"]
# ///
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from common import COLORS, ENOUGH, FLOOR, Settings, below, beyond, by_cell, claim, claim_on_mean, dip_of, fail
from common import interval, interval_name, judgeable, majority, option, reproduce, resampled_means, size_curve, size_ticks
from common import tail, triples, with_interval


@dataclass(frozen=True)
class Grid(Settings):
    """Every hidden size with every D of each task."""
    hidden: tuple[int, ...] = option("hidden sizes", minimum=1, maximum=10_000)
    data: tuple[int, ...] = option("training examples D of addition", minimum=1)
    squared_data: tuple[int, ...] = option("training examples D of (a + b)^2; 0: addition only")


PRESETS = {
    "quick": Grid(p=43, seeds=11, steps=1100, lr=2.5e-2, weight_decay=1.0,
                  hidden=(4, 8, 24, 40), data=(650,), squared_data=(650, 900)),
    "small": Grid(p=59, seeds=11, steps=3000, lr=1e-2, weight_decay=1.0,
                  hidden=(4, 8, 12, 16, 24, 32, 64), data=(1000, 1200, 1500), squared_data=(1200, 1500)),
    "paper": Grid(p=113, seeds=11, steps=10000, lr=5e-3, weight_decay=1.0,
                  hidden=(4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 100),
                  data=(2600, 3000, 4000, 5000), squared_data=(3000,)),
}


def tasks(settings):
    """Pairs of a task and its training-set sizes, ascending."""
    sizes = {"addition": set(settings.data), "squared_addition": set(settings.squared_data) - {0}}
    return [(task, sorted(each)) for task, each in sizes.items() if each]


def grid(settings):
    """The runs: every hidden size and D of each task with every seed."""
    if 0 in settings.squared_data and len(settings.squared_data) > 1:
        fail("--squared-data: 0 stands alone, for addition only")
    return [settings.run(task, hidden, data, seed, experiment="double_descent")
            for task, sizes in tasks(settings) for data in sizes for hidden in settings.hidden for seed in range(settings.seeds)]


# the figure

LINES = "-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4))      # of each D of either task, the smallest first
RING = {"facecolors": "none", "edgecolors": "black", "lw": 2, "zorder": 5}      # around a dip


def draw_task(top, bottom, rows, task, looks, dips):
    """A task's validation accuracy, and training accuracy beneath, a curve for each D of looks, {D: how its lines look}.

    dips: {(task, D): as dip_of}.
    """
    cells = by_cell(rows, "task", "hidden", "data")
    for i, (data, look) in enumerate(looks.items()):
        hidden, values = size_curve(rows, task, data)
        means, low, high = np.array([interval(seeds) for seeds in values]).T
        column = hidden * 1.025 ** (i - (len(looks) - 1) / 2)      # each D in a column of its own
        top.plot(column, means, lw=2, zorder=2, **look)
        top.vlines(column, low, high, color=look["color"], lw=1, zorder=2)
        train_acc = np.ma.masked_invalid(size_curve(rows, task, data, "train_acc")[1])      # without the runs that diverged
        bottom.plot(hidden, train_acc.mean(1), lw=2, label=f"D = {data}", **look)
        for size, place, mean, each in zip(hidden, column, means, values):
            seeds = cells[task, size, data]
            top.scatter(place, mean, color=COLORS.get(majority(seeds), "white"), s=80, zorder=4, edgecolors="black", lw=0.8)
            top.scatter([place] * len(seeds), each, s=7, alpha=0.6, zorder=3, color=[COLORS[line["dynamic"]] for line in seeds])
        _, _, where, _, _, verdict = dips[task, data]
        if verdict == "dip":
            top.scatter(column[where], means[where], s=280, **RING)
    bottom.legend(loc="lower right", ncols=2, fontsize=9)      # where nothing else is
    size_ticks(bottom, hidden, hidden)


def draw(settings, rows, curves):
    """Figures 6 and 7: validation accuracy, and training accuracy beneath, against hidden size; a panel per task."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(tasks(settings)), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    axes[1, 0].set(xscale="log", xlim=(min(settings.hidden) / 1.15, max(settings.hidden) * 1.15))
    formula = {"addition": f"(a + b) mod {settings.p}", "squared_addition": f"(a + b)$^2$ mod {settings.p}"}
    dips = {(task, data): dip_of(rows, task, data) for task, sizes in tasks(settings) for data in sizes}
    every = sorted({data for _, data in dips})
    verdicts = {verdict for *_, verdict in dips.values()}
    greys = np.linspace(0, 0.5, len(every)).astype(str)      # from black on
    looks = {data: {"ls": LINES[i % len(LINES)], "color": grey} for i, (data, grey) in enumerate(zip(every, greys))}
    for (top, bottom), (task, sizes) in zip(axes.T, tasks(settings)):
        draw_task(top, bottom, rows, task, {data: looks[data] for data in sizes}, dips)
        top.set_title(formula[task], fontsize=13)
        top.set_ylim(-0.04, 1.06)
        bottom.set_xlabel("hidden size d")
        for axis in (top, bottom):
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("final validation accuracy\n(no pair whose mirror is trained on)")
    axes[1, 0].set_ylabel("training accuracy")
    seen = [kind for kind in COLORS if any(line["dynamic"] == kind for line in rows)]
    marks = [axes[0, -1].scatter([], [], c=COLORS[kind], s=45, label=kind) for kind in seen]
    if "dip" in verdicts:
        marks.append(axes[0, -1].scatter([], [], s=120, label="a dip, where deepest", **RING))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=10,
                  title="dynamic of more than half of the seeds (white: of none); small dots: each seed")
    finding = ("Wider models can generalize worse before they generalize better" if "dip" in verdicts else
               "A dip or none: these runs do not tell" if "undecided" in verdicts else "No dip in this range of hidden sizes")
    figure.suptitle(f"{finding}\n(mean, {interval_name(settings.seeds)}; seeds: {settings.seeds}; step {settings.steps})")
    return {"double_descent.png": figure}


# claims


# what the paper reports at p = 113, by (task, D); from which hidden size to which; and the hidden sizes at which it reports zero
PAPER_DIPS = {("addition", 2600): "dip", ("addition", 3000): "dip (shallow: not judged)",
              ("addition", 4000): "no dip", ("addition", 5000): "no dip", ("squared_addition", 3000): "dip"}
PAPER_PLACES = {("addition", 2600): (24, 40), ("addition", 3000): (28, 36), ("squared_addition", 3000): (24, 24)}
PAPER_ZEROS = {("addition", 2600): (24, 28, 32, 36, 40), ("squared_addition", 3000): (24,)}


def judge_dips(settings, rows):
    """The dip of each curve, {(task, D): (verdict, what was measured, depth, its interval)}, and a claim on each.

    No dip does not speak against a shallow one, which may be less deep than what is called a dip here.
    """
    found, claims = {}, []
    for task, sizes in tasks(settings):
        for data in sizes:
            hidden, depth, where, low, high, verdict = dip_of(rows, task, data)
            place = f" at d = {hidden[where]}" if where else ""
            found[task, data] = verdict, f"{verdict}, {with_interval(depth, low, high)}{place}", depth, low, high
            paper = PAPER_DIPS.get((task, data), "-") if settings.p == 113 else "-"
            unclear = paper == "-" or verdict == "undecided" or ("shallow" in paper and verdict == "no dip")
            known = np.isfinite(size_curve(rows, task, data)[1]).sum(-1).min()      # seeds, where the fewest
            claims.append(claim(f"{task}, D = {data}: whether accuracy dips", paper, f"{found[task, data][1]}, n = {known}",
                                None if unclear else (paper == "no dip") == (verdict == "no dip")))
    return found, claims


def sufficient_size(hidden, values, seed=0):
    """Hidden size from which on the mean of values (sizes, seeds) stays above 0.5, and its bootstrap, (1 + draws,).

    The critical dataset size read the other way round: for one D, how wide a model must be. On lines in log(hidden) between
    the sizes; the smallest where no mean is below, infinite where that of the largest is, NaN where one is not known.
    """
    means, log_hidden = resampled_means(values, seed), np.log(hidden)
    last = np.where(means < 0.5, np.arange(len(hidden)), -1).max(1)      # the last size below
    at, draw = last.clip(0, len(hidden) - 2), np.arange(len(means))
    low, rise = means[draw, at], means[draw, at + 1] - means[draw, at]
    share = np.divide(0.5 - low, rise, where=rise > 0, out=np.zeros(len(means))).clip(0, 1)
    found = np.exp(log_hidden[at] + share * (log_hidden[at + 1] - log_hidden[at]))
    return np.select([np.isnan(means).any(1), last < 0, last > at], [np.nan, hidden[0], np.inf], found)


def judge_more_data(settings, found):
    """Prediction 1, of the smallest and the largest D decided; found is that of judge_dips.

    Where both dip, or neither does, all D may lie on one side of the crossing: that does not tell.
    """
    claims = []
    for task, sizes in tasks(settings):
        if len(sizes) > 1:
            decided = [data for data in sizes if found[task, data][0] != "undecided"]
            small, *_, large = decided if len(decided) > 1 else sizes
            verdicts, texts, *_ = zip(found[task, small], found[task, large])
            figure, paper = (" (fig 6)", "a dip, then none") if task == "addition" else ("", "(a dip, then none)")
            claims.append(claim(f"prediction 1{figure}: {task} dips for small D, not for large", paper,
                                f"D = {small}: {texts[0]}; D = {large}: {texts[1]}",
                                {("dip", "no dip"): True, ("no dip", "dip"): False}.get(verdicts)))
    return claims


def judge_harder(settings, rows, found):
    """Prediction 2, at some D of both tasks: the harder one alone dips, or dips deeper, and a model must be larger to generalize.

    The paper shows it at one D; so one is enough for a yes, and all must fail for a no. A no needs a dip of addition: without
    one, D may lie above both crossings. That the harder task alone dips fails if it has no dip; that it dips deeper, if there is
    a verdict on its dip. A depth is the largest of many differences, so it is noisy upward, the more so the more sizes are low:
    the interval of a difference of depths has the ends of both intervals. That of a ratio holds for all D together (Bonferroni).
    """
    alone, deeper, larger, dips, by, times = [], [], [], [], [], []
    both = sorted(set(settings.squared_data) & set(settings.data))
    for data in both:
        (hidden, hard), (_, easy) = (size_curve(rows, task, data) for task in ("squared_addition", "addition"))
        dip, _, depth, least, most = found["squared_addition", data]
        easy_dip, _, easy_depth, easy_least, easy_most = found["addition", data]
        dips.append(f"D = {data}: {dip} against {easy_dip}")
        alone.append({("dip", "no dip"): True, ("no dip", "dip"): False}.get((dip, easy_dip)))
        enough, cut = judgeable(hard) and judgeable(easy), tail(settings.seeds)[0] / len(both)
        low, high = least - easy_most, most - easy_least
        by.append(f"D = {data}: by {with_interval(depth - easy_depth, low, high)}")
        less = high <= 0 and easy_dip == "dip" and dip != "undecided"
        deeper.append(True if low > 0 and dip == "dip" else False if less else None)
        size, easy_size = (sufficient_size(hidden, values, i) for i, values in enumerate((hard, easy)))
        ratio = size.clip(max=hidden[-1]) / easy_size.clip(max=hidden[-1])      # beyond the sizes tried: as near to 1 as may be
        low, high = np.percentile(ratio[1:], [cut, 100 - cut], method="nearest")
        unknown, easy_unknown = np.isinf(size[0]), np.isinf(easy_size[0])
        sizes = (f"more than {hidden[-1]}" if np.isinf(each[0]) else with_interval(each[0], style="{:.0f}")
                 for each in (size, easy_size))
        bound = "at least " if unknown else "at most " if easy_unknown else ""
        found_ratio = "" if unknown and easy_unknown else f", {bound}{with_interval(ratio[0], low, high, '{:.1f}')} times"
        times.append(f"D = {data}: d = {' against '.join(sizes)}{found_ratio}")
        wider = beyond(1, low, high, True) if enough else None
        larger.append(wider if wider or easy_dip == "dip" else None)
    if not deeper:
        return []
    return [claim(text, paper, ", ".join(measured), True in verdicts or (None if None in verdicts else False))
            for text, paper, measured, verdicts in (
                ("prediction 2: at some D the harder task dips and addition does not", "dips", dips, alone),
                ("prediction 2 (fig 7): at some D the harder task dips deeper", "deeper", by, deeper),
                ("prediction 2: at some D the harder task stays above 0.5 from a larger size on", "(larger)", times, larger))]


def judge_places(rows, found):
    """Where the paper has a dip and so do we: the size at which it is deepest, and whether that is in the paper's range.

    The true place lies between the sizes tried to its left and right. It is outside the range if all of that is, over all of its
    95% interval, and inside if all of the interval is, with other places tried on both sides of the range.
    """
    claims = []
    for (task, data), (first, last) in PAPER_PLACES.items():
        if (task, data) in found and found[task, data][0] == "dip":
            hidden, values = size_curve(rows, task, data)
            places = triples(len(hidden))[1][below(resampled_means(values)).argmax(-1)]       # (1 + draws,)
            low, high = np.percentile(places[1:], tail(values.shape[-1]), method="nearest")
            inside = hidden[1] < first <= hidden[low] and hidden[high] <= last < hidden[-2]
            outside = hidden[low - 1] >= last or hidden[high + 1] <= first
            claims.append(claim(f"{task}, D = {data}: hidden size of the dip, of those tried",
                                f"{first} to {last}" if last > first else f"{first}",
                                with_interval(*hidden[[places[0], low, high]], "{:.0f}"),
                                True if inside else False if outside else None))
    return claims


def judge_zeros(settings, rows):
    """Where the paper reports an accuracy of zero: the mean over these hidden sizes, of each seed.

    A zero is not told where no size learns the task: it may be one of too few steps.
    """
    claims = []
    for (task, data), sizes in PAPER_ZEROS.items():
        lines = [line for line in rows if (line["task"], line["data"]) == (task, data) and line["hidden"] in sizes]
        if lines:
            seeds = by_cell([line for line in lines if line["dynamic"] != "diverged"], "seed").values()
            means = [np.mean([line["val_acc"] for line in seed]) for seed in seeds]
            tried = " ".join(str(size) for size in sizes if size in settings.hidden)
            zero = claim_on_mean(f"{task}, D = {data}, d = {tried}: val_acc", f"zero (below {FLOOR})", means, FLOOR, False,
                                 least=ENOUGH)
            learned = (resampled_means(size_curve(rows, task, data, "val_acc")[1], draws=0) > 0.5).any()
            claims.append(zero | {"holds": None} if zero["holds"] and not learned else zero)
    return claims


def judge(settings, rows, curves):
    """Both predictions, the dip of each curve, and at paper scale the numbers that the paper states."""
    found, dips = judge_dips(settings, rows)
    numbers = [*judge_places(rows, found), *judge_zeros(settings, rows)] if settings.p == 113 else []
    return [*judge_more_data(settings, found), *judge_harder(settings, rows, found), *dips, *numbers]


def main():
    """Train, draw, judge."""
    reproduce("double_descent.py", __doc__, double_descent=(PRESETS, grid, draw, judge))


if __name__ == "__main__":
    main()
