"""Questions made of texts, from which a reader learns to look things up before it sees real ones; parts of contexts."""

import re
from collections import Counter

import numpy as np

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]")
_SENTENCE = re.compile(r"(?:[^。！？!?.\n]|\.(?!\s)){12,}")
_ASKING = {  # whether Chinese, whether a number is asked for
    (True, True): ("多少", "哪一年", "什么时候", "几"),
    (True, False): ("什么", "谁", "哪里", "哪个", "怎样"),
    (False, True): ("how many", "when", "what year"),
    (False, False): ("what", "who", "where", "which", "how"),
}
_LONGEST, _BESIDE, _DROPPED = 10, 14, 0.3  # words of an answer, and of a question on either side; the share left out


def questions(contexts, count, seed=0):
    """`count` rows for `fit` of each context, as Lewis et al. make them (2019, https://arxiv.org/abs/1906.04980).

    A part of a sentence becomes the answer, and what is left of the sentence, some words missing, the question: with
    a question word in the gap, or behind.
    """
    generator = np.random.default_rng(seed)
    rows = (_question(context, generator) for context in contexts for _ in range(count))
    return [row for row in rows if row]


def _question(context, generator):
    sentences = list(_SENTENCE.finditer(context))
    if not sentences:
        return None
    sentence = sentences[generator.integers(len(sentences))]
    words = list(_WORD.finditer(context, *sentence.span()))
    spoken = [i for i, word in enumerate(words) if word[0].isalnum()]
    if len(spoken) < 4:
        return None
    first = last = spoken[generator.integers(len(spoken))]
    longest = generator.integers(1, min(_LONGEST, len(spoken) // 2) + 1)
    while last + 1 < len(words) and last - first + 1 < longest and words[last + 1][0].isalnum():
        last += 1
    start, end = words[first].start(), words[last].end()
    chinese = "\u3400" <= words[spoken[0]][0] <= "\u9fff"
    asking = _ASKING[chinese, any(c.isdigit() for c in context[start:end])]
    sides = [words[max(0, first - _BESIDE) : first], words[last + 1 : last + 1 + _BESIDE]]
    before, after = ([word[0] for word in side if generator.random() > _DROPPED] for side in sides)
    ask = [asking[generator.integers(len(asking))]]
    apart = [before, after, ask] if chinese else [ask, before, after]
    parts = [before, ask, after] if generator.random() < 0.5 else apart
    question = ("" if chinese else " ").join(word for part in parts for word in part) + ("？" if chinese else "?")
    return {"question": question, "context": context, "answers": [{"text": context[start:end], "answer_start": start}]}


def crops(rows, length, without=0.0, seed=0):
    """The rows, each with `length` characters of its context that hold the answer; to a share `without` one without.

    Training on them reads less than training on whole contexts.
    """
    from keras_llama.questions import questions as checked

    generator = np.random.default_rng(seed)
    cropped: list[dict] = []
    for question, context, texts, spans in checked(rows, found=Counter()):
        if not spans:
            cropped.append({"question": question, "context": context[:length], "answers": []})
            continue
        start, end = spans[0]
        if end - start > length:
            continue
        at = int(generator.integers(max(0, end - length), min(start, max(len(context) - length, 0)) + 1))
        answer = {"text": context[start:end], "answer_start": start - at}
        cropped.append({"question": question, "context": context[at : at + length], "answers": [answer]})
        sides = (context[:start][:length], context[end:][-length:])
        elsewhere = [s for s in sides if len(s) > length // 2 and not any(text in s for text in texts)]
        if elsewhere and generator.random() < without:
            side = elsewhere[generator.integers(len(elsewhere))]
            cropped.append({"question": question, "context": side, "answers": []})
    return cropped
