"""Readers of both modes behind one set of functions: build, train, answer, deliver."""

from tasks import answers, baselines, cloze, common

MODES = ("extractive", "generative")


def build(args, rows):
    """A model of --mode over a vocabulary learned from the training rows, or that of --preset."""
    import keras_llama

    extractive = args.mode == MODES[0]
    if (args.pretrain_epochs and args.preset) or (not extractive and (args.pretrain_epochs or args.cloze)):
        raise common.DataError("--cloze is for an extractive reader, --pretrain-epochs for one from scratch.")
    cls = keras_llama.LlamaQuestionAnswering if extractive else keras_llama.LlamaCausalLM
    if args.preset and args.preset.endswith(".keras"):
        return common.from_preset(args, cls)
    options = {"stride": args.stride, "max_answer_length": args.max_answer_length} if extractive else {}
    if extractive and any(not row.references for row in rows):
        options["no_answer_threshold"] = args.no_answer_threshold
    if args.preset:
        return common.from_preset(args, cls, **options)
    # A Chinese character is the same token in the question and in the context, whatever words it is of.
    texts = answers.texts_of(rows)
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, args.vocabulary_size, split_ideographs=True)
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        **keras_llama.size(args.size),
        dropout=args.dropout,
        causal=not extractive,
        context_length=args.sequence_length,
        dtype=args.precision,
    )
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length)
    own = {"dropout": args.dropout, "question_overlap": True} if extractive else {}
    return cls(backbone, preprocessor, **options, **own)


def pretrain(args, reader, texts):
    """Trains the blocks as a causal language model on `texts` first, and returns the history of that."""
    import keras_llama
    from keras_llama import backend

    config = {**reader.backbone.get_config(), "causal": True, "name": "language_model"}
    lm = keras_llama.LlamaCausalLM(keras_llama.LlamaBackbone.from_config(config), reader.preprocessor)
    lm.compile(**common.compile_options(lm, args, len(texts), args.pretrain_epochs))
    options = {"batch_size": args.batch_size, "epochs": args.pretrain_epochs}
    history = common.fit(args, lm, "pretraining", texts, **options).history
    for learned, weight in zip(lm.backbone.weights, reader.backbone.weights, strict=True):
        backend.copy(learned, weight)
    return history


def train(model, args, rows, validation):
    """Fits, and keeps the weights of the best epoch."""
    import keras

    data, held = (fit_arguments(model, args, part) for part in (rows, validation))
    if args.pretrain_epochs:
        pretrain(args, model, answers.pieces(rows, args.sequence_length))
    if args.cloze:
        made = cloze.questions(list(dict.fromkeys(row.context for row in rows)), args.cloze, args.seed)
        model.compile(**common.compile_options(model, args, len(model.encode(made)["token_ids"]), 1))
        common.fit(args, model, "cloze", made, batch_size=args.batch_size)
    model.compile(**common.compile_options(model, args, len(model.encode(data)["token_ids"])))
    best = keras.callbacks.EarlyStopping("val_loss", patience=args.patience, restore_best_weights=True)
    options = {"batch_size": args.batch_size, "epochs": args.epochs, "validation_data": (held,)}
    with common.profiled(args) as profile:
        return common.fit(args, model, "reader", data, callbacks=[best, *profile], **options).history


def fit_arguments(model, args, rows):
    """What `fit` takes: questions with answers, or prompts with a response each."""
    if args.mode == MODES[0]:
        return [{"question": row.question, "context": row.context, "answers": row.answers} for row in rows]
    own = [[row.context] for row in rows]
    return [
        chat(prompt, row.answers[0]["text"]) if model.preprocessor.tokenizer.chat_template
        else {"prompt": prompt, "response": row.answers[0]["text"]}
        for prompt, row in zip(prompts(model, args, rows, own), rows, strict=True) if row.answers
    ]  # fmt: skip


def chat(prompt, response):
    """A conversation of one answer."""
    roles = {"user": prompt, "assistant": response}
    return {"messages": [{"role": role, "content": content} for role, content in roles.items()]}


def prompts(model, args, rows, contexts):
    """What a language model answers: the contexts found for each question, cut to what leaves it room, and that."""
    tokenizer = model.preprocessor.tokenizer
    texts = ["\n".join(found) for found in contexts]
    asked = [f"\n\n{row.question}\n" for row in rows]
    found = []
    for context, question, ids in zip(texts, asked, tokenizer.encode(asked), strict=True):
        room = model.preprocessor.sequence_length - args.max_answer_length - len(ids) - _OF_CHAT
        (tokens,) = tokenizer.encode([context])
        found.append((context if len(tokens) <= room else tokenizer.decode([tokens[: max(room, 1)]])[0]) + question)
    return found


_OF_CHAT = 32  # tokens that a chat template writes around a message


def retrieved(args, rows, contexts):
    """For each row the --retrieve `contexts` most like its question, by TF-IDF."""
    places = baselines.nearest(contexts, [row.question for row in rows], args.retrieve)
    return [[contexts[i] for i in found] for found in places]


def answer(model, args, rows, contexts):
    """The answer to each row's question: a part of its context, or generated from the `contexts` found for it."""
    if args.mode == MODES[0]:
        return [found["text"] for found in model.answer([row.question for row in rows], [row.context for row in rows])]
    options = {"max_new_tokens": args.max_answer_length, "temperature": 0}
    asked = prompts(model, args, rows, contexts)
    if model.preprocessor.tokenizer.chat_template:
        texts = [model.chat(prompt, **options) for prompt in asked]
    else:
        texts = model.generate(asked, strip_prompt=True, **options)
    return [text.strip().split("\n")[0] for text in texts]


def deliver(model, args, output, rows):
    """Saves, reloads, exports and serves a reader, and raises if any of them answers otherwise."""
    import keras

    if args.mode != MODES[0]:
        common.deliver_preset(model, output)
        return
    expected = answer(model, args, rows, None)
    model.save(output / "model.keras")
    if answer(keras.saving.load_model(output / "model.keras"), args, rows, None) != expected:
        raise RuntimeError("The reloaded model answers otherwise.")
    print(f"{output / 'model.keras'}: reloaded, the same answers")
    common.deliver_adapter(model, output)
    asked = {"questions": [row.question for row in rows], "contexts": [row.context for row in rows]}
    served = common.exported(model, output / "saved_model", asked)
    if served is None:
        return
    if served["texts"] != expected:
        raise RuntimeError(f"The exported model answers otherwise: {served['texts']}.")
    print(f"{output / 'saved_model'}: served by a fresh process, the same answers")
