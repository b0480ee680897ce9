"""Errors a user can cause. Each message says what, where (file, tensor, row, sizes) and what to do next.

This module knows nothing of the rest of the package. Invariants of our own are each an `assert`, not these.
"""


class LemaError(Exception):
    """Base of every error LEMA raises on purpose."""


class ConfigError(LemaError, ValueError):
    """A setting has a bad value, an unknown name, or contradicts another one."""


class WeightsError(LemaError):
    """Weight files cannot be used: missing, ambiguous, changed, or not what their header says."""


class WeightsFormatError(WeightsError):
    """A file is not valid safetensors, or its header contradicts the file."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """A path does not exist or holds no weights."""


class MissingTensorError(WeightsError, KeyError):
    """Tensors a model needs are not in the files. All missing ones are listed at once."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class ShapeMismatchError(WeightsError):
    """A tensor in a file has another shape than the model's configuration asks for."""


class ReadError(WeightsError, OSError):
    """Reading bytes of a tensor failed while streaming."""


class UnsupportedError(LemaError, ValueError):
    """A model family, adapter type or option that LEMA would compute wrongly, and so refuses by name."""


class InputError(LemaError, ValueError):
    """Token ids, labels or masks that no correct step can be made from."""


class BindingError(LemaError, RuntimeError):
    """Parameters bound to streamed memory were moved, cast, merged or asked for as a whole."""


class PlanError(LemaError, ValueError):
    """A memory plan does not fit the model or the device it was given for."""


class StreamingError(LemaError, RuntimeError):
    """The slot protocol was misused: a unit acquired twice, released unacquired, or used after close."""


class NonFiniteError(LemaError, ArithmeticError):
    """A loss or gradient is NaN or infinite; says in which layer it was first seen."""


class DeviceError(LemaError, RuntimeError):
    """The device asked for is absent or cannot compute in the type asked for."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The device has no room for what was to be allocated; says what was planned, what is taken and what to set."""


class CheckpointError(LemaError):
    """A training checkpoint is incomplete, damaged, or belongs to another run."""


class RankError(LemaError, RuntimeError):
    """Another process of the run has ended by an error; says which one and by what."""


class CallbackError(LemaError, RuntimeError):
    """A user's callback raised; says which and at what event. The error itself is its `__cause__`."""


class HubError(LemaError, OSError):
    """The hub refused something, or could not be reached."""


class ReportError(LemaError):
    """A folder that no report can be made of."""


class KaggleError(LemaError):
    """Kaggle refused something, could not be reached, or a kernel there did not end well."""
