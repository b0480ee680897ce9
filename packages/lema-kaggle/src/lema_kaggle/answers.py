"""What Kaggle answers about kernels, as values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Status:
    """Where a kernel's latest run is."""

    state: str
    """QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED, CANCEL_ACKNOWLEDGED or NEW_SCRIPT, as Kaggle says."""
    failure: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing further will happen."""
        return self.state in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")


@dataclass(frozen=True)
class Pushed:
    """A version of a kernel that Kaggle has taken."""

    ref: str
    url: str
    version: int | None


@dataclass(frozen=True)
class Quota:
    """Accelerator time of this week."""

    used: timedelta
    allowed: timedelta
    renewed: datetime | None

    @property
    def left(self) -> timedelta:
        """Never less than nothing."""
        return max(self.allowed - self.used, timedelta())


@dataclass(frozen=True)
class OutputFile:
    """A file a kernel left behind."""

    name: str
    """Relative, with slashes."""
    url: str
