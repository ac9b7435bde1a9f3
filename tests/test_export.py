"""The SavedModel of a classifier: strings in, answers out, in a process without Keras."""

import shutil

import keras
import numpy as np
import pytest

import keras_llama
from tasks import common

ON_TENSORFLOW = keras.config.backend() == "tensorflow"
needs_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="a SavedModel is written on the TensorFlow backend")
TEXTS = ["a good film", "很差的电影", "  spaces 😀 </s> <s>", "a film " * 20, ""]


@pytest.fixture
def make(tokenizer):
    def make(problem_type="single", labels=("bad", "good"), **text_options):
        backbone = keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **keras_llama.size("tiny"))
        preprocessor = keras_llama.TextPreprocessor(tokenizer, 24, **text_options)
        return keras_llama.LlamaTextClassifier(
            backbone, labels=labels, problem_type=problem_type, preprocessor=preprocessor, pooling="mean"
        )

    return make


@needs_tensorflow
@pytest.mark.filterwarnings("ignore:.*texts are longer than sequence_length")
@pytest.mark.parametrize("add_eos", [True, False])
def test_a_fresh_process_gives_the_same_answers(make, tmp_path, add_eos):
    model = make(add_eos=add_eos)
    model.export(tmp_path / "first" / "model")
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "first" / "model", moved)
    shutil.rmtree(tmp_path / "first")
    answer = common.serve(moved, TEXTS)
    found = np.array(answer["probabilities"])
    expected = np.asarray(model.probabilities(model.predict(TEXTS[:-1], verbose=0)))
    np.testing.assert_allclose(found[:-1], expected, atol=1e-6)
    assert answer["label"][:-1] == [row["label"] for row in model.classify(TEXTS[:-1])]
    assert np.isfinite(found[-1]).all()  # the empty string is a text of no tokens but the first


@needs_tensorflow
def test_the_empty_batch_and_a_session_loader(make, tmp_path):
    make().export(tmp_path / "model")
    import tensorflow as tf

    served = tf.saved_model.load(str(tmp_path / "model"))
    empty = served.signatures["serving_default"](tf.constant([], tf.string))
    assert empty["probabilities"].shape == (0, 2)
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "model"))
        session.graph.finalize()


@needs_tensorflow
def test_weights_are_stored_once(make, tmp_path):
    model = make()
    model.export(tmp_path / "model")
    bytes_of_weights = sum(int(np.prod(v.shape)) * 4 for v in model.variables)
    stored = sum(p.stat().st_size for p in (tmp_path / "model" / "variables").iterdir())
    assert stored < 1.05 * bytes_of_weights + 20_000


@needs_tensorflow
@pytest.mark.parametrize("problem_type", ["multi", "regression"])
def test_other_problems(make, tmp_path, problem_type):
    model = make(problem_type)
    model.export(tmp_path / "model")
    import tensorflow as tf

    served = tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    answer = served(tf.constant(TEXTS[:2]))
    expected = np.asarray(model.probabilities(model.predict(TEXTS[:2], verbose=0)))
    np.testing.assert_allclose(answer["probabilities"].numpy(), expected, atol=1e-6)
    assert "label" not in answer


@needs_tensorflow
def test_refuses_an_existing_folder_and_a_task_without_text(make, make_backbone, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="`filepath` must not exist yet"):
        make().export(tmp_path / "model")
    assert (tmp_path / "model" / "mine.txt").read_text() == "kept"
    with pytest.raises(ValueError, match="needs a task with a preprocessor"):
        keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2).export(tmp_path / "other")


@needs_tensorflow
def test_refuses_a_tokenizer_the_graph_has_not_got(make_backbone, chat_tokenizer, tmp_path):
    backbone = make_backbone(vocabulary_size=chat_tokenizer.vocabulary_size)
    preprocessor = keras_llama.TextPreprocessor(chat_tokenizer, sequence_length=16)
    model = keras_llama.LlamaTextClassifier(backbone, num_classes=2, preprocessor=preprocessor)
    with pytest.raises(ValueError, match="SentencePiece model"):
        model.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(ON_TENSORFLOW, reason="the other backends")
def test_other_backends_say_where_to_export(make, tmp_path):
    with pytest.raises(ValueError, match=r"KERAS_BACKEND=tensorflow.*|.*KERAS_BACKEND=tensorflow"):
        make().export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_serving_a_broken_model_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="could not be served"):
        common.serve(tmp_path, ["a"])
