"""The floors that recipes print beside their scores."""

import itertools
import math
import re
from collections import Counter

import numpy as np


def nearest_translations(train_rows, sources):
    """For each source the target of the training row whose source is most alike: TF-IDF of character 1-4-grams."""
    return [train_rows[i][1] for (i,) in nearest([source for source, *_ in train_rows], sources)]


def nearest(texts, asked, count=1):
    """For each text of `asked` the numbers (N, count) of the `texts` that are most alike, the nearest first."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    known = vectorizer.fit_transform(texts)
    found = NearestNeighbors(n_neighbors=min(count, len(texts)), metric="cosine").fit(known)
    return found.kneighbors(vectorizer.transform(asked), return_distance=False)


def window_answers(rows):
    """For each (question, context) the clause that shares most words with the question, without those at its ends.

    It is the sliding window of Richardson et al. (2013, https://aclanthology.org/D13-1020) where no answers are given
    to choose from: a clause is looked at with as many words as the question has on either side, and rare words weigh
    more. A Chinese character is a word.
    """
    return [_window_answer(question, context) for question, context in rows]


_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]")


def _window_answer(question, context):
    asked = {word for word in _WORD.findall(question.lower()) if word.isalnum()}
    found = list(_WORD.finditer(context))
    words = [match[0].lower() for match in found]
    counts, size = Counter(words), len(_WORD.findall(question))
    best, most = context, -1.0
    for spoken, places in itertools.groupby(range(len(words)), key=lambda i: words[i].isalnum()):
        clause = list(places)
        new = [i for i in clause if words[i] not in asked]
        if not (spoken and new):
            continue
        around = set(words[max(0, new[0] - size) : new[-1] + 1 + size]) & asked
        shared = sum(math.log(1 + 1 / counts[word]) for word in around)
        if shared > most:
            best, most = context[found[new[0]].start() : found[new[-1]].end()], shared
    return best


def linear_classifier(train_rows, test_rows):
    """Accuracy of `linear_labels` on the test rows: the floor."""
    found = linear_labels(train_rows, [text for text, *_ in test_rows])
    return sum(label == row[1] for label, row in zip(found, test_rows, strict=True)) / len(test_rows)


def linear_labels(train_rows, asked):
    """The labels that TF-IDF with a linear support vector machine gives to texts.

    The features are character 1-3-grams, or 2-5-grams inside words where texts have words apart by spaces; from many
    texts those of one text alone are left out. Each is the better there (docs/tuning.md).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    texts = [text for text, *_ in train_rows]
    spaced = sum(text.count(" ") for text in texts) > 0.1 * sum(map(len, texts))
    grams = {"analyzer": "char_wb", "ngram_range": (2, 5)} if spaced else {"analyzer": "char", "ngram_range": (1, 3)}
    vectorizer = TfidfVectorizer(**grams, sublinear_tf=True, min_df=2 if len(texts) > 5000 else 1)
    floor = make_pipeline(vectorizer, LinearSVC(C=0.5))
    floor.fit(texts, [label for _, label, _ in train_rows])
    return floor.predict(asked).tolist()


def most_frequent_caption(captions):
    """The caption that training images have most often, the first of them if several do."""
    return Counter(captions).most_common(1)[0][0]


def nearest_captions(images, captions, asked):
    """For each asked image the caption of the training image of the most like colours.

    That is the smallest difference, summed, between histograms of 8 x 8 x 8 colours.

    Args:
        images, asked: uint8 (B, h, w, 3), of one size.
        captions: one of each of `images`.
    """
    known = _histograms(images)
    nearest = [int(np.abs(known - histogram).sum(axis=1).argmin()) for histogram in _histograms(asked)]
    return [captions[i] for i in nearest]


def _histograms(images):
    """Shares of 512 colours (B, 512)."""
    codes = (images >> 5).astype("int32") @ np.array([64, 8, 1], "int32")
    return np.stack([np.bincount(row.ravel(), minlength=512) for row in codes]) / codes[0].size
