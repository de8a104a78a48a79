"""The section `model`: the encoder's shape, layer by layer. What is made of it is in `pretrain/model/`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.config.section import Count, Free, Section

Theta = Annotated[float, Field(gt=1)]


class LayerConfig(Section):
    """One layer of the repeating pattern."""

    span: Literal["global"] | Count = "global"
    """`global`, or a window of W positions for each triangle, itself included: i-W < j <= i and i <= j < i+W
    (|i-j| < W under bidirectional attention). A window costs O(L W) instead of O(L^2)."""
    positions: Literal["rotary", "none"] | None = None
    """Positions of the layer; by default `model.positions`."""
    rotary_theta: Theta | None = None
    """Base of the rotary frequencies; by default `model.rotary_theta`."""

    @property
    def window(self) -> int | None:
        """The span in positions, None if it is global."""
        return None if self.span == "global" else self.span

    @model_validator(mode="after")
    def _theta_has_a_use(self) -> "LayerConfig":
        if self.positions == "none" and self.rotary_theta is not None:
            raise ValueError("a layer without positions has no use for rotary_theta; leave it out")
        return self


class ModelConfig(Section):
    """The encoder's shape. Its vocabulary comes from the corpus."""

    hidden_size: Count = 128
    """Width of the residual stream."""
    num_layers: Count = 4
    num_heads: Count = 2
    """Logical heads; under dual-triangle attention each becomes two sub-heads of half its width."""
    head_dim: Count | None = None
    """Width of a logical head; by default hidden_size / num_heads."""
    intermediate_size: Count | None = None
    """Width inside the feed-forward layer; by default 8/3 of the hidden size, rounded up to a multiple of 32."""
    glu: Literal["swiglu", "geglu"] = "swiglu"
    """Gate of the feed-forward layer (Shazeer, arXiv 2002.05202)."""
    attention: Literal["dual_triangle", "bidirectional", "causal"] = "dual_triangle"
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rotary_theta: Theta = 10_000.0
    """Base of the rotary frequencies."""
    max_positions: Count = 2048
    """Learned positions only: how many there are. A longer row is refused."""
    drop_positions_after: Count | None = None
    """Train and evaluate without rotary positions once this many tokens were seen (DroPE, arXiv 2512.12167)."""
    layers: list[LayerConfig] = Field(default=[])
    """Pattern of spans and positions, repeated over num_layers. Empty: every layer is global, with
    `positions` and `rotary_theta` as above."""
    qk_norm: bool = False
    """RMSNorm of the queries and keys of each (sub-)head, before rotary positions (Henry et al., arXiv 2010.04245)."""
    unet: bool = False
    """Skip connections with learned weights from each layer of the first half to its mirror image in the second, and
    a learned mixture of the input embedding into every layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the elements zeroed in the embedding and in what each layer adds to the residual stream."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared logarithm of the softmax's denominator (PaLM, arXiv 2204.02311) in the gradient."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    init_std: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the initial weights, by default sqrt(2 / (5 x hidden_size)) (Nguyen and Salazar, arXiv
    1910.05895). Under `mup` it is that at `base_width`."""
    parametrization: Literal["standard", "mup"] = "standard"
    """`mup`: initial weights, output and learning rates scale with the width such that what was tuned at `base_width`
    holds at every width (maximal update parametrization, arXiv 2203.03466). Keep the width of a head constant."""
    base_width: Count = 128
    """`mup` only: the hidden_size at which `mup` and `standard` are the same."""
    depth_scaled_init: bool = True
    """Scale the initial projections back into the residual stream down by sqrt(2 x num_layers)."""
    kernel: Free[Literal["auto", "sdpa", "varlen", "flex", "dense"]] = "auto"
    """Attention kernel: `sdpa` (any device), `varlen` (CUDA, bf16), `flex` (no training on CPU), `dense` (the slow
    reference). `auto` chooses by device, precision and rows, and says in the log which and why."""

    @property
    def head_size(self) -> int:
        """Width of a logical head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def sub_head_size(self) -> int:
        """Width of what has one softmax: half a logical head under dual-triangle attention, else a whole one."""
        return self.head_size // 2 if self.attention == "dual_triangle" else self.head_size

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size

    @property
    def ffn_size(self) -> int:
        """Width inside the feed-forward layer."""
        return self.intermediate_size or -(-self.hidden_size * 8 // 3 // 32) * 32

    @property
    def width_ratio(self) -> float:
        """Width as a multiple of `base_width` under `mup`; else 1."""
        return self.hidden_size / self.base_width if self.parametrization == "mup" else 1.0

    @property
    def initial_std(self) -> float:
        """Standard deviation of the initial matrices between hidden layers."""
        return self.embedding_std / self.width_ratio**0.5

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the initial embeddings and of the output matrix."""
        width = self.base_width if self.parametrization == "mup" else self.hidden_size
        return self.init_std or (2 / (5 * width)) ** 0.5

    def layer(self, index: int) -> LayerConfig:
        """Layer `index` of the encoder, from 0, with nothing left to a default.

        `rotary_theta` is None only where `positions` is `none`, as it is in every layer under learned positions, which
        the embedding carries.
        """
        pattern = self.layers[index % len(self.layers)] if self.layers else LayerConfig()
        positions = pattern.positions or ("rotary" if self.positions == "rotary" else "none")
        theta = pattern.rotary_theta or self.rotary_theta
        return LayerConfig(
            span=pattern.span, positions=positions, rotary_theta=theta if positions == "rotary" else None
        )

    @property
    def resolved_layers(self) -> list[LayerConfig]:
        """All layers of the encoder; see `layer`."""
        return [self.layer(index) for index in range(self.num_layers)]

    @property
    def rotates(self) -> bool:
        """Some layer has rotary positions."""
        return any(layer.positions == "rotary" for layer in self.resolved_layers)

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}; "
                "choose another number, or say head_dim"
            )
        if self.attention == "dual_triangle" and self.head_size % 2:
            raise ValueError(f"a head of width {self.head_size} cannot be split into two sub-heads; make it even")
        if self.rotates and self.sub_head_size % 2:
            halved = self.attention == "dual_triangle"
            raise ValueError(
                f"rotary positions rotate pairs, but a {'sub-head' if halved else 'head'} is {self.sub_head_size} "
                f"wide; choose hidden_size / num_heads, or head_dim, a multiple of {4 if halved else 2}"
            )
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> "ModelConfig":
        if self.positions == "learned" and any(layer.positions == "rotary" for layer in self.layers):
            raise ValueError(
                "layers with rotary positions do not go with positions = learned, which are added once at the "
                "embedding; use positions = rotary or none"
            )
        if self.positions != "rotary" and any(layer.rotary_theta and not layer.positions for layer in self.layers):
            raise ValueError(f"a layer's rotary_theta needs its positions = rotary: model.positions = {self.positions}")
        if self.drop_positions_after is not None and not self.rotates:
            raise ValueError("drop_positions_after needs rotary positions to drop")
        return self
