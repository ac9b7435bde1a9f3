"""keras-tuner's searches over cross-validated accuracy: what they may change, and how a trial is scored."""

import argparse

import keras_tuner
import numpy as np
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.errors import FatalRuntimeError
from keras_tuner.oracles import BayesianOptimizationOracle, RandomSearchOracle


class _FirstAsGiven(keras_tuner.Oracle):
    """The first trial of a search is what the flags say, so that one sees what the search is worth."""

    def populate_space(self, trial_id):
        if not self.trials:
            return {"status": "RUNNING", "values": {given.name: given.default for given in self.hyperparameters.space}}
        return super().populate_space(trial_id)


class _Random(_FirstAsGiven, RandomSearchOracle):
    pass


class _Bayesian(_FirstAsGiven, BayesianOptimizationOracle):
    pass


class CrossValidation(BaseTuner):
    """Scores a trial by the accuracy on each fold of a model trained on the others."""

    def __init__(self, args, parts, project):
        space = hyperparameters(args)
        options = {"random": {}, "bayesian": {"num_initial_points": len(space.space) + 1}}[args.search]
        oracle = {"random": _Random, "bayesian": _Bayesian}[args.search](
            objective=keras_tuner.Objective("accuracy", "max"),
            max_trials=args.trials,
            hyperparameters=space,
            seed=abs(args.seed) + 1,  # it takes 0 for none
            **options,
        )
        oracle.verbose = 0
        self.args, self.parts = args, parts
        super().__init__(oracle, directory=args.output_dir, project_name=project)

    def run_trial(self, trial):
        chosen = settings(trial)
        print(f"trial {int(trial.trial_id)}: {chosen}", flush=True)
        args = argparse.Namespace(**{**vars(self.args), **chosen})
        try:
            scores = [self._accuracy(fold, args) for fold in range(len(self.parts.held))]
        except Exception as error:  # else it would count as a trial that failed, and the search go on
            raise FatalRuntimeError(f"trial {int(trial.trial_id)}, {chosen}: {error}") from error
        return {"accuracy": float(np.mean(scores)), **{f"fold {i}": score for i, score in enumerate(scores)}}

    def _accuracy(self, fold, args):
        found = self.parts.probabilities(fold, args).argmax(axis=1)
        truth = [self.parts.labels.index(self.parts.rows[i][1]) for i in self.parts.held[fold]]
        return float(np.mean(found == truth))

    def results(self):
        """The trials, best first."""
        trials = [trial for trial in self.oracle.trials.values() if trial.status == "COMPLETED"]
        return [self._result(trial) for trial in sorted(trials, key=lambda trial: -trial.score)]

    def _result(self, trial):
        scores = [trial.metrics.get_best_value(f"fold {i}") for i in range(len(self.parts.held))]
        return {
            "trial": int(trial.trial_id),
            "accuracy": float(np.mean(scores)),
            "standard_error": float(np.std(scores, ddof=1) / len(scores) ** 0.5),
            "folds": scores,
            "hyperparameters": settings(trial),
        }


def hyperparameters(args):
    """What a search may change of the recipe's flags: the range of each holds what is given."""
    space = keras_tuner.HyperParameters()
    rate = args.learning_rate
    space.Float("learning_rate", rate / 8, rate * 8, sampling="log", default=rate)
    dropouts = ("head_dropout",) if args.preset else ("embedding_dropout", "head_dropout")
    for name, high in (*((name, 0.8) for name in dropouts), ("weight_decay", 1.0), ("label_smoothing", 0.2)):
        given = getattr(args, name)
        space.Float(name, 0.0, max(high, given), default=given)
    return space


def settings(trial):
    """The hyper-parameters of a trial, as short as they can be told."""
    return {name: float(f"{value:.3g}") for name, value in trial.hyperparameters.values.items()}
