"""How gradients become weights: accumulation, clipping, optimizer and schedule of one phase of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from atelier_server.core import Recipe
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training.parts import Part


class Learning:
    """`parts` learn over `steps` steps, each of `gradient_accumulation_steps` micro-steps.

    One parameter group a part, with its learning rate; the schedule is the same for all.
    """

    def __init__(self, parts: Sequence[Part], recipe: Recipe, steps: int) -> None:
        named = [pair for part in parts for pair in part.parameters.items()]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._recipe = recipe
        self._micro_steps = 0  # since the optimizer's last step
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(part.parameters.values()), "lr": part.learning_rate, "name": part.name}
                for part in parts
            ],
            lr=parts[0].learning_rate,  # what the polynomial schedule takes for the whole
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            weight_decay=recipe.adam_weight_decay,
            eps=recipe.adam_epsilon,
        )
        try:
            self.lr_scheduler = get_scheduler(
                recipe.lr_scheduler,
                self.optimizer,
                num_warmup_steps=recipe.lr_warmup_steps,
                num_training_steps=steps,
                num_cycles=recipe.lr_num_cycles,
                power=recipe.lr_power,
            )
        except ValueError as error:
            raise InvalidRequest.of([Violation("recipe.lr_scheduler", str(error))]) from error

    @property
    def rate(self) -> float:
        """The learning rate of the next step, of the first part."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def micro_steps(self) -> int:
        """How many gradients are in the next step so far."""
        return self._micro_steps

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

    def clip(self) -> Tensor:
        """The norm of all gradients together, before it is brought down to `max_grad_norm`."""
        return clip_grad_norm_(self.parameters, self._recipe.max_grad_norm)

    def step(self) -> None:
        """The optimizer's step, and the schedule's; gradients are forgotten."""
        self.optimizer.step()
        self.lr_scheduler.step()
        self.forget()

    def forget(self) -> None:
        """Drops the gradients: their memory is the pictures' until the next step."""
        self.optimizer.zero_grad()
        self._micro_steps = 0

    # ------------------------------------------------------------------------------------------- state
    def tensors(self) -> list[Tensor]:
        """All that it holds beside the weights, for whoever counts memory."""
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        kept += [parameter.grad for parameter in self.parameters]
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


def _like(value: Any, present: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) and isinstance(present, tuple) else value
