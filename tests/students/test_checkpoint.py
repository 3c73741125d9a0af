import json

import pytest
import torch
from safetensors.torch import save_file, save_model

from safari import HyenaOperator
from sd_hyena.errors import BadInput
from sd_hyena.files.weights import read_weights, write_weights
from sd_hyena.options.operators import OPERATORS, Operator, options_of
from sd_hyena.students.checkpoint import FORMAT_VERSION, StudentFile, describe, load_students, save_students
from sd_hyena.students.student import Projections, StudentSpec, build_student
from sd_hyena.students.swap import swapped
from tests.conftest import IN01, OUT11, ROOT
from tests.fork import forked

SPECS = {
    "causal": StudentSpec(
        IN01, "IN01", 32, "causal", {"order": 3, "filter_order": 16, "emb_dim": 5, "w": 4.0}, (6, 10)
    ),
    "bidirectional": StudentSpec(
        IN01, "IN01", 32, "bidirectional", {"short_filter_order": 5, "filter_order": 8}, (6, 10)
    ),
    "pointwise": StudentSpec(IN01, "IN01", 32, "pointwise", {"hidden": 48}, None),
    "safari": StudentSpec(IN01, "IN01", 32, "safari", {"order": 2, "filter_order": 16}, (6, 10)),
}


def randomised(spec):
    torch.manual_seed(0)
    student = build_student(spec)
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return student.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("operator", SPECS)
def test_a_loaded_student_gives_equal_outputs_with_non_default_options(tmp_path, unet, operator, suffix):
    student = randomised(SPECS[operator])
    path = tmp_path / f"x{suffix}"
    save_students(path, StudentFile({IN01: student}, {"step": 7}))
    file = load_students(path, unet)
    loaded, x = file.students[IN01], torch.randn(2, 60, 32)
    projections = Projections.of(unet.get_submodule(IN01))
    assert loaded.spec == student.spec and file.training["step"] == 7
    assert torch.equal(loaded(x, projections, (6, 10)), student(x, projections, (6, 10)))


def test_a_file_of_two_sites_holds_both(tmp_path, unet):
    second = StudentSpec(OUT11, "OUT11", 32, "pointwise", {}, None)
    students = {IN01: randomised(SPECS["causal"]), OUT11: randomised(second)}
    save_students(tmp_path / "x.safetensors", StudentFile(students))
    assert list(load_students(tmp_path / "x.safetensors", unet).students) == [IN01, OUT11]


def test_students_come_as_the_unet_is_and_their_file_is_swapped_in_as_it_comes(tmp_path, own_pipe, states):
    """But for implicit filters, which stay in float32; without a UNet, and where it is asked for, all is as stored."""
    options = {"heads": 4, "local": 3, "long": "separable", "rank": 2, "reach": 8, "landmarks": 4}
    students = {IN01: randomised(StudentSpec(IN01, "IN01", 32, "hyena2d", options, None))}
    save_students(tmp_path / "x.pt", StudentFile(students))
    unet = own_pipe.unet.to(torch.bfloat16)
    file = load_students(tmp_path / "x.pt", unet)
    assert dict(file) == file.students and len(file) == 1
    dtypes = {name: p.dtype for name, p in file[IN01].named_parameters()}
    assert dtypes["change_out.weight"] == torch.bfloat16 and torch.float32 in dtypes.values()
    latents, timesteps, told = states
    told = {name: value.to(torch.bfloat16) for name, value in told.items()}
    with torch.no_grad(), swapped(unet, file):
        assert unet(latents.to(torch.bfloat16), timesteps, **told).sample.isfinite().all()
    for stored in (load_students(tmp_path / "x.pt"), load_students(tmp_path / "x.pt", unet, like=torch.empty(0))):
        for name, value in students[IN01].state_dict().items():
            assert torch.equal(stored[IN01].state_dict()[name], value)


@pytest.fixture
def parts(tmp_path):
    """A good file's tensors and header, and a function that writes and loads a changed one."""
    save_students(tmp_path / "x.pt", StudentFile({IN01: randomised(SPECS["causal"])}))
    tensors, metadata = read_weights(tmp_path / "x.pt")
    header = json.loads(metadata["sd_hyena"])

    def load(tensors=tensors, header=header, unet=None):
        write_weights(tmp_path / "y.safetensors", tensors, {"sd_hyena": json.dumps(header)})
        return load_students(tmp_path / "y.safetensors", unet)

    load()
    return tensors, header, load


def test_nan_extra_missing_misshapen_and_integer_tensors_are_refused(parts):
    tensors, _, load = parts
    name = f"{IN01}/change_out.weight"
    for changed, words in [
        ({**tensors, name: torch.full((32, 32), float("nan"))}, "NaN"),
        ({**tensors, name: torch.full((32, 32), float("inf"))}, "NaN, infinities"),
        ({**tensors, name: torch.ones(32, 32, dtype=torch.int64)}, "whole numbers"),
        ({**tensors, name: torch.ones(32, 31)}, r"change_out.*\(32, 31\), not \(32, 32\)"),
        ({**tensors, f"{IN01}/extra": torch.ones(1)}, "not expected.*extra"),
        ({k: v for k, v in tensors.items() if k != name}, "missing.*change_out"),
        ({**tensors, "elsewhere/x": torch.ones(1)}, "tensors of no student"),
    ]:
        with pytest.raises(BadInput, match=words):
            load(tensors=changed)


def test_damaged_headers_are_refused_in_one_line(parts):
    _, header, load = parts
    student = header["students"][0]
    for changed, words in [
        ({**header, "format_version": FORMAT_VERSION + 1}, "update sd_hyena"),
        ({"students": []}, "damaged header"),
        ({**header, "students": []}, "no student"),
        ({**header, "students": [{**student, "operator": "fourier"}]}, "operator fourier for IN01"),
        ({**header, "students": [{**student, "options": {"ordre": 2}}]}, "ordre"),
        ({**header, "students": [{**student, "strange": 1}]}, "damaged header"),
        ({**header, "students": [{**student, "size": [10**9, 10**9]}]}, "more than the"),
        ({**header, "students": [{**student, "size": [12288, 12288]}]}, "more than the"),
        ({**header, "students": [{**student, "size": [10**9, 60, 1e-9]}]}, "height and width"),
        ({**header, "students": [{**student, "size": [-(10**9), -1]}]}, "whole numbers"),
        ({**header, "students": [{**student, "size": ["x" * 99, 10**9]}]}, "whole numbers"),
        ({**header, "students": [{**student, "options": {**student["options"], "order": 10**6}}]}, "more than the"),
        ({**header, "students": [{**student, "channels": -1}]}, "IN01"),
        ([1], "damaged header"),
    ]:
        with pytest.raises(BadInput, match=words) as error:
            load(header=changed)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("operator", ["landmarks", "hyena2d"])
def test_a_header_that_claims_more_landmarks_than_the_file_holds_is_refused_before_they_are_made(tmp_path, operator):
    older = {"content": "landmarks"} if operator == "hyena2d" else {}  # clusters store nothing of their number
    spec = StudentSpec(IN01, "IN01", 8, operator, {"heads": 2, "landmarks": 3} | older, None)
    save_students(tmp_path / "x.pt", StudentFile({IN01: build_student(spec)}))
    tensors, metadata = read_weights(tmp_path / "x.pt")
    header = json.loads(metadata["sd_hyena"])
    for claimed, words in (
        (10**9, "claims more than"),
        (2**40, "whole number"),
        (-1, "whole number"),
        (2.5, "whole number"),
        (4, "not"),
    ):
        header["students"][0]["options"]["landmarks"] = claimed
        write_weights(tmp_path / "y.pt", tensors, {"sd_hyena": json.dumps(header)})
        with pytest.raises(BadInput, match=words):
            load_students(tmp_path / "y.pt")


OF_OLD = {  # headers of the release before operators were declared in one place
    "linear": {"heads": 2},
    "windows": {"heads": 2},
    "pointwise": {},
    "landmarks": {"heads": 2, "landmarks": 3},
    "hyena2d": {
        "heads": 2, "local": 3, "long": "full", "rank": 4, "reach": 6, "groups": 4, "filter_order": 8,
        "content": "hedgehog", "window": 2, "gates": "dense", "norm": False, "landmarks": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("operator", OF_OLD)
def test_a_file_of_the_last_release_is_read_whichever_its_operator(tmp_path, operator):
    """What its header does not say is as it was: linear attention in LinFusion's form, an MLP four times as wide."""
    student = randomised(StudentSpec(IN01, "IN01", 8, operator, OF_OLD[operator], None))
    shapes = {tuple(value.shape) for value in student.state_dict().values()}
    assert {"linear": (8, 8), "pointwise": (32, 24), "hyena2d": (4, 8)}.get(operator, (8, 8)) in shapes
    assert not any("phi_q" in name for name in student.state_dict()) or operator == "hyena2d"
    save_students(tmp_path / "x.pt", StudentFile({IN01: student}))
    assert load_students(tmp_path / "x.pt").students[IN01].spec == student.spec


class Endless(torch.nn.Module):
    """Makes layers as long as its options say, each of which is small."""

    def __init__(self, d_model: int, *, layers: int = 1):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(layers))


def test_any_operators_header_is_tried_without_memory_and_without_end(tmp_path, monkeypatch):
    monkeypatch.setitem(OPERATORS, "endless", Operator("endless", Endless, "", options_of(Endless)))
    save_students(
        tmp_path / "x.pt", StudentFile({IN01: build_student(StudentSpec(IN01, "IN01", 8, "endless", {}, None))})
    )
    tensors, metadata = read_weights(tmp_path / "x.pt")
    header, before = json.loads(metadata["sd_hyena"]), torch.random.get_rng_state()
    for layers, words in ((2, "missing"), (10**9, "claims more than")):
        header["students"][0]["options"]["layers"] = layers
        write_weights(tmp_path / "y.pt", tensors, {"sd_hyena": json.dumps(header)})
        with pytest.raises(BadInput, match=words):
            load_students(tmp_path / "y.pt")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_site_or_width_that_the_model_does_not_have_is_named(parts, unet):
    tensors, header, load = parts
    student = header["students"][0]
    elsewhere = {k.replace(IN01, "nowhere.attn1"): v for k, v in tensors.items()}
    with pytest.raises(BadInput, match=r"nowhere\.attn1 does not exist in this model; it has IN01"):
        load(elsewhere, {**header, "students": [{**student, "site": "nowhere.attn1"}]}, unet)
    moved = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    renamed = {k.replace(IN01, moved): v for k, v in tensors.items()}
    with pytest.raises(BadInput, match="32 channels in the file and 64 in this model"):
        load(renamed, {**header, "students": [{**student, "site": moved}]}, unet)


@pytest.mark.parametrize("order", [2, 3])
def test_the_ancestors_files_load_with_and_without_its_metadata(tmp_path, unet, order):
    """Its `save_model` stores the shared sine once; its width and height are tokens; it forgot its options."""
    torch.manual_seed(0)
    operator = HyenaOperator(32, 60, order=order, filter_order=24, short_filter_order=4).eval()
    meta = {"target": "OUT11", "train_width": "10", "train_height": "6", "train_channels": "32", "global_step": "40"}
    save_model(operator, str(tmp_path / "old.safetensors"), meta)
    file = load_students(tmp_path / "old.safetensors", unet)
    (student,), x = file.students.values(), torch.randn(2, 60, 32)
    assert student.spec.site == OUT11 and student.spec.size == (6, 10)
    assert torch.equal(student(x, None, (6, 10)), operator(x))
    square = HyenaOperator(32, 64).half()
    save_model(square, str(tmp_path / "older.safetensors"), {"global_step": "40"})
    file = load_students(tmp_path / "older.safetensors", unet, target="in01")
    assert file.students[IN01].spec.size == (8, 8)


def test_a_file_without_students_is_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="holds no students"):
        load_students(tmp_path / "x.safetensors")


def test_python_m_checkpoint_says_what_a_file_is(tmp_path):
    save_students(tmp_path / "x.pt", StudentFile({IN01: randomised(SPECS["causal"])}, {"step": 7}))
    said = forked("-m", "sd_hyena.students.checkpoint", tmp_path / "x.pt", cwd=ROOT)
    assert said.returncode == 0 and "IN01  causal" in said.stdout and "10x6 cells only" in said.stdout
    refused = forked("-m", "sd_hyena.students.checkpoint", ROOT / "README.md", cwd=ROOT)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_describe_counts_the_parameters():
    student = randomised(SPECS["pointwise"])
    assert f"{sum(p.numel() for p in student.parameters()):,}" in describe(StudentFile({IN01: student}))
