"""Types of models that mlx-lm quantized. Those of pictures and text are language models alone in its files, and read as such."""

import numpy as np
import pytest
from catalogue import FAMILIES, make
from safetensors.numpy import save_file

import qkit
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.storage.arrays import read_folder
from qkit.streaming.plan import make_plan

mlx_lm = pytest.importorskip("mlx_lm")
mx = pytest.importorskip("mlx.core")

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def converted(tmp_path, name):
    make(FAMILIES[name], tmp_path / "float")
    export_mlx(read_model(tmp_path / "float"), tmp_path / "plain")
    model, config = mlx_lm.utils.quantize_model(*mlx_lm.utils.load_model(tmp_path / "plain"), 32, 4)
    mlx_lm.utils.save_model(tmp_path / "mlx", model)
    mlx_lm.utils.save_config(config, tmp_path / "mlx" / "config.json")
    return tmp_path / "mlx"


def some(*names):
    return [pytest.param(*name, marks=pytest.mark.families) for name in names]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Gemma 3", "gemma3_text"),
        ("Qwen2-VL", "qwen2"),
        ("Granite", "granite"),
        *some(("Mistral 3", "mistral"), ("Qwen3-VL", "qwen3"), ("Gemma 4", "gemma4_text"), ("SmolLM3", "smollm3")),
        *some(("OLMo 3", "olmo3"), ("EXAONE 4", "exaone4"), ("SeedOss", "seed_oss"), ("Hunyuan", "hunyuan_v1_dense")),
        *some(("Ministral3", "ministral3"), ("Phi-MoE", "phimoe"), ("ExaoneMoe", "exaone_moe"), ("Mellum", "mellum")),
        *some(("SolarOpen", "solar_open"), ("MiniMaxM2", "minimax_m2"), ("AfmoeForCausalLM", "afmoe")),
    ],
)
def test_a_model_opens_with_the_logits_of_mlx_lm(name, kind, tmp_path):
    theirs = converted(tmp_path, name)
    source = read_model(theirs)
    assert source.config["model_type"] == kind
    assert not any("language_model" in path for path in (*source.weights, *source.tensors))
    to_artifact(source, tmp_path / "artifact")
    wanted = np.array(mlx_lm.utils.load_model(theirs)[0](mx.array(TOKENS)).astype(mx.float32))
    for engine in ("torchao", "mlx"):
        model = qkit.load(tmp_path / "artifact", backend=engine)
        assert np.abs(qkit.backend(engine).logits(model, TOKENS) - wanted).max() <= 3e-6 * np.abs(wanted).max()
    assert any("weights are decoded" in note for note in make_plan(theirs, qkit.recipe("int4-g32")).notes)


def test_towers_and_two_tensors_of_one_name_are_refused(tmp_path):
    theirs = converted(tmp_path, "Gemma 3")
    held = {name: np.array(array) for name, array in read_folder(theirs)[0].items()}
    for more, says in (
        (
            "vision_tower.patch.weight",
            r"vision_tower\.patch\.weight is no part of the language model.*convert the model",
        ),
        ("model.norm.weight", r"model\.norm\.weight is no part of the language model"),
    ):
        for file in theirs.glob("*.safetensors*"):
            file.unlink()
        save_file({**held, more: np.ones(4, np.float32)}, theirs / "model.safetensors")
        for reader in (read_model, lambda folder: make_plan(folder, qkit.recipe("int4-g32"))):
            with pytest.raises(qkit.ArtifactError, match=says):
                reader(theirs)
