"""`llmkit generate`: a checkpoint on disk, its text streamed, and one line when it cannot be."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmkit import LLM, SamplingParams
from llmkit.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a byte-level tokenizer, saved as anyone would."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.4)
    model.save_pretrained(folder)
    return str(folder)


def test_streams_prompt_and_continuation(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "def main(", "--model", checkpoint, "--max-tokens", "12", "--dtype", "float32"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    llm = LLM({"name": "hf", "path": checkpoint}, dtype="float32")
    (expected,) = llm.generate("def main(", SamplingParams(temperature=0.0, max_tokens=12))
    assert len(expected.token_ids) == 12
    assert out == f"def main({expected.text}\n" and err == ""


def test_seed_and_temperature_reach_the_sampler(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    def generated(seed: int) -> str:
        argv = ["generate", "x", "--model", checkpoint, "--max-tokens", "12", "--temperature", "2", "--seed", str(seed)]
        assert main(argv) == 0
        return capsys.readouterr().out

    assert generated(1) == generated(1) != generated(2)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["x", "--max-tokens", "0"],
            "max_tokens=0: Input should be greater than or equal to 1 (allowed: integer, 1 to",
        ),
        (["x", "--temperature", "-1"], "temperature=-1.0: "),
        (["x", "--dtype", "fp8"], "dtype='fp8': Input should be 'auto', 'float32', "),
        (["x", "--model", "embeded"], "unknown model 'embeded'; did you mean 'embedded'?"),
        (["x", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_wrong_input_is_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llmkit: ") and says in err and err.count("\n") == 1


def test_prompt_that_cannot_run_is_one_line(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {"": "empty", "x" * 100: "100 tokens", "caf\udce9": "cannot be encoded: it is not valid Unicode"}
    for prompt, says in cases.items():
        assert main(["generate", prompt, "--model", checkpoint]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and says in err and "Traceback" not in err, err


def test_debug_raises(checkpoint: str) -> None:
    with pytest.raises(Exception, match="max_tokens=0"):
        main(["--debug", "generate", "x", "--max-tokens", "0"])
    with pytest.raises(Exception, match="max_tokens=0"):
        main(["generate", "x", "--max-tokens", "0", "--debug"])
    with pytest.raises(Exception, match="unknown part 'nope'"):
        main(["plugins", "show", "nope", "--debug"])


def test_parts_are_told_to_be_options_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "scheduler=sjf": "; only `llmkit run` takes GROUP=NAME and GROUP.OPTION=VALUE",
        "--max_tokens=3": "; did you mean '--max-tokens'?",
        "y": "",
    }
    for argument, hint in cases.items():
        with pytest.raises(SystemExit) as ended:
            main(["generate", "x", argument])
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert err == f"llmkit: unrecognized arguments: {argument}{hint} (see llmkit generate --help)\n"
