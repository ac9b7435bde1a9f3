"""Asks an exported model as a server would, without Keras: JSON list of texts in, JSON answers out.

python tasks/serve.py saved_models/classification/saved_model < texts.json
python tasks/serve.py saved_models/captioning/saved_model --files < paths.json

Of a model with more inputs than one, the JSON is an object with a list for each of them.
"""

import argparse
import importlib
import json
import pathlib
import sys

import tensorflow as tf


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("directory", type=pathlib.Path)
    flags.add_argument("--files", action="store_true", help="the list, or `images`, holds paths; files are asked of")
    flags.add_argument("--signature", default="serving_default")
    args = flags.parse_args()
    needed = json.loads((args.directory / "keras_llama.json").read_text(encoding="utf-8"))["needs"]
    for name in needed:
        importlib.import_module(name)
    model = tf.saved_model.load(str(args.directory))
    given, ask = json.load(sys.stdin), model.signatures[args.signature]
    many = isinstance(given, dict)
    if args.files:
        files = [pathlib.Path(path).read_bytes() for path in (given["images"] if many else given)]
        given = {**given, "images": files} if many else files
    answer = ask(**{name: tf.constant(values) for name, values in given.items()}) if many else ask(tf.constant(given))
    loaded = ({"keras_llama", "keras_hub", "tensorflow_text"} & set(sys.modules)) - set(needed)
    if loaded:
        raise RuntimeError(f"Serving must not need {sorted(loaded)}.")
    values = {name: tensor.numpy().tolist() for name, tensor in answer.items()}
    print(json.dumps(values, default=bytes.decode))


if __name__ == "__main__":
    main()
