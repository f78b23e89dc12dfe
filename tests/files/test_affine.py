"""Models that mlx-lm quantized, as mlx-community has them: read as they are, opened on both engines, given back byte by byte."""

import json
from dataclasses import replace

import numpy as np
import pytest
from models import make

import qkit
from qkit import reference
from qkit.exchange.diff import compare
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.export_model import export_dense, export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.formats.packed import unpack
from qkit.storage.arrays import read_folder

mlx_lm = pytest.importorskip("mlx_lm")
mx = pytest.importorskip("mlx.core")

#: Arguments of `mlx_lm.convert`.
MODES = {
    **{f"{bits} bits": {"q_bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    **{f"g{size}": {"q_group_size": size} for size in (32, 128)},
    **{name: {"quant_predicate": name} for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")},
    **{mode: {"q_mode": mode} for mode in ("mxfp4", "nvfp4", "mxfp8")},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
}
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss")


def converted(tmp_path, *, family="llama", dtype="bfloat16", **options):
    """A model of mlx-lm's own `convert -q`."""
    folder = make(tmp_path / "float", family, dtype=dtype)
    if family in MIXTURES:  # mlx-lm does not open the configurations that transformers 5 writes
        export_mlx(read_model(folder), tmp_path / "float mlx")
        folder = tmp_path / "float mlx"
    defaults = {"q_bits": None, "q_group_size": None} if "q_mode" in options else {}
    mlx_lm.convert(str(folder), str(tmp_path / "mlx"), quantize=True, dtype=dtype, **{**defaults, **options})
    return tmp_path / "mlx"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_mlx_lm_goes_into_an_artifact_and_back_byte_by_byte(mode, tmp_path):
    """And every value is that of `mx.dequantize` in float32."""
    theirs = converted(tmp_path, **MODES[mode])
    to_artifact(read_model(theirs), tmp_path / "artifact")
    mine = read_model(tmp_path / "artifact")
    assert mine.digest() == read_model(theirs).digest()
    export_mlx(mine, tmp_path / "back")
    before, after = (dict(read_folder(folder)[0]) for folder in (theirs, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        assert array.tobytes() == after[name].tobytes(), name
    stated = json.loads((theirs / "config.json").read_text())["quantization"]
    again = json.loads((tmp_path / "back" / "config.json").read_text())["quantization"]
    for path, held in mine.weights.items():
        q = replace(unpack(held.read()), dtype="float32")
        assert np.array_equal(reference.dequantize(q), decoded_by_mlx(before, path, stated)), path
        assert options_of(path, again) == options_of(path, stated)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"dtype": "float16", "q_group_size": 32}, {"Q4_1": 14}),
        ({"dtype": "float16", "q_group_size": 32, "q_bits": 5}, {"Q5_1": 14}),
        ({"dtype": "float16", "q_group_size": 64}, {"Q4_1": 14}),
        ({"dtype": "bfloat16", "q_group_size": 32}, {"Q4_1": 14}),  # their scales are float16 numbers, too
        ({"dtype": "float16", "q_group_size": 32, "q_bits": 3}, None),
    ],
    ids=str,
)
def test_gguf_holds_scales_and_biases_that_are_float16_numbers_or_the_layer_is_named(options, kinds, tmp_path):
    gguf = pytest.importorskip("gguf")
    source, file = read_model(converted(tmp_path, **options)), tmp_path / "m.gguf"
    if kinds is None:
        with pytest.raises(qkit.ArtifactError, match=r"(down_proj|embed_tokens|lm_head)[^:]*: .*export --to dense"):
            export_gguf(source, file)
        return
    found = export_gguf(source, file).kinds
    assert found.keys() == kinds.keys()
    stored = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(file).tensors}
    want = reference.dequantize(replace(unpack(source.weights["model.layers.0.mlp.up_proj"].read()), dtype="float32"))
    assert np.array_equal(stored["blk.0.ffn_up.weight"], want)


def decoded_by_mlx(tensors, path, stated):
    """The values of a weight in float32: scales and biases are cast first."""
    parts = [tensors[f"{path}.{name}"] for name in ("weight", "scales", "biases") if f"{path}.{name}" in tensors]
    words, *more = (mx.array(part if part.dtype.kind == "u" else part.astype(np.float32)) for part in parts)
    return np.array(mx.dequantize(words, *more, dtype=mx.float32, **options_of(path, stated)))


def options_of(path, stated):
    """Arguments of `mx.dequantize`; mlx-lm writes null for its default of a group size."""
    table = stated.get(path) or stated
    return {"group_size": table["group_size"] or 64, "bits": table["bits"], "mode": table.get("mode", "affine")}


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
@pytest.mark.parametrize("mode", ["4 bits", "3 bits", "mixed_3_6", "float16", "float32", "nvfp4", "mxfp4"])
def test_an_engine_opens_them_with_the_values_of_the_law(mode, engine, tmp_path):
    theirs = converted(tmp_path, **MODES[mode])
    source = read_model(theirs)
    to_artifact(source, tmp_path / "artifact")
    export_dense(source, tmp_path / "dense")
    model, dense = (qkit.load(tmp_path / name, backend=engine) for name in ("artifact", "dense"))
    mine = qkit.backend(engine)
    layers = {layer.path: layer for layer in mine.layers(model)}
    for path, held in source.weights.items():
        q = mine.unpack(layers[path].module).map(mine.to_numpy)
        want = unpack(held.read())
        assert q.grid == want.grid
        for name, part in want.parts().items():
            assert q.parts()[name].dtype == part.dtype
            assert np.array_equal(q.parts()[name], part), (path, name)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    made, wanted = (mine.logits(one, tokens) for one in (model, dense))
    tolerance = 1e-6 if MODES[mode].get("dtype") == "float32" else 3e-2  # matrix products in 16 bits
    assert np.abs(made - wanted).max() <= tolerance * np.abs(wanted).max()
    qkit.save(model, tmp_path / "again")
    assert read_model(tmp_path / "again").digest() == source.digest()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", *MIXTURES])
def test_families_tied_heads_and_stacks_of_experts_too(family, tmp_path):
    theirs = converted(tmp_path, family=family)
    source = read_model(theirs)
    to_artifact(source, tmp_path / "artifact")
    assert read_model(tmp_path / "artifact").digest() == source.digest()
    export_mlx(read_model(tmp_path / "artifact"), tmp_path / "back")
    before, after = (dict(read_folder(folder)[0]) for folder in (theirs, tmp_path / "back"))
    decoded = {name.rpartition(".")[0] for name in before.keys() - after.keys()}
    assert bool(decoded) == any("routers" in note for note in source.notes)
    for name, array in before.items():
        if name.rpartition(".")[0] not in decoded:
            assert array.tobytes() == after[name].tobytes(), name
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    made = []
    for engine in ("torchao", "mlx"):
        model = qkit.load(tmp_path / "artifact", backend=engine)
        made.append(qkit.backend(engine).logits(model, tokens))
        qkit.save(model, tmp_path / f"again {engine}", source=tmp_path / "artifact")
        assert read_model(tmp_path / f"again {engine}").digest() == source.digest()
    assert np.abs(made[0] - made[1]).max() <= 5e-2 * np.abs(made[0]).max()  # bfloat16 products


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("mode", "scales"),
    [
        ("4 bits", "learned"),
        ("mixed_3_6", "learned"),
        ("float16", "learned"),
        ("float32", "learned"),
        ("4 bits", "stored"),
    ],
)
def test_an_adapter_on_such_a_base_merges_into_codes_scales_and_biases_without_a_gap(
    mode, scales, kind, engine, tmp_path
):
    to_artifact(read_model(converted(tmp_path, **MODES[mode])), tmp_path / "artifact")
    model, mine = qkit.load(tmp_path / "artifact", backend=engine), qkit.backend(engine)
    before = {layer.path: numpy_of(mine, layer) for layer in mine.layers(model) if layer.rule}
    model = qkit.adapt(model, qkit.Adapter(match=("*_proj",), rank=4, kind=kind, scales=scales))
    untouched = {layer.path: mine.adapter_update(layer.module) for layer in mine.layers(model) if layer.adapter}
    random = np.random.default_rng(3)
    for layer in mine.layers(model):
        if layer.adapter:
            b = random.standard_normal(untouched[layer.path].b.shape).astype(np.float32) * 0.05
            set_parameter(layer.module, "b", b, engine)
            if scales == "learned":
                gains = random.standard_normal(untouched[layer.path].gains.shape).astype(np.float32) * 0.05
                set_parameter(layer.module, "gains", gains, engine)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    adapted = mine.logits(model, tokens)
    model = qkit.merge(model)
    assert np.array_equal(mine.logits(model, tokens), adapted)
    changed = 0
    for layer in mine.layers(model):
        if layer.rule:
            q, first = numpy_of(mine, layer), before[layer.path]
            assert q.grid == first.grid
            for name, part in first.parts().items():
                same = np.array_equal(q.parts()[name], part)
                changed += name == "codes" and not same
                moved = ("codes", "scales", "biases") if scales == "learned" else ("codes",)
                assert same == (name not in moved or layer.path not in untouched), (layer.path, name)
    assert changed == len(untouched)
    qkit.save(model, tmp_path / "merged", source=tmp_path / "artifact")
    again = qkit.load(tmp_path / "merged", backend=engine)
    assert np.array_equal(mine.logits(again, tokens), adapted)
    export_mlx(read_model(tmp_path / "merged"), tmp_path / "exported")
    theirs, _ = mlx_lm.load(str(tmp_path / "exported"))
    made = np.array(theirs(mx.array(tokens)).astype(mx.float32))
    assert np.abs(made - adapted).max() <= 5e-2 * np.abs(adapted).max()  # bfloat16 products


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
def test_an_adapter_that_does_nothing_changes_no_code(engine, tmp_path):
    to_artifact(read_model(converted(tmp_path)), tmp_path / "artifact")
    model, mine = qkit.load(tmp_path / "artifact", backend=engine), qkit.backend(engine)
    before = {layer.path: numpy_of(mine, layer).codes for layer in mine.layers(model) if layer.rule}
    model = qkit.merge(qkit.adapt(model, qkit.Adapter(match=("*_proj",), rank=4)))
    for layer in mine.layers(model):
        if layer.rule:
            assert np.array_equal(numpy_of(mine, layer).codes, before[layer.path])


def numpy_of(engine, layer):
    return engine.unpack(layer.module).map(engine.to_numpy)


def set_parameter(module, name, array, engine):
    """Puts `array` in the place of B or of the gains of an adapted layer."""
    if engine == "mlx":
        module[f"lora_{name}"] = mx.array(array.T if name == "b" else array)
    else:
        parameter = {"b": "lora_B", "gains": "lora_gains"}[name]
        getattr(module, parameter).data.copy_(pytest.importorskip("torch").from_numpy(array))


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_affine_experts_merge_into_codes_alone_without_a_gap(kind, engine, tmp_path):
    to_artifact(read_model(converted(tmp_path, family="qwen3_moe")), tmp_path / "artifact")
    model, mine = qkit.load(tmp_path / "artifact", backend=engine), qkit.backend(engine)
    model = qkit.adapt(model, qkit.Adapter(match=("*.experts", "*.experts.*"), rank=4, kind=kind))
    random = np.random.default_rng(3)
    for layer in mine.layers(model):
        if layer.adapter:
            draw_b(layer.module, random, engine)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    adapted = mine.logits(model, tokens)
    model = qkit.merge(model)
    made = mine.logits(model, tokens)
    assert (
        np.abs(made - adapted).max() <= (0 if engine == "torchao" else 2e-2) * np.abs(adapted).max()
    )  # gather_qmm's order
    qkit.save(model, tmp_path / "merged", source=tmp_path / "artifact")
    rows = list(compare(read_model(tmp_path / "artifact"), read_model(tmp_path / "merged")))
    assert sum(row.codes for row in rows)
    assert not any(row.scales or row.values for row in rows)
    assert all(".experts." in row.name for row in rows if row.codes)


def draw_b(module, random, engine):
    """Numbers in the place of the zeros of all B in a block of experts."""
    named = module.named_modules() if engine == "mlx" else [("", module)]
    for _, one in named:
        if engine == "mlx":
            if "lora_b" in one:
                one.lora_b = mx.array(random.standard_normal(one.lora_b.shape).astype(np.float32) * 0.05)
        else:
            for name, parameter in one.named_parameters():
                if name.endswith("lora_B"):
                    drawn = random.standard_normal(tuple(parameter.shape)).astype(np.float32) * 0.05
                    parameter.data.copy_(pytest.importorskip("torch").from_numpy(drawn))
