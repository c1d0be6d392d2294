"""Data sets of Hugging Face: which one a user means, its splits loaded, and why one does not load."""

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from w2v2.errors import UserError, as_user_error, did_you_mean, flag, one_line, refuse, take_back

LOGIN = "`hf auth login` (or set the environment variable HF_TOKEN)"


@dataclass(frozen=True)
class DatasetSource:
    """Some splits of a data set, where a manifest may stand."""

    name: str  # Hub id or folder
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    audio_column: str | None = None  # None: the one that holds audio
    text_column: str | None = None  # None: as in manifests

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.config})' if self.config else ''} [{'+'.join(self.splits)}]"


Manifest = str | DatasetSource  # a manifest or folder of any kind, or splits of a data set


@dataclass
class DatasetArguments:
    """A data set of Hugging Face in the place of manifests; flags are named as in its examples."""

    dataset_name: str | None = flag(
        None,
        "A data set in place of manifests: a Hub id, or a folder (save_to_disk, Parquet, audiofolder).",
        heading="Data",
    )
    dataset_config_name: str | None = flag(None, "Configuration of the data set, such as a language.")
    audio_column_name: str | None = flag(None, "Column of the data set that holds audio (default: the one that does).")
    eval_split_name: str | None = flag(None, "Split of the data set to validate on, such as `validation`.")

    split_flags: ClassVar[dict[str, str]] = {}  # flag of manifests → flag of splits

    def check_dataset(self) -> None:
        """Raises UserError for flags of a data set that do not go together."""
        take_back(self, "dataset_name", "dataset_config_name", "audio_column_name", "eval_split_name")
        for data in self.split_flags:  # an empty text takes back what a YAML file says
            setattr(self, data, [name for name in getattr(self, data) if name])
        named = ("dataset_config_name", "audio_column_name", *self.split_flags.values())
        given = [f"--{name} needs --dataset_name: name the data set" for name in named if getattr(self, name)]
        both = [(data, "dataset_name" if data == "train_data" else name) for data, name in self.split_flags.items()]
        refuse(
            (given and not self.dataset_name, "".join(given[:1])),
            *((getattr(self, data) and getattr(self, other), f"--{data} and --{other} exclude one another: give one")
              for data, other in both),
        )  # fmt: skip

    def require(self, *names: str) -> None:
        """Raises UserError for the first of these flags that is missing and has no split in its place."""
        for name in names:
            split = self.split_flags.get(name)
            other = f", or --dataset_name and --{split}" if split else ""
            refuse((not (self.list_sources(name) if split else getattr(self, name)),
                    f"--{name} is required: give it on the command line or in the YAML file{other}"))  # fmt: skip

    def describe_sources(self) -> dict[str, list[str]]:
        """What is read, for people, by flag."""
        return {data: list(map(str, self.list_sources(data))) for data in self.split_flags}

    def list_sources(self, data: str, text_column: str | None = None) -> list[Manifest]:
        """What a flag such as `train_data` stands for: its manifests, or splits of the data set (DatasetSource)."""
        splits = getattr(self, self.split_flags[data]) or ("train" if data == "train_data" else [])
        if getattr(self, data) or not self.dataset_name or not splits:
            return getattr(self, data)
        columns = self.audio_column_name, text_column
        splits = [splits] if isinstance(splits, str) else splits
        sets = [[split] for split in splits] if data == "test_data" else [splits]  # each test set is scored by itself
        return [DatasetSource(self.dataset_name, self.dataset_config_name, tuple(some), *columns) for some in sets]


@dataclass
class LabelledDatasetArguments(DatasetArguments):
    """What is trained, validated and tested on a data set with texts or labels."""

    train_split_name: str | None = flag(
        None, "Split of the data set to train on, as train+validation (default: train).", heading="Data"
    )
    test_split_names: list[str] = flag([], "Splits of the data set to test on.")

    split_flags = {
        "train_data": "train_split_name",
        "validation_data": "eval_split_name",
        "test_data": "test_split_names",
    }


def name_sources(sources: Iterable[Manifest]) -> str:
    """Manifests and data sets, for messages."""
    return ", ".join(map(str, sources))


def list_parquet(source: DatasetSource) -> list[str]:
    """Addresses of the Parquet files of some splits; none is fetched. Raises UserError where other files hold them."""
    folder = Path(source.name).expanduser()
    try:
        builder = datasets.load_dataset_builder(str(folder) if folder.is_dir() else source.name, source.config)
    except Exception as error:  # as in `load_splits`
        raise UserError(_explain(source, error)) from None
    files, found = {str(name): paths for name, paths in (builder.config.data_files or {}).items()}, []
    for name in (part.strip() for text in source.splits for part in text.split("+")):
        if name not in files:
            raise UserError(f"{source}: has no split {name!r}: {say_near(name, files)}it has {say_names(files)}")
        found += map(str, files[name])
    if others := [path for path in found if not path.lower().endswith(".parquet")]:
        remedy = "leave --streaming out, so that the data set is loaded"
        raise UserError(f"{source}: --streaming reads Parquet files, and {others[0]} is not one: {remedy}")
    return found


def load_splits(source: DatasetSource) -> dict[str, datasets.Dataset]:
    """All splits of a data set, memory-mapped. Raises UserError for what is not there or may not be read."""
    folder = Path(source.name).expanduser()
    is_dict, is_single = ((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if folder.is_file():
        raise UserError(
            f"--dataset_name {source.name} is a file: give manifests as --train_data, data sets as a folder"
        )
    is_path = source.name.startswith((".", "~", os.sep)) or (source.name.count("/") > 1 and "://" not in source.name)
    if is_path and not folder.exists():
        near = say_near(source.name, _list_siblings(source.name))
        raise UserError(
            f"--dataset_name {source.name}: {near}no folder has this name (relative ones start at {os.getcwd()})"
        )
    if source.name in _PACKAGED_DATASETS_MODULES:  # it would read whatever lies in the working directory
        raise UserError(f"--dataset_name {source.name} is a format: name the data set, or the folder of its files")
    if (is_dict or is_single) and source.config:
        raise UserError(f"{source.name} was written by save_to_disk: leave --dataset_config_name {source.config} out")
    try:
        if is_dict or is_single:
            loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
        else:
            with _without_torchcodec():
                name = str(folder) if folder.is_dir() else source.name
                loaded = datasets.load_dataset(name, source.config, keep_in_memory=False)
    except Exception as error:  # whatever `datasets` meets in files that others wrote
        if isinstance(error, OSError) and (full := as_user_error(error)):
            raise full from None
        raise UserError(_explain(source, error)) from None
    return {"train": loaded} if is_single else dict(loaded)


@contextlib.contextmanager
def _without_torchcodec() -> Iterator[None]:
    """`datasets` imports torchcodec even for audio that is a path, or bytes: it is kept as it is."""

    def keep(self: datasets.Audio, value: Any) -> dict[str, Any]:
        value = {"path": value} if isinstance(value, str | os.PathLike) else value
        value = value if isinstance(value, dict) else {"bytes": value}
        return {"bytes": value.get("bytes"), "path": value.get("path") and os.fspath(value["path"])}

    stock, datasets.Audio.encode_example = datasets.Audio.encode_example, keep
    try:
        yield
    finally:
        datasets.Audio.encode_example = stock


def _explain(source: DatasetSource, error: Exception) -> str:
    """What the user can do where a data set does not load."""
    where, text = f"--dataset_name {source.name}", one_line(error)
    names = re.findall(r"'([^']*)'", text.partition("[")[2].partition("]")[0])
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "gated" in text:
        page = f"{constants.ENDPOINT}/datasets/{source.name}"
        return f"{where}: is gated: accept its terms on {page}, then call {LOGIN}"
    if status in (401, 403) and not isinstance(error, RepositoryNotFoundError):
        return f"{where}: the Hub does not accept your token: call {LOGIN} with a new one, or remove it"
    if "Config name is missing" in text:
        return f"{where}: has several configurations: choose one by --dataset_config_name: {say_names(names)}"
    if "BuilderConfig" in text and "not found" in text:
        return (
            f"{where}: --dataset_config_name {source.config}: {say_near(source.config, names)}it has {say_names(names)}"
        )
    if "scripts are no longer supported" in text:
        remedy = "use a data set of Parquet files, or convert it: trust_remote_code stays off"
        return f"{where}: is a script, and no script is run: {remedy}"
    if isinstance(error, ConnectionError):
        offline = "HF_HUB_OFFLINE is set, and it is not in the cache" if constants.HF_HUB_OFFLINE else text
        remedy = "what was loaded once works with HF_HUB_OFFLINE=1, a local folder always"
        near = say_near(source.name, _list_siblings(source.name))
        return f"{where}: {near}the Hub cannot be reached ({offline}): {remedy}"
    if isinstance(error, FileNotFoundError) and not Path(source.name).expanduser().is_dir():
        near = say_near(source.name, [*_list_siblings(source.name), *_list_hub(source.name)])
        return f"{where}: is neither a folder nor a data set of the Hub: {near}if it is private, call {LOGIN}"
    return f"{where}: cannot be loaded ({type(error).__name__}: {one_line(error.__cause__ or error)}): mend its files"


def _list_siblings(name: str) -> list[str]:
    """What lies beside a local path."""
    parent, prefix = Path(name).expanduser().parent, name.rpartition("/")[0]
    with contextlib.suppress(OSError):
        return [f"{prefix}/{path.name}" if prefix else path.name for path in parent.iterdir() if path.is_dir()]
    return []


def _list_hub(name: str) -> list[str]:
    """Data sets of the same owner on the Hub, or whose name contains this one."""
    owner, _, last = name.rpartition("/")
    if "/" in owner or name.startswith((".", "~", "/")) or not last:
        return []
    with contextlib.suppress(Exception):  # a hint, where the Hub answers
        wanted = dict(author=owner) if owner else dict(search=last)
        return [found.id for found in HfApi().list_datasets(**wanted, limit=1_000)]
    return []


def say_near(name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known, otherwise="")
    return hint and f"{hint} "


def say_names(names: Collection[str]) -> str:
    """At most twenty of them."""
    return ", ".join([*names][:20]) + (" …" if len(names) > 20 else "")
