"""Train Pocket's tokenizer: byte-level BPE of 2,048 tokens, with the special tokens of the turn format.

It owns the chat template and the special tokens. It does not know what the corpus says.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 256
SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
UNK, PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = range(len(SPECIAL))

#: Words with their space, single digits, runs of ASCII punctuation, any other character (an emoji) alone, and space.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[!-/:-@\[-`{-~]+|[^\s\p{L}\p{N}!-~]|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges from ``documents`` and wrap them so that a beginning token is added and an end never is."""
    bpe = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
