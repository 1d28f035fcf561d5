"""Folders of safetensors: what is loaded is what was written, and nothing else is accepted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model_core.errors import CheckpointError, MiniLLMError, UnsupportedModel
from model_core.model.config import ModelConfig, RopeScaling
from model_core.model.parameters import Parameters
from model_core.weights.checkpoint import INDEX, open_checkpoint
from model_core.weights.load import load_parameters
from model_core.weights.progress import SilentProgress

LAYER = ["input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
         "self_attn.o_proj.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
         "mlp.down_proj.weight"]  # fmt: skip
OWN = {"qwen2": [f"self_attn.{part}_proj.bias" for part in "qkv"],
       "qwen3": ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]}  # fmt: skip
HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def make(sample):
    """sample, with matrices a tenth as large; hidden size, heads, intermediate size and vocabulary all differ."""
    return lambda family="llama", **changes: sample(family, **{"hidden_size": 72, "intermediate_size": 112, **changes})


def load(path: Path, dtype: torch.dtype = torch.float32) -> Parameters:
    return load_parameters(open_checkpoint(path), dtype=dtype, device="cpu")


def by_name(parameters: Parameters, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors back under Hugging Face names, cut out of the fused rows as parameters.py describes them."""
    found = {EMBED: parameters.embed, NORM: parameters.final_norm, HEAD: parameters.head}
    q, kv, middle = config.q_size, config.kv_size, config.intermediate_size
    for index, layer in enumerate(parameters.layers):
        bias = layer.qkv_bias
        parts = {
            "input_layernorm.weight": layer.attn_norm, "post_attention_layernorm.weight": layer.mlp_norm,
            "self_attn.q_proj.weight": layer.qkv[:q], "self_attn.k_proj.weight": layer.qkv[q : q + kv],
            "self_attn.v_proj.weight": layer.qkv[q + kv :], "self_attn.o_proj.weight": layer.o,
            "mlp.gate_proj.weight": layer.gate_up[:middle], "mlp.up_proj.weight": layer.gate_up[middle:],
            "mlp.down_proj.weight": layer.down, "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm, "self_attn.q_proj.bias": None if bias is None else bias[:q],
            "self_attn.k_proj.bias": None if bias is None else bias[q : q + kv],
            "self_attn.v_proj.bias": None if bias is None else bias[q + kv :],
        }  # fmt: skip
        found |= {f"model.layers.{index}.{name}": tensor for name, tensor in parts.items() if tensor is not None}
    return found


def check_loaded(parameters: Parameters, model, dtype: torch.dtype = torch.float32) -> None:
    """Every parameter is the tensor written, bit for bit, and there is no other."""
    config = ModelConfig.from_hf(model.config)
    found = by_name(parameters, config)
    wanted = {name: tensor.to(dtype) for name, tensor in model.tensors.items()}
    if config.tie_embeddings:
        assert parameters.head is parameters.embed
        wanted[HEAD] = wanted[EMBED]
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].dtype != dtype or not torch.equal(found[name], wanted[name])] == []
    assert all(tensor.is_contiguous() for tensor in parameters.tensors())


def save_shards(model, folder: Path, count: int, index: bool = True) -> Path:
    """The tensors dealt out to `count` files, with an index that names each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    weight_map = {name: names[n % count] for n, name in enumerate(model.tensors)}
    for file in names:
        save_file({name: model.tensors[name] for name, at in weight_map.items() if at == file}, folder / file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


# --- what is written is what is loaded


def test_every_family_as_one_file_and_as_shards(make, family, tmp_path):
    model = make(family)
    layer = LAYER + OWN.get(family, [])
    tied = family in ("llama_tied", "qwen2")
    names = {EMBED, NORM} | {f"model.layers.{i}.{name}" for i in (0, 1) for name in layer} | (set() if tied else {HEAD})
    assert set(model.tensors) == names  # the names, from the published checkpoints, not from the code under test
    check_loaded(load(model.save(tmp_path / "one")), model)
    check_loaded(load(save_shards(model, tmp_path / "indexed", 3)), model)
    check_loaded(load(save_shards(model, tmp_path / "unindexed", 2, index=False)), model)


@pytest.mark.parametrize("family", ["llama_tied", "llama3", "mistral", "qwen2", "qwen3"])
def test_folders_that_transformers_writes(make, family, tmp_path):
    """The second opinion on names, layout and index: its model takes the same tensors and saves them in shards."""
    import transformers

    model = make(family)
    config = transformers.AutoConfig.for_model(**model.config)
    oracle = transformers.AutoModelForCausalLM.from_config(config)
    assert oracle.load_state_dict(model.tensors, strict=False).unexpected_keys == []
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).is_file()
    check_loaded(load(tmp_path), model)
    ours, theirs = ModelConfig.from_hf(model.config), open_checkpoint(tmp_path).config
    assert ours == theirs


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_are_converted(make, stored, loaded, tmp_path):
    model = make("qwen2")
    model.tensors = {name: tensor.to(stored) for name, tensor in model.tensors.items()}
    check_loaded(load(model.save(tmp_path), loaded), model, loaded)


def test_a_file_of_mixed_dtypes(make, tmp_path):
    model = make()
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    model.tensors = {name: tensor.to(kinds[n % 4]) for n, (name, tensor) in enumerate(model.tensors.items())}
    check_loaded(load(model.save(tmp_path), torch.bfloat16), model, torch.bfloat16)


def test_opening_reads_headers_and_says_what_is_there(make, tmp_path):
    model = make()
    model.tensors = {name: tensor.half() if "proj" in name else tensor for name, tensor in model.tensors.items()}
    found = open_checkpoint(str(model.save(tmp_path)))
    assert (found.path, found.format) == (tmp_path, "safetensors")
    assert found.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        stored = found.tensors[name]
        assert (stored.name, stored.shape, stored.nbytes) == (name, tuple(tensor.shape), tensor.nbytes)
    assert found.nbytes == sum(tensor.nbytes for tensor in model.tensors.values())


def test_progress_adds_up_to_the_bytes_on_disk(make, tmp_path):
    seen: list[tuple[str, Any]] = []

    class Recorded(SilentProgress):
        def begin(self, label: str, total: int | None, done: int = 0) -> None:
            seen.append((label, total))

        def advance(self, nbytes: int) -> None:
            seen.append(("", nbytes))

        def end(self) -> None:
            seen.append(("end", 0))

    checkpoint = open_checkpoint(save_shards(make("qwen3"), tmp_path / "m", 2))
    load_parameters(checkpoint, dtype=torch.float32, device="cpu", progress=Recorded())
    assert seen[0] == ("loading m", checkpoint.nbytes) and seen[-1] == ("end", 0)
    assert sum(nbytes for _, nbytes in seen[1:-1]) == checkpoint.nbytes and len(seen) == len(checkpoint.tensors) + 2


def test_names_without_the_model_prefix(make, tmp_path):
    """As base models are exported, in one file and with an index."""
    model, bare = make("llama_tied"), make("llama_tied")
    bare.tensors = {name.removeprefix("model."): tensor for name, tensor in model.tensors.items()}
    check_loaded(load(bare.save(tmp_path / "one")), model)
    check_loaded(load(save_shards(bare, tmp_path / "two", 2)), model)


def test_model_safetensors_wins_over_files_beside_it(make, tmp_path):
    model, other = make(), make("llama_linear")
    save_file(other.tensors, model.save(tmp_path) / "consolidated.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, never opened")
    check_loaded(load(tmp_path), model)


def test_files_that_the_index_does_not_name_are_not_read(make, tmp_path):
    model = make()
    save_shards(model, tmp_path, 2)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    check_loaded(load(tmp_path), model)


def test_rotary_frequencies_of_old_exports_are_ignored(make, tmp_path):
    model, old = make(), make()
    old.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(32)
    check_loaded(load(old.save(tmp_path)), model)


# --- the head


@pytest.mark.parametrize("family", ["llama_tied", "qwen2"])
def test_a_tied_head_may_be_stored_if_it_is_the_embedding(make, family, tmp_path):
    model, stored = make(family), make(family)
    stored.tensors[HEAD] = stored.tensors[EMBED].clone()
    check_loaded(load(stored.save(tmp_path)), model)
    stored.tensors[HEAD][-1, -1] += 1e-3
    with pytest.raises(CheckpointError, match="config ties 'lm_head.weight'.*another.*set tie_word_embeddings to false"):
        load(stored.save(tmp_path))
    stored.tensors[HEAD] = stored.tensors[EMBED][:-1].clone()
    with pytest.raises(CheckpointError, match="config ties 'lm_head.weight'"):
        load(stored.save(tmp_path))


def test_an_untied_head_is_a_tensor_of_its_own(make, tmp_path):
    model = make()
    parameters = load(model.save(tmp_path))
    assert parameters.head.data_ptr() != parameters.embed.data_ptr()
    del model.tensors[HEAD]
    with pytest.raises(CheckpointError, match="1 missing: lm_head.weight"):
        load(model.save(tmp_path))


# --- tensors that do not fit the config


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_every_missing_tensor_is_named(make, family, tmp_path):
    model = make(family)
    for name in [EMBED, NORM, *(f"model.layers.1.{name}" for name in LAYER + OWN.get(family, []))]:
        rest = make(family)
        del rest.tensors[name]
        with pytest.raises(CheckpointError, match=rf"do not fit the {ModelConfig.from_hf(model.config).family} config"
                                                  rf".* 1 missing: {name}. Check that config.json"):
            load(rest.save(tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_wrong_shape_is_named_with_both_shapes(make, family, tmp_path):
    for name in [EMBED, NORM, *(f"model.layers.0.{name}" for name in LAYER + OWN.get(family, []))]:
        model = make(family)
        shape = list(model.tensors[name].shape)
        model.tensors[name] = model.tensors[name][1:].clone()
        wrong = [shape[0] - 1, *shape[1:]]
        with pytest.raises(CheckpointError) as caught:
            load(model.save(tmp_path))
        assert f"1 of the wrong shape: {name} is {wrong}, config says {shape}" in str(caught.value)
    model.tensors[name] = torch.zeros(shape)[None]
    with pytest.raises(CheckpointError, match="wrong shape"):
        load(model.save(tmp_path))


@pytest.mark.parametrize("extra", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "score.weight",
                                   "model.layers.0.self_attn.q_norm.weight", "model.layers.00.mlp.up_proj.weight"])
def test_tensors_that_the_config_has_no_place_for_are_named(make, extra, tmp_path):
    model = make()
    model.tensors[extra] = torch.zeros(4)
    with pytest.raises(CheckpointError, match=rf"1 unexpected: (model\.)?{extra}"):
        load(model.save(tmp_path))


def test_a_config_of_another_depth(make, tmp_path):
    model = make()
    model.config["num_hidden_layers"] = 1
    with pytest.raises(CheckpointError, match=r"9 unexpected: model.layers.1.\S+; .* \.\.\.") as caught:
        load(model.save(tmp_path))
    assert str(caught.value).count("model.layers.1.") == 8
    model.config["num_hidden_layers"] = 3
    with pytest.raises(CheckpointError, match=r"9 missing: model.layers.2.\S+; .* \.\.\."):
        load(model.save(tmp_path))
    model.config["num_hidden_layers"] = 10**9
    with pytest.raises(CheckpointError, match="1000000000 layers, but there are only 21 tensors"):
        load(model.save(tmp_path))


def test_all_faults_are_said_at_once(make, tmp_path):
    model = make()
    del model.tensors[NORM]
    model.tensors["model.extra"] = torch.zeros(1)
    model.tensors[HEAD] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match="1 missing: model.norm.*1 unexpected: model.extra.*of the wrong shape: lm_head"):
        load(model.save(tmp_path))


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_tensors_that_are_not_floats_are_named(make, kind, tmp_path):
    model = make()
    model.tensors[NORM] = torch.ones(72).to(kind)
    with pytest.raises(UnsupportedModel, match=r"model.safetensors: tensor 'model.norm.weight' is \w+; only F64, F32"):
        open_checkpoint(model.save(tmp_path))


# --- config.json


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"architectures": ["GemmaForCausalLM"]}, UnsupportedModel, "'GemmaForCausalLM'.* is not supported; supported: Llama"),
    ({"architectures": None, "model_type": "mamba"}, UnsupportedModel, "'mamba' is not supported"),
    ({"architectures": []}, UnsupportedModel, "'llama' is not supported"),
    ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act 'gelu'"),
    ({"mlp_bias": True}, UnsupportedModel, "mlp_bias"),
    ({"attention_bias": True}, UnsupportedModel, "attention_bias"),
    ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModel, "quantization_config"),
    ({"num_attention_heads": 5}, UnsupportedModel, "num_attention_heads 5 is not a multiple of num_key_value_heads 2"),
    ({"head_dim": 63}, UnsupportedModel, "head_dim 63 must be even"),
    ({"intermediate_size": 0}, UnsupportedModel, "intermediate_size must be a positive integer"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, UnsupportedModel, "'yarn' is not supported; supported: def"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, UnsupportedModel, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": []}}, UnsupportedModel, "'longrope'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 4.0}}, UnsupportedModel, "'su'"),
    ({"rope_parameters": None, "rope_scaling": {"type": ["yarn"]}}, UnsupportedModel, "yarn"),
    ({"rope_parameters": {"rope_type": "linear"}}, UnsupportedModel, "no key 'factor'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, UnsupportedModel, "no key 'low_freq_factor'"),
    # values of the wrong kind, as damaged or hostile files hold them
    ({"architectures": 5}, MiniLLMError, "config.json"),
    ({"architectures": [["LlamaForCausalLM"]]}, MiniLLMError, "config.json"),
    ({"hidden_size": "wide", "head_dim": None}, CheckpointError, "config.json"),
    ({"num_attention_heads": 0, "head_dim": None}, CheckpointError, "config.json"),
    ({"vocab_size": 96.0}, UnsupportedModel, "vocab_size"),
    ({"vocab_size": True}, MiniLLMError, "size"),
    ({"vocab_size": 10**18}, CheckpointError, "size"),
    ({"intermediate_size": 10**30}, CheckpointError, "size"),
    ({"rms_norm_eps": "small"}, CheckpointError, "config.json holds a value of the wrong kind: rms_eps 'small'"),
    ({"rms_norm_eps": -1.0}, CheckpointError, "rms_eps -1.0"),
    ({"rope_parameters": {"rope_theta": "high"}}, CheckpointError, "'high'"),
    ({"rope_parameters": {"rope_theta": -1.0}}, CheckpointError, "rope_theta -1.0"),
    ({"rope_parameters": "linear"}, CheckpointError, "config.json"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, CheckpointError, "config.json.*'x'"),
    ({"sliding_window": "wide", "use_sliding_window": True}, CheckpointError, "sliding_window 'wide'"),
    ({"eos_token_id": "</s>"}, CheckpointError, "eos token id '</s>'"),
    ({"eos_token_id": [2, None]}, CheckpointError, "eos token id None"),
    ({"bos_token_id": "<s>"}, CheckpointError, "bos token id '<s>'"),
], ids=str)  # fmt: skip
def test_configs_that_are_refused(make, change, error, message, tmp_path):
    model = make()
    model.config |= change
    with pytest.raises(error, match=message):
        load(model.save(tmp_path))


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_absent_keys_are_named(make, key, tmp_path):
    model = make()
    del model.config[key]
    with pytest.raises(UnsupportedModel, match=f"config.json has no key '{key}'"):
        load(model.save(tmp_path))


def test_rope_scaling_of_old_and_new_configs(make, tmp_path):
    def config(**rope: Any) -> ModelConfig:
        model = make()
        del model.config["rope_parameters"], model.config["rope_theta"]
        model.config |= rope
        return open_checkpoint(model.save(tmp_path)).config

    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    assert config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3}) == new
    old = config(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2})
    assert (old.rope_theta, old.rope_scaling) == (1e6, RopeScaling("linear", 2.0))
    assert config(rope_scaling=None).rope_scaling == RopeScaling() and config().rope_theta == 10000.0


def test_end_tokens_of_both_files_each_once(make, tmp_path):
    model = make(eos_token_id=[2, 5])
    model.save(tmp_path)
    for declared, expected in ((None, (2, 5)), (7, (2, 5, 7)), ([5, 9, 2], (2, 5, 9))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
        assert open_checkpoint(tmp_path).config.eos_ids == expected
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(CheckpointError, match="generation_config.json.*eos token id '</s>'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize(("content", "message"), [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"), (b"[]", "not a JSON object"),
    (b"null", "not a JSON object"), (b"[" * 100_000, "not valid JSON"), (b'{"a": ' * 100_000, "not valid JSON"),
    (b" " * (64 << 20) + b"{}", "larger than 64 MiB"),
], ids=lambda value: repr(value[:8]))  # fmt: skip
def test_json_files_that_are_damaged_are_named(make, name, content, message, tmp_path):
    make().save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"/{name} is {message}"):
        open_checkpoint(tmp_path)


def test_no_config(make, tmp_path):
    (make().save(tmp_path) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        open_checkpoint(tmp_path)


# --- files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "w.pkl", "w.pickle"])
def test_pickles_are_refused_unopened_and_the_remedy_is_said(make, name, tmp_path):
    (make().save(tmp_path) / "model.safetensors").unlink()
    marker = tmp_path / "executed"
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")  # opening it would run this
    with pytest.raises(UnsupportedModel, match=rf"only pickle files \({name}\).*use a safetensors or GGUF version"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(UnsupportedModel, match="only pickle files"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MiniLLMError, match=name):  # even if the index asks for it
        open_checkpoint(tmp_path)
    assert not marker.exists()


def test_paths_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="gone does not exist; give a model folder or a .gguf file"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors and no \*.gguf file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="model.safetensors is not a .*gguf file; give one, or a folder"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_folder_in_the_place_of_a_file(make, tmp_path):
    make().save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="b.safetensors is truncated or damaged"):
        open_checkpoint(tmp_path)


def test_one_tensor_in_two_files(make, tmp_path):
    model = make()
    save_shards(model, tmp_path, 2, index=False)
    save_file({NORM: model.tensors[NORM]}, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'model.norm.weight' is in z.safetensors and in another file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model-00002-of-00002.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "",
                                  "./model-00001-of-00002.safetensors", "a\0b", "gone.safetensors"])
def test_an_index_names_files_of_its_own_folder_only(make, name, tmp_path):
    """The named file exists outside, with the very tensors that are wanted: it must not be read."""
    folder = save_shards(make(), tmp_path / "m", 2)
    outside = tmp_path / "model-00002-of-00002.safetensors"
    (folder / outside.name).rename(outside)
    (folder / "sub").mkdir()
    (folder / "sub" / "x.safetensors").write_bytes(outside.read_bytes())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: name if at == outside.name else at for key, at in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of this folder|m lacks .*fetch the model again"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"a": 1}},
                                   {"weight_map": {"a": None}}, {"weight_map": {"a": ["x"]}}], ids=str)
def test_an_index_without_a_usable_map(make, index, tmp_path):
    (make().save(tmp_path) / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json has no 'weight_map'"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_and_a_tensor_that_no_shard_holds(make, tmp_path):
    folder = save_shards(make(), tmp_path, 3)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.more"] = "model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lists 1 tensors that no file holds, first 'model.more'"):
        open_checkpoint(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003.safetensors.*fetch the model again"):
        open_checkpoint(folder)


# --- damage


def test_truncation_anywhere_is_noticed(make, tmp_path):
    path = make().save(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, 2400, 61), len(whole) // 2, len(whole) - 4096, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="model.safetensors is truncated or damaged .*; fetch the file again"):
            open_checkpoint(tmp_path)


def header(entries: dict[str, Any] | bytes, data: bytes = bytes(64), size: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def entry(dtype: str = "F32", shape: Any = (16,), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("content", [
    b"", bytes(8), b"PK\x03\x04" + bytes(100), header({}, size=2**63), header({}, size=2**64 - 1), header({}, size=1 << 30),
    header(b"not json"), header(b"\xff\xff"), header(b"[]"), header(b"[" * 5000), header({"a": 5}), header({"a": entry("F31")}),
    header({"a": entry(shape=[17])}), header({"a": entry(shape=[-16])}), header({"a": entry(shape=[2**32, 2**32, 4])}),
    header({"a": entry(offsets=[0, 2**40])}), header({"a": entry(offsets=[64, 0])}), header({"a": entry(offsets=[4, 68])}),
    header({"a": entry(), "b": entry()}), header({"a": entry(shape=[8], offsets=[0, 32])}), header({"a": {"dtype": "F32"}}),
], ids=lambda content: repr(content[8:60]))  # fmt: skip
def test_headers_that_lie_are_refused(make, content, tmp_path):
    path = make().save(tmp_path) / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors is truncated or damaged"):
        open_checkpoint(tmp_path)


def test_the_same_header_without_a_lie_is_read(make, tmp_path):
    """The counterpart of the refusals above."""
    path = make().save(tmp_path) / "model.safetensors"
    path.write_bytes(header({"norm.weight": entry()}, torch.arange(16.0).numpy().tobytes()))
    target = torch.empty(16)
    open_checkpoint(tmp_path).tensors[NORM].read_into(target)
    assert target.tolist() == list(range(16))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2200), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_any_damage_to_a_header_is_refused_or_harmless(edits, make, tmp_path):
    """Never another exception: only our errors, or a model that loads."""
    damage(make, tmp_path, "model.safetensors", edits)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 600), st.sampled_from([*b'0129.-"[]{}:,nultrefasE \xff'])), max_size=4))
def test_any_damage_to_a_config_is_refused_or_harmless(edits, make, tmp_path):
    damage(make, tmp_path, "config.json", [(at, bytes([new])) for at, new in edits])


def damage(make: Callable, folder: Path, name: str, edits: list[tuple[int, bytes]]) -> None:
    if not (folder / "whole").exists():
        make().save(folder / "whole")
        make().save(folder)
    data = bytearray((folder / "whole" / name).read_bytes())
    for at, new in edits:
        data[at : at + len(new)] = new
    (folder / name).write_bytes(data)
    try:
        load(folder)
    except MiniLLMError as error:
        assert str(error)
