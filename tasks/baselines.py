"""The floors that recipes print beside their scores."""


def nearest_translations(train_rows, sources):
    """For each source the target of the training row whose source is most alike: TF-IDF of character 1-4-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    known = vectorizer.fit_transform([source for source, *_ in train_rows])
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(known)
    found = nearest.kneighbors(vectorizer.transform(sources), return_distance=False)[:, 0]
    return [train_rows[i][1] for i in found]


def linear_classifier(train_rows, test_rows):
    """Accuracy of TF-IDF character 1-3-grams with a linear support vector machine: the floor."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    floor = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True), LinearSVC(C=0.5))
    floor.fit([text for text, *_ in train_rows], [label for _, label, _ in train_rows])
    return float(floor.score([text for text, *_ in test_rows], [label for _, label, _ in test_rows]))
