"""Positions: fixed sin-cos tables that are added to tokens, and rotary angles that turn queries and keys.

Shapes: N tokens, A axes, D width, K head width. Tables are float32, their angles are taken in float64 where the device
has it. They are built on the CPU unless told otherwise, also under `torch.device("meta")`: a network built there gets
its weights by assignment, and its tables must be real.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from smalti.rng import widest_float


def grid_positions(*sizes: int, device: torch.device | str = "cpu") -> Float[Tensor, "N A"]:
    """The integer coordinates of a grid's points in row-major order: (row, column) or (frame, row, column)."""
    axes = [torch.arange(size, dtype=widest_float(device), device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes))


def sincos_positions_1d(
    width: int, positions_N: Shaped[Tensor, " N"], max_period: float = 10000.0
) -> Float[Tensor, "N D"]:
    """[sin p w | cos p w] with w_i = max_period^(-2 i / width). width must divide by 2."""
    wide = widest_float(positions_N.device)
    frequencies = max_period ** (-torch.arange(width // 2, dtype=wide, device=positions_N.device) / (width // 2))
    angles = positions_N.to(wide)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_positions_2d(
    width: int, y_positions: Shaped[Tensor, " rows"], x_positions: Shaped[Tensor, " columns"]
) -> Float[Tensor, "N D"]:
    """Fixed positions of a grid in row-major order: [sin x | cos x | sin y | cos y], x the column.

    y_positions, x_positions: what each row and column counts as (0, 1, 2 ... or rescaled). width must divide by 4.
    Source: DiT's get_2d_sincos_pos_embed (after MAE).
    """
    x_table, y_table = (sincos_positions_1d(width // 2, positions) for positions in (x_positions, y_positions))
    rows, columns = len(y_positions), len(x_positions)
    return torch.cat([x_table.repeat(rows, 1), y_table.repeat_interleave(columns, dim=0)], dim=1)


def sincos_grid(width: int, rows: int, columns: int) -> Float[Tensor, "N D"]:
    """sincos_positions_2d at 0, 1, 2 ... on both axes."""
    return sincos_positions_2d(width, grid_positions(rows)[:, 0], grid_positions(columns)[:, 0])


def rescaled_sincos_grid(
    width: int,
    rows: int,
    columns: int,
    native_grid: tuple[int, int],
    interpolation_scale: float,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "N D"]:
    """sincos_positions_2d of a grid of any size, stretched over the range that a network was trained on.

    Row i counts as i * native_rows / rows / interpolation_scale, columns likewise; these are float32, as in the
    published code: at sizes that do not divide evenly the last bit shows. Source: PixArt-alpha (Chen et al. 2023),
    PixArtMS.py.
    """
    y_positions, x_positions = (
        torch.arange(size, dtype=torch.float32, device=device) / (size / native) / interpolation_scale
        for size, native in zip((rows, columns), native_grid, strict=True)
    )
    return sincos_positions_2d(width, y_positions, x_positions)


def rope_angles(
    positions_NA: Shaped[Tensor, "*rows N A"], axis_widths: Sequence[int], theta: float
) -> Float[Tensor, "2 *rows N K"]:
    """cos and sin of rotary angles for tokens with coordinates on A axes; each angle stands twice, for both of a pair.

    Axis a turns axis_widths[a] features of a head, pair k of them by p_a theta^(-2 k / axis_widths[a]); the widths sum
    to the head's. Source: Su et al. 2021 (RoFormer), eq. 15, on several axes as in FLUX.
    """
    angles, wide = [], widest_float(positions_NA.device)
    for axis, width in enumerate(axis_widths):
        pairs = torch.arange(width // 2, dtype=wide, device=positions_NA.device)
        angles.append(positions_NA[..., axis].to(wide)[..., None] * theta ** (-2 * pairs / width))
    angles_NK = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return torch.stack([angles_NK.cos(), angles_NK.sin()]).float()


def spread_over_grid(*tables: Float[Tensor, "_ _"]) -> tuple[Float[Tensor, "N _"], ...]:
    """A table of each axis of a grid, one row a coordinate, to one row a point of the grid in row-major order."""
    sizes = [len(table) for table in tables]
    spread = []
    for axis, table in enumerate(tables):
        shape = [1] * len(sizes)
        shape[axis] = sizes[axis]
        spread.append(table.view(*shape, -1).expand(*sizes, -1).flatten(0, -2))
    return tuple(spread)


def rope_angles_grid(
    axis_positions: Sequence[Shaped[Tensor, " _"]], axis_widths: Sequence[int], theta: float
) -> Float[Tensor, "2 N K"]:
    """rope_angles of a grid's points in row-major order, from the positions along each axis alone.

    Cosines are taken of rows and columns, not of each point: this is cheap enough for each forward.
    """
    tables = [
        rope_angles(positions[:, None], (width,), theta)
        for positions, width in zip(axis_positions, axis_widths, strict=True)
    ]
    return torch.stack([torch.cat(spread_over_grid(*parts), dim=-1) for parts in zip(*tables, strict=True)])


def rope_grid(
    sizes: Sequence[int], axis_widths: Sequence[int], theta: float, device: torch.device | str = "cpu"
) -> Float[Tensor, "2 N K"]:
    """rope_angles_grid at 0, 1, 2 ... on each axis."""
    return rope_angles_grid([grid_positions(size, device=device)[:, 0] for size in sizes], axis_widths, theta)


def rope_angles_2d(head_width: int, rows: int, columns: int, theta: float = 100.0) -> Float[Tensor, "2 N K"]:
    """Rotary angles of a grid: the first half of the pairs turned by row, the rest by column.

    head_width must divide by 4. theta is small since picture grids have tens of positions, not thousands (Heo et al.
    2024, "Rotary position embedding for ViT", eq. 5).
    """
    return rope_grid((rows, columns), (head_width // 2, head_width // 2), theta)


def rotate_pairs(x: Float[Tensor, "*batch N K"], cos_sin: Float[Tensor, "2 *rows N K"]) -> Float[Tensor, "*batch N K"]:
    """Rotary positions on adjacent pairs: (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos).

    cos_sin holds each angle twice, once per member of its pair; the product is taken in the wider of the two dtypes.
    Source: Su et al. 2021 (RoFormer), eq. 34.
    """
    if x.device.type == "cpu" and x.dtype == cos_sin.dtype == torch.float32 and not torch.compiler.is_compiling():
        # The same as products of complex numbers: a sixth of the time, where no compiler fuses what stands below.
        rotation = torch.complex(cos_sin[0, ..., ::2], cos_sin[1, ..., ::2])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.addcmul(x * cos_sin[0], turned, cos_sin[1]).to(x.dtype)
