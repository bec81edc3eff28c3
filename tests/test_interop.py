"""Other people's packages themselves, in an environment of their own: CONTRIBUTING.md has the command."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import sparc_fast as sf
from sparc_fast.interop.crosscoders import from_crosscoder
from sparc_fast.interop.kernel_hub import write_kernel
from sparc_fast.interop.saelens import from_saelens, to_saelens

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
RECORDED = Path(__file__).parent / "recorded" / "saelens"
D = {"a": 24, "dino": 40}


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    module: ModuleType = pytest.importorskip("sae_lens")
    return module


@pytest.mark.parametrize("name", [p.name for p in sorted(RECORDED.iterdir()) if p.name != "batchtopk"])
def test_saelens_computes_what_is_recorded_of_it(name: str, sae_lens: ModuleType) -> None:
    there, sae = load_file(RECORDED / name / "computed.safetensors"), sae_lens.SAE.load_from_disk(RECORDED / name)
    with torch.no_grad():
        codes = sae.encode(there["x"])
        torch.testing.assert_close(codes, there["codes"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sae.decode(codes), there["recons"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("whiten", [None, "none", "diag"])
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_a_stream_loads_in_saelens_with_its_codes_reconstructions_and_what_dashboards_ask_for(
    selection: str, whiten: str | None, normalize: str, sae_lens: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = sf.SPARC(D, 256, 8, selection=selection, normalize={"dino": normalize})
    with torch.no_grad():
        model.pre_bias.normal_(std=0.3)
        model.latent_bias.normal_(std=0.2)
    x = {s: 3 * torch.randn(500, d) + 2 for s, d in D.items()}
    if whiten is not None:
        model.calibrate(x, whiten)
    asked = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post", "prepend_bos": True}
    to_saelens(model, tmp_path / "sae", "dino", asked)
    sae = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        recons, cache = sae.run_with_cache(x["dino"])
        codes = model.encode({"dino": x["dino"]})
        ours = model.decode(codes, "dino", "dino")
    if normalize == "l2":
        ours = ours * x["dino"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(cache["hook_sae_acts_post"], codes.dense("dino"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recons, ours, rtol=1e-5, atol=1e-5)
    assert isinstance(sae, sae_lens.TopKSAE)
    assert {name: sae.cfg.metadata[name] for name in asked} == asked
    assert sae.get_name() == "sae_gpt2_blocks.3.hook_resid_post_256"
    sae.save_model(tmp_path / "again")  # what it makes of the folder is the folder
    assert {n: t.tolist() for n, t in load_file(tmp_path / "again" / "sae_weights.safetensors").items()} == {
        n: t.tolist() for n, t in load_file(tmp_path / "sae" / "sae_weights.safetensors").items()
    }
    back = from_saelens(tmp_path / "again", "dino").encode({"dino": x["dino"]})
    torch.testing.assert_close(back.dense("dino"), codes.dense("dino"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
def test_dashboards_fold_the_norm_of_decoder_rows_and_nothing_changes(
    calibrated: bool, sae_lens: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = sf.SPARC(D, 256, 8)
    x = {s: 3 * torch.randn(100, d) + 2 for s, d in D.items()}
    if calibrated:
        model.calibrate(x)
    to_saelens(model, tmp_path, "dino", unit_norm=calibrated)
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    sae.fold_W_dec_norm()  # it raises where activations are not rescaled by decoder norms
    codes = model.encode({"dino": x["dino"]})
    with torch.no_grad():
        theirs = sae.encode(x["dino"])
        torch.testing.assert_close(theirs, codes.dense("dino") * model.input_rms[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(theirs), model.decode(codes, "dino", "dino"), rtol=1e-5, atol=2e-5)


def test_a_batchtopk_model_loads_in_saelens_as_it_is_in_eval_mode(sae_lens: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sf.SPARC(D, 256, 8, selection="batch")
    x = {s: 3 * torch.randn(200, d) + 2 for s, d in D.items()}
    model.calibrate(x)
    model.learn_thresholds(x)
    x = {s: 3 * torch.randn(200, d) + 2 for s, d in D.items()}  # the threshold is a score of those before
    to_saelens(model.eval(), tmp_path, "dino")
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    sae.fold_W_dec_norm()  # as dashboards do; its threshold goes with it
    codes = model.encode({"dino": x["dino"]})
    with torch.no_grad():
        theirs = sae.encode(x["dino"])
        torch.testing.assert_close(theirs, codes.dense("dino") * model.input_rms[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(theirs), model.decode(codes, "dino", "dino"), rtol=1e-5, atol=2e-5)
    assert isinstance(sae, sae_lens.JumpReLUSAE)
    assert (theirs > 0).sum(1).unique().numel() > 2


def test_kernels_loads_the_folder_and_its_tests_pass(tmp_path: Path) -> None:
    if not any(metadata.distributions(name="kernels")):  # not to be imported here, where ours may shadow it
        pytest.skip("the package kernels is not installed")
    write_kernel(tmp_path / "kernel")
    # there the package is the one that is installed, and ours is not to be had
    (tmp_path / "kernel" / "conftest.py").write_text("import sys\nsys.modules['sparc_fast'] = None\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=tmp_path / "kernel", env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("normalization", ["CROSSCODER", "SAE", "NONE"])
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("topk", [False, True])
def test_a_crosscoder_of_dictionary_learning_has_the_same_activations(
    normalization: str, layers: list[int] | None, topk: bool, tmp_path: Path
) -> None:
    package = pytest.importorskip("dictionary_learning.dictionary")
    if not hasattr(package, "BatchTopKCrossCoder"):
        pytest.skip("this dictionary_learning has no crosscoders")
    torch.manual_seed(0)
    theirs = package.BatchTopKCrossCoder(
        8, 64, 3, k=5, code_normalization=normalization, encoder_layers=layers, init_with_transpose=False
    )
    theirs.threshold.fill_(0.2)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    ours = from_crosscoder(tmp_path / "ae.pt", {"encoder_layers": layers}, topk=topk)
    x = torch.randn(40, 3, 8)
    with torch.no_grad():
        each = [theirs.get_activations(row[None], use_threshold=not topk) for row in x]
    source, inputs = ("layers", x.flatten(1)) if layers is None else ("layer_1", x[:, 1])
    torch.testing.assert_close(ours.encode({source: inputs}).dense(source), torch.cat(each), rtol=1e-5, atol=1e-5)
