"""What another engine is given: merged weights, without a copy of every difference on the device."""

import weakref

import torch

from pipeline.generation import handover


def test_one_difference_at_a_time_is_on_the_device(adapted, monkeypatch):
    """While an adapter is merged, the differences of the layers before are gone; and all of them were added."""
    alive, delta = [], handover._delta

    def watched(name: str, module: object) -> torch.Tensor:
        assert not [ref for ref in alive if ref() is not None]
        found = delta(name, module)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(handover, "_delta", watched)
    weights = handover.merged_weights(adapted)
    layers = {n: m for n, m in adapted.model.get_base_model().named_modules() if hasattr(m, "base_layer")}
    assert len(alive) == len(layers) > 1
    for name, module in layers.items():
        with torch.no_grad():
            lora = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            expected = module.base_layer.weight + lora
        assert torch.allclose(weights[f"{name}.weight"], expected, atol=1e-6)
        assert not torch.equal(weights[f"{name}.weight"], module.base_layer.weight)
