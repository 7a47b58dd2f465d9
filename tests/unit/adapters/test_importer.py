"""Files of every naming, and files that are none or do not fit: what is understood, what is said."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule
from atelier_server.adapters.exporter import write_adapter
from atelier_server.adapters.importer import import_file
from atelier_server.errors import AdapterMismatch, UnsupportedFormat
from atelier_server.report import AdapterReport, ImportTerms, TokenReport
from tests.unit.adapters.small import ATTN, SD1, SDXL

Q = f"unet.{ATTN}.attn1.to_q"
OUT = f"unet.{ATTN}.attn1.to_out.0"
PEFT = "base_model.model"
TE_Q = "text_encoder.encoder.layers.0.self_attn.q_proj"


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def pair(rank: int = 2, width: int = 8, out: int = 8) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, width), torch.ones(out, rank)


def loras(*names: str, rank: int = 2, width: int = 8) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair(rank, width)
    return tensors


@pytest.mark.parametrize(
    ("down", "up", "name"),
    [
        (f"unet.{ATTN}.attn1.processor.to_q_lora.down", f"unet.{ATTN}.attn1.processor.to_q_lora.up", Q),
        (f"unet.{ATTN}.attn1.to_q.lora.down", f"unet.{ATTN}.attn1.to_q.lora.up", Q),
        (f"{ATTN}.attn1.to_q.lora_A", f"{ATTN}.attn1.to_q.lora_B", Q),
        (f"{ATTN}.attn1.to_q.lora_A.default", f"{ATTN}.attn1.to_q.lora_B.default", Q),
        (f"{ATTN}.attn1.processor.to_out_lora.down", f"{ATTN}.attn1.processor.to_out_lora.up", OUT),
        (
            f"base_model.model.unet.{ATTN}.attn1.to_q.lora_A",
            f"base_model.model.unet.{ATTN}.attn1.to_q.lora_B",
            Q,
        ),
        (
            f"base_model.model.{ATTN}.attn1.to_out.0.lora_A",
            f"base_model.model.{ATTN}.attn1.to_out.0.lora_B",
            OUT,
        ),
        (
            "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.lora_A",
            "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.lora_B",
            Q,
        ),
        (
            f"lycoris_{ATTN.replace('.', '_')}_attn1_to_q.lora_down",
            f"lycoris_{ATTN.replace('.', '_')}_attn1_to_q.lora_up",
            Q,
        ),
    ],
)
def test_older_and_neighbouring_names_are_read(down: str, up: str, name: str, tmp_path: Path) -> None:
    A, B = pair()
    read, report = import_file(save(tmp_path / "x", {f"{down}.weight": A, f"{up}.weight": B}), SD1)
    assert list(read.modules) == list(report.matched) == [name]
    assert read.low_rank[name].alpha == 2.0  # none given: the rank


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}",
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_{}",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}",
        "lora_te1_encoder_layers_0_self_attn_q_proj.lora_{}",  # what diffusers' own converter writes
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_{}",
    ],
)
def test_text_encoders_by_all_their_names(name: str, tmp_path: Path) -> None:
    A, B = pair(2, 6, 6)
    parts = ("A", "B") if ".lora_{}" in name and "lora_te" not in name else ("down", "up")
    tensors = dict(zip((f"{name.format(part)}.weight" for part in parts), (A, B), strict=True))
    assert list(import_file(save(tmp_path / "x", tensors), SD1)[0].modules) == [TE_Q]


def test_alphas_of_the_header_follow_peft(tmp_path: Path) -> None:
    config = {"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": {"to_out.0": 3}}
    header = {"lora_adapter_metadata": json.dumps(config)}
    modules = import_file(save(tmp_path / "x", loras(Q, OUT), header), SD1)[0].low_rank
    assert [modules[name].alpha for name in (Q, OUT)] == [8, 3]
    header = {"lora_adapter_metadata": json.dumps({**config, "unet.use_rslora": True})}
    modules = import_file(save(tmp_path / "y", loras(Q, OUT), header), SD1)[0].low_rank
    assert modules[Q].alpha == pytest.approx(8 * 2**0.5)


def peft_folder(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    save(folder / "adapter_model.safetensors", loras(f"base_model.model.{Q.removeprefix('unet.')}"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_peft_has_its_alphas_in_its_configuration(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "x", {"peft_type": "LORA", "r": 2, "lora_alpha": 16})
    save(folder / "x_emb.safetensors", {"clip_l": torch.ones(2, 6)})
    (folder / "README.md").write_text("a folder has more than this")
    read, report = import_file(folder, SD1, name="zoe")
    assert read.low_rank[Q].alpha == 16
    assert report.tokens == (TokenReport("zoe", 2, ("text_encoder",)),)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_alpha": "many"}, "cannot be read"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "cannot be read"),
    ],
)
def test_options_of_peft_that_mean_something_else_are_refused(
    config: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedFormat, match=named):
        import_file(peft_folder(tmp_path / "x", config), SD1)


def test_a_folder_with_several_candidates_is_asked_about(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", loras(Q))
    with pytest.raises(UnsupportedFormat, match=r"Name the file: a\.safetensors, b\.safetensors"):
        import_file(tmp_path, SD1)
    (tmp_path / "c").mkdir()
    with pytest.raises(UnsupportedFormat, match="no safetensors file"):
        import_file(tmp_path / "c", SD1)


# -------------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize(
    ("tensors", "header", "placeholder"),
    [
        ({"emb_params": torch.ones(2, 6)}, {"name": "zoe-face"}, "zoe-face"),  # A1111, kohya
        ({"emb_params": torch.ones(2, 6)}, {}, "guest"),
        ({"emp_params": torch.ones(2, 6)}, {}, "guest"),  # OneTrainer's spelling
        ({"<zoe>": torch.ones(6)}, {}, "<zoe>"),  # diffusers
        ({"bundle_emb.zoe.v2.string_to_param.*": torch.ones(2, 6), **loras(Q)}, {}, "zoe.v2"),
        ({"bundle_emb.zoe.clip_l": torch.ones(2, 6), **loras(Q)}, {}, "zoe"),
    ],
)
def test_learned_tokens(
    tensors: dict[str, Tensor], header: dict[str, str], placeholder: str, tmp_path: Path
) -> None:
    read, report = import_file(save(tmp_path / "x", tensors, header), SD1, name="guest")
    assert list(read.tokens) == [placeholder]
    assert torch.equal(read.tokens[placeholder]["text_encoder"], next(iter(tensors.values())).reshape(-1, 6))
    assert report.coverage == report.confidence == 1.0


def test_a_pair_of_tokens_for_two_encoders(tmp_path: Path) -> None:
    vectors = {"clip_l": torch.ones(2, 6), "clip_g": torch.zeros(2, 10)}
    path = save(tmp_path / "x", vectors)
    read, report = import_file(path, SDXL, ImportTerms(placeholder="<zoe>"))
    assert torch.equal(read.tokens["<zoe>"]["text_encoder_2"], vectors["clip_g"])
    assert report.tokens == (TokenReport("<zoe>", 2, ("text_encoder", "text_encoder_2")),)
    with pytest.raises(AdapterMismatch, match=r"clip_g: is for text_encoder_2.*file is of sdxl"):
        import_file(path, SD1)


def test_a_token_that_is_a_word_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = save(tmp_path / "x", {"emb_params": torch.ones(2, 6)}, {"name": "dog"})
    with pytest.raises(AdapterMismatch, match="another placeholder, say '<dog>'") as caught:
        import_file(path, SD1)
    assert caught.value.metadata == {"placeholder": "dog"}
    assert list(import_file(path, SD1, ImportTerms(placeholder="<dog>"))[0].tokens) == ["<dog>"]


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"emb_params": torch.ones(2, 7)}, "width 7"),
        ({"emb_params": torch.ones(2, 2, 6)}, r"shape \(2, 2, 6\)"),
        ({"emb_params": torch.full((2, 6), torch.nan)}, "not finite"),
        ({"emb_params": torch.ones(2, 6), "emp_params": torch.ones(1, 6)}, "repeats the token"),
        ({"clip_l": torch.ones(1, 6), "clip_l_out": torch.ones(1, 6)}, "outputs"),
    ],
)
def test_tokens_that_do_not_fit(tensors: dict[str, Tensor], named: str, tmp_path: Path) -> None:
    with pytest.raises((AdapterMismatch, UnsupportedFormat), match=named):
        import_file(save(tmp_path / "x", tensors), SD1)


# -------------------------------------------------------------------------------------------------- report
def test_the_report_tells_what_was_understood(tmp_path: Path) -> None:
    key, te = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_projection"
    A, B = torch.full((2, 8), 2.0), torch.ones(8, 2)
    tensors = {
        f"{key}.lora_down.weight": A,
        f"{key}.lora_up.weight": B,
        f"{key}.alpha": torch.tensor(1.0, dtype=torch.float16),
        f"{te}.lora_down.weight": torch.ones(3, 10),
        f"{te}.lora_up.weight": torch.zeros(10, 3),
        "lora_unet_input_blocks_3_1_transformer_blocks_0_norm1.w_norm": torch.ones(8),
    }
    header = {
        "ss_sd_scripts_commit_hash": "abc",
        "ss_tag_frequency": "x" * 5000,
        "modelspec.trigger_phrase": "a zwx rocket",
        "modelspec.thumbnail": "data:...",
        "ss_base_model_version": "sdxl_base_v1-0",
        "unrelated": "y",
    }
    read, report = import_file(save(tmp_path / "x", tensors, header), SDXL)
    assert (report.format, report.confidence, report.software) == ("kohya", 1.0, "kohya sd-scripts")
    assert (report.family, report.evidence) == ("sdxl", "it changes a second text encoder")
    assert report.kinds == (("lora", 2), ("norm", 1))
    assert report.ranks == ((2, 1), (3, 1))
    assert report.alphas == ((1.0, 1), (3.0, 1))
    assert report.triggers == read.triggers == ("a zwx rocket",)
    kept = dict(report.metadata)
    assert kept.keys() == {
        "ss_sd_scripts_commit_hash",
        "ss_tag_frequency",
        "modelspec.trigger_phrase",
        "ss_base_model_version",
    }
    assert kept["ss_tag_frequency"].endswith("(5000 characters)")
    change = (0.5 * B @ A).square().sum().item() + 8  # and the norm's
    assert dict(report.norms) == {
        "unet.down_blocks.1": pytest.approx(change**0.5, rel=1e-6),
        "text_encoder_2": 0.0,
    }


def test_a_report_survives_its_way_through_json(tmp_path: Path) -> None:
    _, report = import_file(save(tmp_path / "x", {**loras(Q), "bundle_emb.z.clip_l": torch.ones(1, 6)}), SD1)
    assert AdapterReport.of(json.loads(json.dumps(asdict(report)))) == report


def test_what_does_not_fit_is_refused_unless_allowed_and_always_told(tmp_path: Path) -> None:
    tensors = {
        **loras(Q, OUT, "unet.down_blocks.7.attentions.0.to_q"),
        **loras("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v", width=9),
        "unet.conv_in.oft_blocks": torch.ones(2, 2),
    }
    path = save(tmp_path / "x", tensors)
    with pytest.raises(
        AdapterMismatch, match=r"^3 of 5 parts of this diffusers file.*allow_partial"
    ) as caught:
        import_file(path, SD1)
    assert caught.value.metadata["coverage"] == "0.400"
    with pytest.raises(AdapterMismatch):
        import_file(path, SD1, ImportTerms(min_coverage=0.5))
    for terms in (ImportTerms(allow_partial=True), ImportTerms(min_coverage=0.4)):
        read, report = import_file(path, SD1, terms)
        assert set(read.modules) == {Q, OUT}
        reasons = {part.name.rpartition(".")[2]: part.reason for part in report.unmatched}
        assert reasons["to_q"] == "the base model has no such module"
        assert "(2, 9)" in reasons["to_v"]
        assert reasons["oft_blocks"] == "an orthogonal change (OFT), which is not supported"
    nothing = save(tmp_path / "y", loras("unet.down_blocks.7.attentions.0.to_q"))
    with pytest.raises(AdapterMismatch):
        import_file(nothing, SD1, ImportTerms(allow_partial=True))


@pytest.mark.parametrize(
    ("tensors", "header", "told"),
    [
        (
            loras("unet.down_blocks.1.attentions.0.transformer_blocks.9.attn2.to_k", width=2048),
            {},
            r"of sdxl \(its cross-attention is 2048 wide\), the base model of sd1",
        ),
        (
            {
                "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight": torch.ones(2, 4),
                "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_up.weight": torch.ones(4, 2),
            },
            {},
            "of sdxl",
        ),
        (loras("lora_unet_double_blocks_0_img_attn_qkv"), {}, "diffusion transformer"),
        (loras("unet.a.b"), {"ss_v2": "True"}, r"of sd2 \(its header says so\)"),
    ],
)
def test_a_file_of_another_family_is_named_as_such(
    tensors: dict[str, Tensor], header: dict[str, str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterMismatch, match=told):
        import_file(save(tmp_path / "x", tensors, header), SD1)


def test_a_label_alone_refuses_nothing(tmp_path: Path) -> None:
    header = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    _, report = import_file(save(tmp_path / "x", loras(Q), header), SD1)
    assert (report.family, report.coverage) == ("sdxl", 1.0)


# ------------------------------------------------------------------------------------------------- refusals
NAN, DOUBLE = torch.full((2, 8), torch.nan), {f"{Q}.lora.down.weight": torch.ones(2, 8)}


@pytest.mark.parametrize(
    ("tensors", "error", "named"),
    [
        ({}, UnsupportedFormat, "no tensors"),
        ({"model.diffusion_model.x.weight": torch.ones(2, 2)}, UnsupportedFormat, "model.diffusion_model.x"),
        (loras("unet.nothing"), AdapterMismatch, "unet.nothing: the base model has no such module"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8)}, UnsupportedFormat, "lacks its lora_up"),
        (loras(Q, rank=9), AdapterMismatch, "has rank 9; this server takes 1 to 8"),
        ({**loras(Q), f"{Q}.lora_A.bias": torch.ones(2)}, AdapterMismatch, "a bias of its own"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.int64)}, UnsupportedFormat, "int64"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8).to(torch.float8_e4m3fn)}, UnsupportedFormat, "float8"),
        ({**loras(Q), f"{Q}.lora_A.weight": NAN}, AdapterMismatch, "not finite"),
        ({**loras(Q), f"{Q}.alpha": torch.tensor(float("inf"))}, UnsupportedFormat, "alpha"),
        ({**loras(Q), f"{Q}.alpha": torch.ones(2)}, UnsupportedFormat, "alpha"),
        ({**loras(Q), **DOUBLE}, UnsupportedFormat, "repeats"),
        ({f"{Q}.hada_w1_a": torch.ones(8, 2), **loras(Q)}, UnsupportedFormat, "at once"),
    ],
)
def test_what_is_wrong_is_named(
    tensors: dict[str, Tensor], error: type[Exception], named: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=named):
        import_file(save(tmp_path / "x", tensors), SD1)


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(a+)+$": 1}}', "[" * 100_000],
)
def test_a_bad_header_is_refused(config: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x", loras(Q), {"lora_adapter_metadata": config})
    with pytest.raises(UnsupportedFormat):
        import_file(path, SD1)


class _Explosive:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the pickle was run')",)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(pickle.dumps(_Explosive(), protocol=4))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Explosive()))
    for name in ("raw", "zip"):
        with pytest.raises(UnsupportedFormat, match="pickle"):
            import_file(tmp_path / name, SD1)


def test_a_header_whose_size_begins_like_a_pickle_is_none(tmp_path: Path) -> None:
    """A size of 0x280 bytes, little-endian, is what a pickle of protocol 2 begins with."""
    for padding in range(600):
        path = save(tmp_path / "x", loras(Q), {"pad": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert list(import_file(path, SD1)[0].modules) == [Q]


def test_truncated_and_lying_files_are_refused(tmp_path: Path) -> None:
    adapter = CanonicalAdapter({Q: LoraModule(*pair(), 1.0), "unet.conv_in": DenseModule(bias=torch.ones(8))})
    write_adapter(adapter, tmp_path / "whole", "kohya")
    whole = (tmp_path / "whole").read_bytes()
    assert import_file(tmp_path / "whole", SD1)[1].coverage == 1.0
    damaged = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "header": whole[:100],
        "long": whole + b"x",
        "huge": struct.pack("<Q", 2**62) + whole[8:],
        "text": b"hello, this is a text file",
        "json": whole.replace(b'"F32"', b'"F99"'),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnsupportedFormat):
            import_file(tmp_path / name, SD1)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsupportedFormat):
        import_file(path, SD1)
