"""Scores of texts: BLEU and chrF of translations, by sacrebleu; exact match and F1 of answers."""

import difflib
import re
import string
from collections import Counter
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


def answer_scores(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of answers, both from 0 to 100, each against the reference that suits it best.

    Where an answer or its reference holds Chinese, as the script of CMRC 2018 does (https://arxiv.org/abs/1810.07366):
    without case and the punctuation that it lists, exact match of what is left, F1 by the longest run that both share
    of Chinese characters, words of other scripts and other marks; words are cut by a pattern, where it takes NLTK. Else
    as SQuAD has it (https://arxiv.org/abs/1606.05250): of words, without case, punctuation and articles, F1 by the
    words that both share.

    Args:
        answers: one for each question, "" for none.
        references: for each question its answer, or a list of them; [] or "" for a question that has none.

    Raises:
        ValueError: if there is not a reference for each answer.

    >>> answer_scores(["the Seine"], [["Seine", "river Seine"]])
    {'exact_match': 100.0, 'f1': 100.0}
    >>> answer_scores(["在巴黎"], ["巴黎"])
    {'exact_match': 0.0, 'f1': 80.0}
    """
    rows = [[row] if isinstance(row, str) else list(row) or [""] for row in references]
    if len(rows) != len(answers) or not rows:
        raise invalid("There must be references for each answer.", answers=len(answers), references=len(rows))
    exact = f1 = 0.0
    for answer, row in zip(answers, rows, strict=True):
        scores = [_answer_score(answer, reference) for reference in row]
        exact += max(score[0] for score in scores)
        f1 += max(score[1] for score in scores)
    return {"exact_match": 100 * exact / len(rows), "f1": 100 * f1 / len(rows)}


def _answer_score(answer: str, reference: str) -> tuple[float, float]:
    """Exact match and F1 of one answer, from 0 to 1."""
    if re.search(_CHINESE, answer + reference):
        texts = [text.lower().strip().translate(_LEFT_OUT) for text in (answer, reference)]
        found, wanted = (_SEGMENT.findall(text) for text in texts)
        exact = texts[0] == texts[1]
        same = difflib.SequenceMatcher(None, found, wanted, autojunk=False).find_longest_match().size
    else:
        found, wanted = (_words(text) for text in (answer, reference))
        exact = found == wanted
        same = (Counter(found) & Counter(wanted)).total()
    both = len(found) + len(wanted)
    return float(exact), 2 * same / both if both else float(exact)


# What the script of CMRC 2018 takes for Chinese, and what it leaves out; spaces and "%" stay.
_CHINESE = "[\u4e00-\u9fa5]"
_LEFT_OUT = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_WORD = rf"(?:(?!{_CHINESE})\w)+"
_SEGMENT = re.compile(rf"{_CHINESE}|{_WORD}(?:[.,]{_WORD})*|[^\w\s]")  # a number with its point is a word


def _words(text: str) -> list[str]:
    """What SQuAD compares."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


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
