"""The law of serving, for tests of every device: a converted layer has the codes, and computes as the prepared one did."""

import torch

import qkit

INPUTS, OUTPUTS = 4096, 512  #: so long rows that outputs are far below the sums of magnitudes, and so is their rounding
WITHIN = 1e-3  #: of abs(x) @ abs(w)


def serve(recipe, device, rows):
    """A layer in bfloat16 of the recipe's last rule, converted, after its outputs were compared with those of the prepared one.

    Returns:
        The state of the layer in `qkit.coverage`, and the largest difference relative to abs(x) @ abs(w).
    """
    engine, rule = qkit.backend("torchao"), qkit.recipe(recipe).rules[-1]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS)).to(device, torch.bfloat16)
    weight = model[0].weight.detach().clone()
    model = qkit.prepare(model, qkit.Recipe("last", (rule,))).eval()
    inputs = [torch.randn(count, INPUTS, device=device, dtype=torch.bfloat16) for count in rows]
    with torch.no_grad():
        if rule.range != "dynamic":
            with qkit.calibrating(model):
                model(inputs[-1])
        before = [model(x) for x in inputs]
        model = qkit.convert(model)
        q = engine.unpack(model[0])
        if rule.scales != "learned":
            for name, part in qkit.quantize(weight, rule.weight).parts().items():
                assert torch.equal(q.parts()[name], part), name
        values = qkit.dequantize(q).float().abs()
        far = [
            ((y.float() - model(x).float()).abs() / (x.float().abs() @ values.T)).max().item()
            for x, y in zip(inputs, before, strict=True)
        ]
    return qkit.coverage(model).rows[0].state, max(far)
