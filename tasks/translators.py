"""Translators of both architectures behind one set of functions: build, what `fit` takes, translate, deliver."""

import shutil

from tasks import common

ARCHITECTURES = ("encoder-decoder", "decoder")


def references(rows):
    """For each distinct source all its targets."""
    found: dict[str, list[str]] = {}
    for source, target, *_ in rows:
        found.setdefault(source, []).append(target)
    return found


def build(args, rows):
    """A model of --architecture over a joint vocabulary of both languages, or started from --preset."""
    import keras_llama

    cls = keras_llama.LlamaSeq2SeqLM if args.architecture == ARCHITECTURES[0] else keras_llama.LlamaCausalLM
    if args.preset:
        return from_preset(args, cls)
    texts = [text for source, target, *_ in rows for text in (source, target)]
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, args.vocabulary_size)
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length, add_eos=True)
    options = {**keras_llama.size(args.size), "dropout": args.dropout, "tie_word_embeddings": True}
    options |= {"vocabulary_size": tokenizer.vocabulary_size, "dtype": args.precision}
    if cls is keras_llama.LlamaCausalLM:
        options["context_length"] = args.sequence_length
        return cls(keras_llama.LlamaBackbone(**options), preprocessor)
    backbone = keras_llama.LlamaSeq2SeqBackbone(**options, num_encoder_layers=args.encoder_layers)
    return cls(backbone, preprocessor, label_smoothing=args.label_smoothing)


def from_preset(args, cls):
    """The model of --preset; an encoder-decoder may also start from a decoder's checkpoint."""
    import keras_llama
    from keras_llama.checkpoints.presets import open_checkpoint

    decoder = keras_llama.LlamaCausalLM
    if cls is decoder or args.preset.endswith(".keras") or hasattr(open_checkpoint(args.preset).config, "encoder"):
        return common.from_preset(args, cls)
    return cls.from_decoder(common.from_preset(args, decoder), dropout=args.dropout)


def fit_arguments(model, rows):
    """What `fit` takes: two lists for the encoder-decoder, prompts with responses for the decoder alone."""
    sources, targets = ([row[i] for row in rows] for i in (0, 1))
    if "encoder_token_ids" in model.input:
        return sources, targets
    return ([{"prompt": prompt(s), "response": t} for s, t in zip(sources, targets, strict=True)],)


def prompt(source):
    return f"{source}\n"


def translate(model, sources, **options):
    """Translations by greedy decoding, or by beam search with `num_beams`."""
    if "encoder_token_ids" in model.input:
        return model.generate(list(sources), truncate=True, temperature=0, **options)
    prompts = [prompt(source) for source in sources]
    room = model.preprocessor.sequence_length // 2
    return model.generate(prompts, room, temperature=0, strip_prompt=True, **options)


def deliver(model, output, sources, expected):
    """Saves the model, reloads it, and where it can, exports and serves it; raises if one answers otherwise."""
    import keras

    model.save(output / "model.keras")
    if translate(keras.saving.load_model(output / "model.keras"), sources) != expected:
        raise RuntimeError("The reloaded model answers otherwise.")
    print(f"{output / 'model.keras'}: reloaded, the same translations")
    exported = output / "saved_model"
    try:
        shutil.rmtree(exported, ignore_errors=True)
        if not hasattr(model, "alignment"):
            raise ValueError("A SavedModel of a decoder alone comes later.")
        model.export(exported)
    except ValueError as error:
        print(error)
        return
    if common.serve(exported, sources)["text"] != expected:
        raise RuntimeError("The exported model answers otherwise.")
    print(f"{exported}: served by a fresh process, the same translations")
