"""Nearest neighbours among unit vectors by cosine distance, in blocks of bounded memory. Exact; knows no images."""

import torch
from torch import Tensor

_BLOCK_VALUES = 2**22  # similarities at once: 16 MiB
_QUERIES = 256


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows at length 1, float32 [n, D]; a row of zeros stays one."""
    lengths = torch.linalg.vector_norm(vectors.float(), dim=1, keepdim=True)
    unit: Tensor = vectors.float() / lengths.clamp(min=1e-12)
    return unit


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int = 1,
    *,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    block_values: int = _BLOCK_VALUES,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank to each query: distances float64 [B, k] ascending, and their rows int64 [B, k].

    queries [B, D], bank [n, D]: float32, as `unit_rows` makes them. Distance: |a - b|^2 / 2, which is 1 - cos(a, b), in
    [0, 2]; taken anew in float64 for the rows found, for 1 - cos in float32 says nothing of copies. query_groups [B],
    bank_groups [n]: pairs of one group do not count. Where fewer than k rows are left: distance inf, row -1.
    """
    distances = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for first in range(0, len(queries), _QUERIES):
        part = slice(first, first + _QUERIES)
        groups = None if query_groups is None else query_groups[part]
        rows[part] = _nearest_rows(queries[part], bank, k, groups, bank_groups, max(1, block_values // _QUERIES))
        for place in range(k):
            found = rows[part, place]
            gap = queries[part].double() - bank[found.clamp(min=0)].double() if len(bank) else None
            if gap is not None:
                distances[part, place] = (gap.square().sum(dim=1) / 2).masked_fill(found < 0, torch.inf)
    order = distances.argsort(dim=1, stable=True)
    return distances.gather(1, order), rows.gather(1, order)


def _nearest_rows(
    queries: Tensor, bank: Tensor, k: int, query_groups: Tensor | None, bank_groups: Tensor | None, block: int
) -> Tensor:
    """int64 [B, k], -1 where there are fewer."""
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for first in range(0, len(bank), block):
        part = bank[first : first + block]
        similar = queries @ part.T
        if query_groups is not None and bank_groups is not None:
            similar.masked_fill_(query_groups[:, None] == bank_groups[None, first : first + block], -torch.inf)
        numbers = torch.arange(first, first + len(part), device=queries.device).expand(len(queries), -1)
        best, chosen = torch.cat([best, similar], dim=1).topk(k, dim=1)
        rows = torch.cat([rows, numbers], dim=1).gather(1, chosen)
    return rows.masked_fill(best == -torch.inf, -1)
