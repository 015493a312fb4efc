"""A config and a causal language model that transformers' Auto classes know once this module is imported.

Blocks of :class:`fastkm.nn.KanervaMixer` and a gated MLP, with embeddings tied to the output. transformers is not a
dependency of fastkm: ``pip install transformers``.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastkm.nn import KanervaMixer


class KanervaConfig(PreTrainedConfig):
    model_type = "kanerva"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_heads: int = 2,
        head_dim: int = 32,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        use_output_gate: bool = True,
        intermediate_size: int = 128,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_heads, self.head_dim, self.expand_v = num_heads, head_dim, expand_v
        self.use_short_conv, self.use_output_gate = use_short_conv, use_output_gate
        self.intermediate_size = intermediate_size
        # What transformers makes a cache of: mean and covariance of every layer, and the tail of its convolution.
        kwargs.setdefault("layer_types", ["linear_attention"] * num_hidden_layers)
        kwargs.setdefault("number_of_conv_states", 2)
        self.layer_types = kwargs.pop("layer_types")
        self.number_of_conv_states = kwargs.pop("number_of_conv_states")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Block(nn.Module):
    def __init__(self, config: KanervaConfig, layer_idx: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.mixer = KanervaMixer(
            D,
            config.num_heads,
            config.head_dim,
            expand_v=config.expand_v,
            use_short_conv=config.use_short_conv,
            use_output_gate=config.use_output_gate,
            layer_idx=layer_idx,
        )
        self.up_proj = nn.Linear(D, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, D, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), attention_mask, cache)[0]
        gate, up = self.up_proj(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down_proj(silu(gate) * up)


class KanervaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = KanervaConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "embeddings.weight"}
    _is_stateful = True  # its states cannot be cut back

    def __init__(self, config: KanervaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The mixer draws its own; everything else is as PyTorch draws it, but for small embeddings."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, KanervaMixer):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, past_key_values)
        logits, loss = self.lm_head(self.norm(x)), None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """A cache that has seen the prompt needs the last token only."""
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values.layers[0].has_previous_state[0]:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": True,
        }


AutoConfig.register("kanerva", KanervaConfig, exist_ok=True)
AutoModelForCausalLM.register(KanervaConfig, KanervaForCausalLM, exist_ok=True)


def main() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KanervaConfig())
    prompt = torch.randint(256, (1, 8))
    print("parameters", sum(x.numel() for x in model.parameters()))
    print("greedy  ", model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())


if __name__ == "__main__":
    main()
