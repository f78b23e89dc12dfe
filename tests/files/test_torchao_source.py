"""Models that transformers saved with torchao's tensors: every value is that of torchao's own decoder."""

import json
from functools import cache

import numpy as np
import pytest
from foreign import told
from models import make

import qkit
from qkit.exchange.import_model import read_model, to_artifact
from qkit.formats.packed import unpack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
quantization = pytest.importorskip("torchao.quantization")


@cache
def ways():
    """By name: a class of settings, and the grid that qkit reads."""
    grouped, intx = quantization.PerGroup(32), quantization.IntxWeightOnlyConfig
    asymmetric = {"mapping_type": quantization.MappingType.ASYMMETRIC}
    return {
        "int8": (quantization.Int8WeightOnlyConfig(), "int8-row-stored"),
        "int4": (intx(weight_dtype=torch.int4, granularity=grouped), "int4-g32-stored"),
        "int4 zeros": (intx(weight_dtype=torch.int4, granularity=grouped, **asymmetric), "int4-g32-stored-zeros"),
        "int3": (intx(weight_dtype=torch.int3, granularity=quantization.PerAxis(0)), "int3-row-stored"),
        "int7": (intx(weight_dtype=torch.int7, granularity=grouped), "int8-g32-stored"),
        "float8": (quantization.Float8WeightOnlyConfig(), "e4m3-row-stored"),
    }


def saved(folder, name, dtype="bfloat16"):
    """A directory of transformers and torchao, and the weights that torchao decodes."""
    make(folder / "float", "llama", dtype=dtype)
    config = transformers.TorchAoConfig(ways()[name][0])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=config, dtype="auto"
    )
    model.save_pretrained(folder / "m")
    return folder / "m", {
        path: one.weight.dequantize() for path, one in model.named_modules() if path.endswith("_proj")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["int8", "int4", "int4 zeros", "int3", "int7", "float8"])
def test_every_value_is_that_of_torchao(name, dtype, tmp_path):
    folder, want = saved(tmp_path, name, dtype)
    source = read_model(folder)
    assert {str(one.rule.weight) for one in source.weights.values()} == {ways()[name][1]}
    assert source.weights.keys() == want.keys()
    for path, values in want.items():
        made = qkit.dequantize(unpack(source.weights[path].read()))
        assert np.array_equal(made.astype(np.float32), values.float().numpy()), path
    to_artifact(source, tmp_path / "own")
    assert read_model(tmp_path / "own").digest() == source.digest()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"_type": "Int4WeightOnlyConfig", "_data": {}},
            "quant_type is Int4WeightOnlyConfig: of torchao's, qkit reads",
        ),
        ({"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {}}, "quant_type is Int8DynamicActivation"),
        ("int4_weight_only", 'quant_type is "int4_weight_only": want settings of torchao 0.14'),
        ({"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_data": "int3"}}}, "codes are no integers of 3"),
        (
            {"_type": "IntxWeightOnlyConfig", "_data": {"intx_packing_format": {"_data": "OPAQUE"}}},
            "IntxWeightOnlyConfig in the format OPAQUE",
        ),
    ],
)
def test_other_settings_are_refused_by_name(change, said, tmp_path):
    folder, _ = saved(tmp_path, "int8")
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    value = change if isinstance(change, str) else {"default": change}
    told(folder, quantization_config={**stated, "quant_type": value})
    with pytest.raises(qkit.ArtifactError, match=said):
        to_artifact(read_model(folder), tmp_path / "own")
