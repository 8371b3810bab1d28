"""Changes to a model's sampling settings, checked against the model before any work starts."""

import math
from typing import Any

from pydantic import ValidationError

from diffit.configs.sampling import CONTINUOUS, Sampling, steps_text
from diffit.configs.schema import Config, explain, require_null_class
from diffit.errors import UserError

# Setting -> the samplers that know it.
CHURN = ("S_churn", "S_min", "S_max", "S_noise")
KNOWN_BY = {"eta": ("ddim", "dpm++2m-sde"), "levels": CONTINUOUS, "sigma_mid": ("consistency",)}
KNOWN_BY |= dict.fromkeys(CHURN, ("heun",))
SPELLED = {"cfg_power": "scale-pow"} | {name: name.replace("_", "-") for name in CHURN}
GUIDANCE = ("cfg_power", "cfg_interval", "cfg_channels", "cfg_skip")


def with_sampling(config: Config, *, has_guide: bool = False, **changes: Any) -> Config:
    """``config`` with these fields of :class:`Sampling` changed; None leaves a field as it is.

    A model that has a guide (:meth:`Model.guided_by`) needs no classes to be guided.

    ``steps`` alone, where the file has fitted levels for so many, also chooses the sampler that they were fitted for.
    ``guidance`` is another name of ``cfg_scale``; a ``cfg_power`` of 0 is a constant scale, ``cfg_channels`` may be
    ``all``, and ``steps`` may be a string such as ``ddim50``. Raises :class:`UserError` for unknown names, for what the
    model cannot do, and for a setting that would have no effect.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if "guidance" in changes:
        changes["cfg_scale"] = changes.pop("guidance")
    can_guide = has_guide or config.model.num_classes > 0
    changed = _changed(config, changes, can_guide) if changes else config
    if not has_guide:
        require_null_class(changed)
    return changed


def _changed(config: Config, changes: dict[str, Any], can_guide: bool) -> Config:
    scale = changes.get("cfg_scale", 1)
    if scale != 1 and not can_guide:
        raise UserError(
            f"guidance scale {scale:g}: the model has no classes to be guided to; leave it out, or give a guide network"
        )
    if "steps" in changes:
        # A bare number; "ddim50" brings its own.
        changes.setdefault("spacing", "trailing" if config.sampling.spacing == "trailing" else "linspace")
    if changes.get("S_max") == math.inf:
        changes["S_max"] = Sampling().S_max  # JSON has no infinity, and no noise level is above this
    if changes.get("cfg_power") == 0:
        changes["cfg_power"] = None
    if "cfg_channels" in changes:
        changes["cfg_channels"] = None if changes["cfg_channels"] == "all" else int(changes["cfg_channels"])
    if "steps" in changes and "sampler" not in changes and changes.get("levels", config.sampling.levels) == "fitted":
        fits = [fit.sampler for fit in config.sampling.fitted if len(fit.sigmas) == changes["steps"]]
        if fits and config.sampling.sampler not in fits:
            changes["sampler"] = fits[-1]
    if changes.get("sampler", config.sampling.sampler) != config.sampling.sampler:
        changes.setdefault("eta", 1.0 if changes["sampler"] == "dpm++2m-sde" else 0.0)
    if changes.get("sampler", "heun") != "heun":  # what the file's own sampler had
        defaults = Sampling()
        changes = {name: getattr(defaults, name) for name in CHURN} | changes
    try:
        changed = Config.model_validate(config.model_dump() | {"sampling": config.sampling.model_dump() | changes})
    except ValidationError as error:
        raise UserError(f"sampling options: {explain(error)}") from None
    _refuse_without_effect(changed, changes, can_guide)
    return changed


def _refuse_without_effect(config: Config, changes: dict[str, Any], can_guide: bool) -> None:
    sampling, defaults = config.sampling, Sampling()
    for name in changes:
        value = getattr(sampling, name)
        option = f"--{SPELLED.get(name, name.replace('_', '-'))} {value}"
        if name in ("sigma_min", "sigma_max", "rho") and config.diffusion.kind != "edm":
            raise UserError(f"{option}: this model has the noise levels of its own timesteps; choose them with --steps")
        if name in ("sigma_min", "sigma_max", "rho") and sampling.fitted_sigmas is not None:
            raise UserError(f"{option}: the file's fitted noise levels are used; add --levels own")
        if name == "rho" and sampling.levels == "lambda":
            raise UserError(f"{option}: it spaces the model's own levels; leave it or --levels lambda out")
        if option == "--levels fitted" and sampling.fitted_sigmas is None:
            have = ", ".join(f"{fit.sampler} in {len(fit.sigmas)} steps" for fit in sampling.fitted) or "none"
            raise UserError(
                f"{option}: the file has none for {sampling.sampler} in {steps_text(sampling)} steps (it has {have}); "
                "fit them with `diffit tune-schedule`, or leave it out"
            )
        if value == getattr(defaults, name):
            continue
        if name == "levels" and sampling.spacing == "leading":
            raise UserError(f"{option}: --steps {steps_text(sampling)} chooses timesteps; use --steps {sampling.steps}")
        if sampling.sampler not in KNOWN_BY.get(name, (sampling.sampler,)):
            raise UserError(f"{option}: {sampling.sampler} has no such setting; use --sampler {KNOWN_BY[name][0]}")
        if name in ("S_min", "S_max", "S_noise") and not sampling.S_churn:
            raise UserError(f"{option}: no noise is added at S_churn 0; give --S-churn too, or leave it out")
        if name in GUIDANCE and (sampling.cfg_scale == 1 or not can_guide):
            raise UserError(f"{option}: without guidance it has no effect; give --cfg-scale too, or leave it out")
