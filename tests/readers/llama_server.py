"""llama.cpp's server for a GGUF file, from PyPI's packaged build: `python llama_server.py --model FILE [--port PORT]`.

Takes these arguments of `llama-server`, says its address on standard output, and ends with its standard input.
"""

import argparse
import sys

import xllamacpp


def main():
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--port", type=int, default=0)  # any that is free
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port = given.model, given.ctx_size, given.port
    params.n_parallel, params.cpuparams.n_threads, params.warmup = 1, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # not half, to compare numbers
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print("address", server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
