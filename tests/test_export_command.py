"""`sparc-fast export` writes other people's formats, and `sparc-fast convert` reads them, in a line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparc_fast as sf
from sparc_fast import cli
from sparc_fast.interop.saelens import from_saelens

RECORDED = Path(__file__).parent / "recorded" / "saelens"


@pytest.fixture
def model(tmp_path: Path) -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC({"dino": 6, "clip": 4}, 16, 3)
    model.calibrate({"dino": torch.randn(9, 6) + 2, "clip": torch.randn(9, 4)})
    model.save(tmp_path / "model.safetensors")
    return model


def command(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_a_stream_goes_to_saelens_and_comes_back(
    model: sf.SPARC, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, sae, back = tmp_path / "model.safetensors", tmp_path / "sae", tmp_path / "back.safetensors"
    metadata = ("model_name=gpt2", "context_size=128", "prepend_bos=true", "hook_name=a=b")
    assert command("export", ours, "--to", "saelens", "--stream", "dino", "--out", sae, "--metadata", *metadata) == 0
    assert capsys.readouterr().out == f"{sae}: dino, 16 latents, k 3; sae_lens.SAE.load_from_disk loads it\n"
    kept = json.loads((sae / "cfg.json").read_text())["metadata"]
    asked = {"model_name": "gpt2", "context_size": 128, "prepend_bos": True, "hook_name": "a=b"}
    assert {name: kept[name] for name in asked} == asked
    assert command("convert", sae, back, "--streams", "dino") == 0
    assert capsys.readouterr().out == f"{back}: 16 latents, k 3, global TopK, dino 6\n"
    x = torch.randn(5, 6) + 2
    codes = sf.SPARC.load(back).encode({"dino": x})
    torch.testing.assert_close(codes.dense("dino"), model.encode({"dino": x}).dense("dino"), rtol=1e-5, atol=1e-5)


def test_unit_norm_is_asked_for_by_a_flag(model: sf.SPARC, tmp_path: Path) -> None:
    words = ("export", tmp_path / "model.safetensors", "--to", "saelens", "--stream", "dino", "--out")
    assert command(*words, tmp_path / "a") == command(*words, tmp_path / "b", "--unit-norm") == 0
    said = [json.loads((tmp_path / name / "cfg.json").read_text()) for name in ("a", "b")]
    assert [config["rescale_acts_by_decoder_norm"] for config in said] == [False, True]


def test_a_sae_of_saelens_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("convert", RECORDED / "topk", tmp_path / "a.safetensors") == 0
    ours = sf.SPARC.load(tmp_path / "a.safetensors")
    assert ours.streams == ("activations",)
    assert torch.equal(ours.W_dec, from_saelens(RECORDED / "topk").W_dec)
    assert command("convert", RECORDED / "topk", tmp_path / "b.safetensors", "--from", "saelens") == 0
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert command("convert", RECORDED / "topk", tmp_path / "c.safetensors", "--streams", "a", "b") == 1
    assert "--streams must be one name for a SAE, got a, b" in capsys.readouterr().err


def test_a_crosscoder_is_converted_with_its_threshold_or_its_topk(tmp_path: Path) -> None:
    there = {
        "encoder.weight": torch.randn(2, 5, 8),
        "encoder.bias": torch.randn(8),
        "decoder.weight": torch.randn(2, 8, 5),
        "decoder.bias": torch.randn(2, 5),
        "k": torch.tensor(3),
        "threshold": torch.tensor(0.5),
    }
    torch.save(there, tmp_path / "ae.pt")
    words = ("convert", tmp_path / "ae.pt", tmp_path / "ours.safetensors", "--from", "crosscoder")
    for more, selection in (((), "batch"), (("--topk",), "global")):
        assert command(*words, *more) == 0
        ours = sf.SPARC.load(tmp_path / "ours.safetensors")
        assert (ours.d_streams, ours.selection) == ({"layers": 10}, selection)


def test_a_folder_for_the_hub_has_what_was_given(
    model: sf.SPARC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.json").write_text(json.dumps({"mine": {"n_samples": 7, "scores": {"r1": 0.25}}}))
    (tmp_path / "config.json").write_text('{"steps": 5}')
    (tmp_path / "figure.png").write_bytes(b"\x89PNG")
    given = "--evaluation eval.json --settings config.json --picture figure.png"
    words = "--title Mine --about Photographs. --license mit"
    assert command(*f"export model.safetensors --to hub --out out {given} {words}".split()) == 0
    text = (tmp_path / "out" / "README.md").read_text().splitlines()
    for line in (
        "# Mine",
        "Photographs.",
        'license: "mit"',
        "Of 7 samples; `evaluation.json` has all figures.",
        '  "steps": 5',
        "![Mine](figure.png)",
    ):
        assert line in text, line
    weights = sf.SPARC.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_the_kernels_need_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", "--to", "kernels", "--out", tmp_path / "kernel") == 0
    assert "the Triton operators as the kernel _sparc_fast_cuda_" in capsys.readouterr().out
    assert (tmp_path / "kernel" / "build" / "torch-cuda" / "metadata.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "saelens", "--out", "o"), "model must be given with --to saelens, got none"),
        (("m", "--to", "kernels", "--out", "o"), "model must not be given with --to kernels: it has none, got m"),
        (("model.safetensors", "--to", "saelens", "--out", "o"), "--stream must be one of the streams ('dino', 'clip'), got none"),
        (("model.safetensors", "--to", "saelens", "--out", "o", "--stream", "x"), "stream must be one of the streams ('dino', 'clip'), got 'x'"),
        (("model.safetensors", "--to", "saelens", "--out", "o", "--stream", "dino", "--metadata", "a"), "--metadata must be NAME=VALUE, got 'a'"),
        (("model.safetensors", "--to", "hub", "--out", "o", "--settings", "model.safetensors"), "--settings must be JSON, but model.safetensors is not"),
        (("model.safetensors", "--to", "hub", "--out", "o", "--evaluation", "list.json"), "--evaluation must hold one JSON object, got list in list.json"),
        (("none.safetensors", "--to", "hub", "--out", "o"), "there is no file none.safetensors"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    words: tuple[str, ...],
    message: str,
    model: sf.SPARC,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    assert command("export", *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()
