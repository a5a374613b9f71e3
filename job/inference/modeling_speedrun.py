"""The network of `network_speedrun.py` for transformers: configuration, cache, generate()."""

import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .network_speedrun import Network

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""what transformers calls it, which changed in its fifth generation"""


class SpeedrunConfig(PretrainedConfig):
    model_type = "gpt2-speedrun"

    def __init__(self, **values):
        super().__init__(**values)


class SpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SpeedrunConfig
    base_model_prefix = "network"
    _supports_sdpa = True
    _supports_cache_class = True
    _no_split_modules = ("Block",)
    _keep_in_fp32_modules_strict = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")

    def __init__(self, config):
        super().__init__(config)
        self.network = Network(config)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: weights come from the folder."""

    def get_input_embeddings(self):
        return self.network.wte

    def get_output_embeddings(self):
        return self.network.head

    def forward(
        self,
        input_ids,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **_,
    ):
        """Padding, which attention_mask tells, stands on the left where a sequence is to be continued."""
        cache = cache if cache is not None else past_key_values
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        past = 0
        if cache is not None:
            if len(cache.layers) == self.config.depth and self.config.smear:
                cache.layers.append(DynamicLayer())
            past = cache.get_seq_length()
        hidden = self.network(input_ids, attention_mask, cache, past)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.network.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
