"""Small models with random weights that pool in a way of their own: encoders, and what has an encoder."""

from __future__ import annotations

from pathlib import Path

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Question", ":", "Answer", "[", "]", "SEP"]

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
    "dropout_rate", "classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout",
    "summary_last_dropout", "pooler_dropout",
)  # fmt: skip
_STILL = dict.fromkeys(_DROPOUTS, 0.0)
_OF_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
_OF_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, object]] = {
    "bert": _SIZES,
    "roberta": _SIZES,
    "xlm-roberta": _SIZES,
    "electra": {**_SIZES, "embedding_size": 16},
    "albert": {**_SIZES, "embedding_size": 16},
    "mpnet": _SIZES,
    "modernbert": {**_SIZES, "global_attn_every_n_layers": 2, "local_attention": 8},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4},
    "deberta": {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        **_SIZES, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "xlnet": {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64},
    "t5": _OF_T5,
    "bart": _OF_BART,
}  # fmt: skip


def write_encoder(folder: Path, family: str, headless: bool = True) -> str:
    """A random model of a family and a tokenizer of words that closes its texts, in a folder.

    Parameters
    ----------
    folder
        Where they are written.
    family
        What transformers calls it.
    headless
        Leave out what a checkpoint of a masked language model has not, such as BERT's pooler.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    words = [*WORDS, *(f"w{i}" for i in range(200))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = {"t5": "$A [SEP]", "xlnet": "$A [SEP] [CLS]"}.get(family, "[CLS] $A [SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", eos_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    config = AutoConfig.for_model(
        family, vocab_size=len(words), pad_token_id=0, bos_token_id=2, eos_token_id=3,
        decoder_start_token_id=0, **_STILL, **FAMILIES[family],
        **({} if family in ("xlnet", "t5") else {"max_position_embeddings": 64}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():  # as far apart as trained weights, or nothing could be read off a text
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    if headless and getattr(model, "pooler", None) is not None:
        model.pooler = None
    model.save_pretrained(folder)
    return str(folder)
