"""The model: decoder layers that hand on the routing state, and a language model's head."""

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from rmoe_megablocks.routing import SharedRouting

from .cache import CACHE, takes_both_names
from .configuration import RmoeConfig
from .initial_weights import build_shared, draw_router, draw_shared
from .layers.attention import RmoeAttention, RmoeRotaryEmbedding
from .layers.balancing import load_balancing_loss
from .layers.moe import RmoeExperts, RmoeMLP, RmoeRouter, RmoeSparseMoeBlock


class RmoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, or MoE layer, each behind its norm and beside the residual stream."""

    def __init__(self, config: RmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = RmoeAttention(config, layer_idx)
        if config.moe_layer_freq[layer_idx]:
            self.mlp = RmoeSparseMoeBlock(config, layer_idx)
        else:
            self.mlp = RmoeMLP(config, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    @takes_both_names
    def forward(
        self,
        hidden_states: Tensor,
        router_state: Tensor | None,
        shared: SharedRouting | None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, H] and state [B, S, P] (None for h_0 = 0) -> the same of the next layer.

        All that has a gradient is positional, for a recomputation that looks at these arguments alone. A dense layer
        hands the state on.
        """
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, cache=cache, **kwargs
        )
        hidden_states = hidden_states + attended
        x_BSH = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, RmoeSparseMoeBlock):
            y_BSH, router_state = self.mlp(x_BSH, router_state, shared)
        else:
            y_BSH = self.mlp(x_BSH)
        return hidden_states + y_BSH, router_state


class RmoePreTrainedModel(PreTrainedModel):
    """What model and language model have in common."""

    config_class = RmoeConfig
    config: RmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RmoeDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(RmoeRouter, index=0),
        "hidden_states": RmoeDecoderLayer,
        "attentions": RmoeAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """The library looks for the experts' decorator in the text of this file; it stands in another one."""
        return True

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        """As the library's, which calls it before weights are loaded, but without pipeline stages.

        Raises:
            ValueError: more than one stage: hidden states alone travel between the library's, without the state.
        """
        stages = getattr(distributed_config, "pp_size", None) or 1
        if stages > 1:
            raise ValueError(
                f"pp_size={stages}: the library's pipeline stages would lose the routing state; use pp_size=1, or "
                "train over pipeline stages with Megatron"
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As for the library's own models: for others it leaves out modules without parameters of their own."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The routing is drawn from above, whatever stood in its modules before: by the router, and by the model."""
        super()._init_weights(module)
        if isinstance(module, RmoeRouter):
            draw_router(module)
        elif isinstance(module, RmoeModel) and module.shared_router is not None:
            draw_shared(module.shared_router, module.config)
        elif isinstance(module, RmoeExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                initialization.normal_(weight, mean=0.0, std=self.config.initializer_range)


class RmoeModel(RmoePreTrainedModel):
    """Embedding, layers, what their routers share (``shared_router``), and the last norm."""

    def __init__(self, config: RmoeConfig) -> None:
        super().__init__(config)
        # no padding index: the padding token may be one that is learnt, as the end of a document
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RmoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.shared_router = build_shared(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RmoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @takes_both_names
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """input_ids [B, S] or inputs_embeds [B, S, H] -> last_hidden_state [B, S, H].

        With ``output_router_logits`` also ``router_logits``, [B S, E + M] of each MoE layer. The routing state is a
        token's own and goes through the layers within one call: no cache holds it.

        Raises:
            ValueError: both or neither of the two inputs; router logits under reentrant gradient checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        self._refuse_reentrant(kwargs.get("output_router_logits", self.config.output_router_logits))
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        # the fourth is the cache, under one name or the other
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
        hidden_states, router_state = inputs_embeds, None
        further = {
            "attention_mask": mask,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            CACHE: cache,
            **kwargs,
        }
        for layer in self.layers:
            hidden_states, router_state = layer(hidden_states, router_state, self.shared_router, **further)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _refuse_reentrant(self, output_router_logits: bool | None) -> None:
        """Logits recorded inside of a reentrant checkpoint have no gradient: a loss made of them would not train."""
        if not (output_router_logits and self.training and torch.is_grad_enabled()):
            return
        for layer in self.layers:
            if layer.gradient_checkpointing:
                keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
                if keywords.get("use_reentrant") is not False:
                    raise ValueError(
                        "output_router_logits does not work with reentrant gradient checkpointing: the auxiliary loss "
                        'would have no gradient; set gradient_checkpointing_kwargs={"use_reentrant": False}, or '
                        "output_router_logits=False"
                    )


class RmoeForCausalLM(RmoePreTrainedModel, GenerationMixin):
    """The model with a matrix that gives logits over the vocabulary, which may be the embedding's."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RmoeConfig) -> None:
        super().__init__(config)
        self.model = RmoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @takes_both_names
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """input_ids [B, S] -> logits [B, S, vocabulary], and with ``labels`` [B, S] (-100: left out) the loss.

        With ``output_router_logits`` (default: the configuration's) also ``aux_loss``, without its coefficient
        ``router_aux_loss_coef``, and ``loss`` has it with that. Where a batch is spread over several calls
        (``num_items_in_batch``), each one's auxiliary loss counts by its share of the batch's tokens.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **{CACHE: cache},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, self.config, attention_mask)
            if loss is not None:
                share = _share_of_batch(labels, **kwargs)
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )


def _share_of_batch(labels: Tensor, num_items_in_batch=None, shift_labels: Tensor | None = None, **kwargs):
    """This call's part of the tokens that the loss is a mean over: 1 unless the caller counts them itself."""
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return (targets != -100).sum() / num_items_in_batch
