"""Asks an exported model as a server would, without Keras: JSON list of texts in, JSON answers out.

python tasks/serve.py saved_models/classification/saved_model < texts.json
python tasks/serve.py saved_models/captioning/saved_model --files < paths.json

Of a model with more inputs than one, the JSON is an object with a list for each of them.
"""

import importlib
import json
import pathlib
import sys

import tensorflow as tf


def main() -> None:
    needed = json.loads(pathlib.Path(sys.argv[1], "keras_llama.json").read_text(encoding="utf-8"))["needs"]
    for name in needed:
        importlib.import_module(name)
    model = tf.saved_model.load(sys.argv[1])
    given, ask = json.load(sys.stdin), model.signatures["serving_default"]
    if "--files" in sys.argv:
        given = [pathlib.Path(path).read_bytes() for path in given]
    many = isinstance(given, dict)
    answer = ask(**{name: tf.constant(texts) for name, texts in given.items()}) if many else ask(tf.constant(given))
    loaded = ({"keras_llama", "keras_hub", "tensorflow_text"} & set(sys.modules)) - set(needed)
    if loaded:
        raise RuntimeError(f"Serving must not need {sorted(loaded)}.")
    values = {name: tensor.numpy().tolist() for name, tensor in answer.items()}
    print(json.dumps(values, default=bytes.decode))


if __name__ == "__main__":
    main()
