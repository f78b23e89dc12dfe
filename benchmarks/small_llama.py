"""A small Llama in plain torch, and its training: on CUDA a whole step is one CUDA graph. For recover.py.

Its layers have the names that recipes know (`q_proj`, `down_proj`, `lm_head`); tokens are bytes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
WARMUP = 0.03  #: of the steps
WAIT = 8  #: steps after which a training within some seconds waits for its device
CURVE = 50  #: steps that are one point of the curve that is kept


@dataclass(frozen=True, slots=True)
class Size:
    """Of a Llama; widths that groups of 64 divide."""

    hidden: int
    layers: int
    intermediate: int
    heads: int


SIZES = {
    "tiny": Size(64, 2, 128, 4),
    "4m": Size(256, 6, 576, 8),
    "30m": Size(512, 9, 1408, 8),
    "100m": Size(1024, 10, 2048, 16),
}


class Attention(nn.Module):
    """Causal, with rotary positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(size.hidden, size.hidden, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(rotated(q, turn), rotated(k, turn), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """One layer of the decoder."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attn = Attention(size)
        self.before_attn, self.before_mlp = (nn.RMSNorm(size.hidden, eps=1e-5) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(size.hidden, size.intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.self_attn(self.before_attn(x), turn)
        h = self.before_mlp(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """Tokens [batch, length] -> logits [batch, length, vocabulary]; weights drawn from `seed`."""

    turn: Tensor

    def __init__(self, size: Size, *, seed: int, longest: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, size.hidden)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.lm_head = nn.Linear(size.hidden, vocabulary, bias=False)
        width = size.hidden // size.heads
        angles = torch.arange(longest)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        random = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.04, generator=random)

    def forward(self, tokens: Tensor) -> Tensor:
        x, turn = self.embed_tokens(tokens), self.turn[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turn)
        return self.lm_head(self.norm(x))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of x [..., length, width], whose halves are the two coordinates."""
    a, b = x.chunk(2, -1)
    cos, sin = turn.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass(frozen=True, slots=True)
class Run:
    """How a model is trained: AdamW, warm-up over 3 % of the steps, a cosine to a tenth of `rate`.

    Attributes:
        half: multiply in bfloat16, under autocast; else in float32, with TF32 where the device has it.
        seed: of the windows of text.
    """

    steps: int
    batch: int
    length: int
    rate: float
    weight_decay: float
    seed: int
    half: bool

    def share(self, number: int) -> float:
        """Of the peak rate, at step `number` of 1 .. `steps`."""
        warmup = max(1, round(WARMUP * self.steps))
        if number <= warmup:
            return number / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (number - warmup) / max(1, self.steps - warmup)))


def train(model: nn.Module, text: Tensor, run: Run, *, seconds: float = math.inf) -> list[float]:
    """Trains `model` in place on windows of `text` [n].

    Args:
        seconds: the rate falls as they pass, where the steps take longer; then the training ends.

    Returns:
        The mean training loss of every `CURVE` steps; the last is that of what is left.
    """
    device = text.device
    random = np.random.default_rng(run.seed)
    starts = torch.from_numpy(random.integers(0, len(text) - run.length, (run.steps, run.batch))).to(device)
    lr = torch.zeros((), device=device)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": run.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True, capturable=device.type == "cuda")
    window, places = torch.arange(run.length + 1, device=device), starts[0].clone()

    def step() -> Tensor:
        rows = text[places[:, None] + window].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.half, cache_enabled=False):
            scores = model(rows[:, :-1])
        loss = F.cross_entropy(scores.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    model.train()
    torch.set_float32_matmul_precision("high")
    once = captured(step, model, optimizer) if device.type == "cuda" else eager(step, optimizer)
    losses, begin, done = torch.zeros(run.steps, device=device), time.perf_counter(), 0
    for number in range(run.steps):
        if math.isfinite(seconds) and number % WAIT == 0:
            float(losses[max(number - 1, 0)])  # waits for the device
        passed = (time.perf_counter() - begin) / seconds
        if passed >= 1:
            break
        places.copy_(starts[number])
        lr.fill_(run.rate * run.share(max(number, int(passed * run.steps)) + 1))
        losses[number] = once()
        done = number + 1
    torch.set_float32_matmul_precision("highest")
    optimizer.zero_grad(set_to_none=True)  # they hold the graph's memory
    model.eval()  # prepared layers forget values that a graph has changed behind their back
    return [float(part.mean()) for part in losses[:done].cpu().split(CURVE)]


def eager(step: Callable[[], Tensor], optimizer: Any) -> Callable[[], Tensor]:
    """`step` after the gradients were dropped."""

    def once() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        return step()

    return once


def captured(step: Callable[[], Tensor], model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
    """`step` as a CUDA graph. Capturing wants some steps before it, which are undone."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager(step, optimizer)()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)  # gradients then live in the graph's own memory
    model.train()  # prepared layers forget their values, so that making them is captured too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def once() -> Tensor:
        graph.replay()
        return loss

    return once
