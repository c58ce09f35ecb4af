"""Writing networks for others: from anything that can be loaded to a smalti, diffusers or original file."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from smalti.config import RunConfig
from smalti.errors import UserError, unknown_name
from smalti.interop.files import write_folder, write_safetensors
from smalti.interop.formats import Original, format_of_config
from smalti.interop.load import Weights, read_weights, write_network
from smalti.interop.schedulers import scheduler_config
from smalti.interop.surgery import adapt, without_attention_scale
from smalti.models.dit import DiTConfig
from smalti.run_folder import read_config, write_json

Target = Literal["smalti", "diffusers", "original"]
_PIPELINE_CLASSES = 1000  # diffusers' DiTPipeline guides with the null label 1000, whatever the network has


@dataclass(frozen=True)
class Written:
    """What was written where: the paths, tensors and their values in all, and a remark for the user."""

    paths: tuple[Path, ...]
    num_tensors: int
    num_values: int
    remark: str = ""


def _clear(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: pass --overwrite to replace it, or another name")
    if out.is_dir():
        shutil.rmtree(out)
    elif out.exists():
        out.unlink()


def _original(weights: Weights, name: str | None) -> Original:
    originals = {original.name: original for original in format_of_config(weights.config).originals}
    if not originals:
        raise UserError(f"a network of kind {weights.config.kind!r} has no original format that smalti knows")
    if name is None:
        name = weights.source if weights.source in originals else next(iter(originals))
    if name not in originals:
        raise unknown_name("original format", name, originals)
    return originals[name]


def write_weights(
    weights: Weights,
    out: Path,
    to: Target,
    *,
    original: str | None = None,
    prefix: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a network for smalti or diffusers (a folder) or in an original repository's format (a .safetensors file).

    original: the format's name where an architecture has several. prefix: before each original name; None takes the
    one that the source had. Raises UserError for what the target cannot express and for paths that exist.
    """
    if weights.codebook_size is not None:
        raise UserError("a network of tokens cannot be written elsewhere yet: no other format has its embedding")
    if to != "smalti":
        weights = without_attention_scale(weights)  # which others do not know
    if to == "original":
        if out.suffix != ".safetensors":
            raise UserError(f"{out}: an original file is written as .safetensors, give such a name")
        layout = _original(weights, original).layout(weights.config)
        head = weights.prefix if prefix is None else prefix
        tensors = {head + name: tensor for name, tensor in layout.to_theirs(weights.tensors).items()}
        _clear(out, overwrite)
        write_safetensors(out, tensors)
        return Written((out,), len(tensors), sum(t.numel() for t in tensors.values()))
    if to == "smalti":
        _clear(out, overwrite)
        write_network(out, weights.config, weights.tensors)
        return Written((out,), len(weights.tensors), sum(t.numel() for t in weights.tensors.values()))
    form = format_of_config(weights.config)
    if form.class_name is None:
        raise UserError(f"a network of kind {weights.config.kind!r} has no diffusers class")
    body = {"_class_name": form.class_name, **form.write_config(weights.config)}
    tensors = form.diffusers(weights.config).to_theirs(weights.tensors)
    _clear(out, overwrite)
    write_folder(out, tensors)
    write_json(out / "config.json", body)
    return Written((out,), len(tensors), sum(t.numel() for t in tensors.values()))


def convert(
    source: str | Path,
    out: Path,
    to: Target,
    *,
    changes: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    original: str | None = None,
    prefix: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Read a network from what load_backbone takes and write it for `to`; errors as there and in write_weights.

    changes: fields of its config that are to be read otherwise, the weights staying as they are: num_heads where a file
    does not say it, or frequency_shift=1 and mlp_norm_eps=1e-5 to write a DiT from its authors as diffusers has it,
    whose outputs then differ as diffusers' do.
    """
    weights = read_weights(source, checkpoint=checkpoint)
    if changes:
        weights = replace(weights, config=replace(weights.config, **changes))
    return write_weights(weights, out, to, original=original, prefix=prefix, overwrite=overwrite)


def export_run(run: Path, out: Path, *, checkpoint: str | None = None, overwrite: bool = False) -> Written:
    """Write a run as a folder that diffusers loads: transformer/, scheduler/ and, for DDIM's processes, a pipeline.

    A DiT's label table is filled up to 1,000 classes: DiTPipeline takes label 1000 for none when it guides. The folder
    has no autoencoder: a run on pixels is loaded with one that changes nothing. Raises UserError for a network or a
    process that diffusers has no class for.
    """
    config: RunConfig = read_config(run)
    if config.codebook_size is not None:
        raise UserError(f"{run} is a masked model: diffusers has no class for its network, so it cannot be exported")
    scheduler = scheduler_config(config.process, config.objective.prediction_type)
    weights = read_weights(run, checkpoint=checkpoint)
    format_of_config(weights.config).write_config(weights.config)  # complain before anything is written
    if isinstance(weights.config, DiTConfig) and 0 < weights.config.num_classes < _PIPELINE_CLASSES:
        weights, _ = adapt(weights, num_classes=_PIPELINE_CLASSES)
    _clear(out, overwrite)
    part = "unet" if config.model.kind == "unet" else "transformer"
    written = write_weights(weights, out / part, "diffusers")
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    class_name = format_of_config(weights.config).class_name
    remark = f"load: {class_name}.from_pretrained({str(out / part)!r}), {scheduler['_class_name']}.from_pretrained(...)"
    if isinstance(weights.config, DiTConfig) and scheduler["_class_name"] == "DDIMScheduler":
        index = {
            "_class_name": "DiTPipeline",
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "transformer": ["diffusers", class_name],
            "vae": [None, None],
        }
        write_json(out / "model_index.json", index)
        remark = f"load: DiTPipeline.from_pretrained({str(out)!r}, vae=...)"
    return replace(written, paths=(out,), remark=remark)
