"""Settings: read once from flags, ATELIER_* variables and a file, checked together, frozen."""

from atelier_server.config.settings import Limits, Quotas, Settings

__all__ = ["Limits", "Quotas", "Settings"]
