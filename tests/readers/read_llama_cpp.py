"""Opens GGUF files with llama.cpp's server: `python read_llama_cpp.py JOB ANSWERS`, see `asked`."""

import contextlib
import json
import math
import subprocess
import sys
import urllib.request
from pathlib import Path

from asked import answer


def read(folder, tokens, prompt, *, texts=()):
    """Log-probabilities and a chat's answer of the file `folder`; for `texts`, the tokens that llama.cpp has for each."""
    with serving(folder) as address:
        logprobs = [[logprob(address, row[:i], row[i]) for i in range(1, len(row))] for row in tokens]
        cut = [
            post(address, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts
        ]
        asked = [{"role": "user", "content": prompt}]
        said = post(address, "/v1/chat/completions", messages=asked, temperature=0, max_tokens=16)
    return {"logprobs": logprobs, "text": said["choices"][0]["message"]["content"], "tokens": cut}


@contextlib.contextmanager
def serving(file):
    """The address of a server of this GGUF file."""
    command = [sys.executable, Path(__file__).with_name("llama_server.py"), "--model", file]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = next((line.split()[1] for line in server.stdout if line.startswith("address ")), None)
        if address is None:
            raise RuntimeError(f"the server ended with code {server.wait()}")
        yield address
    finally:
        server.stdin.close()
        server.wait()


def logprob(address, before, token):
    """The log-probability of a token after others. The server drops answers that are no text, so that "a" is its answer."""
    asked = {"prompt": before, "n_predict": 1, "n_probs": 1 << 20, "cache_prompt": False, "ignore_eos": True}
    found = post(address, "/completion", **asked, temperature=1.0, samplers=[], logit_bias=[["a", 1000.0]])
    likely = {one["id"]: one["logprob"] for one in found["completion_probabilities"][0]["top_logprobs"]}
    return likely.get(token, -math.inf)


def post(address, path, **body):
    """The server's answer to a request."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


if __name__ == "__main__":
    answer(read)
