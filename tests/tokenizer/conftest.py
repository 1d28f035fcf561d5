"""Small tokenizers of every kind, trained here; the real SmolLM2 comes from the smollm2_dir fixture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model_core.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def area(radius):\n    return 3.14159 * radius ** 2  # two spaces, then a comment\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "In 2026 there were 1234567 tokens, 42 pages and 7 kernels; 50% were free.",
    "<div class='x'>[INST] not a control token [/INST]</div> | a | b |",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]"]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{%- set ns = namespace(first=true) %}{%- for message in messages %}{%- set text = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{%- if ns.first %}"
        "{%- set text = bos_token + text %}{%- set ns.first = false %}{%- endif %}{{- text }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
}


def write_config(folder: Path, bos: str, eos: str, **more: object) -> None:
    config = {"bos_token": bos, "eos_token": {"content": eos, "special": True}, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json that adds <|begin_of_text|>, with control tokens and one plain added token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    backend.add_special_tokens([AddedToken("<|wide|>", special=True, normalized=False, lstrip=True, rstrip=True)])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    folder = tmp_path_factory.mktemp("bpe")
    backend.save(str(folder / "tokenizer.json"))
    write_config(folder, bos, "<|eot_id|>", chat_template=TEMPLATES["llama3"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 0]}))
    return folder


@pytest.fixture(scope="session")
def spm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece BPE tokenizer.model in Llama's manner: byte fallback, dummy prefix, digits split, spaces kept."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()), model_writer=model,
        model_type="bpe", vocab_size=600, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=3)
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write_config(folder, "<s>", "</s>", chat_template=TEMPLATES["zephyr"])
    return folder


@pytest.fixture(scope="session")
def llama_json_dir(spm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentencepiece model as a tokenizer.json in the form that TinyLlama's has."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_dir / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    splits = [(i, piece[:n], piece[n:]) for i, piece in enumerate(pieces)
              if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))  # the first merge scores 0
              for n in range(1, len(piece)) if piece[:n] in vocab and piece[n:] in vocab]
    merges = [(left, right) for _, left, right in
              sorted(splits, key=lambda s: (-model.get_score(s[0]), vocab[s[1]], vocab[s[2]]))]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True,
                                              byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("llama_json")
    backend.save(str(folder / "tokenizer.json"))
    write_config(folder, "<s>", "</s>", chat_template=TEMPLATES["zephyr"])
    return folder


@pytest.fixture(scope="session")
def bpe(bpe_dir: Path) -> Tokenizer:
    return load_tokenizer(bpe_dir)


@pytest.fixture(scope="session")
def spm(spm_dir: Path) -> Tokenizer:
    return load_tokenizer(spm_dir)


@pytest.fixture(scope="session")
def llama_json(llama_json_dir: Path) -> Tokenizer:
    return load_tokenizer(llama_json_dir)


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return load_tokenizer(smollm2_dir)


@pytest.fixture(params=["bpe", "spm", "llama_json", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
