"""Image archives. Making and checking them: :mod:`diffit.data.convert`, :mod:`diffit.data.check`."""

from diffit.data.archive import ImageArchive
from diffit.data.grid import make_grid, save_grid

__all__ = ["ImageArchive", "make_grid", "save_grid"]
