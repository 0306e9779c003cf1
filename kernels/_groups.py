"""Rows sorted by expert, in tiles of one expert each: which tile a program is, from where the experts' rows end."""

import triton
import triton.language as tl


@triton.jit
def tile_of(ends_ptr, tile, E, BLOCK_M: tl.constexpr, E_PADDED: tl.constexpr):
    """(expert, its first row in this tile, where its rows end).  Of tiles beyond the last, no row: first is the end.

    ends int32 [E].  There are at most ceil(S / BLOCK_M) + E tiles: what capacity() says, whatever the rows are, so that no
    host waits for them.
    """
    experts = tl.arange(0, E_PADDED)
    ends = tl.load(ends_ptr + experts, mask=experts < E, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = tl.where(experts < E, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    until = tl.cumsum(tiles, 0)
    mine = (until > tile) & (until - tiles <= tile)
    expert = tl.sum(tl.where(mine, experts, 0))
    first = tl.sum(tl.where(mine, starts + (tile - (until - tiles)) * BLOCK_M, 0))
    end = tl.sum(tl.where(mine, ends, 0))
    return expert, first, end


def capacity(rows: int, experts: int, block_m: int) -> int:
    """Tiles that are launched."""
    return triton.cdiv(rows, block_m) + experts


def block_m(rows: int, experts: int) -> int:
    """Of a tile: about an expert's rows.  Pure; no threshold has been measured yet."""
    each = rows // max(experts, 1)
    return 16 if each <= 16 else 32 if each <= 32 else 64
