"""The one description of a LLaMA architecture, its validation and its named sizes."""

import dataclasses
import math
from typing import Any


def invalid(expected: str, hint: str = "", /, **received: Any) -> ValueError:
    """A `ValueError` that says what was expected, what came, and what to do.

    >>> print(invalid("`rate` must lie in [0, 1).", "Pass 0 to switch it off.", rate=2))
    `rate` must lie in [0, 1). Received: rate=2. Pass 0 to switch it off.
    """
    values = ", ".join(f"{name}={value!r}" for name, value in received.items())
    return ValueError(" ".join(part for part in (expected, f"Received: {values}.", hint) if part))


# Options of each rotary scaling; a value of `...` has no default and must be given.
_ROPE_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "llama3": {
        "factor": ...,
        "low_freq_factor": ...,
        "high_freq_factor": ...,
        "original_max_position_embeddings": ...,
    },
    "yarn": {
        "factor": ...,
        "original_max_position_embeddings": ...,
        "attention_factor": None,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}


def rope_options(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """Checks a rotary scaling and fills in its defaults; `None` means no scaling.

    Accepts the spelling of Hugging Face configurations (`rope_type`, or `type` as older files
    have it). Unknown kinds (`dynamic`, `longrope`, ...) and unknown options are refused by name,
    because dropping one would change the model silently.

    Raises:
        ValueError: for an unknown kind, an unknown or missing option, or a value out of range.
    """
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise invalid(
            "`rope_scaling` must be a dict or None.",
            'For example {"rope_type": "linear", "factor": 2.0}.',
            rope_scaling=scaling,
        )
    given = dict(scaling)
    kinds = {given.pop(key) for key in ("rope_type", "type") if key in given}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind not in _ROPE_OPTIONS:
        raise invalid(
            f"`rope_scaling` needs one `rope_type` of {sorted(_ROPE_OPTIONS)}.",
            "Other scalings are not supported.",
            rope_scaling=scaling,
        )
    known = _ROPE_OPTIONS[kind]
    unknown = sorted(set(given) - set(known))
    missing = sorted(name for name, value in known.items() if value is ... and name not in given)
    if unknown or missing:
        raise invalid(
            f'`rope_scaling` of type "{kind}" takes the options {sorted(known)}.',
            f"Unknown: {unknown}. Missing: {missing}.",
            rope_scaling=scaling,
        )
    options = {**known, **given}
    for name, value in options.items():
        default = known[name]
        good = isinstance(value, bool) if isinstance(default, bool) else _positive(value)
        if not good and not (value is None and default is None):
            kind = "True or False" if isinstance(default, bool) else "a positive number"
            raise invalid(f"`rope_scaling` option `{name}` must be {kind}.", **{name: value})
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise invalid(
            "`rope_scaling` needs high_freq_factor > low_freq_factor.",
            rope_scaling=scaling,
        )
    return None if kind == "default" else {"rope_type": kind, **options}


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def check_heads(num_query_heads: Any, num_key_value_heads: Any, head_dim: Any) -> None:
    """Raises a `ValueError` unless the heads can be grouped and their features rotated in pairs."""
    counts = {"num_query_heads": num_query_heads, "num_key_value_heads": num_key_value_heads, "head_dim": head_dim}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(f"`{name}` must be a positive integer.", **{name: value})
    if num_query_heads % num_key_value_heads:
        raise invalid(
            "`num_query_heads` must be divisible by `num_key_value_heads`.",
            "Each key/value head serves a whole group of query heads.",
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
        )
    if head_dim % 2:
        raise invalid(
            "`head_dim` must be even: rotary embedding turns pairs of features.",
            "Change `head_dim`, or `hidden_dim` / `num_query_heads`.",
            head_dim=head_dim,
        )


_COUNTS = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
    "head_dim",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that determines the mathematics of a LLaMA, checked once and never changed.

    Args:
        vocabulary_size: V, number of token ids.
        num_layers: number of blocks.
        num_query_heads: N, attention heads.
        num_key_value_heads: K, key/value heads; divides N (grouped-query attention).
        hidden_dim: D, width of the residual stream.
        intermediate_dim: F, width of the SwiGLU layer.
        head_dim: H, width of a head, even; `None` means D / N.
        rope_max_wavelength: base of the rotary frequencies ("theta").
        rope_scaling: `None`, or a dict with `rope_type` "linear", "llama3" or "yarn".
        layer_norm_epsilon: epsilon of every RMSNorm.
        tie_word_embeddings: whether the language-model head is the embedding matrix.
        attention_bias: bias in the query, key, value and output projections.
        mlp_bias: bias in the gate, up and down projections.
        dropout: rate on each sub-layer's output while training.
        embedding_dropout: rate on the embeddings while training; `None` means that of `dropout`.
        causal: `False` lets every token see the whole text (encoders, classifiers).
        context_length: longest text that the weights were trained for, in tokens; `None` if unknown.
        num_ngrams: how many characters, pairs and triples have vectors that are added to the tokens'; 0 as every
            published LLaMA has it. Such a model reads whole texts and does not generate.
        final_norm: whether an RMSNorm ends the blocks, as in every published LLaMA. Without it a token may weigh more
            than another in a mean over the text.

    Raises:
        ValueError: for any value outside its range.

    >>> LlamaConfig(**SIZES["tiny"], vocabulary_size=1000).head_dim
    32
    """

    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    hidden_dim: int
    intermediate_dim: int
    head_dim: int | None = None
    rope_max_wavelength: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0
    embedding_dropout: float | None = None
    causal: bool = True
    context_length: int | None = None
    num_ngrams: int = 0
    final_norm: bool = True

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self._derive_head_dim()
        for name in _COUNTS if self.context_length is None else (*_COUNTS, "context_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise invalid(f"`{name}` must be a positive integer.", **{name: value})
        check_heads(self.num_query_heads, self.num_key_value_heads, self.head_dim)
        for name in ("rope_max_wavelength", "layer_norm_epsilon"):
            if not _positive(getattr(self, name)):
                raise invalid(f"`{name}` must be a positive number.", **{name: getattr(self, name)})
            object.__setattr__(self, name, float(getattr(self, name)))  # files name the type of a number
        for name in ("dropout",) if self.embedding_dropout is None else ("dropout", "embedding_dropout"):
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise invalid(f"`{name}` must lie in [0, 1).", **{name: rate})
        if isinstance(self.num_ngrams, bool) or not isinstance(self.num_ngrams, int) or self.num_ngrams < 0:
            raise invalid("`num_ngrams` must be an integer of at least 0.", num_ngrams=self.num_ngrams)
        for name in ["tie_word_embeddings", "attention_bias", "mlp_bias", "causal", "final_norm"]:
            if not isinstance(getattr(self, name), bool):
                raise invalid(f"`{name}` must be True or False.", **{name: getattr(self, name)})
        object.__setattr__(self, "rope_scaling", rope_options(self.rope_scaling))

    def _derive_head_dim(self) -> None:
        heads, width = self.num_query_heads, self.hidden_dim
        if not (isinstance(heads, int) and isinstance(width, int) and heads > 0) or width % heads:
            raise invalid(
                "`hidden_dim` must be divisible by `num_query_heads` when `head_dim` is None.",
                "Pass `head_dim` to set it apart.",
                hidden_dim=width,
                num_query_heads=heads,
            )
        object.__setattr__(self, "head_dim", width // heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaSeq2SeqConfig(LlamaConfig):
    """A bidirectional LLaMA encoder and a causal LLaMA decoder that attends to what the encoder makes of a source.

    Args: those of `LlamaConfig`, `num_layers` being the decoder's, and
        num_encoder_layers: number of the encoder's blocks; `None` means as many as the decoder has.
        share_embeddings: whether source and target tokens have one embedding matrix.

    Raises:
        ValueError: for any value outside its range.

    >>> LlamaSeq2SeqConfig(**SIZES["tiny"], vocabulary_size=1000, num_encoder_layers=3).encoder.num_layers
    3
    """

    num_encoder_layers: int | None = None
    share_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise invalid("`causal` must be True: a decoder must not see the token it predicts.", causal=self.causal)
        if self.num_ngrams:
            raise invalid("`num_ngrams` must be 0: such a model does not generate.", num_ngrams=self.num_ngrams)
        if not isinstance(self.share_embeddings, bool):
            raise invalid("`share_embeddings` must be True or False.", share_embeddings=self.share_embeddings)
        layers = self.num_layers if self.num_encoder_layers is None else self.num_encoder_layers
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise invalid("`num_encoder_layers` must be a positive integer.", num_encoder_layers=layers)
        object.__setattr__(self, "num_encoder_layers", layers)

    @property
    def encoder(self) -> LlamaConfig:
        """The architecture of the encoder alone."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(LlamaConfig)}
        return LlamaConfig(**{**shared, "num_layers": self.num_encoder_layers, "causal": False})


def _size(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_dim": width,
        "num_query_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_dim": mlp,
    }


# Named by the parameters of their blocks; embedding and head come on top and grow with the vocabulary.
SIZES: dict[str, dict[str, int]] = {
    "0.1m": _size(1, 128, 4, 2, 128),
    "0.3m": _size(2, 128, 4, 2, 320),
    "0.5m": _size(2, 160, 4, 2, 400),
    "1m": _size(3, 192, 6, 2, 512),
    "3m": _size(4, 256, 4, 2, 688),
    "10m": _size(6, 384, 6, 2, 1024),
    "30m": _size(8, 576, 9, 3, 1536),
    "100m": _size(30, 576, 9, 3, 1536),  # the shape of SmolLM2-135M
    "300m": _size(32, 960, 15, 5, 2560),  # the shape of SmolLM2-360M
    "1b": _size(16, 2048, 32, 8, 8192),  # the shape of Llama 3.2 1B
}
SIZES |= {"tiny": SIZES["0.3m"], "small": SIZES["3m"], "base": SIZES["30m"]}


def size(name: str) -> dict[str, int]:
    """Layers, heads and widths of a named size, for `LlamaConfig` or `LlamaBackbone`.

    >>> size("tiny")["hidden_dim"]
    128

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SIZES:
        raise invalid(f"`size` must be one of {list(SIZES)}.", size=name)
    return dict(SIZES[name])
