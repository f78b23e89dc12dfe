"""Opens directories with mlx-lm: `python read_mlx_lm.py JOB ANSWERS`, see `asked`."""

import mlx.core as mx
from asked import answer
from mlx_lm import generate, load


def read(folder, tokens, prompt):
    """Log-probabilities and text of the model in `folder`."""
    model, tokenizer = load(folder)
    tokens = mx.array(tokens)
    logits = model(tokens)[:, :-1].astype(mx.float32)
    logprobs = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), tokens[:, 1:, None], -1)[..., 0]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    said = generate(model, tokenizer, asked, max_tokens=16)
    return {"logprobs": logprobs.tolist(), "text": said}


if __name__ == "__main__":
    answer(read)
