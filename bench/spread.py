"""Loss curves compared: how far two runs lie apart, and whether a contestant keeps within the spread of two seeds.

A run is the rows of one training, in order: dicts with `step`, `train_loss` (nats per token, the mean since the row
before) and `val_loss` (None between evaluations). The distance of two runs is four numbers, in nats per token:

    train_rms   root mean square difference of the training losses
    train_max   their largest difference
    val_rms     root mean square difference of the validation losses, all evaluations
    val_last    difference of the last validation loss, with its sign

A contestant is within the spread if its train_rms, train_max and val_rms from the reference of its own seed are each at
most those between the reference's two seeds. val_last is shown and not judged: two seeds end at nearly the same loss by
chance often enough. The largest of the three quotients is the contestant's `ratio`.

The rule is lenient. Another seed means other weights and other batches, so the spread holds the noise of the batches; a
contestant has the reference's weights and batches and may differ by rounding alone. A ratio near 1 is therefore no
pass to be content with: what is right lies where another right implementation lies, so read it beside sdpa's. How far
that is depends on the training, which amplifies rounding, and most of all while it is unstable.
"""

import math

BASE = "reference+reference"  # attention + norm of the runs that all others are compared with
JUDGED = ("train_rms", "train_max", "val_rms")


def runs_of(rows):
    """{(provider, seed): its rows}, in the order of a table's rows."""
    found = {}
    for row in rows:
        found.setdefault((row["provider"], row["seed"]), []).append(row)
    return found


def differences(run, other, column):
    """[(step, run - other)] wherever both have a value of `column`."""
    theirs = {row["step"]: row[column] for row in other}
    pairs = ((row["step"], row[column], theirs.get(row["step"])) for row in run)
    return [(step, mine - its) for step, mine, its in pairs if mine is not None and its is not None]


def distance(run, other):
    """The four numbers above for two runs of the same steps. ValueError where their steps are not the same."""
    if [row["step"] for row in run] != [row["step"] for row in other]:
        raise ValueError("two runs can be compared only over the same steps")
    train = [d for _, d in differences(run, other, "train_loss")]
    val = [d for _, d in differences(run, other, "val_loss")]
    return {"train_rms": rms(train), "train_max": max(map(abs, train)), "val_rms": rms(val), "val_last": val[-1]}


def rms(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


def judge(runs, contestants, seeds):
    """(the distance of the reference's two seeds, one verdict per contestant).

    runs: as runs_of gives them. contestants: providers, trained with seeds[0]. A verdict is a dict: provider, the
    distance, `ratio`, `within` and `note`; one whose run ended early has no distance and is outside.
    """
    base = runs[BASE, seeds[0]]
    spread = distance(runs[BASE, seeds[1]], base)
    return spread, [{"provider": name, **verdict(runs.get((name, seeds[0]), []), base, spread)} for name in contestants]


def verdict(run, base, spread):
    if len(run) < len(base):
        reached = f"ended after step {run[-1]['step']}" if run else "did not start"
        return {"ratio": None, "within": False, "note": f"{reached}, of {base[-1]['step']}"}
    found = distance(run, base)
    ratio = max(found[name] / spread[name] if spread[name] else math.inf for name in JUDGED)
    within = all(found[name] <= spread[name] for name in JUDGED)  # false for NaN, too
    return {**found, "ratio": ratio, "within": within, "note": ""}
