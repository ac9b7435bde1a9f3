"""How many wrong labels `--label-noise-report` finds where it is known which are wrong.

    python -m benchmarks.label_noise --data ag_news_7600.csv [--rows 3000] [--share 0.05] [--seed 0]

Of `--rows` distinct rows that are taken for right, a share gets another label, drawn at random; the report then reads
them all, by default with the frozen SmolLM2-135M-Instruct under heads. Flags of `tasks.classification` may follow. Rows
that were wrong already, or that fit two labels, count as mistakes of the report.
"""

import argparse
import time

import numpy as np

from benchmarks.fine_tuning import settings
from tasks import data, folds, label_noise


def flipped(given, share: float, count: int, seed: int) -> np.ndarray:
    """Class numbers of which a share is another of `count` classes."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(given))[: round(share * len(given))]
    changed = given.copy()
    changed[chosen] = (given[chosen] + generator.integers(1, count, len(chosen))) % count
    return changed


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True)
    flags.add_argument("--rows", type=int, default=3000)
    flags.add_argument("--share", type=float, default=0.05)
    flags.add_argument("--seed", type=int, default=0)
    args, rest = flags.parse_known_args()
    recipe = settings(args, rest)
    rows = data.distinct(data.labelled_texts(args.data), [])
    rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))[: args.rows]]
    labels = sorted({label for _, label, _ in rows})
    right = np.array([labels.index(label) for _, label, _ in rows])
    given = flipped(right, args.share, len(labels), args.seed)
    wrong = given != right
    noisy = [(text, labels[number], place) for (text, _, place), number in zip(rows, given, strict=True)]
    started = time.perf_counter()
    probabilities = label_noise.out_of_fold(folds.Folds(recipe, noisy, labels))
    print(f"{len(rows)} rows, {wrong.sum()} labels flipped; {time.perf_counter() - started:.0f} s")
    print(f"out-of-fold accuracy on the labels before: {100 * (probabilities.argmax(1) == right).mean():.1f}")
    order = np.argsort(probabilities[np.arange(len(given)), given])
    precision = wrong[order].cumsum() / np.arange(1, len(order) + 1)
    longest = np.flatnonzero(precision >= 0.5)[-1] + 1 if (precision >= 0.5).any() else 0
    recall = wrong[order[:longest]].sum() / wrong.sum()
    print(f"by quality, the worst {longest}: precision 50.0, recall {100 * recall:.1f}")
    found = label_noise.suspects(given, probabilities)
    print(
        f"the report's {len(found)}: precision {100 * wrong[found].mean():.1f}, recall "
        f"{100 * wrong[found].sum() / wrong.sum():.1f}, the right label suggested for "
        f"{100 * (probabilities.argmax(1) == right)[found[wrong[found]]].mean():.1f} of those"
    )


if __name__ == "__main__":
    main()
