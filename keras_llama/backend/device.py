"""Which Keras backend runs, on what, and what it is good at."""

import os
import pathlib

import keras

from keras_llama.config import invalid


def name() -> str:
    """The running backend: "tensorflow", "jax" or "torch"."""
    return keras.config.backend()


def has_gpu() -> bool:
    """Whether the running backend sees a GPU."""
    if name() == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))
    if name() == "jax":
        import jax

        return any(device.platform == "gpu" for device in jax.devices())
    import torch

    return torch.cuda.is_available()


def has_replicas() -> bool:
    """Whether a TensorFlow strategy is in scope, which runs a step once for each of its replicas."""
    if name() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


def devices() -> list[str]:
    """The devices the running backend computes on, by name, as a recipe prints them."""
    if name() == "tensorflow":
        import tensorflow as tf

        return [device.name for device in tf.config.list_logical_devices()]
    if name() == "jax":
        import jax

        return [str(device) for device in jax.devices()]
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]


def free_memory() -> int | None:
    """Bytes that are free where the running backend computes, of the GPU if it sees one; `None` if nothing tells."""
    if has_gpu():
        if name() == "torch":
            import torch

            return torch.cuda.mem_get_info()[0]
        if name() == "tensorflow":  # tells what it took, not what there is
            return None
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    table = pathlib.Path("/proc/meminfo")
    if not table.exists():
        return None
    lines = (line.split() for line in table.read_text(encoding="ascii").splitlines())
    return next((int(number) * 1024 for name, number, *_ in lines if name == "MemAvailable:"), None)


def set_memory_growth() -> None:
    """Lets GPU memory grow with need instead of taking all of it; call it before the first computation.

    On JAX it works only before JAX first touches the GPU; torch allocates by need anyway.

    >>> keras_llama.set_memory_growth()
    """
    if name() == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    elif name() == "jax":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def with_float32_weights(policy: keras.DTypePolicy) -> str:
    """The dtype policy that computes as `policy` does, on weights in float32, which training moves by small steps."""
    computed = policy.compute_dtype
    return f"mixed_{computed}" if computed in ("bfloat16", "float16") else computed


def fastest_precision() -> str:
    """The policy in which training is fastest here, by the rules of docs/gpu.md."""
    if has_gpu():
        generation = _gpu_generation()
        return "mixed_bfloat16" if generation >= 8 else "mixed_float16" if generation >= 7 else "float32"
    table = pathlib.Path("/proc/cpuinfo")
    flags = set(table.read_text(encoding="utf-8").split()) if table.exists() else set()
    # XLA multiplies bfloat16 as float32 on a CPU; oneDNN, which the others have, as it is.
    return "mixed_bfloat16" if name() != "jax" and flags & {"avx512_bf16", "amx_bf16"} else "float32"


def _gpu_generation() -> int:
    """The first number of NVIDIA's compute capability: 7 is Volta and Turing, 8 Ampere."""
    if name() == "torch":
        import torch

        return torch.cuda.get_device_capability()[0]
    if name() == "jax":
        import jax

        return int(str(getattr(jax.devices()[0], "compute_capability", 0)).split(".")[0])
    import tensorflow as tf

    gpu = tf.config.list_physical_devices("GPU")[0]
    return tf.config.experimental.get_device_details(gpu).get("compute_capability", (0,))[0]


def resolve_jit(jit_compile: bool | str) -> bool:
    """What `jit_compile="auto"` means: XLA on TensorFlow with a GPU, always on JAX, never on torch.

    On a CPU, TensorFlow runs bfloat16 products faster without XLA, and XLA would compile every
    length bucket anew.

    Raises:
        ValueError: if `jit_compile` is not True, False or "auto".
    """
    if jit_compile not in (True, False, "auto"):
        raise invalid('`jit_compile` must be True, False or "auto".', jit_compile=jit_compile)
    if jit_compile != "auto":
        return bool(jit_compile)
    return name() == "jax" or (name() == "tensorflow" and has_gpu())


def random_states() -> list:
    """The generators of random numbers that no Keras variable holds: torch's own, of which its dropout draws."""
    if name() != "torch":
        return []
    import torch

    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_states(states: list) -> None:
    """Brings them to where `random_states` found them."""
    if not states:
        return
    import torch

    first, *others = (torch.from_numpy(state.copy()) for state in states)
    torch.set_rng_state(first)
    if len(others) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(others)
