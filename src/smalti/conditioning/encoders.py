"""Frozen text encoders, joined as the published networks take them.

family  pooled                      tokens                                                       mask
sd3     CLIP-L | CLIP-G, projected  [CLIP-L | CLIP-G | 0] (last hidden state but one), then T5   none
flux    CLIP-L, at the end token    T5                                                           none
t5      -                           T5                                                           hides padding
llm     -                           a hidden state of a language model, of a chat by default     hides padding
clip    one CLIP, projected         its last hidden state but one                                none

SD3 and FLUX were trained on T5's padding as it comes, computed and attended to without a mask; PixArt, Z-Image and
Sana were trained with one. Sources: the diffusers pipelines of each, which tests/oracles compares with.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.conditioning.pretrained import Precision, TextModel, load_text_model, padded_tokens
from smalti.conditioning.tiny import TinyTextConfig
from smalti.errors import UserError
from smalti.types import Condition

_SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
_FLUX = "black-forest-labs/FLUX.1-schnell"


def _check_max_tokens(max_tokens: int) -> None:
    if max_tokens < 1:
        raise UserError(f"text.max_tokens={max_tokens} must be at least 1")


@dataclass(frozen=True)
class SD3Text:
    """Stable Diffusion 3's three encoders. Each: a folder, or a name of the hub (see load_text_model).

    t5=None: zeros in place of its tokens, text_width wide. max_tokens: of T5; the CLIPs read 77. clip_skip: layers
    left out before the last but one.
    """

    kind: ClassVar[str] = "sd3"
    clip_l: str = f"{_SD3}/text_encoder"
    clip_g: str = f"{_SD3}/text_encoder_2"
    t5: str | None = f"{_SD3}/text_encoder_3"
    max_tokens: int = 256
    text_width: int = 4096  # read where t5 is none
    clip_skip: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        _check_max_tokens(self.max_tokens)
        if self.clip_skip < 0:
            raise UserError(f"text.clip_skip={self.clip_skip} must be at least 0")


@dataclass(frozen=True)
class FluxText:
    """FLUX.1's two encoders: CLIP-L for the pooled vector, T5 for the tokens. max_tokens: 512 for dev, 256 for
    schnell."""

    kind: ClassVar[str] = "flux"
    clip_l: str = f"{_FLUX}/text_encoder"
    t5: str = f"{_FLUX}/text_encoder_2"
    max_tokens: int = 512
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        _check_max_tokens(self.max_tokens)


@dataclass(frozen=True)
class T5Text:
    """T5 alone. The defaults are PixArt-alpha's (sigma: max_tokens=300); LTX-Video and CogVideoX take case as it is.

    padding_seen: computed and given without a mask, as CogVideoX takes it.
    """

    kind: ClassVar[str] = "t5"
    t5: str = "PixArt-alpha/PixArt-XL-2-1024-MS/text_encoder"
    max_tokens: int = 120
    lower_case: bool = True
    padding_seen: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        _check_max_tokens(self.max_tokens)


@dataclass(frozen=True)
class LLMText:
    """A hidden state of a language model. The defaults are Z-Image's: Qwen3, the last layer but one of a chat.

    hidden_layer: -1 is the last, past its norm. Sana's Gemma-2: chat=False, hidden_layer=-1, max_tokens=300,
    lower_case=True (without its instruction for the language model, which a caption may begin with).
    """

    kind: ClassVar[str] = "llm"
    llm: str = "Tongyi-MAI/Z-Image-Turbo/text_encoder"
    max_tokens: int = 512
    hidden_layer: int = -2
    chat: bool = True
    lower_case: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        _check_max_tokens(self.max_tokens)
        if self.hidden_layer >= 0:
            raise UserError(f"text.hidden_layer={self.hidden_layer} must be below 0: -1 is the last")


@dataclass(frozen=True)
class CLIPText:
    """One CLIP text model with its projection, as aMUSEd takes it."""

    kind: ClassVar[str] = "clip"
    clip: str = "amused/amused-256/text_encoder"
    max_tokens: int = 77
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        _check_max_tokens(self.max_tokens)


FrozenTextConfig = SD3Text | FluxText | T5Text | LLMText | CLIPText
TextConfig = TinyTextConfig | FrozenTextConfig
_SOURCES = ("clip_l", "clip_g", "t5", "llm", "clip")


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to what a network takes. It also counts tokens (captions.CountsTokens)."""

    def __call__(self, captions: Sequence[str]) -> Condition:
        """text_embeds [captions, tokens, width] in float32, with text_mask and pooled_embeds where the family has
        them; one shape whatever the captions say."""
        ...

    @property
    def max_tokens(self) -> int:
        """The most tokens that are read of a caption, by the encoder that reads the most."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the encoders' files and of the options, hexadecimal: equal ones give equal embeddings."""
        ...

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before truncation, by the encoder that reads the most."""
        ...


@dataclass(frozen=True)
class _Encoder:
    """What the families share: config, and the models in the order of the config's fields."""

    config: Any
    models: tuple[TextModel, ...]

    @property
    def max_tokens(self) -> int:
        """The most tokens that are read of a caption, by the encoder that reads the most."""
        return int(self.config.max_tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the encoders' files and of the options, hexadecimal: equal ones give equal embeddings."""
        options = {name: value for name, value in asdict(self.config).items() if name not in _SOURCES}
        digest = hashlib.sha256(json.dumps({"kind": self.config.kind, **options}, sort_keys=True).encode())
        for model in self.models:
            digest.update(model.digest)
        return digest.hexdigest()

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before truncation, by the encoder that reads the most."""
        return self.models[-1].token_counts(self._prepared(captions))

    def _prepared(self, captions: Sequence[str]) -> list[str]:
        return list(captions)


class _SD3Encoder(_Encoder):
    @property
    def max_tokens(self) -> int:
        """T5's, or the CLIPs' where there is no T5."""
        return int(self.config.max_tokens) if self.config.t5 else _clip_tokens(self.models[1])

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Condition:
        """text_embeds [captions, 77 + max_tokens, text_width], pooled_embeds [captions, both CLIPs' widths]."""
        clips = [_clip_states(model, captions, _clip_tokens(model), self.config.clip_skip) for model in self.models[:2]]
        clip_tokens = torch.cat([tokens for tokens, _ in clips], dim=-1)
        if self.config.t5:
            t5_tokens = _t5_with_padding(self.models[2], captions, self.config.max_tokens)
        else:
            t5_tokens = clip_tokens.new_zeros(len(captions), self.config.max_tokens, self.config.text_width)
        missing = t5_tokens.shape[-1] - clip_tokens.shape[-1]
        if missing < 0:
            raise UserError(
                f"text: the CLIPs' tokens are {clip_tokens.shape[-1]} wide together, past T5's {t5_tokens.shape[-1]}"
            )
        return Condition(
            text_embeds=torch.cat([F.pad(clip_tokens, (0, missing)), t5_tokens], dim=1),
            pooled_embeds=torch.cat([pooled for _, pooled in clips], dim=-1),
        )


class _CLIPEncoder(_Encoder):
    @property
    def max_tokens(self) -> int:
        """The config's, or fewer where the CLIP reads no more."""
        return min(int(self.config.max_tokens), _clip_tokens(self.models[0]))

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Condition:
        """text_embeds [captions, max_tokens, width], pooled_embeds [captions, projection's width]."""
        tokens, pooled = _clip_states(self.models[0], captions, self.max_tokens)
        return Condition(text_embeds=tokens, pooled_embeds=pooled)


class _FluxEncoder(_Encoder):
    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Condition:
        """text_embeds [captions, max_tokens, T5's width], pooled_embeds [captions, CLIP's width]: no projection."""
        clip, t5 = self.models
        pooled = clip.model(clip.tokens(captions, _clip_tokens(clip), "max_length").input_ids).pooler_output
        return Condition(
            text_embeds=_t5_with_padding(t5, captions, self.config.max_tokens), pooled_embeds=pooled.float()
        )


class _T5Encoder(_Encoder):
    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Condition:
        """text_embeds [captions, max_tokens, width], zero where text_mask is False; no mask with padding_seen."""
        (t5,), max_tokens = self.models, self.config.max_tokens
        captions = self._prepared(captions)
        if self.config.padding_seen:
            return Condition(text_embeds=_t5_with_padding(t5, captions, max_tokens))
        # Real tokens do not see the padding, so that as much of it as the longest caption needs is enough.
        tokens = t5.tokens(captions, max_tokens, "longest")
        hidden = t5.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        text_embeds, text_mask = padded_tokens(hidden.float(), tokens.attention_mask.bool(), max_tokens)
        return Condition(text_embeds=text_embeds, text_mask=text_mask)

    def _prepared(self, captions: Sequence[str]) -> list[str]:
        return [c.lower().strip() for c in captions] if self.config.lower_case else list(captions)


class _LLMEncoder(_Encoder):
    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Condition:
        """text_embeds [captions, max_tokens, width], zero where text_mask is False."""
        (llm,), max_tokens, layer = self.models, self.config.max_tokens, self.config.hidden_layer
        tokens = llm.tokens(self._prepared(captions), max_tokens, "longest")
        output = llm.model(**_ids_and_mask(tokens), output_hidden_states=layer != -1, use_cache=False)
        hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        text_embeds, text_mask = padded_tokens(hidden.float(), tokens.attention_mask.bool(), max_tokens)
        return Condition(text_embeds=text_embeds, text_mask=text_mask)

    def _prepared(self, captions: Sequence[str]) -> list[str]:
        if self.config.lower_case:
            captions = [caption.lower().strip() for caption in captions]
        if not self.config.chat:
            return list(captions)
        template = self.models[0].tokenizer.apply_chat_template
        return [
            template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for caption in captions
        ]


def _ids_and_mask(tokens: Any) -> dict[str, Tensor]:
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def _clip_tokens(clip: TextModel) -> int:
    return int(min(clip.tokenizer.model_max_length, clip.model.config.max_position_embeddings))


def _clip_states(clip: TextModel, captions: Sequence[str], max_tokens: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """The last hidden state but one (and `skip` more), without the final norm, and the projected end token."""
    input_ids = clip.tokens(captions, max_tokens, "max_length").input_ids
    output = clip.model(input_ids, output_hidden_states=True)
    return output.hidden_states[-2 - skip].float(), output.text_embeds.float()


def _t5_with_padding(t5: TextModel, captions: Sequence[str], max_tokens: int) -> Tensor:
    """T5's last hidden state with padding up to max_tokens that is attended to."""
    return t5.model(t5.tokens(captions, max_tokens, "max_length").input_ids).last_hidden_state.float()  # type: ignore[no-any-return]


def build_text_encoder(config: TextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """The frozen encoder of a config on a device.

    Raises UserError for a source that is not there or is not what its field says, and for "tiny", which is trained
    along with the network (conditioning/prompted.py).
    """

    def load(class_name: str, field: str) -> TextModel:
        return load_text_model(class_name, getattr(config, field), f"text.{field}", config.precision, device)  # type: ignore[union-attr]

    match config:
        case SD3Text():
            clips = [load("CLIPTextModelWithProjection", "clip_l"), load("CLIPTextModelWithProjection", "clip_g")]
            return _SD3Encoder(config, (*clips, *([load("T5EncoderModel", "t5")] if config.t5 else [])))
        case FluxText():
            return _FluxEncoder(config, (load("CLIPTextModel", "clip_l"), load("T5EncoderModel", "t5")))
        case T5Text():
            return _T5Encoder(config, (load("T5EncoderModel", "t5"),))
        case LLMText():
            model = load("AutoModel", "llm")
            if config.chat and model.tokenizer.chat_template is None:
                raise UserError(f"text.llm={config.llm!r}: its tokenizer has no chat template; set text.chat=false")
            return _LLMEncoder(config, (model,))
        case CLIPText():
            return _CLIPEncoder(config, (load("CLIPTextModelWithProjection", "clip"),))
        case TinyTextConfig():
            raise UserError("text=tiny is trained along with the network and is no frozen encoder")
