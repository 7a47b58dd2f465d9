"""The recipe of a training: what is learned, and how. Names and meanings are those of the contract."""

from __future__ import annotations

from dataclasses import dataclass, field

from atelier_server.core.choices import Priority

METHODS = ("lora", "dreambooth", "textual_inversion", "pivotal")
PIVOTAL_METHODS = ("lora", "dreambooth")
TARGET_MODULES = ("attention", "feed_forward", "convolutions")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
PRECISIONS = ("no", "fp16", "bf16")
# PEFT's names of `LoraConfig.init_lora_weights`: those that need no data. "default" is its True.
LORA_INITS = ("gaussian", "default", "pissa", "olora", "orthogonal")
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
# A token's vectors learn this much faster than weights unless `token_lr` says otherwise.
_TOKEN_LR_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: `TrainingRecipe` of the contract with every default filled in.

    Three defaults follow from other fields and are filled in here: `text_encoder_lr` and `token_lr` (0 until
    then), and `cache_text_embeddings`, which is never true where the text side learns. `batch_bucket` stays 0
    where the server decides at the start; `mixed_precision` "" is the base's dtype.
    """

    instance_prompt: str
    resolution: int
    method: str = "lora"
    max_train_steps: int = 500
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    train_batch_size: int = 4
    rank: int = 8
    lora_alpha: float = 8.0
    random_crop: bool = False
    random_flip: bool = False
    seed: int = 0
    checkpointing_steps: int = 100
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 30
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    snr_gamma: float | None = None
    caption_dropout: float = 0.0
    # Regularisation by the class (DreamBooth's class pictures, or the base's own predictions).
    class_prompt: str = ""
    with_prior_preservation: bool = False
    prior_loss_weight: float = 1.0
    num_class_images: int = 50
    output_preservation_weight: float = 0.0
    # The text side: encoders, and tokens.
    train_text_encoder: bool = False
    text_encoder_lr: float = 0.0
    placeholder_tokens: tuple[str, ...] = ()
    num_vectors: int = 1
    initializer_token: str = ""
    token_lr: float = 0.0
    train_text_encoder_ti_frac: float = 0.5
    pivotal_method: str = "lora"
    # The adapter.
    target_modules: tuple[str, ...] = ("attention",)
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: str = "gaussian"
    # The optimiser.
    optimizer: str = "adamw"
    gradient_accumulation_steps: int = 1
    noise_offset: float = 0.0
    use_ema: bool = False
    ema_decay: float = 0.999
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    mixed_precision: str = ""
    # The pictures.
    repeats: int = 1
    aspect_ratio_buckets: bool = False
    masked_loss: bool = False
    cache_latents: bool = True
    cache_text_embeddings: bool = True
    validation_split: float = 0.0
    # The job among others.
    exact: bool = False
    batch_bucket: int = 0
    keep_last: int = 0
    keep_every: int = 0
    priority: Priority = Priority.NORMAL

    def __post_init__(self) -> None:
        if not self.text_encoder_lr:
            self._fill("text_encoder_lr", self.learning_rate)
        if not self.token_lr:
            # Prodigy finds the size of its steps itself; a factor there would only mislead it.
            factor = 1.0 if self.optimizer == "prodigy" else _TOKEN_LR_FACTOR
            self._fill("token_lr", self.learning_rate * factor)
        if self.learns_text:
            self._fill("cache_text_embeddings", False)

    @property
    def learns_tokens(self) -> bool:
        return self.method in ("textual_inversion", "pivotal")

    @property
    def learns_text(self) -> bool:
        """Whether what a caption is to the U-Net changes while this trains."""
        return self.train_text_encoder or self.learns_tokens

    @property
    def rows(self) -> int:
        """Of a micro-step: pictures, as many of the class, and the pictures again under its prompt."""
        preserves_output = self.output_preservation_weight > 0
        return self.train_batch_size * (1 + self.with_prior_preservation + preserves_output)

    def _fill(self, name: str, value: float | bool) -> None:
        object.__setattr__(self, name, value)  # frozen: only while it is made


@dataclass(frozen=True, slots=True)
class TrainingAbilities:
    """What the worker's trainer can do with its base on its device.

    `unheeded` are fields of a recipe that it does not know yet: they have to be at their defaults.
    `vocabulary` are the words, in lower case, that are one token to the base: no new one may be among them.
    Empty: not known.
    """

    methods: tuple[str, ...] = METHODS
    optimizers: tuple[str, ...] = ("adamw", "prodigy")
    precisions: tuple[str, ...] = PRECISIONS
    unheeded: tuple[str, ...] = ()
    vocabulary: frozenset[str] = field(default=frozenset(), repr=False)
