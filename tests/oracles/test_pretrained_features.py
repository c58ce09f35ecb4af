"""Pretrained feature networks with random weights in local files: against their own libraries, and what is refused."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fidelity_libraries import import_without_torchvision
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from smalti.data.rows import to_bytes
from smalti.errors import UserError
from smalti.evaluation.features import features_of
from smalti.evaluation.pretrained_features import clip_scores, prepared, pretrained_feature_network

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 10, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "red": 4, "blue": 5, "square": 6, "<unk>": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def by_pillow(picture, size, mean, deviation):
    """As the published pipelines prepare a picture: Pillow's antialiased bicubic."""
    image = Image.fromarray(to_bytes(picture).permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    array = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (array - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def test_pictures_are_resized_as_pillow_does_smaller_and_larger():
    """Pillow rounds to bytes between its two passes and after: within two levels of 255, over ImageNet's deviation."""
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    smooth = F.interpolate(torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 - 1, (300, 260),
                           mode="bicubic").clamp(-1, 1)  # fmt: skip
    for size in ((224, 224), (64, 64), (400, 400)):
        ours = prepared(smooth, size, None, (mean, deviation))[0]
        assert (ours - by_pillow(smooth[0], size[::-1], mean, deviation)).abs().max() < 2 / 255 / 0.22


def test_dinov2_features_are_the_models_class_token(dinov2, pictures):
    network = pretrained_feature_network("dinov2", str(dinov2))
    assert (network.name, network.width) == ("dinov2", 16)
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.stack([by_pillow(picture, (224, 224), mean, deviation) for picture in pictures])
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.from_numpy(features_of(network, pictures)).float() == pytest.approx(expected, abs=0.02)


def test_grey_pictures_are_repeated(dinov2, pictures):
    network = pretrained_feature_network("dinov2", str(dinov2))
    grey = pictures[:, :1]
    assert features_of(network, grey) == pytest.approx(features_of(network, grey.repeat(1, 3, 1, 1)))


def test_clip_features_and_scores_are_the_models(clip, pictures):
    network = pretrained_feature_network("clip", str(clip))
    assert (network.name, network.width) == ("clip", 12)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    prompts = ["a red square", "blue square", "a"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    # The shorter side of 20 x 30 becomes 16, the longer 24; the middle 16 columns are kept.
    pixels = torch.stack([by_pillow(p, (24, 16), mean, deviation)[:, :, 4:20] for p in pictures])
    with torch.inference_mode():
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        ours = network.embed_text(prompts)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(-1).clamp(min=0)
    assert F.normalize(ours, dim=-1) == pytest.approx(out.text_embeds, abs=1e-5)
    images = F.normalize(torch.from_numpy(features_of(network, pictures)).float(), dim=-1)
    assert images == pytest.approx(out.image_embeds, abs=0.02)
    assert clip_scores(network, pictures, prompts) == pytest.approx(expected, abs=2.0)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights in a file; None of its code is run at reading."""
    try:
        (module,) = import_without_torchvision("torch_fidelity.feature_extractor_inceptionv3")
    except ModuleNotFoundError:
        pytest.skip("torch-fidelity is not installed")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    cls = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    load = torch.nn.Module.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(cls, "load_state_dict", lambda self, state: load(self, state, strict=False))
        network = cls("reference", ["2048"])
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_is_torch_fidelitys(inception, pictures):
    reference, path = inception
    network = pretrained_feature_network("inception", str(path))
    assert (network.name, network.width) == ("inception", 2048)
    grey = pictures[:1, :1]
    with torch.inference_mode():
        expected = reference(to_bytes(pictures[:1]))[0]
    assert torch.from_numpy(features_of(network, pictures[:1])).float() == pytest.approx(expected, abs=1e-5)
    assert features_of(network, grey).shape == (1, 2048)


def test_inception_is_had_without_torchvision(inception):
    """In a process of its own, where nobody put a stub in torchvision's place."""
    import subprocess
    import sys

    program = (
        "import sys; from smalti.evaluation.pretrained_features import pretrained_feature_network as load;"
        f"network = load('inception', {str(inception[1])!r});"
        "print(network.width, network.fingerprint[:8], 'torch_fidelity' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert said[:2] == ["2048", pretrained_feature_network("inception", str(inception[1])).fingerprint[:8]]
    # Where torchvision is installed the package is imported as any other; else nothing of it is left behind.
    assert said[2] == str(importlib.util.find_spec("torchvision") is not None)


def test_other_weights_and_names_are_refused(inception, dinov2, clip, tmp_path):
    wrong = tmp_path / "wrong.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, wrong)
    with pytest.raises(UserError, match=r"wrong\.pth' are not Inception's"):
        pretrained_feature_network("inception", str(wrong))
    with pytest.raises(UserError, match=r"features=dinov2: .*lacks .* tensors"):
        pretrained_feature_network("dinov2", str(clip))
    with pytest.raises(UserError, match="features=clip: "):
        pretrained_feature_network("clip", str(dinov2))
    with pytest.raises(UserError, match="hf download facebook/dinov2-large --local-dir DIR"):
        pretrained_feature_network("dinov2")
    with pytest.raises(UserError, match="did you mean 'dinov2'"):
        pretrained_feature_network("dino")
