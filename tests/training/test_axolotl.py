"""axolotl loads the plugin, validates its block, and trains a model on the grid; skipped where axolotl is not installed."""

import json
import os

import numpy as np
import pytest
from models import TOKENS, make

import qkit

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # before the import: it would report to its makers
pytest.importorskip("axolotl", reason="axolotl is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of axolotl's many libraries

PLUGIN = "qkit.integrations.axolotl.QkitPlugin"


def config(path, block, **more):
    import yaml

    make(path / "model", "llama")
    known = json.loads((path / "model/tokenizer_config.json").read_text())
    words = list(json.loads((path / "model/tokenizer.json").read_text())["model"]["vocab"])
    (path / "model/tokenizer_config.json").write_text(
        json.dumps({**known, "eos_token": words[0], "pad_token": words[0]})
    )
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} squared is {i * i}"}) + "\n" for i in range(64)))
    table = {
        "base_model": str(path / "model"), "plugins": [PLUGIN], "qkit": block, "output_dir": str(path / "out"),
        "datasets": [{"path": str(path / "rows.jsonl"), "ds_type": "json", "type": "completion"}],
        "sequence_len": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3,
        "learning_rate": 5e-3, "optimizer": "adamw_torch", "lr_scheduler": "constant", "bf16": False, "fp16": False,
        "tf32": False, "dataset_prepared_path": str(path / "prepared"), "save_strategy": "no", "val_set_size": 0,
        "special_tokens": {"pad_token": words[0]}, "dataset_num_proc": 1, "sample_packing": False,
        "gradient_checkpointing": False, **more,
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(table))
    return str(path / "config.yaml")


def test_axolotl_trains_on_the_grid_and_the_plugin_writes_the_artifact(tmp_path, monkeypatch):
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = load_cfg(config(tmp_path, {"recipe": "int4-g32"}))
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    engine = qkit.backend("torchao")
    opened = qkit.load(tmp_path / "out/qkit", backend="torchao")
    masters = {
        one.path: one.module for one in qkit.backend("torchao").layers(qkit.load(tmp_path / "out", backend="torchao"))
    }
    layers = [one for one in engine.layers(opened) if one.stage == "converted"]
    assert len(layers) == 14
    want = {one.path: qkit.quantize(engine.to_numpy(masters[one.path].weight), one.rule.weight).codes for one in layers}
    assert sum(int((engine.to_numpy(engine.unpack(one.module).codes) != want[one.path]).sum()) for one in layers) == 0
    before = qkit.convert(qkit.load(tmp_path / "model", backend="torchao"), "int4-g32")
    assert not np.array_equal(engine.logits(opened, TOKENS), engine.logits(before, TOKENS))
    assert [one for one in trainer.callback_handler.callbacks if type(one).__name__ == "QatCallback"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"recipe": "int4-g33"}, "int4-g33"),
        ({"recipe": "int4-g32", "intervall": 3}, "intervall"),
        ({"recipe": "int4-g32", "start": 1, "interval": 4}, "between two refreshes"),
        ({}, "recipe"),
    ],
)
def test_axolotl_refuses_a_wrong_block_by_name(tmp_path, block, message):
    from axolotl.cli.config import load_cfg

    with pytest.raises(Exception, match=message):
        load_cfg(config(tmp_path, block))


def test_a_second_quantizer_is_refused_before_the_model_is_loaded():
    from qkit.integrations.axolotl import QkitPlugin

    with pytest.raises(qkit.RecipeError, match="qat quantizes the model, and so does qkit"):
        QkitPlugin().pre_model_load({"qat": {"weight_dtype": "int4"}, "qkit": {"recipe": "int4-g32"}})
