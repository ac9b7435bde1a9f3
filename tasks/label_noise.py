"""Rows whose label is likely wrong, by confident learning: a model trained on the others would label them otherwise."""

import csv
import pathlib

import numpy as np

COLUMNS = ("place", "text", "label", "suggested", "quality")


def suspects(given, probabilities):
    """The numbers of the rows whose label is likely wrong, worst first; labels as numbers, probabilities (N, C)."""
    from cleanlab.filter import find_label_issues

    by = {"filter_by": "low_self_confidence", "return_indices_ranked_by": "self_confidence"}
    found = find_label_issues(given, probabilities, **by, n_jobs=1)
    return found[probabilities[found].argmax(axis=1) != given[found]]


def report(path, folds):
    """Writes the suspects among the rows of `folds` as CSV, and says how many there are."""
    from keras_llama.beside import written_beside

    probabilities = out_of_fold(folds)
    given = np.array([folds.labels.index(label) for _, label, _ in folds.rows])
    found = suspects(given, probabilities)
    with written_beside(pathlib.Path(path)) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for i in found:
            text, label, place = folds.rows[i]
            suggested = folds.labels[probabilities[i].argmax()]
            table.writerow([place, text, label, suggested, f"{probabilities[i, given[i]]:.4f}"])
    print(f"{path}: {len(found)} of {len(given)} training rows whose label is likely wrong, worst first")


def out_of_fold(folds):
    """Of every row the probabilities of the labels (N, C), by a model that was not trained on its text."""
    probabilities = np.zeros((len(folds.rows), len(folds.labels)))
    for number, held in enumerate(folds.held):
        print(f"fold {number + 1} of {len(folds.held)}", flush=True)
        probabilities[held] = folds.probabilities(number)
    return probabilities
