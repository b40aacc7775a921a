"""What an estimator shares with its clones, and what its pickle holds instead."""

from __future__ import annotations

from typing import Any

from skembed.inference.registry import Lease
from skembed.inference.settings import Parameters, pack_model

__all__ = ["LeaseMixin"]


class LeaseMixin:
    """Mixin of an estimator of `Parameters`, before scikit-learn's bases: a lease, and pickles.

    Clones, shallow copies too, share the lease. A pickle holds the commit of a hub model that was
    used, and the model's files where `store_weights`.
    """

    model: Any
    revision: Any
    store_weights: Any

    def __sklearn_clone__(self) -> Any:
        """Return a clone that shares the lease: folds and grid points find the weights loaded."""
        clone = super().__sklearn_clone__()  # type: ignore[misc]
        clone.__dict__["_lease"] = self._shared_lease()
        return clone

    def __copy__(self) -> Any:
        """Return a copy that shares the lease and all fitted values."""
        self._shared_lease()
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return parameters and fitted values; the model's files too where `store_weights`."""
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[dict-item]
        lease: Lease | None = state.pop("_lease", None)
        pin = None if lease is None else lease.find_pin(self.model, self.revision)
        if pin is not None:
            state["_pin"] = pin
        if self.store_weights:
            state["_stored_files"] = pack_model(self._parameters(), self._shared_lease())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and note that the device may be another machine's."""
        state = dict(state)
        stored, pin = state.pop("_stored_files", None), state.pop("_pin", None)
        super().__setstate__(state)  # type: ignore[misc]
        self.__dict__["_lease"] = lease = Lease(stored, from_pickle=True)
        if pin is not None:
            lease.pins[pin[0]] = pin[1]

    def _parameters(self) -> Parameters:
        """Return the parameters that embedding depends on, unchecked."""
        raise NotImplementedError

    def _shared_lease(self) -> Lease:
        """Return the lease, made if need be."""
        raise NotImplementedError
