"""A classifier for every model that generates text: its body and a linear layer on the last real token.

transformers has such a class for about half of the types that it has a language model of. For the
others it is made here, named and built alike, and made known to ``AutoModelForSequenceClassification``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stackllm.llm.families import family_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def add_classifier(config: PretrainedConfig) -> None:
    """Let transformers find a classifier for a type that it has none of; nothing where it has one.

    Adapters of such a model need that before ``peft`` loads them:

    .. code-block:: python

        from peft import AutoPeftModelForSequenceClassification
        from transformers import AutoConfig
        from stackllm.llm.heads import add_classifier

        config = AutoConfig.from_pretrained(folder)
        add_classifier(config)
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=config.num_labels)
    """
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
    )

    kind = type(config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and family_of(config).classifies:
        AutoModelForSequenceClassification.register(kind, _classifier(config), exist_ok=True)


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model without its head."""
    from transformers import PreTrainedModel

    body: PreTrainedModel = model.base_model
    if body is model:  # its class names a part that it does not have, as Llama 4's
        body = next(it for it in model.children() if isinstance(it, PreTrainedModel))
    return body


def _classifier(config: PretrainedConfig) -> type[PreTrainedModel]:
    """A class beside the one that generates text, with the same body under the same name."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    body = body_of(model)
    name = next(name for name, child in model.named_children() if child is body)
    is_text_alone = type(body.config) is not type(config)
    kind: Any = type(body)
    family = next(
        base
        for base in type(model).__mro__
        if base.__name__.endswith("PreTrainedModel") and base is not PreTrainedModel
    )

    def __init__(self: Any, config: PretrainedConfig) -> None:
        super(made, self).__init__(config)
        self.num_labels = config.num_labels
        text = config.get_text_config()
        setattr(self, name, kind(text if is_text_alone else config))
        self.score = torch.nn.Linear(text.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Scores of each class at the last token that the mask calls real, ``(n, num_labels)``."""
        body = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden = body.last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        if attention_mask is None:
            last = torch.full_like(rows, hidden.shape[1] - 1)
        else:
            places = torch.arange(hidden.shape[1], device=attention_mask.device)
            last = (attention_mask * places).argmax(1).to(hidden.device)
        scores = self.score(hidden[rows, last])
        loss = None if labels is None else torch.nn.functional.cross_entropy(scores, labels)
        return SequenceClassifierOutput(loss=loss, logits=scores)

    title = f"{family.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    contents = {
        "__init__": __init__, "forward": forward, "config_class": type(config),
        "base_model_prefix": name,
        "__module__": type(model).__module__,  # what is made elsewhere, transformers loads and starts otherwise
    }  # fmt: skip
    made: type[PreTrainedModel] = type(title, (family,), contents)
    return made
