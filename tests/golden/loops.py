"""The plain training loops that ours are measured against: PEFT and diffusers, one training, nothing shared.

    loop = PlainLoop(recipe, pipeline, targets)
    for batch in batches:
        loop.step(batch)            # losses and gradients (before clipping) are kept

Put together as diffusers' example scripts are: train_dreambooth.py, train_dreambooth_lora.py (and its SDXL
sister), textual_inversion.py, and for `pivotal` train_dreambooth_lora_sdxl_advanced.py with its
`--train_text_encoder_ti`. Two things are ours and not theirs: gradients of textual inversion are clipped too,
and `pivotal` learns first the tokens alone, then the weights alone, each phase with an optimizer of its own.

Nothing here comes from Atelier but the recipe; names of parameters are those of its trainer, so that both
sides can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import Tensor, nn

from atelier_server.core import Recipe

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Drawn:
    """A micro-batch: latents and noise [b,C,h,w], timesteps [b], a caption a row."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: Sequence[str]


@dataclass(frozen=True)
class Group:
    """Parameters that learn in steps `begin` to `end`. `rows`: only these rows of an embedding learn."""

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    rows: slice | None = None


@dataclass
class PlainLoop:
    """`pipeline` is changed; `targets` are the U-Net's layers that get LoRA."""

    recipe: Recipe
    pipeline: Any
    targets: Sequence[str] = ()
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        pipe = self.pipeline
        self._noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self._encoders = {
            name: getattr(pipe, name)
            for name in ("text_encoder", "text_encoder_2")
            if getattr(pipe, name, None) is not None
        }
        for module in (pipe.unet, pipe.vae, *self._encoders.values()):
            module.requires_grad_(False).eval()
        self._tokens: dict[str, str] = {}
        phases = list(self._phases())
        self._ends = [end for end, _ in phases]
        self._groups = [groups for _, groups in phases]
        self._begin(0)

    def parameters(self) -> dict[str, Tensor]:
        """All that has been learned so far, or will be; of a token its own vectors."""
        found: dict[str, Tensor] = {}
        for group in (group for groups in self._groups for group in groups):
            for name, parameter in group.parameters.items():
                found[name] = parameter.detach() if group.rows is None else parameter.detach()[group.rows]
        return found

    # ------------------------------------------------------------------------------------------- phases
    def _phases(self) -> Iterator[tuple[int, list[Group]]]:
        recipe = self.recipe
        last, method = recipe.max_train_steps, recipe.method
        if method in ("textual_inversion", "pivotal"):
            whole = method == "textual_inversion"
            end = last if whole else round(last * recipe.train_text_encoder_ti_frac)
            yield end, list(self._new_tokens())
            if whole:
                return
            method = recipe.pivotal_method
        yield last, list(self._lora() if method == "lora" else self._whole())

    def _begin(self, phase: int) -> None:
        self._phase = phase
        recipe, groups = self.recipe, self._groups[phase]
        for group in (group for groups in self._groups for group in groups):
            for parameter in group.parameters.values():
                parameter.requires_grad_(group in groups)
        begin = self._ends[phase - 1] if phase else 0
        self._optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters.values()), "lr": g.learning_rate} for g in groups],
            lr=groups[0].learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            weight_decay=recipe.adam_weight_decay,
            eps=recipe.adam_epsilon,
        )
        self._lr_scheduler = get_scheduler(
            recipe.lr_scheduler,
            self._optimizer,
            num_warmup_steps=recipe.lr_warmup_steps,
            num_training_steps=self._ends[phase] - begin,
        )

    def _lora(self) -> Iterator[Group]:
        recipe = self.recipe
        init: bool | str = True if recipe.init_lora_weights == "default" else recipe.init_lora_weights
        settings: dict[str, Any] = {
            "r": recipe.rank,
            "lora_alpha": recipe.lora_alpha,
            "use_dora": recipe.use_dora,
            "use_rslora": recipe.use_rslora,
            "init_lora_weights": init,
        }
        torch.manual_seed(recipe.seed)
        self.pipeline.unet.add_adapter(LoraConfig(target_modules=list(self.targets), **settings))
        yield Group(_pairs("unet", self.pipeline.unet), recipe.learning_rate)
        if recipe.train_text_encoder:
            for name, encoder in self._encoders.items():
                encoder.add_adapter(LoraConfig(target_modules=list(TEXT_TARGETS), **settings))
                yield Group(_pairs(name, encoder), recipe.text_encoder_lr)

    def _whole(self) -> Iterator[Group]:
        modules = {"unet": self.pipeline.unet}
        if self.recipe.train_text_encoder:
            modules |= self._encoders
        for component, module in modules.items():
            rate = self.recipe.learning_rate if component == "unet" else self.recipe.text_encoder_lr
            yield Group({f"{component}.{name}": p for name, p in module.named_parameters()}, rate)

    def _new_tokens(self) -> Iterator[Group]:
        """Each placeholder is as many words of the vocabulary as it has vectors (textual_inversion.py)."""
        recipe = self.recipe
        count = recipe.num_vectors
        names = {
            placeholder: [placeholder, *(f"{placeholder}_{number}" for number in range(1, count))]
            for placeholder in recipe.placeholder_tokens
        }
        self._tokens = {placeholder: " ".join(words) for placeholder, words in names.items()}
        for component, encoder in self._encoders.items():
            tokenizer = getattr(self.pipeline, component.replace("text_encoder", "tokenizer"))
            (initial,) = tokenizer.encode(recipe.initializer_token, add_special_tokens=False)
            begin = len(tokenizer)
            added = tokenizer.add_tokens([word for words in names.values() for word in words])
            assert added == count * len(names)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            with torch.no_grad():
                table[begin:] = table[initial]
            yield Group({f"tokens.{component}": table}, recipe.token_lr, slice(begin, len(tokenizer)))

    # --------------------------------------------------------------------------------------------- steps
    def step(self, batch: Drawn) -> None:
        """Forward, backward and optimizer, as in every one of the scripts."""
        if len(self.losses) == self._ends[self._phase]:
            self._begin(self._phase + 1)
        groups = self._groups[self._phase]
        loss = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        told: dict[str, Tensor] = {}
        kept: list[tuple[nn.Parameter, slice, Tensor]] = []
        for group in groups:
            for name, parameter in group.parameters.items():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if group.rows is not None:
                    gradient[: group.rows.start] = 0
                    kept.append((parameter, group.rows, parameter.detach().clone()))
                    gradient = gradient[group.rows]
                told[name] = gradient.clone()
        everything = [p for group in groups for p in group.parameters.values()]
        nn.utils.clip_grad_norm_(everything, self.recipe.max_grad_norm)
        self._optimizer.step()
        self._lr_scheduler.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for parameter, rows, before in kept:
                parameter[: rows.start] = before[: rows.start]
        self.losses.append(loss.item())
        self.gradients.append(told)

    def _loss(self, batch: Drawn) -> Tensor:
        scheduler, unet = self._noise_scheduler, self.pipeline.unet
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        states, added = self._conditioning(batch.captions)
        prediction = unet(noisy, batch.timesteps, states, added_cond_kwargs=added).sample
        target = batch.noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        return F.mse_loss(prediction, target)

    def _conditioning(self, captions: Sequence[str]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """As the scripts' `encode_prompt` and `compute_time_ids` make it; one text after the other."""
        heard = [self._heard(caption) for caption in captions]
        states = torch.stack([one for one, _ in heard])
        if "text_encoder_2" not in self._encoders:
            return states, None
        side = float(self.recipe.resolution)
        time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(captions), -1)
        return states, {"text_embeds": torch.stack([pooled for _, pooled in heard]), "time_ids": time_ids}

    def _heard(self, caption: str) -> tuple[Tensor, Tensor]:
        for placeholder, words in self._tokens.items():
            caption = caption.replace(placeholder, words)
        states, pooled = [], torch.zeros(())
        for component, encoder in self._encoders.items():
            tokenizer = getattr(self.pipeline, component.replace("text_encoder", "tokenizer"))
            ids = tokenizer(
                caption,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            if len(self._encoders) == 1:
                states.append(encoder(ids)[0][0])
            else:
                output = encoder(ids, output_hidden_states=True)
                states.append(output.hidden_states[-2][0])
                pooled = output[0][0]  # of the last one, which has a projection
        return torch.cat(states, dim=-1), pooled


def _pairs(component: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters in the order of the module's, as COMPONENT.LAYER.A, .B and .magnitude."""
    parts = {
        ".lora_A.default.weight": ".A",
        ".lora_B.default.weight": ".B",
        ".lora_magnitude_vector.default.weight": ".magnitude",
    }
    return {
        f"{component}.{name.removesuffix(ending)}{part}": parameter
        for name, parameter in module.named_parameters()
        for ending, part in parts.items()
        if name.endswith(ending)
    }
