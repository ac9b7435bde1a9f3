"""BLEU and chrF of translations, by sacrebleu, as numbers and as metrics of an epoch."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_llama.config import invalid


def translation_scores(
    translations: Sequence[str], references: Sequence[str | Sequence[str]], tokenize: str = "zh"
) -> dict[str, float]:
    """Corpus BLEU and chrF (Post, 2018, https://arxiv.org/abs/1804.08771), both from 0 to 100.

    Args:
        translations: one for each source.
        references: for each source its reference, or a list of them.
        tokenize: how sacrebleu cuts words: "zh" for Chinese, "13a" for most other languages.

    Raises:
        ValueError: if there is not a reference for each translation, or sacrebleu does not know `tokenize`.

    >>> scores = translation_scores(["我喜欢喝茶。"], [["我喜欢喝茶。", "我爱喝茶。"]])
    >>> round(scores["bleu"]), round(scores["chrf"])
    (100, 100)
    """
    sacrebleu = _sacrebleu(tokenize)
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    if len(rows) != len(translations) or not rows or not all(rows):
        raise invalid(
            "`references` must have at least one text for each translation.",
            translations=len(translations),
            references=len(rows),
        )
    most = max(map(len, rows))
    columns: list[Any] = [[row[i] if i < len(row) else None for row in rows] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(list(translations), columns, tokenize=tokenize)
    return {"bleu": bleu.score, "chrf": sacrebleu.corpus_chrf(list(translations), columns).score}


def _sacrebleu(tokenize):
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("BLEU and chrF need sacrebleu: pip install sacrebleu") from error
    known = sacrebleu.BLEU.TOKENIZERS
    if tokenize not in known:
        raise invalid(f"`tokenize` must be one of {sorted(known)}.", tokenize=tokenize)
    return sacrebleu


class TranslationScores(keras.callbacks.Callback):
    """Translates held-out sources as training goes on: `val_bleu` and `val_chrf` among the logs, and samples printed.

    Put it before callbacks that look at these, such as `EarlyStopping("val_bleu", mode="max")`.

    Args:
        translate: list of sources -> list of translations.
        sources, references: as in `translation_scores`.
        every: epochs between two looks.
        samples: translations to print, with the scores; 0 prints nothing.
        tokenize: as in `translation_scores`.

    Raises:
        ValueError: if `every` is below 1, or sacrebleu does not know `tokenize`.

    >>> scores = TranslationScores(lambda sources: ["你好"] * len(sources), ["Hello"], ["你好"], samples=0)
    >>> logs = {}
    >>> scores.on_epoch_end(0, logs)
    >>> round(logs["val_chrf"])
    100
    """

    def __init__(
        self,
        translate: Callable[[Sequence[str]], Sequence[str]],
        sources: Sequence[str],
        references: Sequence[str | Sequence[str]],
        every: int = 1,
        samples: int = 3,
        tokenize: str = "zh",
    ):
        super().__init__()
        if every < 1:
            raise invalid("`every` must be at least 1.", every=every)
        _sacrebleu(tokenize)
        self.translate, self.sources, self.references = translate, list(sources), list(references)
        self.every, self.samples, self.tokenize = every, samples, tokenize

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every:
            return
        translations = list(self.translate(self.sources))
        for source, translation in list(zip(self.sources, translations, strict=True))[: self.samples]:
            print(f"\n  {source}  ->  {translation}", end="")
        scores = translation_scores(translations, self.references, self.tokenize)
        if self.samples:
            print(f"\n  val_bleu: {scores['bleu']:.2f} - val_chrf: {scores['chrf']:.2f}")
        if logs is not None:
            logs.update({f"val_{name}": value for name, value in scores.items()})
