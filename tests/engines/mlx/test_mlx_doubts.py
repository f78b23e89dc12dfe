"""Models of mlx-lm's own loader: a type that nobody has compared with transformers gets a warning by name."""

import warnings

import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
bitnet = pytest.importorskip("mlx_lm.models.bitnet")
from mlx_lm.models import llama  # noqa: E402

import qkit  # noqa: E402
from qkit.errors import FamilyWarning  # noqa: E402

SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
}


@pytest.mark.parametrize("verb", [qkit.prepare, qkit.convert])
def test_a_type_that_is_not_in_the_table_is_named(verb):
    model = bitnet.Model(bitnet.ModelArgs(model_type="bitnet", rope_theta=1e4, **SIZE))
    recipe = qkit.Recipe("r", (qkit.Rule(("*",), "embedding", qkit.Grid("int4", 32)),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qkit.errors.CoverageWarning)
        with pytest.warns(FamilyWarning, match="no model of type 'bitnet' is among those"):
            verb(model, recipe)


def test_a_type_that_mlx_lm_computes_otherwise_is_named():
    model = llama.Model(llama.ModelArgs(model_type="llama", rope_theta=1e4, **SIZE))
    qkit.prepare(model, "int4-g32")  # warns of nothing
    model = llama.Model(llama.ModelArgs(model_type="glm", rope_theta=1e4, **SIZE))
    with pytest.warns(FamilyWarning, match="mlx-lm computes another 'glm' than transformers"):
        qkit.prepare(model, "int4-g32")


@pytest.mark.filterwarnings("error::qkit.errors.FamilyWarning")
def test_a_type_that_qkit_itself_builds_as_transformers_is_not_doubted():
    config = {"model_type": "glm", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **SIZE}
    qkit.prepare(qkit.backend("mlx").build(config), "int4-g32")
