"""How gradients become weights: accumulation, scaling, clipping, optimizer, schedule, average, of a phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from atelier_server.core import Recipe
from atelier_server.training.optimizers import optimizer_of, schedule_of
from atelier_server.training.parts import Part

# A scaler at this scale has halved it so often that no scale would help.
_LEAST_SCALE = 2.0**-14


class Learning:
    """`parts` learn over `steps` steps, each of `gradient_accumulation_steps` micro-steps.

    One parameter group a part, with its learning rate; the schedule is the same for all. `scaled`: gradients
    are those of `scale` times the loss. Raises InvalidRequest for an optimizer or schedule that cannot be.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        recipe: Recipe,
        steps: int,
        *,
        device: torch.device,
        scaled: bool = False,
    ) -> None:
        named = [pair for part in parts for pair in part.parameters.items()]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._recipe = recipe
        self._micro_steps = 0  # since the optimizer's last step
        self.optimizer = optimizer_of(parts, recipe, device)
        self.lr_scheduler = schedule_of(self.optimizer, recipe, steps)
        self._scaler = GradScaler(device.type, enabled=scaled)
        self._one = torch.ones((), device=device)
        self._ema: EMAModel | None = None
        if recipe.use_ema:
            self._ema = EMAModel(self.parameters, decay=recipe.ema_decay, foreach=True)

    @property
    def rate(self) -> float:
        """The learning rate of the next step, of the first part."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def micro_steps(self) -> int:
        """How many gradients are in the next step so far."""
        return self._micro_steps

    @property
    def scale(self) -> Tensor | None:
        """What the loss of a micro-step is multiplied by before its backward; None: nothing."""
        return self._scaler.scale(self._one) if self._scaler.is_enabled() else None

    def add(self, gradients: Sequence[Tensor]) -> bool:
        """Takes a micro-step's gradients, in the order of `parameters`; whether the optimizer's step is due.

        They are means over the micro-step's rows, and count as its part of the step.
        """
        count = self._recipe.gradient_accumulation_steps
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            part = gradient / count if count > 1 else gradient
            parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
        self._micro_steps += 1
        return self._micro_steps == count

    def clip(self) -> bool:
        """Brings the norm of all gradients together down to `max_grad_norm`; whether the step can be made.

        Gradients that are not finite are no reason against it as long as another scale may help: such a step
        changes nothing but the scale.
        """
        self._scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.parameters, self._recipe.max_grad_norm)
        scales = self._scaler.is_enabled() and self._scaler.get_scale() > _LEAST_SCALE
        return scales or bool(norm.isfinite())

    def step(self) -> None:
        """The optimizer's step, the schedule's and the average's; gradients are forgotten."""
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scaler.get_scale() >= scale:  # else it was skipped
            self.lr_scheduler.step()
            if self._ema is not None:
                self._ema.step(self.parameters)
        self.forget()

    def forget(self) -> None:
        """Drops the gradients: their memory is the pictures' until the next step."""
        self.optimizer.zero_grad()
        self._micro_steps = 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are their exponential moving averages, if the recipe asks for these."""
        if self._ema is None:
            yield
            return
        self._ema.store(self.parameters)
        self._ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self._ema.restore(self.parameters)

    # ------------------------------------------------------------------------------------------- state
    def tensors(self) -> list[Tensor]:
        """All that it holds beside the weights, for whoever counts memory."""
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        kept += [parameter.grad for parameter in self.parameters]
        kept += [] if self._ema is None else self._ema.shadow_params
        return [value for value in kept if isinstance(value, Tensor)]

    def state_dict(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        gradients = zip(self.names, self.parameters, strict=True)
        return {
            "optimizer": {
                "state": {self.names[index]: state for index, state in saved["state"].items()},
                "groups": [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in saved["param_groups"]
                ],
            },
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "gradients": {name: p.grad for name, p in gradients if p.grad is not None},
            "micro_steps": self._micro_steps,
            "scaler": self._scaler.state_dict(),
            "ema": {} if self._ema is None else self._ema.state_dict(),
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Raises KeyError, ValueError or RuntimeError for what is of other parameters."""
        content = self.optimizer.state_dict()
        indices = {name: index for index, name in enumerate(self.names)}
        content["state"] = {indices[name]: state for name, state in tree["optimizer"]["state"].items()}
        for group, saved in zip(content["param_groups"], tree["optimizer"]["groups"], strict=True):
            group.update({key: _like(value, group.get(key)) for key, value in saved.items()})
        self.optimizer.load_state_dict(content)
        self.lr_scheduler.load_state_dict(tree["lr_scheduler"])
        for name, gradient in tree.get("gradients", {}).items():
            parameter = self.parameters[indices[name]]
            parameter.grad = gradient.to(parameter)
        self._micro_steps = tree.get("micro_steps", 0)
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(tree["scaler"])
        if self._ema is not None:
            self._ema.load_state_dict(tree["ema"])
            self._ema.to(self._one.device)


def _like(value: Any, present: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) and isinstance(present, tuple) else value
