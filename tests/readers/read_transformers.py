"""Opens directories with transformers: `python read_transformers.py JOB ANSWERS`, see `asked`."""

import torch
from asked import answer
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(folder, tokens, prompt, *, dequantize=False, dtype="float32"):
    """Log-probabilities and text of the model in `folder`, which transformers opens by default or with `dequantize`."""
    more = {}
    if dequantize:
        from transformers import CompressedTensorsConfig

        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **more).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        whole = model.generate(**asked, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(whole[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"logprobs": logprobs.tolist(), "text": said}


if __name__ == "__main__":
    answer(read)
