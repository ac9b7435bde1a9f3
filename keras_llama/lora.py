"""LoRA: products of low rank beside a frozen kernel. Shapes: D in, r rank, units out."""

import contextlib

import keras
from keras import ops

from keras_llama import backend


class LoraAdapter(keras.layers.Layer):
    """dropout(x) A B * alpha / r (Hu et al., 2021, https://arxiv.org/abs/2106.09685): (..., D) -> (..., units).

    A starts uniform in +-1/sqrt(D), as in PEFT, and B at zero, so that nothing changes before training. Both are
    float32, whatever the dtype of the products.

    Args:
        units: of the kernel beside it.
        rank: r.
        alpha: scale of what is added, times r.
        rate: of the dropout.

    >>> adapter = LoraAdapter(6, rank=2, alpha=4.0, rate=0.0)
    >>> tuple(adapter(np.ones((1, 3, 8), "float32")).shape)
    (1, 3, 6)
    """

    def __init__(self, units, *, rank, alpha, rate, **kwargs):
        super().__init__(**kwargs)
        self.units, self.rank, self.alpha, self.rate = units, rank, alpha, rate
        self.dropout = keras.layers.Dropout(rate, dtype=self.dtype_policy)

    def build(self, x_shape):
        limit = x_shape[-1] ** -0.5
        uniform = keras.initializers.RandomUniform(-limit, limit)
        self.a = self.add_weight(shape=(x_shape[-1], self.rank), initializer=uniform, name="lora_a")
        self.b = self.add_weight(shape=(self.rank, self.units), initializer="zeros", name="lora_b")

    def call(self, x, training=None):
        dropped = self.dropout(x, training=training) if self.rate else x
        return ops.matmul(ops.matmul(dropped, self.a), self.b) * (self.alpha / self.rank)

    def delta(self):
        """What it adds to a kernel, float32 (D, units)."""
        return ops.matmul(self.a, self.b) * (self.alpha / self.rank)

    def get_config(self):
        settings = {"units": self.units, "rank": self.rank, "alpha": self.alpha, "rate": self.rate}
        return {**super().get_config(), **settings}


class Projection(keras.layers.Dense):
    """A `Dense` layer with LoRA adapters beside its kernel, at most one of which is in use.

    >>> layer = Projection(6)
    >>> tuple(layer(np.ones((1, 3, 8), "float32")).shape)
    (1, 3, 6)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapters = {}
        self.active = ""

    @property
    def sizes(self) -> tuple[int, int]:
        """D and units, whatever the kernel is packed into."""
        return self.input_spec.axes[-1], self.units

    @property
    def adapter(self) -> LoraAdapter | None:
        """The adapter in use."""
        return self.adapters.get(self.active)

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers here, which must not be done twice for one gradient."""
        return self.adapter is not None and self.adapter.rate > 0

    def add_adapter(self, name: str, **options) -> None:
        """Builds an adapter beside the kernel; options as `LoraAdapter`'s."""
        policy = backend.with_float32_weights(self.dtype_policy)
        adapter = LoraAdapter(self.units, **options, dtype=policy, name=name)
        with contextlib.ExitStack() as scopes:  # torch knows weights by their paths, so each needs one of its own
            for part in self.path.split("/"):
                scopes.enter_context(keras.name_scope(part))
            adapter.build((self.input_spec.axes[-1],))
        self._tracker.unlock()  # as Keras does for its own: a layer that is built takes no other state
        self.adapters[name] = adapter
        self._tracker.lock()

    def remove_adapters(self) -> None:
        """The kernel alone again."""
        self.adapters.clear()
        self.active = ""

    def quantize(self, mode=None, type_check=True, config=None):
        """Keras' for a `Dense` layer, which this is."""
        super().quantize(mode, type_check=False, config=config)

    def save_own_variables(self, store):
        """Keras' own, which (3.15) leaves out the zero points of a calibrated kernel and cannot read it again."""
        if self.quantization_mode not in ("gptq", "awq"):
            super().save_own_variables(store)
            return
        names = self.variable_serialization_spec[self.quantization_mode]
        for i, name in enumerate(name for name in names if name != "bias" or self.use_bias):
            store[str(i)] = getattr(self, name)

    def call(self, inputs, training=None):
        return self._with_adapter(super().call(inputs, training=training), inputs, training)

    def quantized_call(self, inputs, training=None):
        if getattr(self, f"is_{self.quantization_mode}_calibrated", True) is False:
            return self.call(inputs)  # where Keras (3.15) looks at what comes in, and which it passes by in this mode
        return self._with_adapter(super().quantized_call(inputs, training=training), inputs, training)

    def _with_adapter(self, outputs, inputs, training):
        return outputs if self.adapter is None else outputs + self.adapter(inputs, training=training)

    def merged_kernel(self, dtype):
        """The kernel with the adapter in use added to it in float32, rounded once to `dtype`, (D, units)."""
        kernel = self.kernel
        if self.adapter is not None:
            kernel = ops.cast(kernel, "float32") + self.adapter.delta()
        return ops.cast(kernel, dtype)

    def get_config(self):
        adapter = None if self.adapter is None else self.adapter.get_config()
        return {**super().get_config(), "adapter": adapter}
