"""The card of a published mixture of experts: its shapes, what follows from them, and what its paper prints."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from minillm.costs.flops import causal_pairs


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1): low-rank queries, keys and values.

    Each of query_rank and key_value_rank has an RMSNorm; a head's query and key have nope_dim + rope_dim numbers, of
    which the heads share the key's rope_dim.
    """

    query_rank: int
    key_value_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class PublishedMoE:
    """A published transformer with experts, or (``n_experts`` 0) the dense one that its paper compares with.

    Attributes:
        n_layers: of the decoder.
        n_encoder_layers: of the encoder; 0 for a decoder alone. Decoders with an encoder have cross-attention.
        d_ff, gated: of the dense feed-forward layers; gated ones have three matrices, others two.
        expert_d_ff, gated_experts: the same of an expert.
        moe_every, first_dense: after the first_dense layers of a stack, every moe_every-th layer has experts.
        n_shared_experts: beside the n_experts, of the same shape, used by every token.
        latent: instead of n_kv_heads and head_dim.
        alternate_window: tokens that a token sees in every other layer; None: all before it, as in the others.
        attention_vectors, expert_vectors, router_vectors: numbers outside matrices (biases, norms of queries and keys,
            sinks) in one attention layer, one expert, one router.
        position_parameters: of the whole model.
        printed_parameters, printed_active, printed_flops: figures as printed, "1.2T" for instance; None: no such
            figure. FLOPs are of one forward pass over a token, or where there is an encoder over a sequence.
        active_counts_embedding: whether printed_active counts the token embedding.
        unexplained: printed figure's name -> in what it differs from what the printed shapes give.
    """

    name: str
    source: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    expert_d_ff: int
    n_experts: int
    k: int
    printed_parameters: str
    printed_active: str | None = None
    printed_flops: str | None = None
    n_encoder_layers: int = 0
    gated: bool = True
    gated_experts: bool = True
    moe_every: int = 1
    first_dense: int = 0
    n_shared_experts: int = 0
    tied_embeddings: bool = False
    latent: LatentAttention | None = None
    alternate_window: int | None = None
    attention_vectors: int = 0
    expert_vectors: int = 0
    router_vectors: int = 0
    position_parameters: int = 0
    active_counts_embedding: bool = True
    unexplained: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def n_moe_layers(self) -> int:
        """Layers with experts, of encoder and decoder."""
        return self._sparse(self.n_layers) + self._sparse(self.n_encoder_layers)

    @property
    def parameters(self) -> int:
        """All of them, shared ones once, exactly: weights of the matrices and the numbers beside them."""
        stacks = (self.n_layers, self.n_encoder_layers)
        attentions = sum(stacks) + (self.n_layers if self.n_encoder_layers else 0)
        weights = sum(map(self._block_weights, stacks)) + (attentions - sum(stacks)) * self._attention_weights
        weights += self.n_moe_layers * (self.n_experts - self.k) * self._expert_weights
        weights += (1 if self.tied_embeddings else 2) * self.embedding_parameters
        norms = sum(stacks) + attentions + (2 if self.n_encoder_layers else 1)
        vectors = norms * self.d_model + attentions * self.attention_vectors + self.position_parameters
        vectors += self.n_moe_layers * (self.router_vectors + self.n_experts * self.expert_vectors)
        return weights + vectors

    @property
    def active_parameters(self) -> int:
        """Those that a token uses: all but the experts it is not sent to (through encoder and decoder)."""
        idle = self.n_experts - self.k
        return self.parameters - self.n_moe_layers * idle * (self._expert_weights + self.expert_vectors)

    @property
    def embedding_parameters(self) -> int:
        """Of the token embedding, which is the output head too where they are tied."""
        return self.vocab_size * self.d_model

    def weight_flops(self, seq: int = 1, target: int | None = None) -> int:
        """The rule of thumb: two operations a token for each weight that it multiplies in its stack, no attention.

        That is twice active_parameters, less what no token multiplies (vectors, an embedding that is no output head).

        Args:
            seq: tokens, of an encoder if there is one.
            target: tokens of the decoder behind an encoder, and only there; cross-attention counts with these.
        """
        self._check_lengths(seq, target)
        decoder = self._block_weights(self.n_layers) + self.embedding_parameters
        if target is None:
            return 2 * seq * decoder
        decoder += self.n_layers * self._attention_weights
        return 2 * (seq * self._block_weights(self.n_encoder_layers) + target * decoder)

    def forward_flops(self, seq: int, target: int | None = None, *, causal: bool = False) -> int:
        """All matrix products of one forward pass over one text, counted as :func:`minillm.costs.forward_flops` does.

        Args:
            seq, target: as in :meth:`weight_flops`; cross-attention's keys and values are made of the encoder's tokens.
            causal: count the decoder's pairs of tokens that see each other instead of all pairs.
        """
        flops = self.weight_flops(seq, target)
        length = seq if target is None else target
        windowed = self.n_layers // 2 if self.alternate_window else 0
        pairs = self.n_layers * length**2
        if causal:
            pairs = windowed * causal_pairs(length, self.alternate_window) + (self.n_layers - windowed) * causal_pairs(
                length
            )
        if target is not None:
            pairs += self.n_encoder_layers * seq**2 + self.n_layers * seq * target
            flops += 2 * (seq - target) * self.n_layers * 2 * self.d_model * self.n_kv_heads * self.head_dim
        return flops + pairs * self._flops_per_pair

    def _check_lengths(self, seq: int, target: int | None) -> None:
        for name, value in (("seq", seq), ("target", target)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if (target is None) == bool(self.n_encoder_layers):
            wanted = "a number of tokens" if self.n_encoder_layers else "None (there is no encoder)"
            raise ValueError(f"target must be {wanted} for {self.name}, got {target}")

    def _sparse(self, layers: int) -> int:
        return max(layers - self.first_dense, 0) // self.moe_every if self.n_experts else 0

    @property
    def _expert_weights(self) -> int:
        return (3 if self.gated_experts else 2) * self.d_model * self.expert_d_ff

    def _block_weights(self, layers: int) -> int:
        """Weights in matrices that a token multiplies in so many layers, cross-attention left out."""
        sparse = self._sparse(layers)
        dense = (3 if self.gated else 2) * self.d_model * self.d_ff
        mixture = (self.k + self.n_shared_experts) * self._expert_weights + self.n_experts * self.d_model
        return layers * self._attention_weights + (layers - sparse) * dense + sparse * mixture

    @property
    def _attention_weights(self) -> int:
        if self.latent is None:
            return self.d_model * 2 * (self.n_heads + self.n_kv_heads) * self.head_dim
        query_dim = self.latent.nope_dim + self.latent.rope_dim
        query = self.latent.query_rank * (self.d_model + self.n_heads * query_dim)
        joint = self.d_model * (self.latent.key_value_rank + self.latent.rope_dim)
        spread = self.latent.key_value_rank * self.n_heads * (self.latent.nope_dim + self.latent.value_dim)
        return query + joint + spread + self.n_heads * self.latent.value_dim * self.d_model

    @property
    def _flops_per_pair(self) -> int:
        """One query looking at one key in one layer: the score and the weighted sum."""
        if self.latent is None:
            return 4 * self.n_heads * self.head_dim
        return 2 * self.n_heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim)
