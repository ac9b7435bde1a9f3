"""LLaMA in plain Keras 3: backbone, task heads, and the classes that saved files name.

Importing it registers every class, so that `keras.saving.load_model` finds them. On the JAX and
torch backends it imports no TensorFlow.
"""

from keras_llama.backbone import LlamaBackbone
from keras_llama.backend import set_memory_growth
from keras_llama.checkpoints.presets import save_checkpoint
from keras_llama.config import LlamaConfig, LlamaSeq2SeqConfig, size
from keras_llama.factory import create_llama_model
from keras_llama.heads.causal_lm import LlamaCausalLM
from keras_llama.heads.ensemble import LlamaClassifierEnsemble
from keras_llama.heads.image_captioner import LlamaImageCaptioner
from keras_llama.heads.question_answering import LlamaQuestionAnswering
from keras_llama.heads.seq2seq_lm import LlamaSeq2SeqLM
from keras_llama.heads.text_classifier import LlamaTextClassifier
from keras_llama.image_encoders import convolutional_encoder, vit_encoder
from keras_llama.layers import (
    LlamaAttention,
    LlamaBlock,
    LlamaCrossAttention,
    LlamaMemoryMask,
    LlamaMLP,
    LlamaPositions,
)
from keras_llama.losses import Perplexity, SpanCrossentropy, TokenCrossentropy
from keras_llama.memory import MemoryEstimate, estimate_memory
from keras_llama.preprocessing import TextPreprocessor
from keras_llama.scores import TranslationScores, answer_scores, translation_scores
from keras_llama.seq2seq_backbone import LlamaSeq2SeqBackbone
from keras_llama.spelled import SpelledTokenizer
from keras_llama.subword import BytePairTokenizer, SentencePieceTokenizer

__version__ = "0.1.0"

__all__ = [
    "BytePairTokenizer",
    "LlamaAttention",
    "LlamaBackbone",
    "LlamaBlock",
    "LlamaCausalLM",
    "LlamaClassifierEnsemble",
    "LlamaConfig",
    "LlamaCrossAttention",
    "LlamaImageCaptioner",
    "LlamaMLP",
    "LlamaMemoryMask",
    "LlamaPositions",
    "LlamaQuestionAnswering",
    "LlamaSeq2SeqBackbone",
    "LlamaSeq2SeqConfig",
    "LlamaSeq2SeqLM",
    "LlamaTextClassifier",
    "MemoryEstimate",
    "Perplexity",
    "SentencePieceTokenizer",
    "SpanCrossentropy",
    "SpelledTokenizer",
    "TextPreprocessor",
    "TokenCrossentropy",
    "TranslationScores",
    "answer_scores",
    "convolutional_encoder",
    "create_llama_model",
    "estimate_memory",
    "save_checkpoint",
    "set_memory_growth",
    "size",
    "translation_scores",
    "vit_encoder",
]
