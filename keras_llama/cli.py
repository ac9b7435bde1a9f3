"""The command `keras-llama`: generate, convert, export, verify, info."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

PRESET_HELP = (
    "a Hugging Face directory, a .gguf file, a llama2.c .bin file, hf://org/name[@revision], or smollm2_135m_instruct"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; bad input is told in a line and ends with exit code 2."""
    flags = parser()
    args = flags.parse_args(arguments)
    try:
        args.run(args)
    except ValueError as error:
        flags.exit(2, f"keras-llama: {error}\n")
    except BrokenPipeError:  # the reader of a pipe has left
        sys.stderr.close()


def parser() -> argparse.ArgumentParser:
    """The flags of all commands."""
    flags = argparse.ArgumentParser(prog="keras-llama", description="LLaMA in plain Keras 3.")
    commands = flags.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.add_argument("preset", help=PRESET_HELP)
        found.set_defaults(run=run)
        return found

    generating = command("generate", generate, "Continue prompts, or answer them with --chat.")
    generating.add_argument("prompts", nargs="+", metavar="prompt")
    generating.add_argument("--dtype", help="a Keras dtype policy; default: what the checkpoint was saved in")
    generating.add_argument("--seed", type=int, help="of the sampling")
    add_generation_flags(generating)
    converting = command("convert", convert, "Write a checkpoint in another format.")
    converting.add_argument("output", help="a directory for hf, a file for gguf")
    converting.add_argument("--format", choices=("hf", "gguf"), default="hf")
    converting.add_argument("--quantization", choices=("f32", "f16", "q8_0"), default="f32", help="of gguf")
    converting.add_argument("--dtype", help="of the weights; default: what the checkpoint was saved in")
    converting.add_argument("--overwrite", action="store_true")
    exporting = command("export", export, "Write a TensorFlow SavedModel that takes prompts and scores texts.")
    exporting.add_argument("output", help="a directory")
    exporting.add_argument("--dtype", help="of the weights; default: what the checkpoint was saved in")
    exporting.add_argument("--overwrite", action="store_true")
    exporting.add_argument("--versioned", action="store_true", help="write OUTPUT/1, for TensorFlow Serving")
    exporting.add_argument("--jit", action="store_true", help="compiled by XLA, once for each bucket of lengths")
    command("verify", verify, "Compare a checkpoint with Transformers, block by block.")
    command("info", info, "Say what a checkpoint holds, without reading its weights.")
    return flags


def add_generation_flags(flags: argparse.ArgumentParser) -> None:
    """The settings of `generate` and `chat` as flags; those not given are the checkpoint's."""
    flags.add_argument("--chat", action="store_true", help="answer by the checkpoint's chat template")
    flags.add_argument("--system", help="with --chat: the system's message")
    flags.add_argument("--max-new-tokens", type=int)
    for name in ("temperature", "top-p", "min-p", "repetition-penalty"):
        flags.add_argument(f"--{name}", type=float)
    for name in ("top-k", "num-beams"):
        flags.add_argument(f"--{name}", type=int)
    flags.add_argument("--stop", action="append", metavar="TEXT", help="stop at this text too; may be repeated")


def pieces(lm: Any, prompt: str, args: argparse.Namespace) -> Iterator[str]:
    """The answer to a prompt as it comes, by `--seed` and the flags of `add_generation_flags`.

    The prompt and the flags are checked by the call; the model runs as the answer is read.
    """
    names = ("max_new_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "top_k", "num_beams", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options |= {"stream": True, **({"stop": args.stop} if args.stop else {})}
    if not args.chat:
        return lm.generate(prompt, **options)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return lm.chat([*system, {"role": "user", "content": prompt}], **options)


def generate(args: argparse.Namespace) -> None:
    import keras_llama

    lm = keras_llama.LlamaCausalLM.from_preset(args.preset, dtype=args.dtype)
    for answer in [pieces(lm, prompt, args) for prompt in args.prompts]:
        for piece in answer:
            print(piece, end="", flush=True)
        print()


def convert(args: argparse.Namespace) -> None:
    import keras_llama

    lm = keras_llama.LlamaCausalLM.from_preset(args.preset, dtype=args.dtype)
    options = {"quantization": args.quantization} if args.format == "gguf" else {}
    keras_llama.save_checkpoint(lm, args.output, args.format, overwrite=args.overwrite, **options)
    print(f"{args.output}: {lm.count_params():,} parameters, {lm.dtype_policy.variable_dtype}")


def export(args: argparse.Namespace) -> None:
    import keras_llama

    lm = keras_llama.LlamaCausalLM.from_preset(args.preset, dtype=args.dtype)
    lm.export(args.output, overwrite=args.overwrite, versioned=args.versioned, jit=args.jit)
    print(f"{args.output}: {lm.count_params():,} parameters, {lm.dtype_policy.variable_dtype}")


def verify(args: argparse.Namespace) -> None:
    from keras_llama.verify import verify as compare

    print(f"{'':>10}  {'largest difference':>18}  {'largest value':>13}")
    for place, difference, largest in compare(args.preset):
        print(f"{place:>10}  {difference:>18.2e}  {largest:>13.2e}")


def info(args: argparse.Namespace) -> None:
    import dataclasses
    import math

    from keras_llama.checkpoints.presets import open_checkpoint

    checkpoint = open_checkpoint(args.preset)
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    size = {"float32": 4}.get(checkpoint.dtype, 2)
    print(f"{checkpoint.source}")
    print(f"parameters: {parameters:,} in {len(checkpoint.tensors)} tensors")
    print(f"weights as {checkpoint.dtype}: {parameters * size / 2**30:.2f} GiB")
    for name, value in dataclasses.asdict(checkpoint.config).items():
        print(f"{name}: {value}")
    for name, value in checkpoint.generation.items():
        print(f"{name}: {value}")
    print(f"tokenizer: {', '.join(sorted(checkpoint.tokenizer_files)) or 'none'}")


if __name__ == "__main__":
    main()
