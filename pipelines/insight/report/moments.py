"""How two quantities go together, added up one observation at a time."""

import math


class Moments:
    """Second moments of two quantities, added up by Welford's method."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_x = self.mean_y = self.xx = self.yy = self.xy = 0.0

    def add(self, x: float, y: float) -> None:
        """One observation."""
        self.count += 1
        dx = x - self.mean_x
        self.mean_x += dx / self.count
        self.xx += dx * (x - self.mean_x)
        dy = y - self.mean_y
        self.mean_y += dy / self.count
        self.yy += dy * (y - self.mean_y)
        self.xy += dx * (y - self.mean_y)

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where one of the two is constant."""
        if self.xx <= 1e-12 or self.yy <= 1e-12:
            return None
        return self.xy / math.sqrt(self.xx * self.yy)

    @property
    def slope(self) -> float | None:
        """Of y over x."""
        return self.xy / self.xx if self.xx > 1e-12 else None
