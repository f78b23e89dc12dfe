"""Programs that compute with the codes of a recipe, by the layouts that qkit writes for them."""

from qkit.artifact.metadata import StoredRule, stored_rule
from qkit.artifact.servers import VLLM, sentences
from qkit.errors import ArtifactError
from qkit.formats import gguf, mlx_lm
from qkit.rules import Recipe, Rule

WIDTH = 4096  #: inputs of a typical layer
MLX_LM, LLAMA_CPP = "mlx-lm", "llama.cpp"
CLOSED = ("does not open", "opens no")  #: the beginnings of sentences about outputs that vLLM does not open


def runs_on(recipe: Recipe) -> tuple[str, ...]:
    """The programs besides qkit that open an output of `recipe` and multiply by its codes: vLLM, mlx-lm, llama.cpp.

    Read off the layouts, as `docs/evidence/readers.md` has it; whether a certain GPU has a kernel is up to the program. qkit
    itself runs every recipe on CUDA, on CPUs and on a Mac.
    """
    rules = [rule for rule in recipe.rules if rule.weight]
    tests = {VLLM: _in_vllm, MLX_LM: _in_mlx_lm, LLAMA_CPP: _in_llama_cpp}
    return tuple(name for name, opens in tests.items() if all(opens(rule) for rule in rules))


def _in_vllm(rule: Rule) -> bool:
    stored = StoredRule(stored_rule(rule), "bfloat16", ("layer",))
    return not any(text.startswith(CLOSED) for text in sentences([stored], tied=False))


def _in_mlx_lm(rule: Rule) -> bool:
    container = mlx_lm.container_for(rule.weight, WIDTH) if rule.weight and not rule.slots else None
    return container is not None and container.mode != "nvfp4"  # which has no scale of the tensor


def _in_llama_cpp(rule: Rule) -> bool:
    try:
        return not rule.slots and rule.weight is not None and bool(gguf.layout(rule.weight, WIDTH))
    except ArtifactError:
        return False
