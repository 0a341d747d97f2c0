"""Computes the correlation of two quantities online, one observation at a time."""

import math


class Moments:
    """Running second moments of two quantities (Welford's algorithm)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_x = self.mean_y = self.xx = self.yy = self.xy = 0.0

    def add(self, x: float, y: float) -> None:
        """Add one observation."""
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
        """The Pearson correlation; None where one of the two quantities is constant."""
        if self.xx <= 1e-12 or self.yy <= 1e-12:
            return None
        return self.xy / math.sqrt(self.xx * self.yy)

    @property
    def slope(self) -> float | None:
        """The slope of the regression of y on x; None where x is constant."""
        return self.xy / self.xx if self.xx > 1e-12 else None
