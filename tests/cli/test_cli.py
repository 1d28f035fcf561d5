"""The command line in process, on a tiny model whose every token has a text."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.cli import figures
from model_core.cli.figures import Figures
from model_core.cli.main import main
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.llm import LLM
from model_core.engine.request import SamplingParams
from model_core.kernels.linear import packing_works
from model_core.model.config import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = ["--device", "cpu", "--threads", "1", "--kv-cache-bytes", str(2 << 20)]
FIGURES = re.compile(r"\[(\d+) prompt tokens, (\d+) new ones; TTFT \d+ ms, (\d+\.\d) tokens/s, (\d+\.\d) GB/s\]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM.load(folder, EngineConfig(device="cpu", threads=1, kv_cache_bytes=2 << 20)) as llm:
        yield llm


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """run("generate", "text", ..., stdin=...) -> exit code, standard output, standard error."""

    def run_(command: str, *argv: str, stdin: str = "", model=folder) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        where = [str(model)] if command == "info" else ["--model", str(model)]
        capsys.readouterr()
        code = main([command, *argv, *where, *HERE])
        return code, *capsys.readouterr()

    return run_


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


# ---- generate ---------------------------------------------------------------------------------------------------------


def test_generate_answers_by_the_models_template(run, llm):
    code, out, err = run("generate", "hello", "--max-tokens", "20")
    assert (code, out) == (0, llm.chat([{"role": "user", "content": "hello"}], greedy(20)).text + "\n")
    prompt, tokens, speed, _ = FIGURES.fullmatch(err.splitlines()[-1]).groups()
    assert (int(prompt), int(tokens)) == (len("user: hello\nassistant: "), 20) and float(speed) > 0


def test_generate_raw_continues_the_text(run, llm):
    assert run("generate", "hello", "--raw", "--max-tokens", "20")[1] == llm.generate(["hello"], greedy(20))[0].text + "\n"


def test_generate_reads_standard_input(run):
    _, typed, _ = run("generate", "a\nb", "--max-tokens", "9")
    assert run("generate", "-", "--max-tokens", "9", stdin="a\nb")[1] == typed


@pytest.mark.parametrize("prompt", ["hello", "a longer prompt, with ünicode"])
def test_generate_without_a_kv_cache_prints_the_same(run, prompt):
    code, cached, _ = run("generate", prompt, "--max-tokens", "40")
    code_without, without, err = run("generate", prompt, "--max-tokens", "40", "--no-kv-cache")
    assert (code, code_without) == (0, 0) and cached == without
    assert FIGURES.fullmatch(err.splitlines()[-1])[2] == "40"


def test_generate_stops_at_a_string(run):
    whole = run("generate", "hello", "--max-tokens", "40")[1]
    stop = whole[20:23]
    for more in ([], ["--no-kv-cache"]):
        found = run("generate", "hello", "--max-tokens", "40", "--stop", "not written", "--stop", stop, *more)[1]
        assert found == whole[: whole.index(stop)] + "\n"


def test_generate_samples_by_its_options(run):
    """The same seed, the same text; options that leave one token are greedy; a penalty changes what comes."""

    def text(*options: str) -> str:
        return run("generate", "hello", "--max-tokens", "20", *options)[1]

    hot = ["--temperature", "1.5"]
    plain = text()
    assert text(*hot, "--seed", "7") == text(*hot, "--seed", "7") != text(*hot, "--seed", "8")
    assert text(*hot) != text(*hot)
    for cut in (["--top-k", "1"], ["--top-p", "0"], ["--min-p", "1"]):
        assert text(*hot, *cut) == plain
    assert text("--repetition-penalty", "5") != plain


@pytest.mark.skipif(not packing_works(), reason="a CPU needs FBGEMM's products (x86 with AVX2) for this")
def test_generate_deterministically(run, monkeypatch):
    """The option reaches the engine, and its tokens are those of any other."""
    seen = []
    load = Engine.load
    monkeypatch.setattr(Engine, "load", lambda path, config=None, **more: seen.append(config) or load(path, config, **more))
    texts = {run("generate", "hello", "--max-tokens", "5", *more)[1] for more in ([], ["--deterministic"])}
    assert [config.deterministic for config in seen] == [False, True] and len(texts) == 1


# ---- chat -------------------------------------------------------------------------------------------------------------


def prompts(err: str) -> list[int]:
    """Prompt tokens of every answer: a byte each, in this model."""
    return [int(found[1]) for found in FIGURES.finditer(err)]


def test_chat_remembers_the_conversation(run, llm):
    messages, answers = [], []
    for text in ("hello", "and now?"):
        messages.append({"role": "user", "content": text})
        answers.append(llm.chat(messages, greedy(12)).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    code, out, err = run("chat", "--max-tokens", "12", stdin="hello\n\nand now?\n")
    assert (code, out) == (0, "".join(answer + "\n" for answer in answers) + "\n")
    assert prompts(err) == [len(llm.encode_chat(messages[:1])), len(llm.encode_chat(messages[:3]))]
    assert err.count("tiny on cpu") == 1


def test_chat_commands(run, llm):
    def size(*messages: tuple[str, str]) -> int:
        return len(llm.encode_chat([{"role": role, "content": content} for role, content in messages]))

    lines = ["/help", "one", "/reset", "two", "/system be brief", "three", "/reset", "four", "/system", "five", "/exit", "six"]
    code, out, err = run("chat", "--max-tokens", "3", "--system", "first", stdin="\n".join(lines))
    assert code == 0 and out.startswith("/reset  ")
    assert prompts(err) == [size(("system", "first"), ("user", "one")), size(("system", "first"), ("user", "two")),
                            size(("system", "be brief"), ("user", "three")), size(("system", "be brief"), ("user", "four")),
                            size(("user", "five"))]  # fmt: skip


def test_chat_goes_on_after_a_message_that_is_too_long(run, llm):
    code, out, err = run("chat", "--max-tokens", "5", stdin="y" * 600 + "\nhello\n")
    assert code == 0 and "the context holds 512" in err and "/reset" in err
    assert prompts(err) == [len("user: hello\nassistant: ")]
    assert out == llm.chat([{"role": "user", "content": "hello"}], greedy(5)).text + "\n\n"


def test_ctrl_c_in_chat_keeps_what_there_is_of_an_answer(run, monkeypatch):
    whole, closed = LLM.stream, []

    def interrupted(self, *args, **options):
        stream = whole(self, *args, **options)
        try:
            yield next(stream)
            raise KeyboardInterrupt
        finally:
            stream.close()
            closed.append(True)

    monkeypatch.setattr(LLM, "stream", interrupted)
    code, out, err = run("chat", "--max-tokens", "50", stdin="hello\nagain\n")
    assert code == 0 and len(closed) == 2
    first, second = prompts(err)
    assert second == first + len(out.splitlines()[0].encode()) + len("\nuser: again\nassistant: ")


# ---- info -------------------------------------------------------------------------------------------------------------


def test_info(run, monkeypatch, llm):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run("info", "--kernels", "rmsnorm=torch")
    found = re.findall(r"^│ (.+?) +│ (.*?) +│$", out, re.MULTILINE)
    rows = dict(found)
    model, ledger = llm.engine.parts.model, llm.engine.parts.ledger
    assert code == 0
    assert rows["parameters"] == f"{model.num_parameters:,}" and rows["heads (query, key/value) x size"] == "(4, 2) x 16"
    assert rows["vocabulary"] == "512 rows, 512 tokens, head own" and rows["chat template"] == "yes"
    assert rows["device, dtype"] == "cpu, float32" and rows["prompt + answer"] == "512 tokens"
    assert ("KV pages", f"{ledger.num_pages} of 16 tokens, 8.2 kB each") in found
    assert rows["weights"] == f"{ledger.weights / 2**30:.2f} GiB" and "available" in rows
    assert re.search(r"rmsnorm +│ any number of tokens +│ torch +│ override rmsnorm: torch", out)


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, told", [
    ([], "COMMAND"), (["fly"], "invalid choice: 'fly'"), (["generate"], "prompt"), (["chat", "stray"], "stray"),
    (["generate", "x", "--device", "tpu"], "'tpu'"), (["generate", "x", "--max-tokens", "many"], "'many'"),
    (["info", "--temperature", "1"], "--temperature"),
    (["generate", "x", "--no-kv-cache", "--temperature", "1"], "greedily"),
    (["generate", "x", "--no-kv-cache", "--repetition-penalty", "1.2"], "greedily"),
], ids=str)  # fmt: skip
def test_wrong_usage_exits_with_2(argv, told, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["generate", "chat", "info"])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and f"mini-llm {command}" in out and "--kv-cache-bytes" in out


@pytest.mark.parametrize("argv, told", [
    (["generate", "x", "--model", "./nowhere"], "nowhere does not exist"),
    (["chat", "--model", "./nowhere.gguf"], "nowhere.gguf does not exist"),
    (["info", "./nowhere"], "nowhere does not exist"),
    (["generate", "x", "--kernels", "rmsnorm"], "write OP=torch or OP=triton"),
    (["generate", "x", "--kernels", "rmsnrm=torch"], "did you mean 'rmsnorm'?"),
    (["generate", "x", "--threads", "0"], "threads must be at least 1, got 0"),
    (["info", "--kv-cache-bytes", "100"], "(now 100)"),
    (["generate", "x", "--max-tokens", "600"], "the context holds 512 tokens: lower max_tokens to at most"),
    (["generate", "x", "--top-p", "3"], "top_p must be from 0 to 1, got 3.0"),
    (["generate", "", "--raw"], "the prompt has no tokens"),
], ids=str)  # fmt: skip
def test_errors_are_one_line_and_exit_with_1(argv, told, folder, capsys):
    model = [] if any("nowhere" in one for one in argv) else [str(folder)] if argv[0] == "info" else ["--model", str(folder)]
    assert main([*argv, *model]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith(f"mini-llm {argv[0]}: ") and told in lines[0]


def test_a_damaged_checkpoint_is_named(run, folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    code, out, err = run("generate", "x", model=broken)
    assert (code, out, len(err.splitlines())) == (1, "", 1) and "model.safetensors" in err


def test_ctrl_c_exits_with_130(run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "load", interrupted)
    assert run("generate", "x")[0] == 130


# ---- figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_computed_as_the_help_says(monkeypatch):
    """Ten tokens after a prompt of 100: half a second to the first, 0.1 s for each of the nine others."""
    clock = [10.0]
    monkeypatch.setattr(figures, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    model = ModelConfig("llama", 2, 8, 8, 4, 2, 16, 100, 512)
    seen = Figures(model, weight_bytes=1000, kv_element_bytes=4, prompt_tokens=100, begun=clock[0])
    assert str(seen) == "[100 prompt tokens, no answer]"
    clock[0] = 10.5
    seen.count(1)
    assert (seen.tokens_per_second, seen.bytes_per_second) == (0.0, 0.0)
    for _ in range(9):
        clock[0] += 0.1
        seen.count(1)
    per_token = 2 * 2 * 2 * 16 * 4
    assert seen.tokens_per_second == pytest.approx(10)
    assert seen.bytes_per_second == pytest.approx(sum(1000 + (100 + n) * per_token for n in range(1, 10)) / 0.9)
    seen.weight_bytes = 1_000_000_000
    assert str(seen) == "[100 prompt tokens, 10 new ones; TTFT 500 ms, 10.0 tokens/s, 10.0 GB/s]"
    seen.cached_tokens = 64
    assert "100 prompt tokens (64 from the cache), 10 new" in str(seen)
