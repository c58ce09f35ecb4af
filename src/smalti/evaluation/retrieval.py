"""Does a picture show what its prompt says? A small judge of pictures and captions, and the rank of the own prompt.

The judge is CLIP in small (Radford et al. 2021, "Learning transferable visual models from natural language
supervision"): an encoder of pictures and one of captions, trained on the user's own pairs so that a picture lies
nearest to its own caption. A generated picture is then asked which of n prompts it was drawn from; the share that
puts the own prompt among the first k is the figure, k / n is chance, and the same figure of the real pictures is the
most that can be had from this judge.

What is fair, and stated with every figure:
- Candidates are prompts of n distinct pictures with distinct texts, drawn from all rows alike, so that near
  duplicates (one emoji in two skin tones) are among them as often as in the data and count as different, unless
  groups are given: candidates of the own prompt's group are then left out, neither right nor wrong.
- Equal scores count against the picture: a judge or a picture that says nothing ranks last and not first.
- The first 10 of 200 is a low bar: emoji shrunk to 4 x 4 pixels and back, colours at their places and nothing else,
  pass it at 52 to 57 %, at 8 x 8 at 92 %; as the very first of 200 they come out at 22 and 70 %. Report both.
- The judge is trained without a fifth of the variants (of emoji: skin tones, and further names), unseen as pair,
  on which its own retrieval is reported; what it cannot tell apart there it cannot be trusted with.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti import rng
from smalti.conditioning.captions import CaptionPolicy, pick_captions
from smalti.conditioning.tiny import CaptionTokenizer, TinyTextConfig, TinyTextEncoder, train_tokenizer
from smalti.config import from_json, to_json
from smalti.data.order import batch_indices
from smalti.data.rows import PicturesInMemory
from smalti.errors import UserError
from smalti.evaluation.intervals import Estimate, bootstrap
from smalti.evaluation.resizing import resized
from smalti.types import required_field

_VERSION = 1  # of what is cached: raise it with any change to the networks or their training
_TONE = r"(?:medium-light|medium-dark|light|medium|dark)"
_SKIN_TONE = re.compile(rf"[:,]?\s*(?:\bwith\s+)?\b{_TONE}(?:\s+and\s+{_TONE})?\s+skin(?: tones?)?\b", re.IGNORECASE)
_ANY_CAPTION = CaptionPolicy(dropout=0.0, choose="random")
_FIRST_TEMPERATURE, _LOWEST_TEMPERATURE = 0.07, 0.01  # CLIP's


@dataclass(frozen=True)
class RetrievalConfig:
    """The judge's networks and their training. image_size: what pictures are resized to; multiples of 4 x a power of 2.

    shift: pixels that a picture is moved by at most; colour_jitter: how far its channels are scaled and moved.
    """

    channels: int = 3
    image_size: tuple[int, int] = (32, 32)
    width: int = 32  # of the first convolution
    embed_width: int = 128
    text: TinyTextConfig = field(default_factory=lambda: TinyTextConfig(width=128, depth=1))
    epochs: float = 20.0
    batch_size: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.2
    shift: int = 2
    colour_jitter: float = 0.1
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if any(side < 8 for side in self.image_size):
            raise UserError(f"judge.image_size={self.image_size}: each side must be at least 8")
        if not 0 <= self.held_out < 1:
            raise UserError(f"judge.held_out={self.held_out} must lie in [0, 1)")


class PictureEncoder(nn.Module):
    """Convolutions of stride 2 until about 4 x 4 are left, then one linear layer, so that places still matter."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        halvings = max(1, int(math.log2(min(config.image_size) / 4)))
        layers: list[nn.Module] = []
        channels = config.channels
        for level in range(halvings):
            out = min(config.width * 2**level, 192)
            layers += [_convolution(channels, out, 2), _convolution(out, out, 1)]
            channels = out
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.out = nn.Linear(16 * channels, config.embed_width)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [batch, channels, height, width] in [-1, 1] -> embeddings [batch, embed_width]."""
        return self.out(self.convolutions(images.contiguous(memory_format=torch.channels_last)))  # type: ignore[no-any-return]


def _convolution(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class RetrievalJudge(nn.Module):
    """Encoders of pictures and of captions into one space, where the nearer fit better together."""

    def __init__(self, config: RetrievalConfig, tokenizer: CaptionTokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.pictures = PictureEncoder(config)
        self.text = TinyTextEncoder(config.text)
        self.text_out = nn.Linear(config.text.width, config.embed_width)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_FIRST_TEMPERATURE)))

    def embed_pictures(self, images: Tensor) -> Tensor:
        """Pictures [batch, channels, height, width] in [-1, 1], of any size -> unit vectors [batch, embed_width]."""
        if images.shape[1] != self.config.channels:
            raise UserError(f"the judge reads pictures of {self.config.channels} channels, not {images.shape[1]}")
        return F.normalize(self.pictures(resized(images, self.config.image_size)), dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [captions, embed_width]."""
        cond = self.tokenizer.encode(captions)
        token_ids, mask = required_field(cond, "token_ids"), required_field(cond, "text_mask")
        longest = max(1, int(mask.sum(dim=1).max()))  # padding beyond it is only work
        _, pooled = self.text(token_ids[:, :longest], mask[:, :longest])
        return F.normalize(self.text_out(pooled), dim=-1)

    @torch.inference_mode()
    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture to each caption, [pictures, captions], in batches of 500."""
        texts = torch.cat([self.embed_captions(captions[i : i + 500]) for i in range(0, len(captions), 500)])
        return torch.cat([self.embed_pictures(part) for part in images.split(500)]) @ texts.T


def jitter(images: Tensor, step: int, seed: int, shift: int, colour: float) -> Tensor:
    """Each picture moved by up to `shift` whole pixels (edges repeated), its channels scaled and moved by up to
    `colour`; addressed by (seed, step, row)."""
    batch, channels, height, width = images.shape
    u = rng.uniform((2 + 2 * channels,), seed=seed, purpose="retrieval/jitter", index=torch.arange(batch), call=step)
    moves = (u[:, :2] * (2 * shift + 1)).long() - shift
    rows = (torch.arange(height) + moves[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[:, 1:]).clamp(0, width - 1)
    moved = images.permute(0, 2, 3, 1)[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
    gain, bias = (colour * (2 * u[:, 2:] - 1)).float()[:, None, None].chunk(2, dim=-1)
    return (moved * (1 + gain) + bias).clamp(-1, 1).permute(0, 3, 1, 2)


def without_skin_tone(caption: str) -> str:
    """A caption that is the same for an emoji's skin tones; other captions as they are."""
    return _SKIN_TONE.sub("", caption).strip()


@dataclass(frozen=True)
class CaptionSplit:
    """The captions of each row, parted: those that the judge is trained on, and those held out."""

    training: list[tuple[str, ...]]
    held_out: list[tuple[str, ...]]


def split_captions(captions: Sequence[tuple[str, ...]], share: float, seed: int = 0) -> CaptionSplit:
    """Hold out about a share of the variants, so that something like each remains in training.

    Rows whose first captions differ in skin tone alone are variants of each other: such a row is held out whole. Of a
    row without its like the captions are the variants. One variant of each group always stays.
    """
    groups: dict[str, list[int]] = {}
    for row, own in enumerate(captions):
        if own:
            groups.setdefault(without_skin_tone(own[0]), []).append(row)
    training = [tuple(own) for own in captions]
    held_out: list[tuple[str, ...]] = [()] * len(training)
    if not groups:
        return CaptionSplit(training, held_out)
    most = max(map(len, training))
    rows = torch.arange(len(training))
    u = rng.uniform((1 + most,), seed=seed, purpose="retrieval/held_out", index=rows).numpy()
    for members in groups.values():
        if len(members) > 1:
            stays = max(members, key=lambda row: u[row, 0])
            for row in members:
                if u[row, 0] < share and row != stays:
                    training[row], held_out[row] = (), training[row]
            continue
        (row,) = members
        own, keys = training[row], u[row, 1 : 1 + len(training[row])]
        out = (keys < share) & (keys < keys.max())
        training[row] = tuple(c for c, is_out in zip(own, out, strict=True) if not is_out)
        held_out[row] = tuple(c for c, is_out in zip(own, out, strict=True) if is_out)
    return CaptionSplit(training, held_out)


def contrastive_loss(pictures: Tensor, texts: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit vectors [batch, width]; pictures that share a caption are right for each other's.

    Source: Radford et al. 2021, fig. 3.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    keys = torch.tensor([numbers[caption] for caption in captions])
    same = (keys[:, None] == keys).to(pictures.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    logits = scale * pictures @ texts.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def train_retrieval_judge(
    rows: PicturesInMemory,
    captions: Sequence[tuple[str, ...]],
    config: RetrievalConfig | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RetrievalJudge:
    """A judge trained on pictures and captions (those of each row; () leaves the row out).

    progress(step, steps) is called after each step. Raises UserError where fewer than two rows have captions.
    """
    config = config or RetrievalConfig()
    kept = torch.tensor([row for row, own in enumerate(captions) if own], dtype=torch.int64)
    if len(kept) < 2:
        raise UserError(f"the judge needs pictures with captions: {len(kept)} of {len(captions)} rows have one")
    tokenizer = train_tokenizer((caption for own in captions for caption in own), config.text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = RetrievalJudge(config, tokenizer)
    judge.text.initialise(torch.Generator().manual_seed(seed))
    judge.train()
    batch_size = min(config.batch_size, len(kept))
    steps = math.ceil(config.epochs * len(kept) / batch_size)
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
    slots = torch.arange(batch_size)
    for step in range(steps):
        indices = kept[batch_indices(step, batch_size, len(kept), seed)]
        images = jitter(resized(rows.read(indices), config.image_size), step, seed, config.shift, config.colour_jitter)
        texts = pick_captions(captions, indices, slots, seed, step, _ANY_CAPTION)
        scale = judge.log_scale.clamp(max=-math.log(_LOWEST_TEMPERATURE)).exp()
        loss = contrastive_loss(judge.embed_pictures(images), judge.embed_captions(texts), texts, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    return judge.eval()


def ranks_of(scores: Tensor, own: Tensor, skipped: Tensor | None = None) -> Tensor:
    """The place of each picture's own candidate, 1 the best: int64 [pictures].

    scores: [pictures, candidates]; own: int64 [pictures]; skipped: bool as scores, candidates that are not counted.
    What scores as much as the own candidate, or is not a number, is counted as better.
    """
    own_scores = scores.gather(1, own[:, None])
    counted = ~(scores < own_scores)
    counted.scatter_(1, own[:, None], False)
    return 1 + (counted if skipped is None else counted & ~skipped).sum(dim=1)


def prompt_ranks(
    judge: RetrievalJudge,
    pictures: Tensor,
    prompts: Sequence[str],
    candidates: Sequence[str],
    groups: Sequence[str] | None = None,
) -> Tensor:
    """The rank of each picture's own prompt among the candidates, 1 the best: int64 [pictures].

    pictures: [pictures, channels, height, width] in [-1, 1]; prompts: one a picture, each among the candidates, which
    are distinct. groups: one a candidate; those of the own prompt's group are left out. Raises UserError for prompts
    that are no candidates and for candidates given twice.
    """
    places = {candidate: place for place, candidate in enumerate(candidates)}
    if len(places) != len(candidates):
        raise UserError(f"candidates={len(candidates)} prompts, of which {len(places)} are different: give each once")
    missing = [prompt for prompt in prompts if prompt not in places]
    if missing:
        raise UserError(f"prompt {missing[0]!r} is not among the {len(candidates)} candidates")
    if len(prompts) != len(pictures):
        raise UserError(f"prompts={len(prompts)} must be as many as the pictures, {len(pictures)}")
    own = torch.tensor([places[prompt] for prompt in prompts], dtype=torch.int64)
    skipped = None
    if groups is not None:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        group_of = torch.tensor([numbers[group] for group in groups])
        skipped = group_of[own][:, None] == group_of
    return ranks_of(judge.scores(pictures, candidates), own, skipped)


def share_in_top(ranks: Tensor, k: int) -> Estimate:
    """Share of ranks that are at most k, with its bootstrap 95 % interval.

    ranks: [prompts], or [prompts, pictures of each]: prompts are what is resampled, with all their pictures.
    """
    hits = (ranks <= k).double().reshape(len(ranks), -1).mean(dim=1).numpy()
    estimate = bootstrap(lambda rows: float(np.mean(hits[rows])), len(hits), replicates=1000)
    return Estimate(estimate.value, max(0.0, estimate.low), min(1.0, estimate.high))


def prompt_rows(captions: Sequence[tuple[str, ...]], count: int, seed: int = 0) -> Tensor:
    """Rows whose first captions are the prompts to judge by: int64 [count], in random order, their texts distinct.

    Raises UserError where the data has fewer. All rows are as likely, but for those that repeat a text.
    """
    seen: set[str] = set()
    rows: list[int] = []
    for row in rng.permutation(len(captions), seed=seed, purpose="retrieval/prompts").tolist():
        if captions[row] and captions[row][0] not in seen:
            seen.add(captions[row][0])
            rows.append(row)
    if len(rows) < count:
        raise UserError(f"candidates={count}: the data has {len(rows)} pictures with captions of their own")
    return torch.tensor(rows[:count], dtype=torch.int64)


@dataclass(frozen=True)
class RetrievalReport:
    """How well the judge reads real pictures: the rank of the own caption among num_candidates of the data.

    held_out: pairs that it was not trained on. training: pairs that it was, which is the most that generated pictures
    of training prompts can reach.
    """

    num_candidates: int
    num_held_out: int
    held_out_top1: Estimate
    held_out_top10: Estimate
    training_top1: Estimate
    training_top10: Estimate

    def text(self) -> str:
        """The report in lines for a person."""
        return "\n".join(
            f"judge on {name}: own caption first of {self.num_candidates} for {top1.value:.1%}, "
            f"among the first 10 for {top10.value:.1%}  (95 %: {top10.low:.1%} .. {top10.high:.1%})"
            for name, top1, top10 in (
                (f"{self.num_held_out} held-out pairs", self.held_out_top1, self.held_out_top10),
                ("pairs it was trained on", self.training_top1, self.training_top10),
            )
        )


def judge_report(
    judge: RetrievalJudge, rows: PicturesInMemory, split: CaptionSplit, num_candidates: int = 200, seed: int = 0
) -> RetrievalReport:
    """How well the judge finds held-out captions, and those of its training.

    Each picture's caption is ranked among num_candidates - 1 others drawn from the first captions of all other rows
    (fewer where the data has fewer).
    """
    firsts = [
        (training or held_out or ("",))[0] for training, held_out in zip(split.training, split.held_out, strict=True)
    ]
    texts = sorted({text for text in firsts if text} | {own[0] for own in split.held_out if own})
    places = {text: place for place, text in enumerate(texts)}
    first_places = torch.tensor(sorted({places[text] for text in firsts if text}))
    others = min(num_candidates - 1, len(first_places) - 1)

    def ranks(captions: Sequence[tuple[str, ...]]) -> Tensor:
        judged = torch.tensor([row for row, own in enumerate(captions) if own], dtype=torch.int64)
        if not len(judged):
            return torch.zeros(0, dtype=torch.int64)
        own = torch.tensor([places[captions[row][0]] for row in judged.tolist()])
        scores = judge.scores(rows.read(judged), texts)
        u = rng.uniform((len(texts),), seed=seed, purpose="retrieval/candidates", index=judged)
        offered = torch.zeros_like(u).index_fill_(1, first_places, 1.0) * u
        offered.scatter_(1, own[:, None], 0.0)
        drawn = offered.topk(others, dim=1).indices
        return ranks_of(scores, own, torch.ones_like(scores, dtype=torch.bool).scatter_(1, drawn, False))

    held_out, training = ranks(split.held_out), ranks(split.training)
    nothing = torch.full((1,), 2**31)  # no pair held out: reported as never found
    return RetrievalReport(
        1 + others,
        len(held_out),
        *(share_in_top(r if len(r) else nothing, k) for r in (held_out, training) for k in (1, 10)),
    )


def load_retrieval_judge(
    rows: PicturesInMemory,
    folder: Path,
    config: RetrievalConfig | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RetrievalJudge, RetrievalReport]:
    """The judge of these pictures and captions kept in `folder`, trained first where there is none, and its report.

    The file's name has the version and a digest of pictures, captions, config and seed, so that other data never meets
    the wrong judge; a damaged file is made again. Raises UserError for rows without captions.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = config or RetrievalConfig()
    if rows.captions is None:
        raise UserError("the judge needs captions, and this data has none")
    split = split_captions(rows.captions, config.held_out, seed)
    path = folder / f"retrieval-v{_VERSION}-{_digest(rows, config, seed)[:16]}.safetensors"
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                judge = RetrievalJudge(config, CaptionTokenizer(file.metadata()["tokenizer"])).eval()
                judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                body = json.loads(file.metadata()["report"])
            return judge, from_json(RetrievalReport, body)
        except Exception:  # whatever is wrong with a cache file, training again cures it
            path.unlink(missing_ok=True)
    judge = train_retrieval_judge(rows, split.training, config, seed, progress)
    report = judge_report(judge, rows, split, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    metadata = {"tokenizer": judge.tokenizer.text, "report": json.dumps(to_json(report))}
    save_file(judge.state_dict(), partial, metadata)
    partial.replace(path)
    return judge, report


def _digest(rows: PicturesInMemory, config: RetrievalConfig, seed: int) -> str:
    """SHA-256 of everything that the judge is a function of."""
    what = {"shape": list(rows.images.shape), "captions": rows.captions, "config": to_json(config), "seed": seed}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    digest.update(rows.images.contiguous().numpy().tobytes())
    return digest.hexdigest()
