"""What a tenant may have, held against what it has."""

from __future__ import annotations

from collections.abc import Sequence

from atelier_server.access.tenants import Scope, Tenant
from atelier_server.adapters.store import AdapterStore
from atelier_server.errors import QuotaExceeded

DAY_SECONDS = 24 * 3600.0
_IMAGES_RETRY_SECONDS = 5.0
_TRAININGS_RETRY_SECONDS = 60.0


def check_images(tenant: Tenant, held: int, wanted: int) -> None:
    """`held` pictures are waiting or being painted. Raises QuotaExceeded."""
    _check(tenant, "max_images", held, wanted, "images waiting or being painted", retry=_IMAGES_RETRY_SECONDS)


def check_trainings(tenant: Tenant, held: int) -> None:
    """`held` trainings have not ended. Raises QuotaExceeded."""
    _check(tenant, "max_trainings", held, 1, "trainings that have not ended", retry=_TRAININGS_RETRY_SECONDS)


def check_stored(tenant: Tenant, held: int, wanted: int) -> None:
    """`held` bytes of adapters are stored. Raises QuotaExceeded: deleting helps, waiting does not."""
    _check(tenant, "max_stored_bytes", held, wanted, "bytes of adapters stored", retry=None)


def check_steps(tenant: Tenant, asked: Sequence[tuple[float, int]], wanted: int, now: float) -> None:
    """`asked` are the times and steps of the trainings of the last 24 hours, oldest first.

    Raises QuotaExceeded, which says when enough of them will be older than that.
    """
    limit = tenant.quotas.max_train_steps_per_day
    held = sum(steps for _, steps in asked)
    if limit is None or held + wanted <= limit:
        return
    left, retry = held, None
    for time, steps in asked:
        left -= steps
        if left + wanted <= limit:
            retry = max(1.0, time + DAY_SECONDS - now)
            break
    what = "training steps asked for in 24 hours"
    _check(tenant, "max_train_steps_per_day", held, wanted, what, retry=retry)


def stored_bytes(store: AdapterStore, scope: Scope) -> int:
    """What the adapters of a scope take in the store."""
    return sum(
        record.size_bytes
        for version in store.versions()
        if scope.owns(version.meta.name)
        for record in version.checkpoints
    )


def _check(tenant: Tenant, quota: str, held: int, wanted: int, what: str, *, retry: float | None) -> None:
    limit: int | None = getattr(tenant.quotas, quota)
    if limit is not None and held + wanted > limit:
        if wanted > limit:
            retry = None  # it never fits
        raise QuotaExceeded(
            f"tenant {tenant.name} may have {limit} {what}; it has {held}, and this asks for {wanted} more",
            {"quota": quota, "limit": str(limit), "held": str(held), "wanted": str(wanted)},
            tenant=tenant.name,
            retry_after_seconds=retry,
        )
