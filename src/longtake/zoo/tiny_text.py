"""The tiny text side: a word-level tokenizer and a two-layer `UMT5EncoderModel` for captions of the world of lanes."""

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longtake.zoo import lanes

TEXT_TOKENS = 24  # rows that the transformer attends to, padding included
SPECIAL = ("<pad>", "</s>", "<unk>")
# Words that captions may use for a word of the world; training swaps them in now and then.
SYNONYMS = {
    "ball": ("circle", "disc"),
    "square": ("box",),
    "a": ("one", "the"),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per known word, any case; punctuation is dropped, other words become <unk>, </s> ends every prompt."""
    known = {*lanes.SHAPES, "a", "and", "nobody", *SYNONYMS} | {word for words in SYNONYMS.values() for word in words}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(known)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build(vocabulary: int) -> UMT5EncoderModel:
    """Untrained encoder of width 64."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=0,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def embed(tokens: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, prompts: list[str]) -> torch.Tensor:
    """Prompts -> [B, TEXT_TOKENS, 64]; the rows behind the end of a prompt are zero, as Wan has them."""
    batch = tokens(prompts, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    ids, mask = batch.input_ids.to(encoder.device), batch.attention_mask.to(encoder.device)
    return encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
