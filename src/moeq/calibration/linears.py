"""Second moments of what the linears of a block are called with.

Legend: T tokens of a call, K inputs.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from moeq.calibration.moments import add_rows, mirrored
from moeq.calibration.tap import Heard, hear_calls


class _Sums:
    """Sums of x x^T by linear; linears that are called one after the other with the same tensor have one together."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}
        self.mixed: set[str] = set()
        self._last: tuple[str, Tensor] | None = None

    def listener(self, path: str) -> Callable[[Heard], None]:
        """What to tell of the calls of the linear at `path`."""

        def hear(heard: Heard) -> None:
            x_TK = heard.x_TK
            leader = path
            if self._last is not None and _same(self._last[1], x_TK):
                leader = self._last[0]
            if self.leaders.setdefault(path, leader) != leader:
                self.mixed.add(path)
            if leader == path:
                self.totals[path] = add_rows(self.totals.get(path), x_TK.float())
            # Kept until the next call: its memory must not become that of another tensor.
            self._last = leader, x_TK

        return hear


def _same(x_TK: Tensor, y_TK: Tensor) -> bool:
    return x_TK.data_ptr() == y_TK.data_ptr() and x_TK.shape == y_TK.shape


def second_moments(linears: Mapping[str, nn.Module], show: Callable[[], None]) -> dict[str, Tensor]:
    """Sum of x x^T over everything that each linear is called with.

    Args:
        linears: by path.
        show: runs what calls them, on all tokens.

    Returns:
        Path -> (K, K) float32, the same object where linears share their inputs. Linears that are never called are not
        there, nor those that see anything but finite numbers, nor any that share their inputs in some calls only.
    """
    sums = _Sums()
    handles = [hear_calls(module, sums.listener(path), gradients=False) for path, module in linears.items()]
    try:
        show()
    finally:
        for handle in handles:
            handle.remove()
    usable = {path: mirrored(total) for path, total in sums.totals.items() if bool(total.diagonal().isfinite().all())}
    return {
        path: usable[leader] for path, leader in sums.leaders.items() if leader in usable and path not in sums.mixed
    }
