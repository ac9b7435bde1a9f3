"""The floors that recipes print beside their scores."""


def linear_classifier(train_rows, test_rows):
    """Accuracy of TF-IDF character 1-3-grams with a linear support vector machine: the floor."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    floor = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True), LinearSVC(C=0.5))
    floor.fit([text for text, *_ in train_rows], [label for _, label, _ in train_rows])
    return float(floor.score([text for text, *_ in test_rows], [label for _, label, _ in test_rows]))
