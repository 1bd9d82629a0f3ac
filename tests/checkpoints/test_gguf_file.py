from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from chameleon_jax.checkpoints import gguf as gguf_checkpoint
from chameleon_jax.checkpoints import gguf_file
from chameleon_jax.checkpoints.gguf_file import GgufFile
from tests.checkpoints.test_gguf import LAYER, MODEL, permute, write


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Q.F16, 1e-3), (Q.BF16, 8e-3), (Q.Q8_0, 1e-2), (Q.Q5_0, 0.08), (Q.Q5_1, 0.08), (Q.Q4_0, 0.15), (Q.Q4_1, 0.15)],
    ids=lambda value: getattr(value, "name", None),
)
def test_quantised_types(kind, error, tmp_path):
    loaded = gguf_checkpoint.load(write(tmp_path / "m.gguf", kind))
    for name, tensor in MODEL.tensors.items():
        got = loaded.tensors[name]
        assert got.dtype == np.float32 and got.shape == tensor.shape
        assert np.abs(got - tensor).max() <= error * np.abs(tensor).max(), name
        if name.endswith("proj.weight") and not name.endswith(("q_proj.weight", "k_proj.weight")):
            np.testing.assert_array_equal(got, gguf.dequantize(gguf.quantize(tensor, kind), kind))


NEEDED = (
    *(Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q5_0, Q.Q5_1, Q.Q4_0, Q.Q4_1),
    *(Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS),
)


def dequantised(blocks: np.ndarray, kind: Q) -> np.ndarray | None:
    """Values of blocks by the library; None where it cannot read their type."""
    try:
        return gguf.dequantize(blocks, kind)
    except NotImplementedError:
        return None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales may be NaN
@pytest.mark.parametrize("kind", Q, ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_library_reads_it_or_refused(kind, tmp_path):
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    names = {"self_attn.q_proj": "blk.0.attn_q.weight", "mlp.down_proj": "blk.0.ffn_down.weight"}
    rng = np.random.default_rng(int(kind))
    blocks = {
        "self_attn.q_proj": rng.integers(0, 256, (256, 256 // elements * size), np.uint8),
        "mlp.down_proj": rng.integers(0, 256, (256, 512 // elements * size), np.uint8),
    }
    if kind == Q.F32:
        blocks = {part: rng.standard_normal((256, rows.shape[1] // 4), np.float32) for part, rows in blocks.items()}
    tensors = {name: tensor for name, tensor in MODEL.tensors.items() if not any(part in name for part in names)}
    path = write(tmp_path / "m.gguf", tensors=tensors, raw={names[part]: (rows, kind) for part, rows in blocks.items()})
    expected = dequantised(blocks["mlp.down_proj"], kind)
    assert expected is not None or kind not in NEEDED
    if expected is None:
        with pytest.raises(ValueError, match=rf"tensor blk.0.attn_q.weight has type {kind.name}; allowed: F32, F16, .*Q4_K"):
            gguf_checkpoint.load(path)
        return
    loaded = gguf_checkpoint.load(path)
    down = loaded.tensors[f"{LAYER}.mlp.down_proj.weight"]
    np.testing.assert_array_equal(down, expected)
    assert down.shape == (256, 512) and down.dtype == np.float32
    q = loaded.tensors[f"{LAYER}.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(permute(q, 4), dequantised(blocks["self_attn.q_proj"], kind))


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a gguf file at all, but long enough", b"GGUF\x03\0\0\0" + b"\xff" * 64]
)
def test_broken_files(content, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read"):
        GgufFile(path)


def test_truncated_file(tmp_path):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read at tensor output.weight: the file ends too early"):
        GgufFile(path)


@pytest.mark.parametrize("field", ["llama.block_count", "tokenizer.ggml.token_type"])
def test_file_that_is_cut_inside_its_fields(field, tmp_path):
    path = write(tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(field.encode()) + len(field) + 6])
    names = list(gguf.GGUFReader(write(tmp_path / "whole.gguf")).fields)
    with pytest.raises(ValueError, match=f"behind the field {names[names.index(field) - 1]}: the file ends too early"):
        GgufFile(path)


def test_array_that_claims_to_be_longer_than_the_file(tmp_path):
    path = write(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    place = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    content[place : place + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(content[: place + 4096])  # the library reads up to the end, value by value
    with pytest.raises(ValueError, match=r"behind the field tokenizer.ggml.tokens: the file ends too early"):
        GgufFile(path)


def test_file_of_another_byte_order(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="the other order"):
        GgufFile(tmp_path / "m.gguf")


def test_tensor_that_is_there_twice(tmp_path):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))
    with pytest.raises(ValueError, match="at tensor blk.0.attn_k.weight: the file has it twice"):
        GgufFile(path)


def test_text_that_is_not_utf8(tmp_path):
    path = write(tmp_path / "m.gguf", general__name="name")
    path.write_bytes(path.read_bytes().replace(b"<assistant>", b"<\xff\xff\xff\xff\xff\xff\xff\xff\xff>"))
    with pytest.raises(ValueError, match="tokenizer.chat_template is not UTF-8"):
        gguf_checkpoint.load(path)


@pytest.mark.parametrize("rows", [1, gguf_file._ROWS, 2 * gguf_file._ROWS + 1])
def test_tensors_are_dequantised_in_parts(rows, tmp_path):
    values = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
    blocks = gguf.quantize(values, Q.Q8_0)
    file = GgufFile(write(tmp_path / "m.gguf", raw={"other": (blocks, Q.Q8_0)}))
    np.testing.assert_array_equal(file.read("other"), gguf.dequantize(blocks, Q.Q8_0))
