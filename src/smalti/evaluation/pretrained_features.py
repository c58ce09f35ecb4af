"""Pretrained feature networks: Inception-v3 of the FID convention, DINOv2, CLIP. From local files or the hub.

How each reads a picture is part of its convention, and of its fingerprint. Grey pictures are repeated to 3 channels.
inception   bytes 0 .. 255, bilinear to 299 x 299 as TensorFlow 1 did, without antialiasing (Heusel et al. 2017; Parmar
            et al. 2022 show what that costs; it is what published FIDs were measured with)
dinov2      bicubic with antialiasing to 224 x 224, ImageNet's mean and deviation; the class token (Stein et al. 2023)
clip        bicubic with antialiasing, shorter side to the model's size, the middle square, CLIP's mean and deviation;
            the projected image embedding, not normalised (Radford et al. 2021)
"""

import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.conditioning.pretrained import TextModel, load_text_model, text_model_folder
from smalti.data.fingerprint import fingerprint
from smalti.data.rows import to_bytes
from smalti.errors import UserError, unknown_name
from smalti.evaluation.cards import Card, Drawing, make_card
from smalti.evaluation.features import FeatureNetwork, NamedFeatures, extractor_of, network_features, reference_of
from smalti.evaluation.intervals import resampled_mean
from smalti.evaluation.measuring import DataRows
from smalti.evaluation.metrics import METRICS
from smalti.interop.files import read_pickle, read_safetensors
from smalti.pipeline import PipelineOutput

DINOV2, CLIP = "facebook/dinov2-large", "openai/clip-vit-large-patch14"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_DINOV2_SIDE = 224


def pretrained_feature_network(name: str, weights: str | None = None) -> FeatureNetwork:
    """inception, dinov2 or clip, with weights from a file, a folder or the hub; None for the published ones.

    Raises UserError for another name, and where the weights are not to be had, with what to do without a network.
    """
    if name not in _LOADERS:
        raise unknown_name("feature network", name, _LOADERS)
    network: FeatureNetwork = _LOADERS[name](weights)
    return network


def three_channels(images: Tensor) -> Tensor:
    """Pictures [batch, 1 or 3, height, width] with 3 channels."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def prepared(images: Tensor, size: tuple[int, int], crop: int | None, normal: Any) -> Tensor:
    """Pictures in [-1, 1] as bytes, resized to size (bicubic, antialiased), their middle cut out, normalised."""
    unit = to_bytes(three_channels(images)).float() / 255
    resized = F.interpolate(unit, size, mode="bicubic", antialias=True).clamp(0, 1)
    if crop is not None:
        top, left = (resized.shape[-2] - crop) // 2, (resized.shape[-1] - crop) // 2
        resized = resized[..., top : top + crop, left : left + crop]
    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in normal)
    return (resized - mean) / deviation


def _inception(weights: str | None) -> NamedFeatures:
    """torch-fidelity's port of the network that FIDs are measured with: its 2048 pooled features."""
    path = None if weights is None else Path(weights).expanduser()
    file = io.BytesIO()
    if path is not None:
        if not path.is_file():
            raise UserError(f"weights={weights!r}: there is no such file; {_INCEPTION_FILE}")
        # Read as tensors only and handed on: torch-fidelity would run whatever a pickle holds.
        torch.save(read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path), file)
        file.seek(0)
    try:
        module = _inception_class()("inception", ["2048"], feature_extractor_weights_path=path and file)
    except OSError as error:  # of the download
        raise UserError(f"Inception's weights cannot be fetched ({_first_line(error)}): {_INCEPTION_FILE}") from None
    except RuntimeError as error:  # of load_state_dict
        raise UserError(f"weights={weights!r} are not Inception's: {_first_line(error)}; {_INCEPTION_FILE}") from None

    def compute(images: Tensor) -> Tensor:
        features: Tensor = module(to_bytes(three_channels(images)))[0]
        return features

    return network_features("inception", 2048, module, "bytes, bilinear to 299 x 299 like TensorFlow 1", compute)


_INCEPTION_FILE = (
    "give --weights FILE with torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or take --features judge"
)


def _inception_class() -> Any:
    """torch-fidelity's FeatureExtractorInceptionV3. Raises UserError where the package is not installed."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    found = importlib.util.find_spec("torch_fidelity") if "torch_fidelity" not in sys.modules else None
    if found is None and "torch_fidelity" not in sys.modules:
        raise UserError("features=inception needs torch-fidelity: pip install --no-deps torch-fidelity")
    try:
        return importlib.import_module(name).FeatureExtractorInceptionV3
    except ImportError:
        assert found is not None
    # The package imports torchvision for its other networks, which this one does without: the module is imported from
    # the same folder with an empty package in its place, which is taken away again.
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(found.submodule_search_locations or ())
    _forget_torch_fidelity()
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module(name).FeatureExtractorInceptionV3
    finally:
        _forget_torch_fidelity()


def _forget_torch_fidelity() -> None:
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        del sys.modules[loaded]


def _dinov2(weights: str | None) -> NamedFeatures:
    import transformers
    from safetensors import SafetensorError

    source = weights or DINOV2
    how = _offline(DINOV2)
    try:
        folder = text_model_folder(source, "weights")
        dinov2: Any = transformers.Dinov2Model
        model, loading = dinov2.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"features=dinov2: {source!r} is not to be had ({_first_line(error)}); {how}") from None
    wrong = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if wrong:
        raise UserError(f"features=dinov2: {source!r} lacks {len(wrong)} tensors, the first is {wrong[0]}; {how}")
    model = model.eval().requires_grad_(False)

    def compute(images: Tensor) -> Tensor:
        pixels = prepared(images, (_DINOV2_SIDE, _DINOV2_SIDE), None, _IMAGENET)
        features: Tensor = model(pixel_values=pixels).pooler_output
        return features

    return network_features("dinov2", model.config.hidden_size, model, "bytes, antialiased bicubic to 224", compute)


@dataclass(frozen=True)
class ClipFeatures:
    """CLIP's image embeddings as features, and its text embeddings. As FeatureNetwork."""

    loaded: TextModel
    fingerprint: str
    name: str = "clip"

    @property
    def width(self) -> int:
        """Of an embedding."""
        return int(self.loaded.model.config.projection_dim)

    def __call__(self, images: Tensor) -> Tensor:
        """Image embeddings float32 [batch, width], not normalised."""
        model, side = self.loaded.model, int(self.loaded.model.config.vision_config.image_size)
        height, width = images.shape[-2:]
        scale = side / min(height, width)
        size = (max(side, round(height * scale)), max(side, round(width * scale)))
        pooled = model.vision_model(pixel_values=prepared(images, size, side, _CLIP)).pooler_output
        embeddings: Tensor = model.visual_projection(pooled)
        return embeddings

    @torch.inference_mode()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings float32 [prompts, width], not normalised; a prompt is cut at the model's length."""
        model = self.loaded.model
        longest = int(model.config.text_config.max_position_embeddings)
        tokens = self.loaded.tokens(prompts, longest, "longest")
        pooled = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        embeddings: Tensor = model.text_projection(pooled)
        return embeddings


def _clip(weights: str | None) -> ClipFeatures:
    source = weights or CLIP
    try:
        loaded = load_text_model("CLIPModel", source, "weights", "float32", "cpu")
    except UserError as error:
        raise UserError(f"features=clip: {error}; {_offline(CLIP)}") from None
    preparation = "clip; bytes, antialiased bicubic, middle square"
    return ClipFeatures(loaded, fingerprint(preparation, loaded.model.state_dict()))


@torch.inference_mode()
def clip_scores(network: ClipFeatures, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """100 max(cosine, 0) of each picture's and its prompt's embedding: float32 [batch].

    Source: Hessel et al. 2021, "CLIPScore", in the scale of torchmetrics (100 in place of the paper's 2.5).
    """
    scores = []
    for start in range(0, len(images), 100):
        part = slice(start, start + 100)
        pictures, texts = network(images[part]), network.embed_text(list(prompts[part]))
        scores.append(100 * F.cosine_similarity(pictures, texts, dim=-1).clamp(min=0))
    return torch.cat(scores)


def clip_card(network: ClipFeatures, output: PipelineOutput, rows: DataRows, drawing: Drawing | None = None) -> Card:
    """The card of the mean CLIP score of pictures and the prompts that they were drawn from."""
    assert output.prompts is not None
    scores = clip_scores(network, output.tensor.cpu(), output.prompts).double().numpy()
    estimate = METRICS["clip_score"].estimate(resampled_mean(np.asarray(scores)))
    reference = reference_of(f"training rows of {rows.origin}, whose prompts were drawn", rows.training, 0)
    return make_card("clip_score", estimate, len(scores), reference, extractor_of(network), drawing)


def _offline(published: str) -> str:
    return (
        f"without a network: `hf download {published} --local-dir DIR` elsewhere and --weights DIR, or --features judge"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_LOADERS: dict[str, Any] = {"inception": _inception, "dinov2": _dinov2, "clip": _clip}
