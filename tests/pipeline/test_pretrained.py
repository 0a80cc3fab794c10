"""What is read of a checkpoint, and what is not: no pickle, no weights for a skeleton."""

import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pipeline.policy import load_policy, save_policy
from pipeline.pretrained import load_tokenizer, skeleton
from pipeline.prompts import render
from pipeline.records import canonical

ASK = canonical([{"role": "user", "content": "1+1="}])


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant(file: Path, marker: Path) -> None:
    """Write a file in the format of torch.save whose pickle creates ``marker``."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Hostile(marker)))
        archive.writestr("archive/version", "3\n")


def test_the_pickle_of_these_tests_is_hostile(tmp_path):
    """The planted file does run its code where pickles are trusted, so that the tests below can fail."""
    plant(tmp_path / "x.bin", tmp_path / "marker")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_unread(llama, tmp_path, name):
    """A checkpoint with pickled weights alone is refused by name, and nothing in it runs."""
    folder, marker = tmp_path / "checkpoint", tmp_path / "marker"
    save_policy(llama, folder)
    (folder / "model.safetensors").unlink()
    plant(folder / name, marker)
    for read in (load_policy, load_tokenizer, skeleton):
        with pytest.raises(ValueError, match=rf"{name}.*only.*safetensors"):
            read(folder)
    assert not marker.exists()


def test_a_model_name_with_pickled_weights_alone_is_refused(llama, tmp_path):
    """A model of the hub's cache that has pickled weights alone is refused by name, and nothing in it runs."""
    snapshot, marker = tmp_path / "hub" / "models--org--old" / "snapshots" / ("0" * 40), tmp_path / "marker"
    save_policy(llama, snapshot)
    (snapshot / "model.safetensors").unlink()
    plant(snapshot / "pytorch_model.bin", marker)
    (tmp_path / "hub" / "models--org--old" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--old" / "refs" / "main").write_text("0" * 40)
    program = "from pipeline.pretrained import load_tokenizer; load_tokenizer('org/old'); from pipeline.policy import load_policy; load_policy('org/old')"
    tried = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: checkpoint 'org/old' has no weights in safetensors" in tried.stderr
    assert not marker.exists()


def test_an_unknown_name_of_pickled_weights_is_refused_too(llama, tmp_path):
    """Weights under a name that nobody foresaw are not looked for: what is missing is safetensors."""
    save_policy(llama, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.weights")
    with pytest.raises((ValueError, FileNotFoundError), match="checkpoint"):
        load_policy(tmp_path)


def test_pickles_beside_safetensors_are_left_alone(llama, tmp_path):
    """A pickle beside safetensors is not read, even where the library would look for it."""
    folder, marker = tmp_path / "checkpoint", tmp_path / "marker"
    save_policy(llama, folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        plant(folder / name, marker)
    policy = load_policy(folder)
    assert all(torch.equal(p, policy.trainable()[name]) for name, p in llama.trainable().items())
    assert not marker.exists()


def test_a_pickled_adapter_is_refused_unread(adapted, tmp_path):
    """An adapter with pickled weights alone is refused, and nothing in it runs."""
    save_policy(adapted, tmp_path / "adapter")
    save_policy(type(adapted)(adapted.model.unload(), adapted.tokenizer), tmp_path / "base")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    plant(tmp_path / "adapter" / "adapter_model.bin", tmp_path / "marker")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors; pickled weights are not read"):
        load_policy(tmp_path / "base", adapter=tmp_path / "adapter")
    assert not (tmp_path / "marker").exists()


def test_a_skeleton_has_the_shape_and_no_weights(qwen3, tmp_path):
    """A skeleton names every parameter with its shape, tied ones once, and holds no memory for them."""
    save_policy(qwen3, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # no weight is read
    model = skeleton(tmp_path, dtype="bfloat16")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in qwen3.trainable().items()}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_skeleton_has_the_adapter_that_a_policy_would_have(llama, tmp_path):
    """With LoRA the skeleton trains what the loaded policy trains, and nothing else."""
    save_policy(llama, tmp_path)
    lora = {"rank": 4, "alpha": 8, "targets": "all-linear"}
    model, policy = skeleton(tmp_path, lora=lora), load_policy(tmp_path, lora=lora)
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == {
        n: p.shape for n, p in policy.trainable().items()
    }


def test_a_chat_template_of_ones_own_renders_prompts(llama, tmp_path):
    """A given template stands in for the tokenizer's, and is saved with the policy."""
    save_policy(llama, tmp_path / "a")
    policy = load_policy(tmp_path / "a", chat_template="{{ messages[0]['content'] }}=")
    expected = llama.tokenizer("1+1==").input_ids
    assert render(ASK, policy.tokenizer, chat=True) == expected
    save_policy(policy, tmp_path / "b")
    assert render(ASK, load_tokenizer(tmp_path / "b"), chat=True) == expected


def test_a_chat_template_that_is_none_is_refused(llama, tmp_path):
    """Text that is no template, or one that fails on a plain user message, is refused with its beginning."""
    save_policy(llama, tmp_path)
    with pytest.raises(ValueError, match=r"chat_template = '\{% for m in'"):
        load_policy(tmp_path, chat_template="{% for m in")
    with pytest.raises(ValueError, match=r"chat_template = .*no system turn"):
        load_policy(tmp_path, chat_template="{{ raise_exception('no system turn') }}")


def test_the_context_is_at_most_what_the_checkpoint_was_made_for(llama, tmp_path):
    """``context`` shortens the context of a policy and never lengthens it."""
    save_policy(llama, tmp_path)
    assert [load_policy(tmp_path, context=c).context_length for c in (0, 7, 32, 1000)] == [32, 7, 32, 32]


def test_a_large_model_is_sized_without_its_weights(tmp_path):
    """The configuration of Qwen2.5-1.5B alone gives its published number of parameters, and reserves no memory."""
    from transformers import Qwen2Config

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)
    model = skeleton(tmp_path, dtype="bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 1_543_714_304
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB, of the 3 GB that it has
