"""LPIPS: official keys, the published file layout, the formula, and what is said when files are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference_metrics as reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.features import lpips
from darkroom.features.weight_files import read_weights

LAYOUT = Path(__file__).parents[1] / "parity" / "layouts" / "kl-f4.json"
FEATURES = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]


def plain_vgg() -> nn.Sequential:
    """torchvision's vgg16().features without its last pooling, written down independently."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in FEATURES:
        if entry == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            assert isinstance(entry, int)
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
            channels = entry
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def published() -> tuple[nn.Sequential, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    vgg = plain_vgg()
    with torch.no_grad():  # keeps activations of order 1 through 13 layers
        for module in vgg:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    features = {f"features.{k}": v for k, v in vgg.state_dict().items()}
    features["classifier.0.weight"] = torch.zeros(1)  # the real file has one; it is not used
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    return vgg, features, heads


def test_official_keys_and_constants() -> None:
    spec = json.loads(LAYOUT.read_text())
    prefix = "loss.perceptual_loss."
    with torch.device("meta"):
        model = lpips.LPIPS()
    ours = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert ours == {k.removeprefix(prefix): v for k, v in spec["layout"].items() if k.startswith(prefix)}
    scaling = lpips.LPIPS().scaling_layer
    for name in ("shift", "scale"):
        expected = spec["derived"][f"{prefix}scaling_layer.{name}"]["value"]
        torch.testing.assert_close(getattr(scaling, name).flatten(), torch.tensor(expected))


def test_published_files_and_formula(
    tmp_path: Path, published: tuple[nn.Sequential, dict[str, Tensor], dict[str, Tensor]]
) -> None:
    vgg, features, heads = published
    assert not lpips.lpips_available(tmp_path)
    torch.save(features, tmp_path / lpips.VGG_FILE)
    torch.save(heads, tmp_path / lpips.LINEAR_FILE)
    assert lpips.lpips_available(tmp_path)
    model = lpips.load_lpips(tmp_path)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=g) * 2 - 1

    expected = torch.zeros(2)
    a, b = ((t - model.scaling_layer.shift) / model.scaling_layer.scale for t in (x, y))
    taps = dict(zip((3, 8, 15, 22, 29), range(5), strict=True))
    with torch.no_grad():
        for i, layer in enumerate(vgg):
            a, b = layer(a), layer(b)
            if i in taps:
                difference = (F.normalize(a, eps=1e-10) - F.normalize(b, eps=1e-10)).square()
                expected += (difference * heads[f"lin{taps[i]}.model.1.weight"]).sum(1).mean((1, 2))
        torch.testing.assert_close(model(x, y), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(model(x, x), torch.zeros(2))
        grey = x[:, :1]
        torch.testing.assert_close(model(grey, y[:, :1]), model(grey.repeat(1, 3, 1, 1), y[:, :1].repeat(1, 3, 1, 1)))


def test_equals_torchmetrics_with_the_published_heads(
    published: tuple[nn.Sequential, dict[str, Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It brings the true linear heads along, in the file format of before torch 1.6; VGG16 is random on both sides."""
    vgg, features, _ = published
    library = reference.metrics_lpips
    monkeypatch.setattr(library, "_get_tv_model_features", lambda name, pretrained: vgg)
    theirs = library._LPIPS(net="vgg")
    heads = read_weights(Path(library.__file__).parent / "lpips_models" / "vgg.pth")
    ours = lpips.lpips_from_published(features, heads)
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 2, 3, 40, 32, generator=g) * 2 - 1
    with torch.no_grad():
        expected = theirs(x, y).flatten()
        assert float(expected.min()) > 0.01
        torch.testing.assert_close(ours(x, y), expected, rtol=1e-4, atol=0)


def test_gradients_reach_the_image_only(published: tuple[nn.Sequential, dict[str, Tensor], dict[str, Tensor]]) -> None:
    model = lpips.lpips_from_published(*published[1:])
    x = torch.zeros(1, 3, 16, 16)
    y = (0.1 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    model(x, y).sum().backward()
    assert y.grad is not None and bool(y.grad.isfinite().all()) and float(y.grad.abs().sum()) > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_missing_and_wrong_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    published: tuple[nn.Sequential, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path / "none"))
    assert lpips.weights_folder() == tmp_path / "none"
    with pytest.raises(DarkroomError, match=r"vgg16-397923af\.pth and vgg\.pth .* into .*none.*DARKROOM_WEIGHTS"):
        lpips.load_lpips()
    monkeypatch.delenv("DARKROOM_WEIGHTS")
    assert lpips.weights_folder() == Path.home() / ".cache" / "darkroom" / "weights"
    _, features, heads = published
    with pytest.raises(DarkroomError, match=r"features\.0\.weight must have shape"):
        lpips.lpips_from_published(heads, features)
    (tmp_path / lpips.VGG_FILE).write_bytes(b"no weights")
    (tmp_path / lpips.LINEAR_FILE).write_bytes(b"no weights")
    with pytest.raises(DarkroomError, match="not a readable weights file"):
        lpips.load_lpips(tmp_path)


def test_images_it_cannot_take() -> None:
    model = lpips.LPIPS()
    with pytest.raises(DarkroomError, match="1 or 3 channels, got 4"):
        model(torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32))
    with pytest.raises(DarkroomError, match="at least 16 pixels"):
        model(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))
