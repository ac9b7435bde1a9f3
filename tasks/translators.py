"""Translators of both architectures behind one set of functions: build, what `fit` takes, translate, deliver."""

from tasks import common, delivery

ARCHITECTURES = ("encoder-decoder", "decoder")


def references(rows):
    """For each distinct source all its targets."""
    found: dict[str, list[str]] = {}
    for source, target, *_ in rows:
        found.setdefault(source, []).append(target)
    return found


def joint_vocabulary(rows, vocabulary_size):
    """One SentencePiece vocabulary of both languages; Chinese characters do not use up the room of words."""
    import keras_llama

    texts = [text for source, target, *_ in rows for text in (source, target)]
    return keras_llama.SentencePieceTokenizer.train(texts, vocabulary_size, split_ideographs=True)


def build(args, rows):
    """A model of --architecture over a joint vocabulary of both languages, or started from --preset."""
    import keras_llama

    cls = keras_llama.LlamaSeq2SeqLM if args.architecture == ARCHITECTURES[0] else keras_llama.LlamaCausalLM
    alone = cls is keras_llama.LlamaCausalLM
    if alone:
        without = ("label_smoothing",) if args.preset else ("label_smoothing", "encoder_layers")
        common.kept(args, *without, why=f"--architecture {args.architecture} has none")
    if args.preset:
        return from_preset(args, cls)
    tokenizer = joint_vocabulary(rows, args.vocabulary_size)
    length = args.sequence_length * (2 if alone else 1)  # source and target in one
    # A source needs no token to begin with: nothing is predicted from it.
    preprocessor = keras_llama.TextPreprocessor(tokenizer, length, add_bos=alone, add_eos=True)
    options = {**keras_llama.size(args.size), "dropout": args.dropout}
    options |= {"vocabulary_size": tokenizer.vocabulary_size, "dtype": args.precision}
    if alone:
        return cls(keras_llama.LlamaBackbone(**options, context_length=length), preprocessor)
    backbone = keras_llama.LlamaSeq2SeqBackbone(**options, num_encoder_layers=args.encoder_layers)
    return cls(backbone, preprocessor, label_smoothing=args.label_smoothing)


def from_preset(args, cls):
    """The model of --preset; an encoder-decoder may also start from a decoder's checkpoint."""
    import keras_llama
    from keras_llama.checkpoints.presets import open_checkpoint

    decoder = keras_llama.LlamaCausalLM
    if cls is decoder:
        args.sequence_length *= 2  # source and target in one
        return common.from_preset(args, cls)
    if common.is_file(args.preset) or hasattr(open_checkpoint(args.preset).config, "encoder"):
        model = common.from_preset(args, cls)
        common.settle(args, model, "label_smoothing")
        return model
    options = {"dropout": args.dropout, "label_smoothing": args.label_smoothing}
    return cls.from_decoder(common.from_preset(args, decoder, read=("dropout",)), **options)


def fit_arguments(model, rows):
    """What `fit` takes: two lists for the encoder-decoder, prompts with responses for the decoder alone."""
    sources, targets = ([row[i] for row in rows] for i in (0, 1))
    if "encoder_token_ids" in model.input:
        return sources, targets
    return ([{"prompt": p, "response": t} for p, t in zip(prompts(model, sources), targets, strict=True)],)


def prompts(model, sources):
    """What a decoder alone continues with the target: a source, cut to half of a text's length, and a line's end."""
    tokenizer, room = model.preprocessor.tokenizer, model.preprocessor.sequence_length // 2 - 4
    rows = tokenizer.encode(list(sources))
    cut = tokenizer.decode([row[:room] for row in rows])
    texts = (short if len(row) > room else text for text, short, row in zip(sources, cut, rows, strict=True))
    return [f"{text}\n" for text in texts]


def translate(model, sources, **options):
    """Translations by greedy decoding, or by beam search with `num_beams`."""
    if "encoder_token_ids" in model.input:
        return model.generate(list(sources), truncate=True, temperature=0, **options)
    room = model.preprocessor.sequence_length // 2
    return model.generate(prompts(model, sources), room, temperature=0, strip_prompt=True, **options)


def deliver(model, output, sources):
    """Saves, reloads, exports and serves the model, and raises if any of them answers otherwise."""
    expected, again = translate(model, sources), delivery.reloaded(model, output)
    delivery.check_texts(model, expected, translate(again, sources), lambda ids: again.predict(ids, verbose=0))
    print(f"{output / 'model.keras'}: reloaded, the same weights and translations")
    delivery.adapter(model, output)
    alone = "encoder_token_ids" not in model.input
    asked = prompts(model, sources) if alone else list(sources)
    if alone:  # with the prompt, and as long as the context lets each alone
        expected = [model.generate(prompt) for prompt in asked]
    served = output / "saved_model"
    answer = delivery.exported(model, served, asked)
    if answer is None:
        return
    delivery.check_texts(model, expected, answer["texts"], lambda ids: delivery.served_logits(served, ids))
    print(f"{served}: served by a fresh process, the same translations")
