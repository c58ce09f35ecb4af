"""The embedded text encoder: byte-pair tokens of the user's own captions, and a small transformer trained along.

It needs no download. The tokenizer is trained once, on the captions of the data, and kept as text (the format of the
`tokenizers` package); the transformer is part of the network (conditioning/prompted.py).

Shapes: B batch, M tokens, D width.

Initialisation            here
    token embedding       N(0, 1): the final norm's unit, so that a prompt starts as its bag of words
    positions             N(0, 0.1)
    Linear                xavier uniform, no bias
    outputs of a block    zero: each block is the identity
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.conditioning.captions import valid_unicode
from smalti.errors import UserError
from smalti.nn.attention import RMSNorm, SelfAttention
from smalti.nn.feedforward import FeedForward, gated_width
from smalti.types import Condition, required_field

_PAD, _START, _END = "<pad>", "<start>", "<end>"
PAD_ID, START_ID, END_ID = 0, 1, 2
_MLP_RATIO = 4
_SMALLEST_VOCABULARY = 256 + 3  # every byte, and the three above


@dataclass(frozen=True)
class TinyTextConfig:
    """The shape of the embedded text encoder. width is also the width of the pooled vector."""

    kind: ClassVar[str] = "tiny"
    vocab_size: int = 2048
    width: int = 192
    depth: int = 2
    num_heads: int = 4
    max_tokens: int = 24  # read of a caption, with start and end

    def __post_init__(self) -> None:
        if self.vocab_size < _SMALLEST_VOCABULARY:
            raise UserError(f"text.vocab_size={self.vocab_size} must be at least {_SMALLEST_VOCABULARY}: every byte")
        if self.max_tokens < 3:
            raise UserError(f"text.max_tokens={self.max_tokens} must be at least 3: start, end and one between")
        if self.depth < 0 or self.num_heads < 1 or self.width < 1:
            raise UserError(
                f"text.depth={self.depth}, num_heads={self.num_heads}, width={self.width}: must be positive"
            )
        if self.width % self.num_heads:
            raise UserError(f"text.width={self.width} must divide by text.num_heads={self.num_heads}")


@dataclass(frozen=True)
class CaptionTokenizer:
    """Captions to token ids. text: the tokenizer in the JSON of the `tokenizers` package, as train_tokenizer made it.

    Upper case is read as lower case. Raises UserError for text that is no such tokenizer.
    """

    text: str

    def __post_init__(self) -> None:
        assert self.max_tokens > 0  # reads the text

    @cached_property
    def _tokenizer(self) -> Any:
        return _read_tokenizer(self.text)

    @cached_property
    def _counter(self) -> Any:
        """The same tokenizer without truncation and padding."""
        tokenizer = _read_tokenizer(self.text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def max_tokens(self) -> int:
        """The most tokens that are read of a caption, start and end included; shorter ones are padded to it."""
        return int(self._tokenizer.truncation["max_length"])

    @property
    def vocab_size(self) -> int:
        """How many tokens there are: at most what was asked for, fewer where the captions have fewer pairs."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, captions: Sequence[str]) -> Condition:
        """token_ids [len(captions), max_tokens] and their text_mask; longer captions lose their ends."""
        ids = torch.tensor([self._tokenizer.encode(valid_unicode(caption)).ids for caption in captions])
        ids = ids.reshape(len(captions), self.max_tokens)  # for no captions
        return Condition(token_ids=ids, text_mask=ids != PAD_ID)

    def decode(self, token_ids: Tensor) -> list[str]:
        """What was read of each caption, from token_ids [captions, tokens]."""
        return [str(self._tokenizer.decode(row)).removeprefix(" ") for row in token_ids.tolist()]

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before truncation, start and end included."""
        return [len(self._counter.encode(valid_unicode(caption)).ids) for caption in captions]


def _read_tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
        known = [tokenizer.token_to_id(name) for name in (_PAD, _START, _END)]
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"the tokenizer's text is damaged: {str(error).splitlines()[0]}") from None
    if known != [PAD_ID, START_ID, END_ID] or tokenizer.truncation is None:
        raise UserError("the tokenizer is not one that smalti trained: its special tokens or its truncation differ")
    tokenizer.encode_special_tokens = True  # "<end>" in a caption is five characters; the text does not keep this
    return tokenizer


def train_tokenizer(captions: Iterable[str], config: TinyTextConfig) -> CaptionTokenizer:
    """A byte-level byte-pair tokenizer of the captions: any string encodes. A function of its arguments alone.

    Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units", on bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Sorted: where pairs are as frequent, the order of the texts must not decide.
    tokenizer.train_from_iterator(sorted(valid_unicode(caption) for caption in captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, START_ID), (_END, END_ID)]
    )
    tokenizer.enable_truncation(config.max_tokens)
    tokenizer.enable_padding(length=config.max_tokens, pad_id=PAD_ID, pad_token=_PAD)
    return CaptionTokenizer(tokenizer.to_str())


def empty_prompt(batch_size: int, max_tokens: int, device: torch.device | str = "cpu") -> Condition:
    """The tokens of "", as CaptionTokenizer.encode gives them."""
    ids = torch.full((batch_size, max_tokens), PAD_ID, dtype=torch.int64, device=device)
    ids[:, 0], ids[:, 1] = START_ID, END_ID
    return Condition(token_ids=ids, text_mask=ids != PAD_ID)


class TextBlock(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(width)
        self.attn = SelfAttention(width, num_heads, qk_norm=True, bias=False)
        self.mlp_norm = RMSNorm(width)
        self.mlp = FeedForward(width, gated_width(_MLP_RATIO * width), "swiglu", bias=False)

    def forward(self, x_BMD: Float[Tensor, "B M D"], mask_BM: Bool[Tensor, "B M"]) -> Float[Tensor, "B M D"]:
        """Tokens attend to those of their own row where mask_BM is True."""
        x_BMD = x_BMD + self.attn(self.attn_norm(x_BMD), mask_BN=mask_BM)
        return x_BMD + self.mlp(self.mlp_norm(x_BMD))  # type: ignore[no-any-return]


class TinyTextEncoder(nn.Module):
    """Token ids to text embeddings: a small bidirectional transformer with learned positions."""

    def __init__(self, config: TinyTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.positions_MD = nn.Parameter(torch.zeros(config.max_tokens, config.width))
        self.blocks = nn.ModuleList(TextBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        nn.init.normal_(self.token_embed.weight, generator=generator)
        nn.init.normal_(self.positions_MD, std=0.1, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            nn.init.zeros_(block.attn.out.weight)
            nn.init.zeros_(block.mlp.fc2.weight)

    def forward(
        self, token_ids_BM: Int[Tensor, "B M"], mask_BM: Bool[Tensor, "B M"]
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B D"]]:
        """Embeddings of the tokens, and their mean where mask_BM is True, which has at least one True a row."""
        x_BMD = self.token_embed(token_ids_BM) + self.positions_MD[: token_ids_BM.shape[1]]
        for block in self.blocks:
            x_BMD = block(x_BMD, mask_BM)
        x_BMD = self.norm(x_BMD)
        share_B1M = (mask_BM / mask_BM.sum(1, keepdim=True)).to(x_BMD.dtype)[:, None]
        return x_BMD, (share_B1M @ x_BMD)[:, 0]

    def encode(self, cond: Condition) -> Condition:
        """The condition with text_embeds [B, M, D] and pooled_embeds [B, D] in place of its token_ids."""
        token_ids, mask = required_field(cond, "token_ids"), required_field(cond, "text_mask")
        text_embeds, pooled_embeds = self(token_ids, mask)
        return replace(cond, token_ids=None, text_embeds=text_embeds, pooled_embeds=pooled_embeds)
