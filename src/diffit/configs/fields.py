"""Ranges of values, from which the parts of a configuration are made."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
MAX_SIZE, MAX_BLOCKS = 2**20, 1000  # of a network; nothing larger fits a machine
MAX_STEPS = 100_000  # of a sampler or a schedule: their noise levels are kept, and no model has as many
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Blocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
# Not strict: Sampling is looked at before it is validated, so that an array of JSON comes as a list.
Interval = Annotated[tuple[NonNegative, Positive], Field(strict=False)]
Levels = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)], ...],
    Field(strict=False, min_length=1, max_length=1000),
]


class Frozen(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
