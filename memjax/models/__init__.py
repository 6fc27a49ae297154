"""Pretrained models: the Llama and BERT families as Flax NNX, checkpoint readers, and generation."""

from memjax.models.bert import Bert, BertConfig, sentence_embedding
from memjax.models.generate import generate
from memjax.models.layers import Stages
from memjax.models.llama import Llama, LlamaConfig, RopeScaling, llama_config
from memjax.models.load import load
from memjax.models.model import Model, abstract, random_params
from memjax.models.peft import load_peft, save_peft
from memjax.models.save import save

__all__ = [
    "Bert",
    "BertConfig",
    "Llama",
    "LlamaConfig",
    "Model",
    "RopeScaling",
    "Stages",
    "abstract",
    "generate",
    "llama_config",
    "load",
    "load_peft",
    "random_params",
    "save",
    "save_peft",
    "sentence_embedding",
]
