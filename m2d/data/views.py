"""The eight views of a square: flips and quarter turns. The only augmentation, for it leaves a dermoscopy image one."""

import numpy as np

_STEPS = (*((1, 1), (1, -1), (-1, 1), (-1, -1)), *((-1, 1), (1, -1), (1, 1), (-1, -1)))  # the last four: transposed


def apply_view(image: np.ndarray, view: int) -> np.ndarray:
    """One element of the dihedral group of the square, as a strided view: no pixel is copied.

    image: [H, W, ...]; views 4 to 7 swap H and W. Raises ValueError for a view outside 0..7.
    0 identity, 1 left-right flip, 2 up-down flip, 3 half turn, 4 quarter turn, 5 three-quarter turn (both
    counter-clockwise), 6 transpose, 7 anti-transpose. 0 to 3 are a subgroup: `views: 4` is the flips and the half turn.
    """
    if not 0 <= view < len(_STEPS):
        raise ValueError(f"view {view}; the views of a square are 0 to 7")
    down, across = _STEPS[view]
    return (image if view < 4 else image.swapaxes(0, 1))[::down, ::across]
