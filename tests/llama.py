"""A small Llama for tests, by its Hugging Face configuration; the same on every engine."""

import numpy as np

import qkit
from qkit.engines.abilities import offers
from qkit.engines.protocol import Builds

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0},  # nobody's default
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
ENGINES = [status.name for status in qkit.backends() if status.ready and offers(qkit.backend(status.name), Builds)]
SEED = 7


def build(name, **changes):
    """The Llama on engine `name`, with weights drawn by NumPy, so that they are the same on every engine."""
    engine = qkit.backend(name)
    model = engine.build({**CONFIG, **changes})
    random = np.random.default_rng(SEED)
    drawn = {}
    for key, tensor in sorted(engine.tensors(model).items()):
        old = engine.to_numpy(tensor)
        drawn[key] = (random.standard_normal(old.shape) * (old.shape[-1] ** -0.5)).astype(old.dtype)
    engine.fill(model, drawn)
    return model


def logits(name, model):
    """Float32 logits of `model` on the test tokens."""
    return qkit.backend(name).logits(model, TOKENS)
