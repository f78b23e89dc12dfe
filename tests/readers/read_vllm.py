"""Opens directories with vLLM on a CPU: `python read_vllm.py JOB ANSWERS`, see `asked`. One process imports it, and forks.

With `serve`, vLLM's server answers a chat request of the OpenAI kind, as the README starts it. With `reference`, products come
from `vllm_reference`, for the formats that vLLM's CPU build has no kernel for: its loader and its schemes run as they are.
"""

import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
import subprocess
import time
import urllib.request

from asked import answer
from vllm import LLM, SamplingParams


def read(folder, tokens, prompt, *, dtype="float32", reference=False, serve=False):
    """Log-probabilities and text of the model in `folder`, from a process of its own."""
    if serve:
        return ask_server(folder, prompt, dtype)
    inward, outward = os.pipe()
    child = os.fork()
    if not child:
        found = {"error": "vLLM ended without a word"}
        try:
            found = _read_here(folder, tokens, prompt, dtype, reference)
        except BaseException as error:
            import traceback

            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}"}
        finally:
            os.write(outward, json.dumps(found).encode())
            sys.stderr.flush()
            os._exit(0)
    os.close(outward)
    with os.fdopen(inward, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said or b'{"error": "vLLM was killed"}')


def _read_here(folder, tokens, prompt, dtype, reference):
    if reference:
        import vllm_reference

        vllm_reference.install()
    model = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = model.generate([{"prompt_token_ids": row} for row in tokens], scored, use_tqdm=False)
    logprobs = [
        [given[token].logprob for given, token in zip(one.prompt_logprobs[1:], row[1:], strict=True)]
        for one, row in zip(answers, tokens, strict=True)
    ]
    said = model.chat(
        [{"role": "user", "content": prompt}], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False
    )
    return {"logprobs": logprobs, "text": said[0].outputs[0].text}


def ask_server(folder, prompt, dtype, *, port=8765):
    """The text that vLLM's server answers to a chat request."""
    api = "vllm.entrypoints.openai.api_server"  # `vllm serve` without its command, which the CPU wheel's metadata stop
    command = [sys.executable, "-m", api, "--model", folder, "--port", str(port), "--dtype", dtype]
    server = subprocess.Popen([*command, "--enforce-eager", "--max-model-len", "256"])
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"vllm serve ended with exit code {server.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(1)
        body = {"model": folder, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 16}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        found = json.loads(urllib.request.urlopen(request, timeout=300).read())
        return {"text": found["choices"][0]["message"]["content"]}
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    answer(read)
