"""Readers of both modes behind one set of functions: build, train, ask, answer, deliver."""

import math

from tasks import answers, baselines, cloze, common, delivery, memory, prompts

MODES = ("extractive", "generative")
_OPTIONS = ("stride", "max_answer_length", "no_answer_threshold")


def build(args, rows, validation=()):
    """A model of --mode over a vocabulary learned from the training rows, or that of --preset."""
    import keras_llama

    extractive = args.mode == MODES[0]
    if (args.pretrain_epochs and args.preset) or (not extractive and (args.pretrain_epochs or args.cloze)):
        raise common.DataError("--cloze is for an extractive reader, --pretrain-epochs for one from scratch.")
    cls = keras_llama.LlamaQuestionAnswering if extractive else keras_llama.LlamaCausalLM
    own = bool(args.preset) and _has_settings(args.preset, cls)
    model = _loaded(args, cls, own) if args.preset else _new(args, cls, rows)
    if extractive:
        common.settle(args, model, *_OPTIONS, own=own)
        if model.no_answer_threshold is None and any(not row.references for row in (*rows, *validation)):
            args.no_answer_threshold = model.no_answer_threshold = 0.0
    return model


def _has_settings(preset, cls):
    """Whether a preset is a model of this mode that was saved with settings of its own."""
    from keras_llama.checkpoints import presets

    if common.is_file(preset):
        return True
    checkpoint = presets.open_checkpoint(preset)
    return checkpoint.head == cls.head and "preprocessor" in checkpoint.options


def _loaded(args, cls, own):
    """The model of --preset, for texts as long as --sequence-length or its settings say."""
    as_it_is = not args.data and args.mode == MODES[1]
    if own or as_it_is:
        common.leave(args, "sequence_length")
    given = args.sequence_length
    model = common.from_preset(args, cls)
    if as_it_is and not given and (context := model.backbone.config.context_length):
        args.sequence_length = model.preprocessor.sequence_length = context
    return model


def _new(args, cls, rows):
    import keras_llama

    # A Chinese character is the same token in the question and in the context, whatever words it is of.
    texts = answers.texts_of(rows)
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, args.vocabulary_size, split_ideographs=True)
    length, extractive = args.sequence_length, args.mode == MODES[0]
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        **keras_llama.size(args.size),
        dropout=args.dropout,
        causal=not extractive,
        context_length=length,
        dtype=args.precision,
    )
    own = {"dropout": args.dropout, "question_overlap": True} if extractive else {}
    return cls(backbone, keras_llama.TextPreprocessor(tokenizer, length), **own)


def pretrain(args, reader, texts):
    """Trains the blocks as a causal language model on `texts` first, and returns the history of that."""
    import keras_llama
    from keras_llama import backend

    config = {**reader.backbone.get_config(), "causal": True, "name": "language_model"}
    lm = keras_llama.LlamaCausalLM(keras_llama.LlamaBackbone.from_config(config), reader.preprocessor)
    memory.check(lm, args)
    lm.compile(**common.compile_options(lm, args, len(texts), args.pretrain_epochs))
    options = {"batch_size": args.batch_size, "epochs": args.pretrain_epochs}
    history = common.fit(args, lm, "pretraining", texts, **options).history
    for learned, weight in zip(lm.backbone.weights, reader.backbone.weights, strict=True):
        backend.copy(learned, weight)
    return history


def train(model, args, rows, validation):
    """Fits, keeps the weights of the best epoch; the history, and questions per second of the epochs run now."""
    import keras

    from tasks.speed import Speed

    data, held = (fit_arguments(model, args, part) for part in (rows, validation))
    made = cloze_questions(args, rows)
    if args.cloze and not made:
        raise common.DataError("--cloze: expected contexts with sentences of four words or more. Received: none.")
    if args.pretrain_epochs:
        pretrain(args, model, answers.pieces(rows, args.sequence_length))
    if made:
        model.compile(**common.compile_options(model, args, len(model.encode(made)["token_ids"]), 1))
        common.fit(args, model, "cloze", made, batch_size=args.batch_size)
    model.compile(**common.compile_options(model, args, len(model.encode(data)["token_ids"])))
    best = keras.callbacks.EarlyStopping("val_loss", patience=args.patience, restore_best_weights=True)
    options = {"batch_size": args.batch_size, "epochs": args.epochs, "validation_data": (held,)}
    speed = Speed()
    with common.profiled(args) as profile, speed.of(len(data)) as counting:
        history = common.fit(args, model, "reader", data, callbacks=[best, counting, *profile], **options).history
    return history, speed.per_second


def bytes_of_states(model, args, rows, validation):
    """What --trainable head keeps of all windows: in float32 and once more, and as half precision computed it."""
    from keras_llama.activations import REAL, width_of

    if args.trainable != "head" or model.question_overlap is not False:
        return 0
    learned = [fit_arguments(model, args, part) for part in (rows, validation)]
    stages = (learned, [cloze_questions(args, rows)])  # one after the other
    windows = max(sum(len(model.encode(part)["token_ids"]) for part in stage if part) for stage in stages)
    numbers = windows * model.preprocessor.sequence_length * model.backbone.config.hidden_dim
    width = width_of(model.compute_dtype)
    return numbers * (2 * REAL + (width if width < REAL else 0))


def cloze_questions(args, rows):
    """Those of --cloze, made of each context."""
    return cloze.questions(list(dict.fromkeys(row.context for row in rows)), args.cloze, args.seed)


def fit_arguments(model, args, rows):
    """What `fit` takes: questions with answers, or prompts with a response each."""
    if args.mode != MODES[0]:
        return prompts.learned(model, args, rows)
    return [{"question": row.question, "context": row.context, "answers": row.answers} for row in rows]


def ask(model, args, rows, contexts):
    """(context, question) of each row as `answer` takes them; a language model reads the `contexts` found for it."""
    if args.mode != MODES[0]:
        return prompts.fitted(model, args, rows, contexts)
    return [(row.context, row.question) for row in rows]


def retrieved(args, rows, contexts):
    """For each row the --retrieve `contexts` most like its question, by TF-IDF."""
    places = baselines.nearest(contexts, [row.question for row in rows], args.retrieve)
    return [[contexts[i] for i in found] for found in places]


def answer(model, args, asked):
    """The answer to each of `ask`: a part of its context, or generated."""
    if args.mode == MODES[0]:
        contexts, questions = map(list, zip(*asked, strict=True))
        return [found["text"] for found in model.answer(questions, contexts)]
    options = {"max_new_tokens": args.max_answer_length, "temperature": 0}
    whole = ["".join(pair) for pair in asked]
    if model.preprocessor.tokenizer.chat_template:
        texts = [model.chat(prompt, **options) for prompt in whole]
    else:
        texts = model.generate(whole, strip_prompt=True, **options)
    return [text.strip().split("\n")[0] for text in texts]


def deliver(model, args, output, asked):
    """Saves, reloads, exports and serves a reader, and raises if any of them answers otherwise."""
    if args.mode != MODES[0]:
        delivery.preset(model, output)
        return
    contexts, questions = map(list, zip(*asked, strict=True))
    expected, again = model.answer(questions, contexts), delivery.reloaded(model, output)
    check(model, "reloaded", contexts, expected, again.answer(questions, contexts))
    print(f"{output / 'model.keras'}: reloaded, the same weights and answers")
    delivery.adapter(model, output)
    served = delivery.exported(model, output / "saved_model", {"questions": questions, "contexts": contexts})
    if served is None:
        return
    pairs = zip(served["texts"], served["scores"], strict=True)
    check(model, "exported", contexts, expected, [{"text": text, "score": score} for text, score in pairs])
    print(f"{output / 'saved_model'}: served by a fresh process, the same answers")


def check(model, name, contexts, expected, found):
    """Raises unless answers are the same; of two that are as probable but for rounding either may be given."""
    near = 4 * delivery.tolerance(model)  # a share of the probability, which is a product of two
    for context, one, other in zip(contexts, expected, found, strict=True):
        tie = other["text"] in context and math.isclose(one["score"], other["score"], rel_tol=near)
        if other["text"] != one["text"] and not tie:
            raise RuntimeError(f"The {name} model answers otherwise: {other} instead of {one}.")
