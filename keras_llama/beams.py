"""The books of a beam search, on the host. They see token ids and log-probabilities only."""

import numpy as np


class Beams:
    """Running beams and finished ones of each prompt."""

    def __init__(self, prompts: int, num_beams: int, length_penalty: float, stop_ids: list[int], vocabulary_size: int):
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.stop_ids, self.vocabulary_size = stop_ids, vocabulary_size
        self.running: list[list[tuple[int, ...]]] = [[()] for _ in range(prompts)]
        self.scores = np.zeros((prompts, num_beams), "float32")
        self.finished: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(prompts)]
        self.open = np.ones(prompts, bool)  # prompts whose running beams may still beat a finished one

    def update(self, found, flat):
        """Takes the best continuations in: log-probabilities and beam * V + id (B, width), best first.

        Returns the rows (B * n,) of the beams that the new running ones continue.
        """
        origins, ids = np.divmod(flat, self.vocabulary_size)
        stopped = np.isin(ids, self.stop_ids)
        rows = []
        for i, running in enumerate(self.running):
            beams = [(*running[k], int(token)) for k, token in zip(origins[i], ids[i], strict=True)]
            length = len(beams[0]) ** self.length_penalty
            if self.open[i]:
                # Only the first n candidates may finish; the others are there to keep n beams running.
                ended = [(float(found[i, k]) / length, beams[k]) for k in range(self.num_beams) if stopped[i, k]]
                self.finished[i] = sorted(self.finished[i] + ended, key=lambda pair: -pair[0])[: self.num_beams]
            chosen = np.flatnonzero(~stopped[i])[: self.num_beams]
            self.running[i], self.scores[i] = [beams[k] for k in chosen], found[i, chosen]
            rows.append(i * self.num_beams + origins[i, chosen])
            if len(self.finished[i]) == self.num_beams:
                self.open[i] &= self.scores[i, 0] / length > self.finished[i][-1][0]
        return np.concatenate(rows).astype("int32")

    def settled(self) -> bool:
        """Whether no running beam of any prompt can beat its finished ones."""
        return not self.open.any()

    def last_ids(self) -> np.ndarray:
        """The newest token of each running beam, (B * n,)."""
        return np.array([beam[-1] for beams in self.running for beam in beams], "int32")

    def best(self) -> list[list[int]]:
        """The best finished continuation of each prompt, or the best running one where the length ran out."""
        best = []
        for finished, running, scores, still_open in zip(
            self.finished, self.running, self.scores, self.open, strict=True
        ):
            candidates = list(finished)
            if still_open:
                candidates += [
                    (float(s) / len(b) ** self.length_penalty, b) for s, b in zip(scores, running, strict=True)
                ]
            best.append(list(max(candidates, key=lambda pair: pair[0])[1]))
        return best
